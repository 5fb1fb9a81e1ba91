"""Objectives: from a batch and a model's scores to a loss.

Scoring gives *values*, tensors by name over the responses or tokens of a batch; the loss is computed on those and on
the batch's columns. These are separate steps because a loss may need the values of a whole global batch, which is
scored in micro-batches (see ``step.py``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.table import IndexArray
from prefopt.errors import DataError, RunError
from prefopt.losses.declare import Kind
from prefopt.losses.parse import WeightedLoss
from prefopt.model.check import CheckReport
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, ScoreRequest, response_sums
from prefopt.runs.metrics import Record
from prefopt.train.batch import AT_ONCE, Batch, LossResult, State, weighted_sum
from prefopt.train.columns import LossInputs, Values, head_sums, weights_of
from prefopt.train.loss_options import needs_reference

Normaliser = tuple[torch.Tensor, ...]

DIFFERENTIATED = (
    *("logp_N", "logp_M", "value_M", "reward_N", "kl_N", "divergence_N"),
    *("chosen_head_logp_P", "rejected_head_logp_P"),
    *("router_prob_BE", "router_z_B"),
)
"""Values that gradients flow through."""
_TINY = 1e-30  # the weights of a loss may all be zero in a batch; then its numerators are, too


class Objective(ABC):
    """What a trainer minimises."""

    whole_batch: bool = False
    """Whether the loss needs the values of the whole global batch at once."""
    compares: bool = False
    """Whether scoring needs the next-token distributions of a reference."""
    other_models: Sequence[PackedModel] = ()
    """Models beside the policy that scoring passes through and that train, such as a critic."""
    state: State
    """Running state of losses; the trainer sets it after each update."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.dtype = device, torch.float32 if device.type == "mps" else torch.float64
        self.state = {}

    @abstractmethod
    def normaliser(self, batch: Batch) -> Normaliser:
        """What each loss of a global batch is divided by, from its columns alone. Not used where ``whole_batch``."""

    @abstractmethod
    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Values under the policy, with gradients if they are enabled."""

    @abstractmethod
    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        """The loss of ``batch``, which is a micro-batch or a whole global batch."""

    def derived(self, record: Record) -> Record:
        """``record`` with metrics that are computed from averages over a batch or an evaluation."""
        return record


class PreferenceObjective(Objective):
    """A weighted sum of losses on pairs, labelled responses or rankings, each divided by its own normaliser.

    Columns: those of :func:`prefopt.train.columns.columns_of`; for losses with a reference ``ref_logp_N`` and, if they
    use the first tokens of responses, ``ref_logp_M``, unless these are among the values.
    """

    def __init__(self, terms: Sequence[WeightedLoss], *, device: torch.device) -> None:
        super().__init__(device)
        self.terms = tuple(terms)
        self.kind: Kind = terms[0].loss.kind
        self.names = {name for term in terms for name in term.inputs}
        self.optional = {name for term in terms for name in term.loss.optional_inputs} - self.names
        self.whole_batch = any(term.loss.whole_batch for term in terms)
        self.compares = any(term.loss.needs_distributions for term in terms)
        self.state = {term.loss.name: start for term in terms if (start := term.loss.start(device)) is not None}
        self._needs = frozenset(self.names | self.optional)

    @torch.no_grad()
    def normaliser(self, batch: Batch) -> Normaliser:
        """See :class:`Objective`. The row weights of a loss do not depend on values, which are zero here."""
        sums = torch.zeros(len(self.terms), dtype=self.dtype, device=self.device)
        if self.whole_batch:  # weights may depend on the values of the batch
            return tuple(sums)
        for first in range(0, len(batch), AT_ONCE):
            inputs = self._inputs(batch.select(range(first, min(first + AT_ONCE, len(batch)))))
            given = inputs.named(self.names, self.optional, {})
            sums += torch.stack([(term(given, self.state).weight_R * inputs.weight_R).sum() for term in self.terms])
        return tuple(sums.clamp(min=_TINY))

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """``logp_N`` and the other values that the losses need."""
        square = "chosen_wpo_P" in self._needs
        if not square and reference is None:
            return self._sums(scorer(packed), packed, batch, "logp")
        scores = scorer(packed, ScoreRequest(squares=square, reference=reference))
        values = self._sums(scores.logp_M, packed, batch, "logp")
        if reference is not None:
            values["kl_N"] = response_sums(scores.divergence_M, packed)
            values |= self._sums(scores.other_logp_M, packed, batch, "ref_logp")
        if square:
            values["wpo_N"] = response_sums(scores.logp_M.detach() - scores.square_M, packed) / packed.length
        return values

    def _sums(self, logp_M: torch.Tensor, packed: PackedBatch, batch: Batch, name: str) -> Values:
        """Sums by response and, if needed, over the first tokens of the responses of each pair."""
        values = {f"{name}_N": response_sums(logp_M, packed)}
        if f"chosen_head_{name}_P" in self._needs:
            values |= self._heads(logp_M.to(self.dtype), batch, name)
        return values

    def _heads(self, logp_M: torch.Tensor, batch: Batch, name: str) -> Values:
        """Sums over as many tokens of both responses of a pair as the shorter one has."""
        length = batch.length_N
        starts = np.cumsum(length) - length
        sides = [batch.at_N(f"{side}_P") for side in ("chosen", "rejected")]
        shorter: IndexArray = np.minimum(*(length[at] for at in sides))
        sums = head_sums(logp_M, [starts[at] for at in sides], shorter)
        return {f"{side}_head_{name}_P": found for side, found in zip(("chosen", "rejected"), sums, strict=True)}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        inputs = self._inputs(batch)
        values = self._with_reference(values, inputs)
        given = inputs.named(self.names, self.optional, values)
        shares: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        state = dict(self.state)
        for term, weight in zip(self.terms, normaliser, strict=True):
            output = term(given, self.state)
            if self.whole_batch:
                weight = (output.weight_R * inputs.weight_R).sum().clamp(min=_TINY)
            weights.append(weight)
            shares.append(term.weight * (output.numerator_R * inputs.weight_R).sum() / weight)
            for name, values_R in output.metrics.items():
                if self.kind != "labels" or name != "rewards/margins":  # Sums.means computes it
                    metrics.setdefault(name, weighted_sum(values_R, inputs.weight_R))
            if output.state is not None:
                state[term.loss.name] = output.state
        total = torch.stack(shares).sum()
        named, divided_by = {"loss": total}, {"loss": weights[0]}
        if len(shares) > 1:
            names = [f"loss/{term.loss.name}" for term in self.terms]
            named |= {n: x / t.weight for n, t, x in zip(names, self.terms, shares, strict=True)}
            divided_by = dict(zip(names, weights, strict=True))  # the sum of losses has none
        return LossResult(total, named, {**metrics, **inputs.response_metrics(values)}, state, divided_by)

    def values_at_reference(self, batch: Batch, values: Values) -> Values:
        """``values`` as they would be if the policy were the reference."""
        known = self._with_reference(values, self._inputs(batch))
        same = {name: known[n] for name in values if (n := name.replace("logp", "ref_logp")) in known}
        same |= {name: torch.zeros_like(v) for name, v in values.items() if name == "kl_N"}
        return {**known, **same}

    def _inputs(self, batch: Batch) -> LossInputs:
        return LossInputs(batch, self.kind, self.device, self.dtype)

    def _with_reference(self, values: Values, inputs: LossInputs) -> Values:
        """``values`` with those of the reference that are columns, and its sums over first tokens."""
        found: Values = {}
        batch = inputs.batch
        if "ref_logp_N" in batch.columns:
            found["ref_logp_N"] = inputs.column("ref_logp_N", inputs.dtype)
        if batch.mismatched is not None and "ref_logp_N" in batch.mismatched.columns:
            found["mismatched_ref_logp_N"] = batch.mismatched.on_device(self.device)["ref_logp_N"].to(self.dtype)
        if "chosen_head_ref_logp_P" in self._needs and "chosen_head_ref_logp_P" not in values:
            tokens = values["ref_logp_M"] if "ref_logp_M" in values else inputs.column("ref_logp_M")
            found |= self._heads(tokens.to(self.dtype), batch, "ref_logp")
        return {**found, **values}


def check_rows(terms: Sequence[WeightedLoss], groups: Sequence[Group], which: str) -> None:
    """Raises :class:`DataError` for a group without the scores or order that the losses need, or with unequal weights
    where they cannot weigh rows. ``which``: see :data:`prefopt.train.columns.WHICH`."""
    kind = terms[0].loss.kind
    sorting = [term.loss.name for term in terms if not term.loss.per_row]
    scoring = [term.loss.name for term in terms if term.loss.needs_scores]
    if not sorting and not scoring and kind != "ranking" and which == "all":
        return  # pairs and labels are checked when rows are read
    weights: set[float] = set()
    for group in groups:
        weights.update(weights_of(group, kind, which))
        if scoring:
            check_scores([group], f"--loss {scoring[0]} needs a finite score of every response")
        if sorting and len(weights) > 1:
            raise DataError(
                f"--loss {sorting[0]} sorts the pairs of a batch, so all need equal weight, but this row has"
                " more or fewer pairs than those before; give --pairs best-worst, or another loss",
                row=group.row,
            )


def check_scores(groups: Iterable[Group], message: str) -> None:
    """Raises :class:`DataError` with ``message`` for a group without finite scores."""
    for group in groups:
        if group.scores is None or not np.isfinite(group.scores).all():
            raise DataError(message, row=group.row)


MANY = 8
"""From this number of groups on an accuracy of exactly 1 is not chance."""


def _loss_at_reference(
    objective: PreferenceObjective, check: CheckReport, batch: Batch, values: Values
) -> tuple[float, float]:
    """The loss of a policy that is its reference, and the largest deviation by rounding."""
    same = objective.values_at_reference(batch, values)
    leaves = {name: same[name].detach().requires_grad_() for name in DIFFERENTIATED if name in same}
    with torch.enable_grad():
        total = objective(batch, {**same, **leaves}, objective.normaliser(batch)).total
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    tokens = int(batch.length_N.max())
    slope = sum(float(s.abs().sum()) for s in slopes if s is not None)
    expected = float(total.detach())
    return expected, 2 * slope * check.tolerance(tokens) + 1e-6 * max(1.0, abs(expected))


def inspect_first(
    objective: PreferenceObjective, check: CheckReport | None, record: Record, batch: Batch, values: Values
) -> str | None:
    """Check the first step. Returns a line on it. ``check`` is None where the reference is not the initial policy.

    Raises :class:`RunError` where the loss is not that of a policy that equals its reference.
    """
    if not needs_reference(objective.terms):
        return None
    if check is None:
        if record.get("rewards/accuracies") == 1.0 and len(batch) >= MANY:
            return (
                "step 1: accuracy is 1.0 before any weight moved: the policy has seen these preferences and the"
                " reference has not; is --reference the right model?"
            )
        return None
    expected, allowed = _loss_at_reference(objective, check, batch, values)
    number = f"{'ln 2 =' if abs(expected - math.log(2)) < 1e-6 else 'a loss of'} {expected:.6f}"
    if not abs(record["loss"] - expected) <= allowed:
        raise RunError(
            f"step 1: the loss is {record['loss']:.6f} where an untrained policy has {number}"
            f" (rounding explains {allowed:.1g}): the reference's values are not this model's. Check them with"
            " prefopt cache verify, or remove them with prefopt cache clear"
        )
    same = "" if number.startswith("a loss") else f" {number},"
    return f"step 1: loss {record['loss']:.6f},{same} as it must be before any weight moves"
