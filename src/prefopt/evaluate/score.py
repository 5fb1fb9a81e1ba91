"""Numbers for responses: rows in any layout in, the same rows with scores out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.config.tools import IMPLICIT, ScoreConfig
from prefopt.core.files import output_errors
from prefopt.core.statistics import Interval, rate_interval
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.render_options import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.group import Group
from prefopt.data.layouts import LAYOUTS
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.data.validate import Problem, refuse
from prefopt.errors import DataError, ModelError, RunError
from prefopt.model.architectures import context_length
from prefopt.model.load import base_and_adapter, load_config, load_model, local_folder
from prefopt.model.packing import pack, split
from prefopt.model.precision import freeze_and_cast, resolve_device, resolve_dtype
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, response_rewards
from prefopt.model.scorer import PackedModel, Scorer, response_sums
from prefopt.records import Comparison, tiers_of
from prefopt.reference.identity import tokenizer_of_name
from prefopt.rewards import Reward, load_reward, prompt_text

TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 4096}
"""Tokens at once, for each kind of device: no activations are kept."""

Floats = npt.NDArray[np.float64]
Numbers = Callable[[Sequence[Group]], Floats]


class ModelScores:
    """Scores [K] of each row's responses; ``truncated`` counts the rows that were too long for the model.

    ``words`` says what gives the numbers.
    """

    def __init__(self, words: str, numbers: Numbers, renderer: Renderer) -> None:
        self.words, self._numbers, self._renderer = words, numbers, renderer
        self.truncated = 0

    def __call__(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """One tuple for each row. Raises :class:`DataError` for a row that cannot be shown to the model."""
        # What is preferred does not matter here; two responses that are the same get the same number.
        bare = [replace(c, tiers=(), scores=None, labels=None, votes=None) for c in rows]
        groups = []
        for c, rendered in zip(rows, self._renderer.render_all(bare), strict=True):
            if isinstance(rendered, Problem):
                raise DataError(f"{rendered.kind}: {rendered.what}", file=c.file or None, row=c.row)
            self.truncated += bool(rendered.prompt_cut or any(rendered.responses_cut))
            groups.append(rendered.group)
        found = iter(self._numbers(groups).tolist())
        scores = [tuple(next(found) for _ in group.continuations) for group in groups]
        for c, several in zip(rows, scores, strict=True):
            if not np.isfinite(several).all():
                raise ModelError(f"row {c.row}: {self.words} gave {several}; try --dtype float32, or check its weights")
        return scores


def reward_model_scores(config: ScoreConfig) -> ModelScores:
    """Those of the reward model that ``--reward`` names.

    Raises :class:`ModelError` where it is none, or has another number of labels.
    """
    source, device, dtype = _place(config, config.reward)
    if not has_scalar_head(source):
        raise ModelError(
            f"--reward {config.reward} is a language model, which gives no score: prefopt reward makes one that does,"
            " and --reward implicit takes its log-probabilities"
        )
    tokenizer = load_tokenizer(source)
    model = load_scalar(source, dtype=dtype, device=device, tokenizer=tokenizer).requires_grad_(False)
    scorer = ScalarScorer(freeze_and_cast(model, dtype)).eval()

    def numbers(groups: Sequence[Group]) -> Floats:
        return response_rewards(scorer, groups, range(len(groups)), TOKENS[device.type])

    return ModelScores(f"the reward model {config.reward}", numbers, _renderer(config, tokenizer, source))


def implicit_scores(config: ScoreConfig) -> ModelScores:
    """beta log(pi(y|x) / ref(y|x)), Rafailov et al. 2023, equation 5 less its term of the prompt alone.

    Raises :class:`ModelError` where the two models do not read the same tokens.
    """
    assert config.model is not None and config.beta is not None
    _, device, dtype = _place(config, config.model)
    source, adapter = base_and_adapter(config.model, config.adapter)
    reference = config.reference or (config.model if config.adapter is not None else source)
    other = local_folder(reference)
    tokenizer = tokenizer_of_name(config.model, config.adapter)
    if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"--reference {reference} has another tokenizer than --model {config.model}: their tokens differ"
        )
    pair = [
        Scorer(load_model(folder, dtype=dtype, device=device, adapter=a).requires_grad_(False)).eval()
        for folder, a in ((source, adapter), (other, None))
    ]
    beta = config.beta

    def numbers(groups: Sequence[Group]) -> Floats:
        policy, ref = (_log_probabilities(scorer, groups, device) for scorer in pair)
        return beta * (policy - ref)

    words = f"{beta:g} log({config.adapter or config.model} / {reference})"
    return ModelScores(words, numbers, _renderer(config, tokenizer, source, other))


@torch.no_grad()
def _log_probabilities(scorer: PackedModel, groups: Sequence[Group], device: torch.device) -> Floats:
    costs = [scorer.layout.cost(g) for g in groups]
    parts = []
    for part in split(range(len(groups)), costs, TOKENS[device.type]):
        batch = pack([groups[i] for i in part], scorer.layout).to(device)
        parts.append(response_sums(scorer(batch), batch).double().cpu().numpy())
    return np.concatenate(parts)


def _place(config: ScoreConfig, name: str) -> tuple[str, torch.device, torch.dtype]:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    return local_folder(name), device, resolve_dtype(config.dtype, device)


def _renderer(config: ScoreConfig, tokenizer: Tokenizer, *sources: str) -> Renderer:
    contexts: list[Any] = [context_length(load_config(source)) for source in sources]
    limit = min(sequence_limit(config.max_length, c) for c in contexts)
    return Renderer(tokenizer, Rendering.from_options(config, limit))


if TYPE_CHECKING:
    pass  # SELF

BATCH = 256
"""Rows that a reward is given at once."""

Scores = Callable[[Sequence[Comparison]], list[tuple[float, ...]]]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """``mean`` and ``spread`` (standard deviation) are over all responses.

    ``agreement``: the part of a row's pairs that the scores order as the row did (a tie counts half), the mean over the
    prompts of rows that had preferences, with its interval; none where no row had any. ``truncated`` rows were too long
    for a model.
    """

    output: Path
    rows: int
    responses: int
    mean: float
    spread: float
    agreement: Interval | None
    truncated: int = 0

    def lines(self) -> list[str]:
        """What a person is told."""
        said = [f"{self.responses} responses of {self.rows} rows: mean {self.mean:.3f}, spread {self.spread:.3f}"]
        if self.truncated:
            said.append(f"{self.truncated} of {self.rows} rows truncated to what the model takes")
        if self.agreement is not None:
            a = self.agreement
            said.append(
                f"the scores order {a.mean:.1%} of the pairs as the rows do"
                f" (95 % interval {a.low:.1%} to {a.high:.1%}, {a.count} prompts)"
            )
        return [*said, f"written: {self.output}"]


def run(config: ScoreConfig) -> ScoreResult:
    """Score what ``config`` names. Raises :class:`prefopt.errors.UserError`; the output appears whole or not at all."""
    path = Path(config.output)
    if path.exists() and not config.overwrite:
        raise RunError(f"--output {path} is there already; name another file, or add --overwrite")
    scores_of, models = scores_for(config)
    values: list[float] = []
    agreements: dict[bytes, list[float]] = {}
    rows = 0
    aside = path.with_name(f".{path.name}.aside")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for before, scores in scored(_rows(config), scores_of):
                    after = replace(before, scores=scores, tiers=tiers_of(scores), labels=None, votes=None)
                    file.write(json.dumps(LAYOUTS["canonical"].write(after), ensure_ascii=False) + "\n")
                    rows += 1
                    values += scores
                    if before.pairs:
                        agreements.setdefault(before.prompt_key, []).append(agreement(before.pairs, scores))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    interval = rate_interval([np.mean(of_prompt) for of_prompt in agreements.values()]) if agreements else None
    spread, truncated = float(np.std(values)), models.truncated if models else 0
    return ScoreResult(path, rows, len(values), float(np.mean(values)), spread, interval, truncated)


def scores_for(config: ScoreConfig) -> tuple[Scores, ModelScores | None]:
    """What gives the numbers, and that again where it is a model."""
    if not config.by_model:
        return by_text(load_reward(config.reward)), None
    pass  # SELF

    models = implicit_scores(config) if config.reward == IMPLICIT else reward_model_scores(config)
    return models, models


def by_text(reward: Reward) -> Scores:
    """A function of texts as one of rows."""

    def scores(rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        prompts = [prompt_text(c) for c in rows for _ in c.responses]
        numbers = iter(reward(prompts, [r.text for c in rows for r in c.responses]))
        return [tuple(islice(numbers, len(c.responses))) for c in rows]

    return scores


def scored(rows: Iterable[Comparison], scores_of: Scores) -> Iterator[tuple[Comparison, tuple[float, ...]]]:
    """Each row with one score [K] for each of its responses, in order; what gives them sees many rows at once."""
    given = iter(rows)
    while batch := list(islice(given, BATCH)):
        yield from zip(batch, scores_of(batch), strict=True)


def agreement(pairs: Sequence[tuple[int, int]], scores: Sequence[float]) -> float:
    """The part of (preferred, dispreferred) pairs that scores order likewise; equal scores count half."""
    return float(np.mean([0.5 + 0.5 * np.sign(scores[best] - scores[worse]) for best, worse in pairs]))


def _rows(config: ScoreConfig) -> Iterator[Comparison]:
    for source in find_sources(config.files):
        reading = open_comparisons(source, format=config.format, columns=config.column_words)
        problems: list[Problem] = []
        for row in reading:
            if isinstance(row, Problem):
                problems.append(row)
            elif not row.responses:
                raise DataError("has no response to score; prefopt sample draws some", file=row.file, row=row.row)
            else:
                yield row
        if problems:
            raise refuse(problems, reading.count)
