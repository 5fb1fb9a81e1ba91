"""What changed between two models that wrote on the same openings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.core.statistics import Interval, mean_interval
from prefopt.data.comparisons import read_comparisons
from prefopt.data.group import Group
from prefopt.data.tokenizer import load_tokenizer
from prefopt.data.validate import Problem
from prefopt.generate.model_io import renderer_for
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, response_sums
from prefopt.records import Comparison

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One opening, what was written on it before and after, and how it was judged."""

    opening: str
    before: str
    after: str
    before_score: float
    after_score: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over samples, intervals over openings. ``change`` is that of the judge's score, paired by opening.

    ``kl``: KL(aligned || model) of whole continuations in nats, estimated on samples of the aligned model by the mean
    of the log-ratio (k1). ``tokens``: mean length of a continuation before and after. ``variety``: distinct sequences
    of three words as a part of all, over all continuations, before and after: a model that always says the same, or
    stammers, has little.
    """

    before: Interval
    after: Interval
    change: Interval
    kl: Interval
    tokens: tuple[float, float]
    variety: tuple[float, float]
    examples: tuple[Example, ...]


def measure(before: Path, after: Path, *, reference: Path, seed: int) -> Measured:
    """Compare two files of scored samples, made on the same prompts in the same order."""
    one, two = _rows(before), _rows(after)
    assert [r["prompt"] for r in one] == [r["prompt"] for r in two]
    scores = [np.array([np.mean(r["scores"]) for r in rows]) for rows in (one, two)]
    lengths = [float(np.mean([r["tokens"] for r in rows])) for rows in (one, two)]
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(one), 3, replace=False)
    return Measured(
        mean_interval(scores[0]),
        mean_interval(scores[1]),
        mean_interval(scores[1] - scores[0]),
        mean_interval(_log_ratios(two, after, reference)),
        (lengths[0], lengths[1]),
        (_variety(one), _variety(two)),
        tuple(_example(one[i], two[i]) for i in chosen),
    )


def _rows(path: Path) -> list[Row]:
    # Not splitlines(): texts may hold characters that it takes for ends of lines.
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def _variety(rows: list[Row]) -> float:
    words = [text.split() for row in rows for text in row["responses"]]
    triples = [triple for w in words for triple in zip(w, w[1:], w[2:], strict=False)]
    return len(set(triples)) / max(1, len(triples))


def _example(one: Row, two: Row) -> Example:
    """The first sample of each, not the best."""
    return Example(one["prompt"], one["responses"][0], two["responses"][0], one["scores"][0], two["scores"][0])


def _log_ratios(rows: list[Row], file: Path, reference: Path) -> npt.NDArray[np.float64]:
    """Mean log-ratio [prompts] of each prompt's samples, from the sampler's own log-probabilities."""
    read = (row for row in read_comparisons(file) if isinstance(row, Comparison))
    prompts = [p for p in renderer_for(load_tokenizer(reference)).prompts(read) if not isinstance(p, Problem)]
    scorer = Scorer(load_model(str(reference), dtype=torch.float32, device=torch.device("cpu")))
    ratios = []
    for row, prompt in zip(rows, prompts, strict=True):
        whole = [np.concatenate([prompt, ids]) for ids in row["token_ids"]]
        trained = [np.arange(len(ids)) >= len(prompt) for ids in whole]
        group = Group.from_sequences(list(zip(whole, trained, strict=True)), row=0, pairs=())
        batch = pack([group], scorer.layout)
        with torch.no_grad():
            sums = response_sums(scorer(batch), batch).double().numpy()
        ratios.append(float(np.mean(np.array(row["logprobs"]) - sums)))
    return np.array(ratios)
