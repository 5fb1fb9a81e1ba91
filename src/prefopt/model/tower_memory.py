"""Memory of computing the features of pictures, measured: the largest picture is encoded once, and others are taken to
need as much for each of their tokens.

A tower whose attention is among the tokens of one picture needs that much or less for a smaller one. Towers in shards
are not measured, since all ranks would have to encode together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from prefopt.data.group import Group, Placed
from prefopt.model.costs import uncounted
from prefopt.model.memory import LiveBytes, PassMemory
from prefopt.model.scorer import PackedModel

NOTHING = PassMemory(0, 0, 0)


@dataclass(slots=True)
class TowerMemory:
    """Of the towers of a scorer's model, as they train or not."""

    scorer: PackedModel
    _tokens: int = 0
    _measured: PassMemory = field(default=NOTHING)

    def of(self, groups: Sequence[Group]) -> PassMemory:
        """Bytes of encoding the pictures of ``groups``, each once: ``kept`` are features, and what towers that train
        need for backward; ``peak`` while features or gradients are computed."""
        pictures = different(groups)
        if not pictures or self.scorer.cut_towers or next(self.scorer.model.parameters()).is_meta:
            return NOTHING
        largest = max(pictures, key=_length)
        if _length(largest) > self._tokens:
            self._tokens, self._measured = _length(largest), self._measure(largest)
        ratio = sum(map(_length, pictures)) / self._tokens
        return PassMemory(int(ratio * self._measured.kept), 0, int(ratio * self._measured.peak))

    def _measure(self, placed: Placed) -> PassMemory:
        vision, device = self.scorer.vision, next(self.scorer.model.parameters()).device
        pixels = vision.processor.pixels([placed.picture])
        trained = [p for tower in vision.towers for p in tower.parameters() if p.requires_grad]
        with uncounted(), torch.random.fork_rng(devices=[]), LiveBytes(device.type) as live:
            output = vision.features(pixels, device)
            used = (output.pooler_output, getattr(output, "deepstack_features", None))
            kept, peak = live.live, live.peak
            if trained:
                total = sum(x.sum() for x in tree_leaves(used) if isinstance(x, torch.Tensor))
                live.mark("backward")
                given = torch.autograd.grad(total, trained, allow_unused=True)  # type: ignore[arg-type]
                own = sum(g.untyped_storage().nbytes() for g in given if g is not None)
                peak = max(peak, live.peak - own)  # gradients of weights are counted with the weights
        return PassMemory(kept, 0, peak)


def different(groups: Sequence[Group]) -> list[Placed]:
    """The pictures of groups, each once."""
    found: dict[bytes, Placed] = {}
    for group in groups:
        for placed in (*group.pictures, *(p for c in group.continuations for p in c.pictures)):
            found.setdefault(placed.picture.digest, placed)
    return list(found.values())


def _length(placed: Placed) -> int:
    return placed.stop - placed.start
