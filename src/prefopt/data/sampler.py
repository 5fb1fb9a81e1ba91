"""The order of training data: a pure function of seed and epoch, so that any step can be rebuilt from its number.

>>> half = Share(np.arange(4), 0.5)
>>> mixture = Sampler(7, 2, seed=0, shares=[half, Share(np.arange(4, 7), 2.0)])
>>> mixture.epoch_size, mixture.steps_per_epoch
(8, 4)
>>> sorted(i for epoch in (0, 1) for i in mixture.order(epoch).tolist() if i < 4)
[0, 1, 2, 3]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A source's part of a mixture: where its groups are, [n], and how often an epoch takes each of them.

    An epoch takes every group floor(weight) times, and besides a part of them once, so that it takes
    round(weight * n) in all. The part moves on around a fixed circle of the groups: no group is in it twice, and after
    any number of epochs all groups were taken equally often, but for one.
    """

    groups: IndexArray
    weight: float

    @property
    def size(self) -> int:
        """How many an epoch takes."""
        return round(self.weight * len(self.groups))

    def taken(self, epoch: int, circle: IndexArray) -> IndexArray:
        """What an epoch takes, in the order of the groups; ``circle`` is a permutation [n]."""
        n, whole = len(self.groups), math.floor(self.weight)
        part = self.size - whole * n
        once = np.sort(circle[(epoch * part + np.arange(part)) % n]) if part else circle[:0]
        taken: IndexArray = self.groups[np.concatenate([np.tile(np.arange(n), whole), once])]
        return taken


class Sampler:
    """Global batches of ``batch_size`` indices into ``size`` groups; the last batch of an epoch may be smaller.

    ``shares`` make it a mixture; without them every group is taken once in an epoch.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, shuffle: bool = True, shares: Sequence[Share] = ()
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle, self.shares = size, batch_size, seed, shuffle, shares
        self.epoch_size = sum(share.size for share in shares) if shares else size
        self.steps_per_epoch = -(-self.epoch_size // batch_size)
        self._last: tuple[int, IndexArray] | None = None

    def order(self, epoch: int) -> IndexArray:
        """The indices of one epoch, [epoch_size]."""
        if self._last is None or self._last[0] != epoch:  # kept: a step asks for its own epoch, again and again
            self._last = epoch, self._order(epoch)
        return self._last[1]

    def batch(self, step: int) -> IndexArray:
        """The indices of global step ``step``, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def _order(self, epoch: int) -> IndexArray:
        taken = [share.taken(epoch, self._circle(s, len(share.groups))) for s, share in enumerate(self.shares)]
        indices = np.concatenate(taken) if taken else np.arange(self.size)
        if not self.shuffle:
            return indices
        return indices[np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(indices))]

    def _circle(self, source: int, n: int) -> IndexArray:
        # The 1 sets these seeds apart from those of the epochs, to which numpy adds zeros.
        return np.random.Generator(np.random.PCG64([self.seed, source, 1])).permutation(n)
