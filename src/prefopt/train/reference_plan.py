"""Reference log-probabilities for the data of a run, cached or from a model in memory, and mismatched responses, for
the losses that use them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefopt.config.dpo import DpoConfig
from prefopt.core.terminal import Reporter, StopRequest, duration
from prefopt.data.table import GroupTable, IndexArray
from prefopt.losses.parse import WeightedLoss
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import PackedModel, Scorer, response_sums
from prefopt.reference.cache import ReferenceValues
from prefopt.reference.in_memory import InMemoryReference, TrDpoUpdate
from prefopt.runs.folder import RunFolder
from prefopt.train import budget
from prefopt.train.batch import MicroBatch
from prefopt.train.columns import Values, mismatched
from prefopt.train.data import TrainingData
from prefopt.train.loss_options import names_of
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferenceRun, at

SCORING_AHEAD = 4
"""The reference is scored in batches this much larger than training's: no activations are kept for backward."""


class InMemoryColumns:
    """Values scored without gradients for each micro-batch: those of a reference in memory, unless it is compared by
    distributions, and the policy's of mismatched responses."""

    def __init__(self, live: InMemoryReference | None, *, compares: bool, tokens: bool) -> None:
        """``tokens``: log-probabilities of tokens are wanted beside those of responses."""
        self.live, self._compares, self._tokens = live, compares, tokens

    def values(self, scorer: PackedModel, micro: MicroBatch) -> Values:
        """``ref_logp_N`` (and ``_M``), ``mismatched_logp_N``, ``mismatched_ref_logp_N``: those that are wanted."""
        found: Values = {}
        if self.live is not None and not self._compares:
            logp_M = self.live.logprobs(micro.packed)
            found["ref_logp_N"] = response_sums(logp_M, micro.packed)
            if self._tokens:
                found["ref_logp_M"] = logp_M
        if micro.batch.mismatched is not None:
            other = pack(micro.batch.mismatched.groups, scorer.layout).to(micro.packed.target.device)
            found["mismatched_logp_N"] = response_sums(scorer(other), other)
            if self.live is not None:
                found["mismatched_ref_logp_N"] = response_sums(self.live.logprobs(other), other)
        return found

    def distributions(self, packed: PackedBatch) -> Distributions | None:
        """The reference's next-token distributions."""
        return None if self.live is None else self.live.distributions(packed)


class ReferencePlan:
    """What the losses of a run need beside the data: prepared before the model trains, and filled in afterwards.

    ``reference`` is none where no loss needs one; ``max_length`` cuts mismatched sequences. ``read``: the groups of the
    data that ``steps`` steps read, where that is not all; no others are scored.
    """

    def __init__(
        self,
        config: DpoConfig,
        terms: Sequence[WeightedLoss],
        data: TrainingData,
        reference: ReferenceRun | None,
        max_length: int,
        reporter: Reporter,
        *,
        steps: int = 0,
        read: IndexArray | None = None,
    ) -> None:
        self.config, self.terms, self.data, self.reference, self.reporter = config, terms, data, reference, reporter
        self.read = read
        self.movement: TrDpoUpdate | None = None
        whole = [term.loss.name for term in terms if term.loss.needs_distributions]
        self.compares = bool(whole)
        self.live = reference is not None and (self.compares or config.ref_model_sync_steps is not None)
        if reference is None:
            reporter.say(f"reference: none is loaded, {names_of(terms)} compares with none")
        else:
            reporter.say(f"reference: {reference.choice.words}, {reference.identity.digest[:12]}")
        if self.live:
            why = [f"{' and '.join(whole)} compares whole distributions"] if whole else []
            if config.ref_model_sync_steps is not None:
                every = config.ref_model_sync_steps
                why.append(f"it moves by {config.ref_model_mixup_alpha:g} to the policy every {every} steps")
            reporter.say(f"reference: scored with every batch and not cached, since {', and '.join(why)}")
        elif reference is not None and read is not None:
            reporter.say(
                f"reference: {len(read)} of {len(data.groups)} {data.noun} are read in {steps} steps"
                f"{' and evaluations' if data.held_out else ''}; no others are scored"
            )
        self.mismatched: GroupTable | None = None
        if any(term.loss.needs_mismatched for term in terms):
            self.mismatched, cut = mismatched(data.groups, max_length)
            said = f", {cut} of them cut to {max_length} tokens" if cut else ""
            reporter.say(f"loss: compares with {len(self.mismatched.key_N)} responses to other prompts{said}")

    @property
    def groups(self) -> GroupTable:
        """The data's groups, and behind them those with mismatched responses."""
        return self.data.groups + self.mismatched if self.mismatched is not None else self.data.groups

    @property
    def scored(self) -> GroupTable:
        """Those of :attr:`groups` that need a value of the reference."""
        return self.groups if (read := self._read()) is None else at(self.groups, read)

    def _read(self) -> IndexArray | None:
        """The places in :attr:`groups` of the groups that are read and of their mismatched responses."""
        if self.read is None or self.mismatched is None:
            return self.read
        return np.concatenate([self.read, self.read + len(self.data.groups)])

    def missing(self) -> int:
        """How many responses are to be scored before training. Raises :class:`ModelError` as :meth:`values`."""
        if self.reference is None:
            return 0
        self.reference.check_fits(self.groups)
        return 0 if self.live else self.reference.missing(self.scored)

    def say_missing(self) -> None:
        """Tell how much is to be scored before training."""
        self._missing = self.missing()
        if self.reference is not None and not self.live:
            self.reporter.say(f"reference: {self._missing or 'no'} responses are still to be scored")

    def seconds_ahead(self, scorer: Scorer, speed: float) -> float | None:
        """Seconds that this takes, after :meth:`say_missing`, at ``speed`` tokens of training per second."""
        if self.reference is None or self.live:
            return None
        # Forward alone is a third of a training step's work.
        return int(scorer.layout.costs(self.scored).sum()) / (3 * speed) if self._missing else 0.0

    def values(self, scorer: Scorer, folder: RunFolder, stop: StopRequest) -> ReferenceValues | None:
        """The reference's values for all responses, where they are wanted beforehand.

        Raises :class:`ModelError` where the reference cannot take the data.
        """
        if self.reference is None:
            return None
        if self.live:
            self.reference.check_fits(self.groups)
            return None
        # Remembered, since a resumed run must pack as the first one did to give the same bits.
        tokens = folder.record.get("scoring_budget") or SCORING_AHEAD * (
            self.config.token_budget or budget.estimate(scorer, self.groups, checkpointing=False, still_to_come=0)
        )
        folder.remember(scoring_budget=tokens)
        values, report = self.reference.values(self.groups, tokens, self.reporter, stop, self._read())
        scored, reused = report.scored_responses, report.reused_responses
        self.reporter.say(
            f"reference: {scored} responses scored in {duration(report.seconds)}, {reused} from the cache"
            if scored
            else f"reference: all {reused} responses from the cache"
        )
        return values

    def in_memory(self, policy: Policy) -> InMemoryColumns | None:
        """What is scored with every micro-batch, where anything is; ``policy`` is trainable already."""
        live = self._live_reference(policy) if self.live else None
        if live is None and self.mismatched is None:
            return None
        tokens = any(term.loss.needs_head_values for term in self.terms)
        return InMemoryColumns(live, compares=self.compares, tokens=tokens)

    def _live_reference(self, policy: Policy) -> InMemoryReference:
        assert self.reference is not None
        every, alpha = self.config.ref_model_sync_steps, self.config.ref_model_mixup_alpha
        live = self.reference.in_memory(policy.scorer, policy.masters, self.groups, moves=every is not None)
        if every is not None and alpha is not None:
            assert live.weights is not None
            self.movement = TrDpoUpdate(live.weights, every, alpha)
        return live
