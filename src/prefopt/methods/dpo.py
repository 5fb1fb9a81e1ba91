"""Direct Preference Optimization, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.scorer import Scorer
from prefopt.reference.in_memory import Movement
from prefopt.runs.diagnose import diagnose, in_words
from prefopt.runs.history import read_history
from prefopt.runs.metrics import Record
from prefopt.train import objectives
from prefopt.train.comparison import Against
from prefopt.train.inputs import Values
from prefopt.train.loss_options import needs_reference, terms_of, want_of, words
from prefopt.train.objective import Objective, PreferenceObjective
from prefopt.train.policy import Policy
from prefopt.train.preflight import inspect_first
from prefopt.train.reference import ReferenceRun, choose_reference, identify
from prefopt.train.run import TrainingRun


@dataclass(frozen=True, slots=True)
class DpoResult:
    """What a run gives back: ``metrics`` are averages over the rows of the last epoch (see
    :mod:`prefopt.runs.metrics`), ``held_out_loss`` is that of the saved weights."""

    output: Path
    steps: int
    metrics: dict[str, float]
    held_out_loss: float | None
    best_step: int | None


def run(
    config: DpoConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> DpoResult | None:
    """Run DPO, or the other loss of ``config``. ``callbacks``: see :class:`prefopt.runs.callbacks.Callback`.

    ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names (a model is trained in place).

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    with StopRequest() as stop:
        given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "rows": rows, "callbacks": callbacks}
        run = _Run(config, Reporter(config.progress), stop, **given)
        loop = run.run()
        if loop is None:
            return None
        progress = loop.progress
        return DpoResult(run.folder.path, progress.step, run.metrics, run.held_out_loss, progress.best_step)


class _Run(TrainingRun[Scorer]):
    """One run of DPO."""

    config: DpoConfig
    policy: Policy

    def __init__(self, config: DpoConfig, reporter: Reporter, stop: StopRequest, **given: Any) -> None:
        config, self.terms = terms_of(config)
        self.want = want_of(self.terms)
        if self.terms[0].loss.kind == "pairs":
            self.which = config.pairs
        super().__init__(config, reporter, stop, **given)

    def before_model(self) -> None:
        """The reference is named by its contents, as it is now."""
        self.choice = choose_reference(self.config, self.given) if needs_reference(self.terms) else None
        self.identity = identify(self.choice, self.given) if self.choice else None

    def load_policy(self) -> Policy:
        """See :class:`TrainingRun`."""
        return Policy(self.config, self.source, self.dtype, self.device, self.given)

    def check_scores(self) -> CheckReport:
        """See :class:`TrainingRun`."""
        return check_scoring(self.policy.scorer, self.data.groups)

    def prepare(self) -> None:
        """The reference, and whatever else the losses compare with."""
        self.reporter.say(f"loss: {words(self.terms)}")
        self._tell(objectives.in_words(self.policy.scorer.model, self.config.router_aux_loss_coef))
        reference = None
        if self.choice and self.identity:
            tokens = any(term.loss.needs_head_values for term in self.terms)
            reference = ReferenceRun(self.choice, self.identity, self.policy.scorer, self.config, token_values=tokens)
        steps, read = self.steps(), self.groups_read()
        self.against = Against(
            self.config, self.terms, self.data, reference, self.limit, self.reporter, steps=steps, read=read
        )

    def identities(self) -> dict[str, tuple[str, str]]:
        """See :class:`TrainingRun`."""
        return {"reference": (self.identity.digest if self.identity else "none", "the reference model")}

    def facts(self) -> dict[str, Any]:
        """See :class:`TrainingRun`."""
        return {"loss": words(self.terms)}

    def objective(self) -> Objective:
        """The losses; the reference is scored on the way."""
        values = self.against.values(self.policy.scorer, self.folder, self.stop)
        self.reporter.say(self.policy.make_trainable())
        return self._balanced(self.against.objective(self.policy, values))

    def say_ahead(self) -> None:
        """See :class:`TrainingRun`."""
        self.missing = self.against.missing()
        if self.against.reference is not None and not self.against.live:
            self.reporter.say(f"reference: {self.missing or 'no'} responses are still to be scored")

    def objective_to_try(self) -> Objective:
        """See :class:`TrainingRun`."""
        return self._balanced(self.against.preview(self.policy))

    def _balanced(self, objective: Objective) -> Objective:
        return objectives.balanced(objective, self.policy.scorer.model, self.config.router_aux_loss_coef)

    def work_ahead(self, speed: float) -> float | None:
        """See :class:`TrainingRun`."""
        if self.against.reference is None or self.against.live:
            return None
        # Forward alone is a third of a training step's work.
        return int(self.policy.scorer.layout.costs(self.against.scored).sum()) / (3 * speed) if self.missing else 0.0

    def inspect_first(self, objective: Objective, record: Record, indices: Sequence[int], values: Values) -> str | None:
        """See :class:`TrainingRun`."""
        if isinstance(objective, objectives.BalancedObjective):  # the loss that is told is that of what is inside
            objective = objective.inner
        assert isinstance(objective, PreferenceObjective)
        known = self.check if self.choice and self.choice.is_start else None
        return inspect_first(objective, known, record, indices, values)

    @property
    def movement(self) -> Movement | None:
        """See :class:`TrainingRun`."""
        return self.against.movement

    @property
    def passes(self) -> float:
        """A forward pass more, a third of a step's work, where a loss sees the whole batch and it is cut."""
        whole = any(term.loss.whole_batch for term in self.terms) or self.config.router_aux_loss_coef is not None
        return 4 / 3 if whole else 1.0

    def closing(self) -> list[str]:
        """What the run's numbers say, in words."""
        return in_words(diagnose(read_history(self.folder.path)))

    def title(self) -> tuple[str, str]:
        """See :class:`TrainingRun`."""
        title = _TITLES.get(self.config.loss, f"Preference optimisation ({words(self.terms)})")
        return title, self.terms[0].loss.name.rpartition(":")[2]


_TITLES = {"dpo": "Direct Preference Optimization"}
