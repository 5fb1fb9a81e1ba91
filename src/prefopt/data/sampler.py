"""The order of training data: a pure function of seed and epoch, so that any step can be rebuilt from its number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Sampler:
    """Global batches of ``batch_size`` indices into ``size`` groups; the last batch of an epoch may be smaller."""

    def __init__(self, size: int, batch_size: int, *, seed: int, shuffle: bool = True) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.steps_per_epoch = -(-size // batch_size)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The permutation [size] of one epoch."""
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.size)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """The indices of global step ``step``, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
