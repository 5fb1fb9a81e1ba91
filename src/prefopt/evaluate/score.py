"""``prefopt score``: rows in any layout in, the same rows with a score for each response out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from prefopt.config.scoring import IMPLICIT, ScorerOptions
from prefopt.config.tools import ScoreConfig
from prefopt.core.files import OVERWRITE, output_errors, refuse_existing
from prefopt.core.model_folder import NOT_QUANTISED
from prefopt.core.shown import ShownLines
from prefopt.core.statistics import Interval, rate_interval
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.chat.truncate import sequence_limit
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.group import Group
from prefopt.data.layouts import LAYOUTS
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.data.validate import Problem, refuse
from prefopt.errors import DataError, ModelError
from prefopt.evaluate.win_rate import Floats
from prefopt.model.architectures import context_length
from prefopt.model.load import base_and_adapter, load_config, load_model, local_folder
from prefopt.model.packing import packed_batches
from prefopt.model.precision import freeze_and_cast, resolve_device, resolve_dtype, scoring_dtype
from prefopt.model.quantised import chosen
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, response_rewards
from prefopt.model.scorer import PackedModel, Scorer, response_sums
from prefopt.records import Comparison, tiers_of
from prefopt.reference.identity import tokenizer_of_name
from prefopt.rewards import Reward, load_reward, prompt_text

TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768, "mps": 4096}
"""Tokens of a forward pass by device type; no activations are kept."""
BATCH = 256
"""Rows that a scorer gets at once."""


class TextScorer:
    """A rule or a function of prompt and response texts. ``truncated`` counts rows that were too long for a model."""

    truncated = 0

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def __call__(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """Scores [K] for the K responses of each row."""
        prompts = [prompt_text(c) for c in rows for _ in c.responses]
        scores = iter(self._reward(prompts, [r.text for c in rows for r in c.responses]))
        return [tuple(islice(scores, len(c.responses))) for c in rows]


class ModelScorer:
    """A function of tokenised groups to scores [N]; ``description`` names the model in messages."""

    def __init__(self, description: str, score: Callable[[Sequence[Group]], Floats], renderer: Renderer) -> None:
        self.description, self._score, self._renderer = description, score, renderer
        self.truncated = 0

    def __call__(self, rows: Sequence[Comparison]) -> list[tuple[float, ...]]:
        """As :meth:`TextScorer.__call__`. Raises :class:`DataError` for a row that cannot be rendered, and
        :class:`ModelError` for scores that are not finite."""
        # Without preferences: they do not matter here, and equal responses are no mistake.
        bare = [replace(c, tiers=(), scores=None, labels=None, votes=None) for c in rows]
        groups = []
        for c, rendered in zip(rows, self._renderer.render_all(bare), strict=True):
            if isinstance(rendered, Problem):
                raise DataError(f"{rendered.kind}: {rendered.what}", file=c.file or None, row=c.row)
            self.truncated += bool(rendered.prompt_cut or any(rendered.responses_cut))
            groups.append(rendered.group)
        numbers = iter(self._score(groups).tolist())
        scores = [tuple(islice(numbers, len(group.continuations))) for group in groups]
        for c, of_row in zip(rows, scores, strict=True):
            if not np.isfinite(of_row).all():
                raise ModelError(
                    f"row {c.row}: {self.description} gave {of_row}; try --dtype float32, or check its weights"
                )
        return scores


RowScorer = TextScorer | ModelScorer


def load_row_scorer(config: ScorerOptions) -> RowScorer:
    """The scorer that ``--reward`` names: a rule, a function, a reward model or the implicit reward."""
    if not config.by_model:
        return TextScorer(load_reward(config.reward))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    if config.reward == IMPLICIT:
        return implicit_reward_scorer(config, device, resolve_dtype(scoring_dtype(config.dtype), device))
    return reward_model_scorer(config, device, resolve_dtype(config.dtype, device))


def reward_model_scorer(config: ScorerOptions, device: torch.device, dtype: torch.dtype) -> ModelScorer:
    """Raises :class:`ModelError` where ``--reward`` is no reward model, or has another number of labels."""
    source = local_folder(config.reward)
    if not has_scalar_head(source):
        raise ModelError(
            f"--reward {config.reward} is a language model, which gives no score: prefopt reward makes one that does,"
            " and --reward implicit takes its log-probabilities"
        )
    tokenizer = load_tokenizer(source)
    model = load_scalar(
        source, dtype=dtype, device=device, tokenizer=tokenizer, quantise=config.quantise
    ).requires_grad_(False)
    scorer = ScalarScorer(freeze_and_cast(model, dtype)).eval()

    def score(groups: Sequence[Group]) -> Floats:
        return response_rewards(scorer, groups, range(len(groups)), TOKEN_BUDGET[device.type])

    return ModelScorer(f"the reward model {config.reward}", score, _renderer(config, tokenizer, source))


def implicit_reward_scorer(config: ScorerOptions, device: torch.device, dtype: torch.dtype) -> ModelScorer:
    """beta log(pi(y|x) / ref(y|x)): Rafailov et al. 2023, equation 5 without its term of the prompt alone.

    Raises :class:`ModelError` where the tokenizers of policy and reference differ.
    """
    assert config.model is not None and config.beta is not None
    source, adapter = base_and_adapter(config.model, config.adapter)
    reference = config.reference or (config.model if config.adapter is not None else source)
    other = local_folder(reference)
    tokenizer = tokenizer_of_name(config.model, config.adapter)
    if load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        what = f"has another tokenizer than --model {config.model}: their tokens differ"
        raise ModelError(f"--reference {reference} {what}")
    # Both alike: an adapter's own base is quantised as the base under it.
    load = partial(load_model, dtype=dtype, device=device, quantise=chosen(config.quantise, adapter) or NOT_QUANTISED)
    scorers = [
        Scorer(load(folder, adapter=a).requires_grad_(False)).eval() for folder, a in ((source, adapter), (other, None))
    ]
    beta = config.beta

    def score(groups: Sequence[Group]) -> Floats:
        policy, ref = (response_logprobs(scorer, groups, TOKEN_BUDGET[device.type]) for scorer in scorers)
        return beta * (policy - ref)

    description = f"{beta:g} log({config.adapter or config.model} / {reference})"
    return ModelScorer(description, score, _renderer(config, tokenizer, source, other))


@torch.no_grad()
def response_logprobs(scorer: PackedModel, groups: Sequence[Group], token_budget: int) -> Floats:
    """Log-probability [N] of the trained tokens of every response, group after group."""
    device = next(scorer.model.parameters()).device
    batches = packed_batches(groups, scorer.layout, token_budget, device)
    parts = [response_sums(scorer(batch), batch).double().cpu().numpy() for batch in batches]
    return np.concatenate(parts) if parts else np.empty(0)


def _renderer(config: ScorerOptions, tokenizer: Tokenizer, *sources: str) -> Renderer:
    limit = min(sequence_limit(config.max_length, context_length(load_config(source))) for source in sources)
    return Renderer(tokenizer, Rendering.from_options(config, limit), scored=True)


@dataclass(frozen=True, slots=True, repr=False)
class ScoreResult(ShownLines):
    """``mean`` and ``spread`` (standard deviation) are over all responses.

    ``agreement``: the fraction of a row's pairs that the scores order as the row does (a tie counts half), averaged
    over prompts; None where no row has preferences. ``truncated`` rows were too long for a model.
    """

    output: Path
    rows: int
    responses: int
    mean: float
    spread: float
    agreement: Interval | None
    truncated: int = 0

    def lines(self) -> list[str]:
        """The lines that ``prefopt score`` prints."""
        lines = [f"{self.responses} responses of {self.rows} rows: mean {self.mean:.3f}, spread {self.spread:.3f}"]
        if self.truncated:
            lines.append(f"{self.truncated} of {self.rows} rows truncated to what the model takes")
        if self.agreement is not None:
            a = self.agreement
            lines.append(
                f"the scores order {a.mean:.1%} of the pairs as the rows do"
                f" (95 % interval {a.low:.1%} to {a.high:.1%}, {a.count} prompts)"
            )
        return [*lines, f"written: {self.output}"]


def run(config: ScoreConfig) -> ScoreResult:
    """Score the files of ``config``. Raises :class:`prefopt.errors.UserError`; the output appears whole or not at
    all."""
    path = Path(config.output)
    refuse_existing(path, OVERWRITE, unless=config.overwrite)
    scorer = load_row_scorer(config)
    values: list[float] = []
    agreements: dict[bytes, list[float]] = {}
    rows = 0
    aside = path.with_name(f".{path.name}.aside")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for before, scores in _scored(config, scorer):
                    after = replace(before, scores=scores, tiers=tiers_of(scores), labels=None, votes=None)
                    file.write(json.dumps(LAYOUTS["canonical"].write(after), ensure_ascii=False) + "\n")
                    rows += 1
                    values += scores
                    if before.pairs:
                        # Equal scores count half.
                        ordered = [0.5 + 0.5 * np.sign(scores[best] - scores[worse]) for best, worse in before.pairs]
                        agreements.setdefault(before.prompt_key, []).append(float(np.mean(ordered)))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    interval = rate_interval([np.mean(of_prompt) for of_prompt in agreements.values()]) if agreements else None
    mean, spread = float(np.mean(values)), float(np.std(values))
    return ScoreResult(path, rows, len(values), mean, spread, interval, scorer.truncated)


def _scored(config: ScoreConfig, scorer: RowScorer) -> Iterator[tuple[Comparison, tuple[float, ...]]]:
    rows = read_rows(config.files, format=config.format, columns=config.column_words)
    while batch := list(islice(rows, BATCH)):
        for row in batch:
            if not row.responses:
                raise DataError("has no response to score; prefopt sample draws some", file=row.file, row=row.row)
        yield from zip(batch, scorer(batch), strict=True)


def read_rows(names: Sequence[str], *, format: str | None, columns: Sequence[str] | None) -> Iterator[Comparison]:
    """The rows of files in any layout. Raises :class:`DataError` at the end of a file with rows that cannot be
    used."""
    for source in find_sources(names):
        reading = open_comparisons(source, format=format, columns=columns)
        problems: list[Problem] = []
        for row in reading:
            if isinstance(row, Problem):
                problems.append(row)
            else:
                yield row
        if problems:
            raise refuse(problems, reading.count)
