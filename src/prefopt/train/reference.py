"""The reference of a run: which model it is, and its log-probabilities for the data, cached or computed per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from prefopt.config.dpo import DpoConfig
from prefopt.core.phases import phase
from prefopt.core.terminal import Bar, duration
from prefopt.data.group import Group
from prefopt.data.table import GroupTable, IndexArray, Selection, ranges
from prefopt.errors import ModelError
from prefopt.losses.parse import WeightedLoss
from prefopt.model.architectures import causal_model, context_length, vocabulary_size
from prefopt.model.check import check_scoring
from prefopt.model.costs import MEMORY_ERRORS, out_of_memory
from prefopt.model.kernels.head import vocabulary_of
from prefopt.model.load import base_and_adapter, load_model
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights, freeze_and_cast
from prefopt.model.scorer import Scorer, response_sums
from prefopt.parallel.arrays import arrays_from_first
from prefopt.reference.cache import (
    FillReport,
    Identity,
    ReferenceCache,
    ReferenceValues,
    ResponseScore,
    ScoreBatch,
    SpaceKey,
)
from prefopt.reference.identity import identity_of_model, identity_of_name, space_of
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights, TrDpoUpdate
from prefopt.train.budget import estimate, fatal_in_shards, smaller_budget
from prefopt.train.columns import mismatched
from prefopt.train.data import TrainingData
from prefopt.train.loss_options import names_of
from prefopt.train.policy import Shards, Trained
from prefopt.train.run import Run
from prefopt.train.step import InMemoryColumns

SCORING_AHEAD = 4
"""The reference is scored in batches this much larger than training's: no activations are kept for backward."""


def check_vocabulary(groups: Sequence[Group], rows: int, model: str) -> None:
    """Raises :class:`ModelError` for token ids beyond the embedding: the tokenizer is another model's."""
    top = GroupTable.of(groups).max_id
    if top >= rows:
        raise ModelError(
            f"{model}: the tokenizer gives token {top}, but the model's vocabulary has {rows}; they belong to different"
            " models"
        )


def spread(values: ReferenceValues, at_G: IndexArray, table: GroupTable) -> ReferenceValues:
    """``values`` of the groups ``at_G`` as values of all of ``table``. The others are NaN, which a loss that read them
    would show at once."""
    found = without_values(table)
    at_N = ranges(found.starts, np.diff(found.starts), at_G)
    found.sums_N[at_N] = values.sums_N
    if values.token_values_M is not None:
        assert found.token_values_M is not None
        found.token_values_M[ranges(found.token_starts, np.diff(found.token_starts), at_N)] = values.token_values_M
    return found


def without_values(table: GroupTable, value: float = np.nan) -> ReferenceValues:
    """Reference values of ``table`` that are all ``value``."""
    tokens = np.concatenate([[0], np.cumsum(table.trained_N, dtype=np.int64)])
    sums, each = np.full(len(table.trained_N), value), np.full(int(tokens[-1]), value, np.float32)
    return ReferenceValues(sums, table.trained_N, table.response_starts, tokens, each)


@dataclass(frozen=True, slots=True)
class ReferenceChoice:
    """The names of the reference's ``model`` and ``adapter``. ``is_start``: it is the policy before training.
    ``option`` named it: ``--teacher`` for the model that is distilled."""

    model: str
    adapter: str | None
    is_start: bool
    identity: Identity
    option: str = "--reference"

    @property
    def words(self) -> str:
        """For the log."""
        name = f"{self.model} with adapter {self.adapter}" if self.adapter else self.model
        return f"{name}{' (the model as it is before training)' if self.is_start else ''}"


def choose_reference(config: DpoConfig, given: torch.nn.Module | None = None) -> ReferenceChoice:
    """The reference of ``config``, identified by its present contents. ``given``: a policy given in Python, which is
    never the same as a named model."""
    model, adapter, is_start = config.model, config.adapter, True
    if config.reference is not None:
        model, adapter = config.reference, config.reference_adapter
        is_start = model == config.model and adapter == config.adapter and given is None
    elif config.reference_adapter is not None:
        adapter, is_start = config.reference_adapter, config.reference_adapter == config.adapter
    if given is not None and is_start:
        return ReferenceChoice(model, adapter, is_start, identity_of_model(given, name=model))
    return ReferenceChoice(model, adapter, is_start, identity_of_name(model, adapter, config.quantise))


class ReferenceRun:
    """Reference log-probabilities: read from the cache, or scored now and cached.

    ``start`` is the policy's scorer, used where the reference is the policy before training. ``token_values``: values
    of tokens are needed, not only sums by response. ``shards``: how the policy is cut, and so another reference too.
    """

    def __init__(
        self, run: Run, choice: ReferenceChoice, start: Scorer, *, token_values: bool, shards: Shards = "none"
    ) -> None:
        self.run, self.choice, self.start, self.shards = run, choice, start, shards
        self.device = next(start.model.parameters()).device
        self.token_values = token_values
        self._scorer: Scorer | None = start if choice.is_start else None

    @phase("reference")
    def values(
        self, groups: GroupTable, token_budget: int, read: IndexArray | None = None
    ) -> tuple[ReferenceValues, FillReport]:
        """Fill the cache and read it: for all ``groups``, or only for those at ``read``, with NaN for the others.

        Raises :class:`ModelError` where the reference cannot take the data.
        """
        try:
            if not self.choice.is_start and self.shards == "none":
                self.run.world.together(self._other)  # or one that it does not fit leaves the others waiting
            return self._values(groups, token_budget, read)
        finally:
            if not self.choice.is_start:
                self._scorer = None  # frees its memory for training

    def _values(
        self, groups: GroupTable, token_budget: int, read: IndexArray | None
    ) -> tuple[ReferenceValues, FillReport]:
        self.check_fits(groups)
        wanted = groups if read is None else GroupTable.of(Selection(groups, read.tolist()))
        cache = ReferenceCache(self.space())
        missing = self.run.world.on_first(lambda: cache.missing(wanted, token_values=self.token_values))
        if missing:
            if not self.choice.is_start:  # the policy has been checked already
                check_scoring(self._other(), wanted)
            with self.run.reporter.bar("reference", missing, "responses") as bar:
                report = self._fill(cache, wanted, token_budget, bar)
        else:
            report = FillReport(0, len(wanted.key_N), 0, 0.0)
        arrays = arrays_from_first(
            self.run.world, lambda: cache.values(wanted, token_values=self.token_values).arrays()
        )
        found = ReferenceValues(**arrays)
        return (found if read is None else spread(found, read, groups)), report

    def _fill(self, cache: ReferenceCache, groups: GroupTable, token_budget: int, bar: Bar) -> FillReport:
        """Score what is missing. On out-of-memory the budget is halved; committed values are kept."""
        while True:
            try:
                return cache.fill(
                    groups,
                    self._make_score,
                    token_budget=token_budget,
                    token_values=self.token_values,
                    progress=lambda done, total, seconds: bar.update(done),
                    stop=self.run.stop.check,
                    world=self.run.world,
                    lockstep=self.shards != "none",
                )
            except MEMORY_ERRORS as error:
                if self.shards != "none" and out_of_memory(error):
                    raise fatal_in_shards("scoring the reference", token_budget // SCORING_AHEAD) from error
                largest = int(cache.space.costs(groups).max())
                token_budget = smaller_budget(error, token_budget, "scoring the reference", largest, self.device)
                self.run.say(f"out of memory: the reference is scored with {token_budget} tokens at once")

    def check_fits(self, groups: Sequence[Group], longest: int = 0) -> None:
        """Raises :class:`ModelError` where another model's vocabulary or context is too small for ``groups``, and for
        sequences of ``longest`` tokens."""
        if self.choice.is_start:
            return
        model, name = causal_model(self._other().model), f"{self.choice.option} {self.choice.model}"
        check_vocabulary(groups, vocabulary_size(model), name)
        context, longest = context_length(model.config), max(longest, int(GroupTable.of(groups).longest_G.max()))
        if context is not None and longest > context:
            raise ModelError(
                f"{name}: its context is {context} tokens, but a row may have {longest}; give --max-length {context}"
            )

    def in_memory(
        self, policy: Scorer, masters: MasterWeights, groups: Sequence[Group], *, moves: bool
    ) -> InMemoryReference:
        """The reference, to be scored with each batch. ``policy`` and ``masters`` are the trainable policy's.

        Raises :class:`ModelError` where the two have logits for different vocabularies.
        """
        if self.choice.is_start:
            return InMemoryReference(policy, SwappedWeights(masters, moves=moves))
        other = self._other()
        check_scoring(other, groups)
        rows = [vocabulary_of(causal_model(s.model).get_output_embeddings()) for s in (policy, other)]
        # Sizes of one family pad their vocabularies otherwise; a teacher's tokens beyond the model's stand for nothing.
        if rows[0] == rows[1] or (rows[0] < rows[1] and self.choice.option == "--teacher"):
            return InMemoryReference(other, vocabulary=rows[0])
        otherwise = "" if self.choice.option == "--teacher" else ", or a loss that needs no distributions"
        raise ModelError(
            f"{self.choice.option} {self.choice.model}: it has {rows[1]} tokens and the model {rows[0]}, whose"
            f" distributions cannot be compared; give another one{otherwise}"
        )

    def missing(self, groups: Sequence[Group]) -> int:
        """Number of distinct responses without a cached value."""
        cache = ReferenceCache(self.space())
        return self.run.world.on_first(lambda: cache.missing(groups, token_values=self.token_values))

    def space(self) -> SpaceKey:
        """The key of the values in the cache."""
        # Another reference has the policy's kind of device and dtype; whether it can share, only the model can say.
        scorer = self.start if self.choice.is_start else self._other()
        return space_of(self.choice.identity, scorer, self.device)

    def _other(self) -> Scorer:
        if self._scorer is None:
            source, adapter = base_and_adapter(self.choice.model, self.choice.adapter)
            quantise = self.run.config.quantise
            options: dict[str, Any] = {"dtype": self.start.dtype, "device": self.device, "adapter": adapter}
            options["pictures"] = self.start.pictures
            if self.shards == "none":
                model = freeze_and_cast(load_model(source, **options, quantise=quantise), self.start.dtype)
                self._scorer = Scorer(model, attention=self.run.config.attention, pictures=self.start.pictures)
            else:
                self._scorer = self._other_in_shards(source, options)
        return self._scorer

    def _other_in_shards(self, source: str, options: dict[str, Any]) -> Scorer:
        from prefopt.parallel.loading import from_first, shard_unread

        world, dtype = self.run.world, self.start.dtype
        model = freeze_and_cast(load_model(source, **options, from_first=partial(from_first, world)), dtype)
        scorer = Scorer(model, attention=self.run.config.attention, pictures=self.start.pictures)
        weights = MasterWeights(model, dtype)
        _, line = shard_unread(scorer, weights, world, dtype, self.device, hybrid=self.shards == "hybrid")
        scorer.choose_flash()
        self.run.say(f"reference: {line.removeprefix('weights: ')}")
        return scorer

    def _make_score(self) -> ScoreBatch:
        scorer = self.start if self.choice.is_start else self._other()
        scorer.eval()

        @torch.no_grad()
        def score(groups: list[Group]) -> list[list[ResponseScore]]:
            batch = pack(groups, scorer.layout).to(self.device)
            logp_M = scorer(batch)
            sums: Any = response_sums(logp_M, batch).tolist()
            counts = batch.length.tolist()
            tokens: list[Any] = [None] * len(counts)
            if self.token_values:
                tokens = np.split(logp_M.float().cpu().numpy(), np.cumsum(counts)[:-1])
            scored = map(ResponseScore, sums, counts, tokens)
            return [[next(scored) for _ in group.continuations] for group in groups]

        return score


class ReferencePlan:
    """Reference values and mismatched responses for the losses of a run.

    ``reference`` is None where no loss needs one; ``max_length`` truncates mismatched sequences. ``read``: the groups
    that ``steps`` steps read, where those are not all; only these are scored.
    """

    def __init__(
        self,
        run: Run,
        terms: Sequence[WeightedLoss],
        data: TrainingData,
        reference: ReferenceRun | None,
        max_length: int,
        *,
        steps: int,
        read: IndexArray | None,
    ) -> None:
        self.run, self.terms, self.reference, config = run, terms, reference, run.config
        self.movement: TrDpoUpdate | None = None
        whole = [term.loss.name for term in terms if term.loss.needs_distributions]
        self.compares = bool(whole)
        self.live = reference is not None and (self.compares or config.ref_model_sync_steps is not None)
        if reference is None:
            run.say(f"reference: none is loaded, {names_of(terms)} compares with none")
        else:
            run.say(f"reference: {reference.choice.words}, {reference.choice.identity.digest[:12]}")
        if self.live:
            why = [f"{' and '.join(whole)} compares whole distributions"] if whole else []
            if config.ref_model_sync_steps is not None:
                every = config.ref_model_sync_steps
                why.append(f"it moves by {config.ref_model_mixup_alpha:g} to the policy every {every} steps")
            run.say(f"reference: scored with every batch and not cached, since {', and '.join(why)}")
        elif reference is not None and read is not None:
            run.say(
                f"reference: {len(read)} of {len(data.groups)} {data.noun} are read in {steps} steps"
                f"{' and evaluations' if data.held_out else ''}; no others are scored"
            )
        self.held_out: IndexArray = np.sort(np.asarray(data.held_out, np.int64))
        self.groups, self.read = data.groups, read
        """The groups of the data, followed by the same with mismatched responses; and the places of those read."""
        self.mismatched: GroupTable | None = None
        if any(term.loss.needs_mismatched for term in terms):
            self.mismatched, cut = mismatched(data.groups, max_length)
            cut_words = f", {cut} of them cut to {max_length} tokens" if cut else ""
            run.say(f"loss: compares with {len(self.mismatched.key_N)} responses to other prompts{cut_words}")
            self.groups = data.groups + self.mismatched
            self.read = None if read is None else np.concatenate([read, read + len(data.groups)])
            self.held_out = np.concatenate([self.held_out, self.held_out + len(data.groups)])

    def say_missing(self) -> None:
        """Report how many responses have no cached value. Raises :class:`ModelError` as :meth:`values`."""
        if self.reference is None:
            return
        self.reference.check_fits(self.groups)
        if not self.live:
            missing = self.reference.missing(self._scored())
            self.run.say(f"reference: {missing or 'no'} responses are still to be scored")

    def _scored(self) -> GroupTable:
        return self.groups if self.read is None else GroupTable.of(Selection(self.groups, self.read.tolist()))

    def seconds_ahead(self, scorer: Scorer, speed: float) -> float | None:
        """Seconds of scoring before training starts, if it trains ``speed`` tokens per second; None without a cache."""
        if self.reference is None or self.live:
            return None
        groups = self._scored()
        # Forward alone is a third of a training step's work.
        return int(scorer.layout.costs(groups).sum()) / (3 * speed) if self.reference.missing(groups) else 0.0

    def placeholder(self) -> ReferenceValues | None:
        """Zeros in the place of :meth:`values`, for a dry run."""
        return None if self.reference is None or self.live else without_values(self.groups, 0.0)

    def values(self, scorer: Scorer) -> ReferenceValues | None:
        """The reference's values for all responses; None where they are not cached.

        Raises :class:`ModelError` where the reference cannot take the data.
        """
        if self.reference is None:
            return None
        if self.live:
            self.reference.check_fits(self.groups)
            return None
        # Remembered, since a resumed run must pack as the first one did to give the same bits.
        folder = self.run.folder
        tokens = folder.record.get("scoring_budget") or SCORING_AHEAD * (
            self.run.config.token_budget or estimate(scorer, self.groups)
        )
        tokens = self.run.world.smallest(tokens)
        folder.remember(scoring_budget=tokens)
        values, report = self.reference.values(self.groups, tokens, self.read)
        scored, reused = report.scored_responses, report.reused_responses
        self.run.say(
            f"reference: {scored} responses scored in {duration(report.seconds)}, {reused} from the cache"
            if scored
            else f"reference: all {reused} responses from the cache"
        )
        return values

    def held_out_values(self) -> ReferenceValues | None:
        """The reference's values of the held-out groups in the present dtype of its scorer, which is not the run's; NaN
        for the others. After :meth:`values`."""
        if self.reference is None:
            return None
        tokens = max(1, self.run.folder.record["scoring_budget"] // 2)  # numbers of twice the size
        values, report = self.reference.values(self.groups, tokens, self.held_out)
        if report.scored_responses:
            self.run.say(f"reference: {report.scored_responses} held-out responses also scored in float32")
        return values

    def in_memory(self, policy: Trained[Any]) -> InMemoryColumns | None:
        """What is scored with every micro-batch, if anything; ``policy`` is trainable already."""
        live = None
        if self.live and self.reference is not None:
            every, alpha = self.run.config.ref_model_sync_steps, self.run.config.ref_model_mixup_alpha
            live = self.reference.in_memory(policy.scorer, policy.masters, self.groups, moves=every is not None)
            if every is not None and alpha is not None:
                assert live.weights is not None
                self.movement = TrDpoUpdate(live.weights, every, alpha)
        if live is None and self.mismatched is None:
            return None
        tokens = any(term.loss.needs_head_values for term in self.terms)
        return InMemoryColumns(live, compares=self.compares, tokens=tokens)
