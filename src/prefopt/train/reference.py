"""Which model log-ratios are taken against, and its values for a set of groups.

>>> from prefopt.data.sampler import BatchSampler
>>> sampler = BatchSampler(6, 2, seed=0)
>>> groups_read(sampler, 1, train=[10, 11, 12, 13, 14, 15], held_out=[20]).tolist()
[12, 13, 20]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefopt.config.dpo import DpoConfig
from prefopt.core.terminal import Bar, Reporter, StopRequest
from prefopt.data.group import Group
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable, IndexArray, Selection, ranges
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model, context_length, vocabulary_size
from prefopt.model.check import check_scoring
from prefopt.model.kernels.head import vocabulary_of
from prefopt.model.load import base_and_adapter, load_model
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights, freeze_and_cast
from prefopt.model.scorer import Scorer, response_sums
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
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.train.budget import smaller_budget


def groups_read(sampler: BatchSampler, steps: int, train: Sequence[int], held_out: Sequence[int]) -> IndexArray:
    """The groups of the batches of so many steps, which the sampler draws from ``train``, and all held out; sorted."""
    batches = [sampler.batch(step) for step in range(steps)]
    drawn = np.asarray(train, np.int64)[np.concatenate([*batches, np.empty(0, np.int64)])]
    return np.unique(np.concatenate([drawn, np.asarray(held_out, np.int64)]))


def at(groups: GroupTable, at_G: IndexArray) -> GroupTable:
    """Some of the groups, in this order."""
    return GroupTable.of(Selection(groups, at_G.tolist()))


def spread(values: ReferenceValues, at_G: IndexArray, table: GroupTable) -> ReferenceValues:
    """``values`` of the groups ``at_G`` as values of all of ``table``. Those of the others are NaN: a loss that read
    one would tell at once."""
    found = without_values(table)
    at_N = ranges(found.starts, np.diff(found.starts), at_G)
    found.sums_N[at_N] = values.sums_N
    if values.token_values_M is not None:
        assert found.token_values_M is not None
        found.token_values_M[ranges(found.token_starts, np.diff(found.token_starts), at_N)] = values.token_values_M
    return found


def without_values(table: GroupTable, value: float = np.nan) -> ReferenceValues:
    """``value`` where the reference's values of a table will stand."""
    tokens = np.concatenate([[0], np.cumsum(table.trained_N, dtype=np.int64)])
    sums, each = np.full(len(table.trained_N), value), np.full(int(tokens[-1]), value, np.float32)
    return ReferenceValues(sums, table.trained_N, table.response_starts, tokens, each)


@dataclass(frozen=True, slots=True)
class ReferenceChoice:
    """``model`` and ``adapter`` name it; ``is_start``: it is the policy as it is before training."""

    model: str
    adapter: str | None
    is_start: bool

    @property
    def words(self) -> str:
        """For the line that a run prints."""
        name = f"{self.model} with adapter {self.adapter}" if self.adapter else self.model
        return f"{name}{' (the model as it is before training)' if self.is_start else ''}"


def choose_reference(config: DpoConfig, given: Any = None) -> ReferenceChoice:
    """The reference that a configuration asks for; a model ``given`` in Python is never the one a name stands for."""
    if config.reference is not None:
        same = config.reference == config.model and config.reference_adapter == config.adapter and given is None
        return ReferenceChoice(config.reference, config.reference_adapter, same)
    if config.reference_adapter is not None:
        return ReferenceChoice(config.model, config.reference_adapter, config.reference_adapter == config.adapter)
    return ReferenceChoice(config.model, config.adapter, True)


def identify(choice: ReferenceChoice, model: torch.nn.Module | None) -> Identity:
    """Identity of the reference; ``model`` is the object given in Python, where one was and it is the reference."""
    if model is not None and choice.is_start:
        return identity_of_model(model, name=choice.model)
    return identity_of_name(choice.model, choice.adapter)


class ReferenceRun:
    """The reference's values for ``groups``: from the cache, or scored now and cached.

    ``start`` is the policy's scorer, used where the policy as it stands now is the reference. ``token_values``: the
    value of every token is wanted, not only the sums.
    """

    def __init__(
        self, choice: ReferenceChoice, identity: Identity, start: Scorer, config: DpoConfig, *, token_values: bool
    ) -> None:
        self.choice, self.identity, self.start, self.config = choice, identity, start, config
        self.token_values = token_values
        self.device = next(start.model.parameters()).device
        self._scorer: Scorer | None = start if choice.is_start else None

    def values(
        self,
        groups: GroupTable,
        token_budget: int,
        reporter: Reporter,
        stop: StopRequest,
        read: IndexArray | None = None,
    ) -> tuple[ReferenceValues, FillReport]:
        """Fill the cache and read it, for all ``groups``, or for those at ``read`` alone: the others' values are NaN.

        Raises :class:`ModelError` where the reference cannot take the data.
        """
        self.check_fits(groups)
        if read is None:
            return self._filled(groups, token_budget, reporter, stop)
        few, report = self._filled(at(groups, read), token_budget, reporter, stop)
        return spread(few, read, groups), report

    def _filled(
        self, groups: GroupTable, token_budget: int, reporter: Reporter, stop: StopRequest
    ) -> tuple[ReferenceValues, FillReport]:
        cache = ReferenceCache(self.space())
        missing = cache.missing(groups, token_values=self.token_values)
        if not missing:
            report = FillReport(0, len(GroupTable.of(groups).key_N), 0, 0.0)
        else:
            if not self.choice.is_start:  # the policy has been checked already
                check_scoring(self._other(), groups)
            with reporter.bar("reference", missing, "responses") as bar:
                report = self._fill(cache, groups, token_budget, reporter, bar, stop)
        if not self.choice.is_start:
            self._scorer = None  # its memory is the policy's now
        return cache.values(groups, token_values=self.token_values), report

    def _fill(
        self,
        cache: ReferenceCache,
        groups: Sequence[Group],
        token_budget: int,
        reporter: Reporter,
        bar: Bar,
        stop: StopRequest,
    ) -> FillReport:
        """Score what is missing, with half as many tokens at once where memory ends; what is scored is kept."""
        while True:
            try:
                return cache.fill(
                    groups,
                    self._make_score,
                    token_budget=token_budget,
                    token_values=self.token_values,
                    progress=lambda done, total, seconds: bar.update(done),
                    stop=stop.check,
                )
            except RuntimeError as error:
                largest = int(cache.space.costs(GroupTable.of(groups)).max())
                token_budget = smaller_budget(error, token_budget, "scoring the reference", largest, self.device)
                reporter.say(f"out of memory: the reference is scored with {token_budget} tokens at once")

    def check_fits(self, groups: Sequence[Group]) -> None:
        """Another model than the policy has a vocabulary and a context of its own. Raises :class:`ModelError`."""
        if self.choice.is_start:
            return
        model = causal_model(self._other().model)
        check_vocabulary(groups, vocabulary_size(model), f"--reference {self.choice.model}")
        context, longest = context_length(model.config), int(GroupTable.of(groups).longest_G.max())
        if context is not None and longest > context:
            raise ModelError(
                f"--reference {self.choice.model}: its context is {context} tokens, but a row has {longest};"
                f" give --max-length {context}"
            )

    def in_memory(
        self, policy: Scorer, masters: MasterWeights, groups: Sequence[Group], *, moves: bool
    ) -> InMemoryReference:
        """The reference to be scored batch by batch. ``policy`` and ``masters`` are the trainable policy's.

        Raises :class:`ModelError` where the two do not make logits of the same tokens.
        """
        if self.choice.is_start:
            return InMemoryReference(policy, SwappedWeights(masters, moves=moves))
        other = self._other()
        check_scoring(other, groups)
        rows = [vocabulary_of(causal_model(s.model).get_output_embeddings()) for s in (policy, other)]
        if rows[0] != rows[1]:
            raise ModelError(
                f"--reference {self.choice.model}: it has {rows[1]} tokens and the model {rows[0]}, whose distributions"
                " cannot be compared; give another one, or a loss that needs no distributions"
            )
        return InMemoryReference(other)

    def missing(self, groups: Sequence[Group]) -> int:
        """Responses still to be scored."""
        return ReferenceCache(self.space()).missing(groups, token_values=self.token_values)

    def space(self) -> SpaceKey:
        """Where the values are kept."""
        # Another reference has the policy's kind of device and dtype; whether it can share, only the model can say.
        scorer = self.start if self.choice.is_start else self._other()
        return space_of(self.identity, scorer, self.device)

    def _other(self) -> Scorer:
        if self._scorer is None:
            source, adapter = base_and_adapter(self.choice.model, self.choice.adapter)
            model = load_model(source, dtype=self.start.dtype, device=self.device, adapter=adapter)
            self._scorer = Scorer(freeze_and_cast(model, self.start.dtype), attention=self.config.attention)
        return self._scorer

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


def check_vocabulary(groups: Sequence[Group], rows: int, model: str) -> None:
    """Refuse token ids beyond the embedding: the tokenizer is another model's. Raises :class:`ModelError`."""
    top = GroupTable.of(groups).max_id
    if top >= rows:
        raise ModelError(
            f"{model}: the tokenizer gives token {top}, but the model's vocabulary has {rows}; they belong to different"
            " models"
        )
