"""Supervised fine-tuning, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.sft import SftConfig
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.kinds import convert
from prefopt.data.problems import Problem
from prefopt.errors import ConfigError
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.from_scratch import new_model, new_tokenizer
from prefopt.model.scorer import Scorer
from prefopt.train import objectives
from prefopt.train.data import TrainingData, load_data
from prefopt.train.objective import Objective
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.policy import Policy
from prefopt.train.run import TrainingRun


@dataclass(frozen=True, slots=True)
class SftResult:
    """What a run gives back: ``metrics`` are averages over the rows of the last epoch (see
    :mod:`prefopt.runs.metrics`), ``held_out_loss`` is that of the saved weights."""

    output: Path
    steps: int
    metrics: dict[str, float]
    held_out_loss: float | None
    best_step: int | None


def run(
    config: SftConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> SftResult | None:
    """Fine-tune. ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names; a model is trained in place.

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    if model is not None and config.from_scratch:
        raise ConfigError("from_scratch builds a model from its configuration: name a folder, or leave it out")
    rows = list(rows) if rows is not None else None  # read twice, where a tokenizer is made
    with StopRequest() as stop:
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "callbacks": callbacks}
        run = _Run(config, Reporter(config.progress), stop, **given)
        loop = run.run()
        if loop is None:
            return None
        progress = loop.progress
        return SftResult(run.folder.path, progress.step, run.metrics, run.held_out_loss, progress.best_step)


class _Run(TrainingRun[Scorer]):
    """One run of SFT."""

    config: SftConfig
    policy: Policy
    want = "demonstrations"
    unit = "rows"

    def load_tokenizer(self) -> Any:
        """The model's own, or one made from the data."""
        if self.config.train_tokenizer is None:
            return super().load_tokenizer()
        made = new_tokenizer(self._texts(), self.config.train_tokenizer)
        self.reporter.say(f"tokenizer: {len(made)} tokens, made from the data")
        return made

    def load(self) -> TrainingData:
        """Demonstrations; texts without a prompt are cut into windows instead of being truncated."""
        return load_data(
            self.config,
            self.tokenizer,
            self.limit,
            self.rows,
            self.reporter,
            seed=self.config.seed,
            want=self.want,
            workers=self.config.threads,
            stop=self.stop,
            train_on=self.config.train_on,
            windows=True,
        )

    def load_policy(self) -> Policy:
        """See :class:`TrainingRun`."""
        config, model = self.config, self.given
        if config.from_scratch:
            fitted = config.train_tokenizer is not None
            model = new_model(self.source, self.tokenizer, seed=config.seed, fitted=fitted).to(self.device)
        return Policy(config, self.source, self.dtype, self.device, model)

    def check_scores(self) -> CheckReport:
        """See :class:`TrainingRun`."""
        return check_scoring(self.policy.scorer, self.data.groups)

    def prepare(self) -> None:
        """Says what is trained."""
        tokens = int(self.data.groups.trained_N[: self._responses()].sum())
        mean = "token" if self.config.average == "tokens" else "response"
        self.reporter.say(f"loss: negative log-likelihood, mean over every {mean}; {tokens:,} tokens to learn")
        self._tell(objectives.in_words(self.policy.scorer.model, self.config.router_aux_loss_coef))

    def _responses(self) -> int:
        """Responses of what ``--data`` gave."""
        return int(self.data.source.groups.responses_G.sum())

    def objective(self) -> Objective:
        """See :class:`TrainingRun`."""
        self.reporter.say(self.policy.make_trainable())
        return self.objective_to_try()

    def objective_to_try(self) -> Objective:
        """See :class:`TrainingRun`."""
        plain = LikelihoodObjective(self.data.groups, self.config.average, device=self.policy.device)
        return objectives.balanced(plain, self.policy.scorer.model, self.config.router_aux_loss_coef)

    @property
    def passes(self) -> float:
        """A forward pass more, a third of a step's work, where the loss sees the whole batch and it is cut."""
        return 1.0 if self.config.router_aux_loss_coef is None else 4 / 3

    def title(self) -> tuple[str, str]:
        """See :class:`TrainingRun`."""
        return ("Training from scratch" if self.config.from_scratch else "Supervised fine-tuning"), "sft"

    def _texts(self) -> Iterator[str]:
        """All words of the data: what a tokenizer is made from."""
        layout: dict[str, Any] = {"format": self.config.format, "columns": self.config.column_words}
        if self.rows is not None:
            readings = [parse_comparisons(self.rows, "data", **layout)]
        else:
            readings = [open_comparisons(source, **layout) for source in find_sources(self.config.data)]
        for reading in readings:
            for row in reading:
                wanted = row if isinstance(row, Problem) else convert(row, self.want)
                if not isinstance(wanted, Problem):  # those are refused, or skipped, when the data are rendered
                    turns = [*wanted.prompt, *(m for r in wanted.responses for m in r.messages)]
                    yield from (m.content for m in turns if m.content)
