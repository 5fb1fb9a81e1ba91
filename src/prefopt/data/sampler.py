"""The order of training data, a pure function of seed and epoch, and the split into training and held-out prompts.

>>> half = Share(np.arange(4), 0.5)
>>> mixture = BatchSampler(7, 2, seed=0, shares=[half, Share(np.arange(4, 7), 2.0)])
>>> mixture.epoch_size, mixture.steps_per_epoch
(8, 4)
>>> sorted(i for epoch in (0, 1) for i in mixture.order(epoch).tolist() if i < 4)
[0, 1, 2, 3]

>>> train, held = split_by_prompt(np.array([b"a", b"b", b"a", b"c"]), fraction=0.5, seed=0)
>>> sorted(train + held)
[0, 1, 2, 3]
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from prefopt.data.table import IndexArray, KeyArray
from prefopt.errors import ConfigError, DataError

# A sequence of ints of eight bytes.
Indices: TypeAlias = "array[int]"


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One source of a mixture: the indices of its groups, [n], and its weight.

    An epoch takes every group floor(weight) times and some of them once more, round(weight * n) in all. The latter move
    on around a fixed permutation, so that the counts of two groups never differ by more than one.
    """

    groups: IndexArray
    weight: float

    @property
    def size(self) -> int:
        """Groups in an epoch."""
        return round(self.weight * len(self.groups))

    def taken(self, epoch: int, circle: IndexArray) -> IndexArray:
        """The groups of an epoch, in order; ``circle`` is a permutation [n]."""
        n, whole = len(self.groups), math.floor(self.weight)
        part = self.size - whole * n
        once = np.sort(circle[(epoch * part + np.arange(part)) % n]) if part else circle[:0]
        taken: IndexArray = self.groups[np.concatenate([np.tile(np.arange(n), whole), once])]
        return taken


class BatchSampler:
    """Global batches of ``batch_size`` indices of ``size`` groups; the last one of an epoch may be smaller. Without
    ``shares``, which make it a mixture, an epoch takes every group once."""

    def __init__(
        self, size: int, batch_size: int, *, seed: int, shuffle: bool = True, shares: Sequence[Share] = ()
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle, self.shares = size, batch_size, seed, shuffle, shares
        self.epoch_size = sum(share.size for share in shares) if shares else size
        self.steps_per_epoch = -(-self.epoch_size // batch_size)
        self._last: tuple[int, IndexArray] | None = None

    def order(self, epoch: int) -> IndexArray:
        """The indices of one epoch, [epoch_size]."""
        if self._last is not None and self._last[0] == epoch:  # every step asks for its epoch
            return self._last[1]
        taken = []
        for source, share in enumerate(self.shares):
            # The 1 keeps these seeds apart from those of the epochs, which numpy extends with zeros.
            circle = np.random.Generator(np.random.PCG64([self.seed, source, 1])).permutation(len(share.groups))
            taken.append(share.taken(epoch, circle))
        indices = np.concatenate(taken) if taken else np.arange(self.size)
        if self.shuffle:
            indices = indices[np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(indices))]
        self._last = epoch, indices
        return indices

    def batch(self, step: int) -> IndexArray:
        """The indices of global step ``step``, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]


def split_by_prompt(keys: KeyArray, fraction: float, seed: int, *, least: int = 1) -> tuple[Indices, Indices]:
    """Indices (train, held out) of rows, given the keys of their prompts; no prompt is on both sides.

    A prompt is held out with probability ``fraction`` by a hash of seed and key, so that rows appended later move no
    other row. At least ``least`` prompts are held out, those with the smallest hashes, and one is left. Raises
    :class:`ConfigError` for a fraction that is not between 0 and 1, :class:`DataError` for fewer than two different
    prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--eval-fraction {fraction} should lie between 0 and 1")
    prompts, prompt = np.unique(keys, return_inverse=True)
    data, width = prompts.tobytes(), prompts.itemsize  # with trailing zero bytes, which numpy drops from an item
    names = [data[start : start + width] for start in range(0, len(data), width)]
    salt = seed.to_bytes(16, "little", signed=True)
    digests = (hashlib.blake2b(name, digest_size=8, salt=salt).digest() for name in names)
    place = np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests])
    if len(place) < 2:
        raise DataError("all rows have the same prompt, so none can be held out; name a file with --eval-data")
    held = place < fraction
    count = min(max(int(held.sum()), least), len(place) - 1)
    if count != held.sum():
        ranked = sorted(zip(place.tolist(), names, range(len(place)), strict=True))
        held[[number for _, _, number in ranked]] = np.arange(len(place)) < count
    side = held[prompt]
    return indices(np.flatnonzero(~side)), indices(np.flatnonzero(side))


def indices(numbers: IndexArray) -> Indices:
    """The same numbers as a sequence of ints."""
    return array("q", np.ascontiguousarray(numbers, np.int64).tobytes())
