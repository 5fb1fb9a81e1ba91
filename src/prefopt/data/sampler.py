"""The order of training data: a pure function of seed and epoch, so that any step can be rebuilt from its number.

>>> half = Share(np.arange(4), 0.5)
>>> mixture = Sampler(7, 2, seed=0, shares=[half, Share(np.arange(4, 7), 2.0)])
>>> mixture.epoch_size, mixture.steps_per_epoch
(8, 4)
>>> sorted(i for epoch in (0, 1) for i in mixture.order(epoch).tolist() if i < 4)
[0, 1, 2, 3]

>>> train, held = split_by_prompt([b"a", b"b", b"a", b"c"], fraction=0.5, seed=0)
>>> sorted(train + held)
[0, 1, 2, 3]
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from prefopt.data.table import KeyArray
from prefopt.errors import ConfigError, DataError

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


Indices: TypeAlias = "array[int]"
"""Whole numbers of eight bytes: a sequence of ints, small enough for a million rows."""


def split_by_prompt(keys: Sequence[bytes] | KeyArray, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Indices (train, held out) of rows named by the keys of their prompts; no prompt is on both sides.

    Each prompt is held out with probability ``fraction`` by a hash of seed and prompt, so that rows appended later
    change no other row's side. Both sides get at least one prompt. Raises :class:`ConfigError` for a fraction that is
    not between 0 and 1 and :class:`DataError` for fewer than two different prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--eval-fraction {fraction} should lie between 0 and 1")
    names, prompt = _distinct(keys)
    place = np.array([_place(name, seed) for name in names])
    if len(place) < 2:
        raise DataError("all rows have the same prompt, so none can be held out; name a file with --eval-data")
    held = place < fraction
    if held.all() or not held.any():
        ranked = sorted(zip(place.tolist(), _distinct(keys)[0], range(len(place)), strict=True))
        held[ranked[-1 if held.all() else 0][2]] ^= True
    side = held[prompt]
    return indices(np.flatnonzero(~side)), indices(np.flatnonzero(side))


def indices(numbers: IndexArray) -> Indices:
    """The same numbers as a sequence of ints."""
    found: Indices = array("q")
    found.frombytes(np.ascontiguousarray(numbers, np.int64).tobytes())
    return found


def _distinct(keys: Sequence[bytes] | KeyArray) -> tuple[Iterable[bytes], IndexArray]:
    """The different keys, and for each row which of them is its own."""
    if isinstance(keys, np.ndarray):
        found, inverse = np.unique(keys, return_inverse=True)
        data, width = found.tobytes(), found.itemsize  # with the zero bytes at the end, which numpy leaves away
        return (data[i : i + width] for i in range(0, len(data), width)), inverse
    number: dict[bytes, int] = {}
    inverse = np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
    return number, inverse


def _place(key: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and prompt."""
    digest = hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
