"""Rows held out for evaluation, by prompt.

>>> train, held = split_by_prompt([b"a", b"b", b"a", b"c"], fraction=0.5, seed=0)
>>> sorted(train + held)
[0, 1, 2, 3]
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from prefopt.data.table import IndexArray, KeyArray
from prefopt.errors import ConfigError, DataError

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
