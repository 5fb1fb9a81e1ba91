"""What samples of a model show of it: how long and how varied they are, and how far it went from its reference.

>>> import numpy as np
>>> gathered(np.array([[1.0], [0.5], [0.0]]), np.array([0, 1, 0]))
array([[1. , 0. ],
       [0.5, nan]])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.core.statistics import Interval, mean_interval
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.data.validate import Problem
from prefopt.errors import DataError, ModelError
from prefopt.generate.sampled_model import SampledModel, renderer_for
from prefopt.model.packing import pack, split
from prefopt.model.scorer import response_sums
from prefopt.records import Comparison

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def numbered(keys: Iterable[Hashable]) -> Ints:
    """The number [rows] of each row's prompt, in the order in which they first come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def gathered(values: Floats, prompt: Ints) -> Floats:
    """``values`` [rows, samples] as [prompts, most samples of one], NaN where a prompt has fewer than another."""
    _, place, rows = np.unique(prompt, return_inverse=True, return_counts=True)
    found = np.full((len(rows), int(rows.max(initial=0)), values.shape[1]), np.nan)
    filled = np.zeros(len(rows), np.int64)
    for row, p in zip(values, place, strict=True):
        found[p, filled[p]] = row
        filled[p] += 1
    return found.reshape(len(rows), -1)


AT_ONCE = 4096  # tokens of a forward pass
LONGEST = 4096  # tokens of a row of held-out data, where a model names no context


@dataclass(frozen=True, slots=True)
class Distance:
    """KL(policy || reference) of whole responses in nats, estimated on the policy's own samples.

    With r = reference / policy of a response, ``k1`` is the mean of -log r, unbiased, ``error`` its standard error over
    prompts; ``k3`` that of r - 1 - log r, which is never negative and has the same mean (Schulman 2020), though where
    the two models lie far apart it is ruled by rare responses.
    """

    k1: Interval
    error: float
    k3: float


@dataclass(frozen=True, slots=True)
class Samples:
    """Means over samples. ``entropy``: nats per token, by the log-probabilities of what was drawn; none where the
    draw was not from the model itself. ``repetition``: part of a sample's runs of four words that it holds already.
    """

    prompts: int
    samples: int
    tokens: float | None
    characters: float
    entropy: float | None
    repetition: float
    empty: int
    distance: Distance | None = None
    perplexity: float | None = None


def seen(rows: Sequence[Comparison], distance: Distance | None = None, perplexity: float | None = None) -> Samples:
    """What the rows of ``prefopt sample`` show; a row of another origin has neither tokens nor entropy."""
    texts = [r.text for row in rows for r in row.responses]
    tokens = _column(rows, "tokens")
    logps, drawn = _column(rows, "logprobs"), _column(rows, "sampling_logprobs")
    pure = tokens is not None and logps is not None and drawn is not None and np.allclose(logps, drawn, atol=1e-4)
    return Samples(
        len({row.prompt_key for row in rows}),
        len(texts),
        float(np.mean(tokens)) if tokens is not None else None,
        float(np.mean([len(t) for t in texts])),
        float(-np.sum(logps) / np.sum(tokens)) if pure and logps is not None and tokens is not None else None,
        float(np.mean([repetition(t) for t in texts])),
        sum(not t.strip() for t in texts),
        distance,
        perplexity,
    )


def repetition(text: str, run: int = 4) -> float:
    """The part of the runs of four words that have come before in the text; of characters where it has no spaces.

    >>> repetition("a b c d a b c d"), repetition("all of these are different words")
    (0.2, 0.0)
    """
    words = text.split() if " " in text.strip() else list(text.strip())
    runs = Counter(tuple(words[i : i + run]) for i in range(len(words) - run + 1))
    return 1 - len(runs) / runs.total() if runs else 0.0


def distance(rows: Sequence[Comparison], reference: SampledModel, *, seed: int = 0) -> Distance | None:
    """The KL of whoever drew these samples to ``reference``, whose tokens must be the same; none for one prompt.

    Raises :class:`DataError` where the samples are not drawn from the model itself, or do not tell their tokens.
    """
    for row in rows:
        if not all(name in row.extra for name in ("token_ids", "logprobs", "sampling_logprobs")):
            raise DataError("does not tell tokens and log-probabilities, as prefopt sample does", row=row.row)
        if not np.allclose(_numbers(row, "logprobs"), _numbers(row, "sampling_logprobs"), atol=1e-4):
            raise DataError("was drawn at another temperature than 1, or cut: no KL is told by it", row=row.row)
    prompts = list(renderer_for(reference.tokenizer).prompts(_bare(rows)))
    groups = []
    for row, prompt in zip(rows, prompts, strict=True):
        if isinstance(prompt, Problem):
            raise DataError(f"{prompt.kind}: {prompt.what}", row=row.row)
        ids: Any = row.extra["token_ids"]
        whole = [np.concatenate([prompt, np.asarray(x, np.int32)]) for x in ids]
        masks = [np.arange(len(x)) >= len(prompt) for x in whole]
        groups.append(Group.from_sequences(list(zip(whole, masks, strict=True)), row=row.row, pairs=()))
    top = max(int(c.ids.max()) for g in groups for c in g.continuations)
    if top >= len(reference.tokenizer):
        raise ModelError(f"--reference {reference.name}: its tokens are others than those of the samples")
    ratio = np.concatenate([_numbers(row, "logprobs") for row in rows]) - log_probabilities(reference, groups)
    k3 = np.expm1(-ratio) + ratio
    prompt = np.repeat(numbered(row.prompt_key for row in rows), [len(row.responses) for row in rows])
    means = np.bincount(prompt, ratio) / np.bincount(prompt)
    if len(means) < 2:
        return None
    error = float(means.std(ddof=1) / len(means) ** 0.5)
    return Distance(mean_interval(means, seed=seed), error, float(k3.mean()))


def perplexity(model: SampledModel, names: Sequence[str], **layout: Any) -> tuple[float, int, int]:
    """exp of the mean negative log-probability per token of the best responses of some data, and how many rows were
    truncated to the model's context, and left out.

    Tokens are the model's own: models with other tokenizers have perplexities that do not compare.
    """
    found = load_groups(names, model.tokenizer, max_length=model.context or LONGEST, kind="demonstrations", **layout)
    groups = list(found.groups)
    mean = log_probabilities(model, groups).sum() / found.groups.trained_N.sum()
    return float(np.exp(-mean)), found.truncated, found.refused


def log_probabilities(model: SampledModel, groups: Sequence[Group]) -> Floats:
    """Log-probability [N] of the trained tokens of every response, group after group."""
    scorer, found = model.scorer, []
    with torch.no_grad():
        for part in split(range(len(groups)), [scorer.layout.cost(g) for g in groups], AT_ONCE):
            batch = pack([groups[i] for i in part], scorer.layout).to(model.device)
            found.append(response_sums(scorer(batch), batch).double().cpu().numpy())
    return np.concatenate(found) if found else np.empty(0)


def _bare(rows: Sequence[Comparison]) -> list[Comparison]:
    return [replace(row, responses=(), tiers=(), scores=None, labels=None, votes=None) for row in rows]


def _column(rows: Sequence[Comparison], name: str) -> Floats | None:
    if not all(name in row.extra for row in rows):
        return None
    return np.concatenate([_numbers(row, name) for row in rows])


def _numbers(row: Comparison, name: str) -> Floats:
    values: Any = row.extra[name]
    return np.asarray(values, np.float64)
