"""What the losses of a run compare the policy with: a reference, kept as values or in memory, and responses to other
prompts. Losses that need neither get neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefopt.config.dpo import DpoConfig
from prefopt.core.stop import StopRequest
from prefopt.core.terminal import Reporter, duration
from prefopt.data.table import GroupTable, IndexArray
from prefopt.losses.parse import Term
from prefopt.model.scorer import Scorer
from prefopt.reference.cache import ReferenceValues
from prefopt.reference.in_memory import LiveReference, Movement
from prefopt.runs.folder import RunFolder
from prefopt.train import budget
from prefopt.train.data import TrainingData
from prefopt.train.loss_options import names_of
from prefopt.train.objective import PreferenceObjective
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferenceRun, at, without_values
from prefopt.train.rows import mismatched

SCORING_AHEAD = 4
"""The reference is scored in batches this much larger than training's: no activations are kept for backward."""


class Against:
    """See the module. ``reference`` is none where no loss needs one; ``max_length`` cuts what is put together here.
    ``read``: the groups of the data that ``steps`` steps read, where that is not all; no other is scored."""

    def __init__(
        self,
        config: DpoConfig,
        terms: Sequence[Term],
        data: TrainingData,
        reference: ReferenceRun | None,
        max_length: int,
        reporter: Reporter,
        *,
        steps: int = 0,
        read: IndexArray | None = None,
    ) -> None:
        self.read = read
        self.config, self.terms, self.data, self.reference, self.reporter = config, terms, data, reference, reporter
        self.movement: Movement | None = None
        whole = [term.loss.name for term in terms if term.loss.needs_distributions]
        self.live = reference is not None and (bool(whole) or config.reference_every is not None)
        if reference is None:
            reporter.say(f"reference: none is loaded, {names_of(terms)} compares with none")
        else:
            reporter.say(f"reference: {reference.choice.words}, {reference.identity.digest[:12]}")
        if self.live:
            why = [f"{' and '.join(whole)} compares whole distributions"] if whole else []
            if config.reference_every is not None:
                why.append(f"it moves by {config.reference_mix:g} to the policy every {config.reference_every} steps")
            reporter.say(f"reference: scored with every batch and not cached, since {', and '.join(why)}")
        elif reference is not None and read is not None:
            reporter.say(
                f"reference: {len(read)} of {len(data.groups)} {data.noun} are read in {steps} steps"
                f"{' and evaluations' if data.held_out else ''}; no others are scored"
            )
        self.others: GroupTable | None = None
        if any(term.loss.needs_mismatched for term in terms):
            self.others, cut = mismatched(data.groups, max_length)
            said = f", {cut} of them cut to {max_length} tokens" if cut else ""
            reporter.say(f"loss: compares with {len(self.others.key_N)} responses to other prompts{said}")

    @property
    def groups(self) -> GroupTable:
        """The data's groups, and behind them those with responses to other prompts."""
        return self.data.groups + self.others if self.others is not None else self.data.groups

    @property
    def scored(self) -> GroupTable:
        """Those of :attr:`groups` that need a value of the reference."""
        return self.groups if (read := self._read()) is None else at(self.groups, read)

    def _read(self) -> IndexArray | None:
        """Where the groups that are read stand in :attr:`groups`: each has its responses to other prompts behind."""
        if self.read is None or self.others is None:
            return self.read
        return np.concatenate([self.read, self.read + len(self.data.groups)])

    def missing(self) -> int:
        """How many responses are to be scored before training. Raises :class:`ModelError` as :meth:`values`."""
        if self.reference is None:
            return 0
        self.reference.check_fits(self.groups)
        return 0 if self.live else self.reference.missing(self.scored)

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

    def objective(self, policy: Policy, values: ReferenceValues | None) -> PreferenceObjective:
        """The losses with all they compare with; ``policy`` is trainable already."""
        live = self._live_reference(policy) if self.live else None
        return PreferenceObjective(
            self.terms,
            self.data.groups,
            values,
            device=policy.device,
            pairs=self.config.pairs or "all",
            mismatched=self.others,
            live=live,
        )

    def preview(self, policy: Policy) -> PreferenceObjective:
        """The same before the reference has been scored, to try a step."""
        return self.objective(policy, None if self.live or self.reference is None else without_values(self.groups, 0.0))

    def _live_reference(self, policy: Policy) -> LiveReference:
        assert self.reference is not None
        moves = self.config.reference_every is not None
        live = self.reference.in_memory(policy.scorer, policy.masters, self.groups, moves=moves)
        if moves:
            assert live.held is not None and self.config.reference_every is not None
            self.movement = Movement(live.held, self.config.reference_every, self.config.reference_mix)
        return live
