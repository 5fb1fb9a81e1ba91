"""The memory of a training by part: weights, gradients, optimiser state, and what a pass keeps and needs. From it come
the token budget, whether activations are checkpointed, and what the run says of its memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from prefopt.config.training import RunOptions
from prefopt.core.terminal import size
from prefopt.data.group import Group
from prefopt.data.table import GroupTable
from prefopt.errors import first_line
from prefopt.model.architectures import (
    causal_model,
    checkpoint_activations,
    checkpoints_activations,
    vocabulary_size,
)
from prefopt.model.costs import free_memory
from prefopt.model.kernels.head import KEEP_BYTES
from prefopt.model.memory import Blueprint, PassMemory
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import PackedModel
from prefopt.model.tower_memory import TowerMemory, different
from prefopt.parallel.tensors import local_of
from prefopt.parallel.world import ALONE, World
from prefopt.train.budget import CEILING, bytes_per_token, largest_batch
from prefopt.train.optim import BLOCK, MIN_8BIT, PAGED_FROM

SHARE = {"cuda": 0.85, "cpu": 0.7, "mps": 0.7}
"""The fraction of free memory that a run takes. A GPU says where that was too much, and the trial takes less; a machine
that swaps or ends processes does not, and other programs share it."""
ENOUGH = {"cuda": 1024, "cpu": 256, "mps": 512}
"""Tokens of a micro-batch from which on matrix products are near their best rate: with fewer, activations are
checkpointed."""
SMALL = 0.05
"""A fraction of the free memory. Passes that a rough estimate puts below it are not counted."""
STEPS = 4
"""Passes that are counted between the smallest budget and the largest."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Trainee:
    """A network in training. ``blueprint``: one made before its weights were cut into shards. ``gathered``: bytes of
    weights and gradients that shards are put together to, for a moment."""

    scorer: PackedModel
    weights: MasterWeights
    blueprint: Blueprint | None = None
    gathered: int = field(init=False)
    tower: TowerMemory = field(init=False)
    _unknown: bool = False

    def __post_init__(self) -> None:
        self.tower = TowerMemory(self.scorer)
        self.gathered = self.blueprint.gathered() if self.blueprint is not None else 0

    def count(self, groups: Sequence[Group]) -> PassMemory | None:
        """The memory of a pass over ``groups``; None where the model cannot be counted."""
        if self._unknown:
            return None
        try:
            self.blueprint = self.blueprint or Blueprint.of(self.scorer)
            return self.blueprint.count(groups)
        except Exception as error:  # of any kind, from the model's class
            log.warning("memory is estimated and not counted: %s", first_line(error))
            self._unknown = True
            return None

    @property
    def checkpointed(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return checkpoints_activations(self.scorer.model)

    def checkpoint(self) -> None:
        """Compute layers again in the backward pass from now on."""
        checkpoint_activations(self.scorer.model)
        if self.blueprint is not None:
            checkpoint_activations(self.blueprint.scorer.model)


@dataclass(slots=True)
class TrainingMemory:
    """What a training takes of its device. ``others``: bytes of models beside those that train, by name. ``sharing``:
    processes that share the memory of the host."""

    trainees: Sequence[Trainee]
    options: RunOptions
    device: torch.device
    others: Mapping[str, int] = field(default_factory=dict)
    sharing: int = 1

    def parts(self) -> dict[str, int]:
        """Bytes by part, without activations. Parts of which this training has none are left out."""
        found = dict.fromkeys(("weights", "float32 masters", "gradients", "optimiser state"), 0)
        seen: set[int] = set()  # networks may share weights
        for trainee in self.trainees:
            own = {id(p): p for p in trainee.scorer.model.parameters()}
            found["weights"] += sum(_bytes(p) for p in own.values() if id(p) not in seen)
            seen |= own.keys()
            if trainee.weights.host is None:
                masters = trainee.weights.masters.values()
                found["float32 masters"] += sum(_bytes(m) for m in masters if id(m) not in own)
                found["gradients"] += sum(map(_bytes, masters))
                found["optimiser state"] += sum(optimizer_bytes(m, self.options.optimizer) for m in masters)
        return {name: count for name, count in {**found, **self.others}.items() if count}

    @property
    def to_come(self) -> int:
        """Bytes of gradients and optimiser state, which are allocated in the first step."""
        parts = self.parts()
        return parts.get("gradients", 0) + parts.get("optimiser state", 0)

    @property
    def on_host(self) -> int:
        """Bytes in host memory in the place of the device's: masters, gradients and optimiser state."""
        masters = [m for t in self.trainees if t.weights.host is not None for m in t.weights.masters.values()]
        return sum(2 * _bytes(m) + optimizer_bytes(m, self.options.optimizer) for m in masters)

    def of(self, groups: Sequence[Group]) -> PassMemory:
        """The memory of a pass over ``groups``: counted, or where that is impossible roughly estimated."""
        found = [t.count(groups) or self._rough(t, _tokens(t.scorer, groups)) for t in self.trainees]
        found = [pass_of.after(t.tower.of(groups)) for t, pass_of in zip(self.trainees, found, strict=True)]
        kept, gathered = sum(p.kept for p in found), sum(t.gathered for t in self.trainees)
        workspace = max(p.workspace for p in found) + gathered
        return PassMemory(kept, max(p.head for p in found), kept + workspace)

    def rough(self, tokens: int) -> int:
        """A rough estimate of the bytes of a pass."""
        return sum(self._rough(t, tokens).peak for t in self.trainees)

    def _rough(self, trainee: Trainee, tokens: int) -> PassMemory:
        scorer = trainee.scorer
        kept = tokens * bytes_per_token(scorer, checkpointing=trainee.checkpointed)
        logits = tokens * vocabulary_size(causal_model(scorer.model)) * scorer.dtype.itemsize
        head = 4 * min(logits, KEEP_BYTES)
        return PassMemory(kept, head, kept + head)

    @property
    def room(self) -> int:
        """Bytes for activations: the share of what is free, less gradients and optimiser state."""
        free = free_memory(self.device) // (1 if self.device.type == "cuda" else self.sharing)
        return int(SHARE[self.device.type] * free) - self.to_come

    def is_small(self, tokens: int) -> bool:
        """Whether a pass of so many tokens takes so little that it need not be counted."""
        pictured = any(t.scorer.pictures for t in self.trainees)  # whose towers the estimate does not know
        return not pictured and self.rough(tokens) < SMALL * self.room

    def token_budget(self, groups: Sequence[Group]) -> tuple[int, bool]:
        """Tokens of a micro-batch of ``groups``, and whether it fits: the largest group may not."""
        scorer, room = self.trainees[0].scorer, self.room
        costs = scorer.layout.costs(GroupTable.of(groups))
        smallest = int(costs.max())
        largest = max(smallest, CEILING[self.device.type] // len(self.trainees))
        if self.is_small(largest):
            return largest, True

        def peak(tokens: int) -> int:
            return self.of([groups[i] for i in largest_batch(costs, tokens)]).peak

        low, high = (smallest, peak(smallest)), (largest, peak(largest))
        if high[1] <= room:
            return largest, True
        if low[1] > room:
            return smallest, False
        for _ in range(STEPS):  # linear between the two, but for groups that are whole
            tokens = int(low[0] + (high[0] - low[0]) * (room - low[1]) / (high[1] - low[1]))
            if tokens <= low[0]:
                break
            found = tokens, peak(tokens)
            if found[1] <= room:
                low = found
            else:
                high = found
            if high[0] - low[0] < low[0] // 20:
                break
        return low[0], True

    def plan(
        self, groups: Sequence[Group], *, tokens: int | None, checkpointed: bool | None, world: World = ALONE
    ) -> int:
        """The token budget of ``groups``: ``tokens`` where it is known. Where ``--gradient-checkpointing auto`` finds
        that too few tokens fit without, activations are checkpointed. ``checkpointed``: what an earlier start found."""
        auto = self.options.gradient_checkpointing == "auto"
        budget = tokens
        if auto and checkpointed is None:
            budget, fits = (tokens, self._fits(groups, tokens)) if tokens else self.token_budget(groups)
            costs = self.trainees[0].scorer.layout.costs(GroupTable.of(groups))
            wanted = min(ENOUGH[self.device.type], int(costs.sum()))
            checkpointed = bool(world.largest(int(not fits or (not tokens and budget < wanted))))
            budget = tokens if checkpointed else budget
        if auto and checkpointed:
            for trainee in self.trainees:
                trainee.checkpoint()
        return budget or self.token_budget(groups)[0]

    def _fits(self, groups: Sequence[Group], tokens: int) -> bool:
        return self.is_small(tokens) or self._largest(groups, tokens).peak <= self.room

    def line(self, groups: Sequence[Group], tokens: int) -> str:
        """What the run takes, in one line."""
        parts = [f"{name} {size(count)}" for name, count in self.parts().items()]
        tokens = min(tokens, _tokens(self.trainees[0].scorer, groups))
        pass_of = f"a pass of {tokens} tokens"
        if self.trainees[0].checkpointed:
            pass_of += ", with checkpointed activations,"
        if self.is_small(tokens):
            parts.append(f"{pass_of} below {size(self.rough(tokens))}")
        else:
            found = self._largest(groups, tokens)
            parts.append(f"{pass_of} {size(found.peak)} ({size(found.kept)} kept for backward)")
            total = sum(self.parts().values()) + found.peak
            parts[-1] += f": {size(total)} in all{self._picture_words(groups, tokens)}"
        return f"memory: {', '.join(parts)}{self._host_words()}"

    def whole_line(self, groups: Sequence[Group], tokens: int) -> str:
        """All parts in one line."""
        found = self._largest(groups, tokens)
        rows = {**self.parts(), "activations kept for backward": found.kept}
        rows["workspace, mostly of the head" if found.head >= found.workspace else "workspace"] = found.workspace
        parts = ", ".join(f"{name} {size(count)}" for name, count in rows.items())
        total = f"{size(sum(rows.values()))} in all"
        told = f"{total}{self._picture_words(groups, tokens)}{self._host_words()}"
        return f"memory on {self.device}, {tokens} tokens at once: {parts}: {told}"

    def _largest(self, groups: Sequence[Group], tokens: int) -> PassMemory:
        return self.of(self._batch(groups, tokens))

    def _batch(self, groups: Sequence[Group], tokens: int) -> list[Group]:
        costs = self.trainees[0].scorer.layout.costs(GroupTable.of(groups))
        return [groups[i] for i in largest_batch(costs, tokens)]

    def _picture_words(self, groups: Sequence[Group], tokens: int) -> str:
        batch = self._batch(groups, tokens)
        most = max(t.tower.of(batch).peak for t in self.trainees)
        count = len(different(batch))
        return f"; encoding {count} picture{'s' * (count > 1)} takes {size(most)} of a pass" if most else ""

    def _host_words(self) -> str:
        return f"; {size(self.on_host)} in host memory" if self.on_host else ""


def blueprint_of(scorer: PackedModel, device: torch.device, dtype: torch.dtype) -> Blueprint | None:
    """The blueprint of a model that is about to be cut into shards, on ``device``; None where it cannot be counted."""
    with suppress(Exception):  # of any kind, from the model's class: memory is then estimated
        return Blueprint.of(scorer, kind=device.type, dtype=dtype)
    return None


def optimizer_bytes(weight: torch.Tensor, name: str) -> int:
    """Bytes of an optimiser's two moments of one weight on its device."""
    count = local_of(weight).numel()
    if name == "adamw" or count < MIN_8BIT:
        return 2 * _bytes(weight)
    if name.startswith("paged") and count >= PAGED_FROM:
        return 0  # moved to the host where the device is full
    return 2 * count + 2 * 4 * -(-count // BLOCK)


def _bytes(tensor: torch.Tensor) -> int:
    local: Any = local_of(tensor)
    return int(local.numel() * local.element_size())


def _tokens(scorer: PackedModel, groups: Sequence[Group]) -> int:
    return int(scorer.layout.costs(GroupTable.of(groups)).sum())
