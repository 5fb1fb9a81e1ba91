"""What is optimised: a weighted sum of losses on groups, each over its own normaliser of the whole global batch.

Scoring gives *values*, tensors by name over the responses or pairs of some groups; losses are computed on those. The
two are apart because a loss may need the values of a whole global batch, which is scored in parts (see ``step.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.table import Selection
from prefopt.errors import DataError
from prefopt.losses.declare import Kind
from prefopt.losses.parse import Term
from prefopt.model.kernels.distributions import TokenScores
from prefopt.model.packed_model import PackedModel
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import Asked, response_sums
from prefopt.reference.cache import ReferenceValues
from prefopt.reference.in_memory import LiveReference
from prefopt.runs.metrics import Record
from prefopt.train import rows as items
from prefopt.train.inputs import Facts, Values, head_sums
from prefopt.train.results import Outcome, State, summed

Normaliser = tuple[torch.Tensor, ...]

DIFFERENTIATED = ("logp_N", "reward_N", "kl_N", "chosen_head_logp_G", "rejected_head_logp_G", "router_prob_PE")
"""Values through which gradients flow."""


class Objective(Protocol):
    """What a loop optimises. ``indices`` name groups of the data, in the order in which their values stand."""

    whole_batch: bool
    """Whether losses must see the values of the whole global batch at once."""

    state: State
    """What losses keep from batch to batch; the loop sets it once a step is done."""

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """What each loss is divided by, from the data alone: before anything is scored.

        Not where ``whole_batch``: then the call sees the whole batch, and takes it from there.
        """

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Values without gradients that are scored anew for each batch."""

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Values under the policy, with gradients where they are switched on."""

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """The loss on ``values`` of these groups."""

    def derived(self, record: Record) -> Record:
        """Further metrics that follow from the means of a batch or an evaluation."""


class PreferenceObjective:
    """Losses on pairs, labelled responses or rankings (see :class:`Objective`).

    ``reference`` holds the reference's values of all ``groups``, and behind them of all ``mismatched`` (see
    ``mismatched.py``); none where no loss needs them, or where a ``live`` one is scored with every batch. ``pairs``:
    see :data:`prefopt.train.rows.WHICH`.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        groups: Sequence[Group],
        reference: ReferenceValues | None,
        *,
        device: torch.device,
        pairs: str = "all",
        mismatched: Sequence[Group] | None = None,
        live: LiveReference | None = None,
    ) -> None:
        """Raises :class:`DataError` where a group has nothing that the losses could be computed on."""
        self.terms, self.groups, self.reference, self.which = tuple(terms), groups, reference, pairs
        self.mismatched, self.live = mismatched, live
        self.device, self.dtype = device, torch.float32 if device.type == "mps" else torch.float64
        self.kind: Kind = terms[0].loss.kind
        self.names = {name for term in terms for name in term.inputs}
        self.optional = {name for term in terms for name in term.loss.optional_inputs} - self.names
        self.whole_batch = any(term.loss.whole_batch for term in terms)
        self.state: State = {term.loss.name: start for term in terms if (start := term.loss.start(device)) is not None}
        self._needs = frozenset(self.names | self.optional)
        self._compares = any(term.loss.needs_distributions for term in terms)
        self._check()

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares with a reference."""
        return any(term.loss.needs_reference for term in self.terms)

    @torch.no_grad()
    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """See :class:`Objective`. A loss tells the weights of its rows whatever the policy gives: here, nothing."""
        sums = torch.zeros(len(self.terms), dtype=self.dtype, device=self.device)
        if self.whole_batch:  # which rows count may depend on the batch: told when that is seen
            return tuple(sums)
        for first in range(0, len(indices), AT_ONCE):
            facts = self._facts(indices[first : first + AT_ONCE])
            inputs = facts.inputs(self.names, self.optional, {})
            outputs = [term(inputs, self.state) for term in self.terms]
            sums += torch.stack([(out.weight_G * facts.weight_R).sum() for out in outputs])
        return tuple(sums.clamp(min=_TINY))

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """See :class:`Objective`."""
        values: Values = {}
        if self.live is not None and not self._compares:
            values = self._sums(self.live.logprobs(batch), batch, indices, "ref_logp")
        if self.mismatched is not None:
            other = pack([self.mismatched[i] for i in indices], scorer.layout).to(self.device)
            values["mismatched_logp_N"] = response_sums(scorer(other), other)
            if self.live is not None:
                values["mismatched_ref_logp_N"] = response_sums(self.live.logprobs(other), other)
        return values

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """See :class:`Objective`."""
        square = "chosen_wpo_G" in self._needs
        if not square and not self._compares:
            return self._sums(scorer(batch), batch, indices, "logp")
        against = self.live.distributions(batch) if self._compares and self.live is not None else None
        scores: TokenScores = scorer(batch, Asked(squares=square, against=against))
        values = self._sums(scores.logp_M, batch, indices, "logp")
        if against is not None:
            assert scores.kl_M is not None and scores.other_logp_M is not None
            values["kl_N"] = response_sums(scores.kl_M, batch)
            values |= self._sums(scores.other_logp_M, batch, indices, "ref_logp")
        if square:
            assert scores.square_M is not None
            values["wpo_N"] = response_sums(scores.logp_M.detach() - scores.square_M, batch) / batch.length
        return values

    def _sums(self, logp_M: torch.Tensor, batch: PackedBatch, indices: Sequence[int], name: str) -> Values:
        """Sums by response and, where a loss needs them, over the first tokens of the responses of each pair."""
        values = {f"{name}_N": response_sums(logp_M, batch)}
        if f"chosen_head_{name}_G" in self._needs:
            facts = self._facts(indices)
            length = items.lengths_of(facts.groups)
            for side in ("chosen", "rejected"):
                response: items.Ints = getattr(facts.pairs, side)
                head = head_sums(logp_M.to(self.dtype), np.cumsum(length) - length, response, facts.head_R)
                values[f"{side}_head_{name}_G"] = head
        return values

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """See :class:`Objective`."""
        facts = self._facts(indices)
        values = self._with_reference(values, facts, indices)
        inputs = facts.inputs(self.names, self.optional, values)
        shares: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        state = dict(self.state)
        for term, weight in zip(self.terms, normaliser, strict=True):
            output = term(inputs, self.state)
            if self.whole_batch:
                weight = (output.weight_G * facts.weight_R).sum().clamp(min=_TINY)
            weights.append(weight)
            shares.append(term.weight * (output.numerator_G * facts.weight_R).sum() / weight)
            for name, values_R in output.metrics.items():
                if self.kind != "labels" or name != "rewards/margins":  # a difference of means: of the whole batch's
                    metrics.setdefault(name, summed(values_R, facts.weight_R))
            if output.state is not None:
                state[term.loss.name] = output.state
        total = torch.stack(shares).sum()
        named, divided_by = {"loss": total}, {"loss": weights[0]}
        if len(shares) > 1:
            names = [f"loss/{term.loss.name}" for term in self.terms]
            named |= {n: x / t.weight for n, t, x in zip(names, self.terms, shares, strict=True)}
            divided_by = dict(zip(names, weights, strict=True))  # the sum has none of its own
        return Outcome(total, named, {**metrics, **self._seen(values, facts)}, state, divided_by)

    def derived(self, record: Record) -> Record:
        """See :class:`Objective`."""
        return {}

    def at_reference(self, values: Values, indices: Sequence[int]) -> Values:
        """``values`` as they would be if the policy were the reference."""
        facts = self._facts(indices)
        known = self._with_reference(values, facts, indices)
        same = {name: known[n] for name in values if (n := name.replace("logp", "ref_logp")) in known}
        same |= {name: torch.zeros_like(v) for name, v in values.items() if name == "kl_N"}
        return {**known, **same}

    def longest(self, indices: Sequence[int]) -> int:
        """Trained tokens of the longest response of these groups."""
        return max(int(c.trained.sum()) for i in indices for c in self.groups[i].continuations)

    def _facts(self, indices: Sequence[int]) -> Facts:
        few = len(indices) <= AT_ONCE
        groups = [self.groups[i] for i in indices] if few else Selection(self.groups, indices)
        return Facts(groups, self.kind, self.which, "label_G" in self._needs, self.device, self.dtype)

    def _with_reference(self, values: Values, facts: Facts, indices: Sequence[int]) -> Values:
        """``values`` with those of the reference, where they are known beforehand."""
        reference = self.reference
        if reference is None:
            return values
        at_N = _responses(reference, np.asarray(indices))
        found = {"ref_logp_N": facts.tensor(reference.sums_N[at_N], facts.dtype)}
        if self.mismatched is not None:
            at = _responses(reference, np.asarray(indices) + len(self.groups))
            found["mismatched_ref_logp_N"] = facts.tensor(reference.sums_N[at], facts.dtype)
        if "chosen_head_ref_logp_G" in self._needs:
            assert reference.token_values_M is not None
            tokens = torch.from_numpy(reference.token_values_M).double()
            starts = reference.token_starts[at_N]
            for side in ("chosen", "rejected"):
                head = head_sums(tokens, starts, getattr(facts.pairs, side), facts.head_R)
                found[f"{side}_head_ref_logp_G"] = head.to(facts.device, facts.dtype)
        return {**found, **values}

    @torch.no_grad()
    def _seen(self, values: Values, facts: Facts) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Metrics that come from the responses and not from the loss."""
        per_response = {"lengths": facts.length_N}
        if "ref_logp_N" in values:
            per_response["log_ratios_per_token"] = (values["logp_N"] - values["ref_logp_N"]) / facts.length_N
        rows, found = facts.rows, {}
        for name, x in per_response.items():
            if isinstance(rows, items.Pairs):
                for side in ("chosen", "rejected"):
                    found[f"{name}/{side}"] = summed(x[facts.tensor(getattr(rows, side))], facts.weight_R)
            elif isinstance(rows, items.Labels):
                for side, where in (("chosen", rows.label), ("rejected", ~rows.label)):
                    weight = facts.weight_R * facts.tensor(where, facts.dtype)
                    found[f"{name}/{side}"] = summed(x[facts.tensor(rows.response)], weight)
            else:
                for side, where in (("chosen", rows.tier == 0), ("rejected", rows.last)):
                    weight = facts.tensor(where, facts.dtype)
                    found[f"{name}/{side}"] = summed(x[facts.tensor(rows.response)], weight)
        return found

    def _check(self) -> None:
        """Every group has what the losses are computed on, and none is weighted where rows cannot be."""
        sorting = [term.loss.name for term in self.terms if not term.loss.per_row]
        scoring = [term.loss.name for term in self.terms if term.loss.needs_scores]
        if not sorting and not scoring and self.kind != "ranking" and self.which == "all":
            return  # that there are pairs or labels is seen when rows are read
        weights: set[float] = set()
        for group in self.groups:
            weights.update(items.weights_of(group, self.kind, self.which))
            if scoring and (group.scores is None or not np.isfinite(group.scores).all()):
                raise DataError(f"--loss {scoring[0]} needs a finite score of every response", row=group.row)
            if sorting and len(weights) > 1:
                raise DataError(
                    f"--loss {sorting[0]} sorts the pairs of a batch, so that all must weigh the same, but this row has"
                    " more or fewer of them than those before; give --pairs best-worst, or another loss",
                    row=group.row,
                )


def _responses(reference: ReferenceValues, indices: items.Ints) -> items.Ints:
    """Where the values of these groups' responses stand, [N]."""
    first, stop = reference.starts[indices], reference.starts[indices + 1]
    ends = np.cumsum(stop - first)
    found: items.Ints = np.repeat(stop - ends, stop - first) + np.arange(int(ends[-1]))
    return found


AT_ONCE = 512  # groups held as objects; held-out rows may be many more
_TINY = 1e-30  # a batch may hold no row that a loss has a weight for; its numerators are zero then
