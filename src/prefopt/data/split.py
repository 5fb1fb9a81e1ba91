"""Rows held out for evaluation, by prompt.

>>> train, held = split_by_prompt([b"a", b"b", b"a", b"c"], fraction=0.5, seed=0)
>>> sorted(train + held)
[0, 1, 2, 3]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from prefopt.errors import ConfigError, DataError


def split_by_prompt(keys: Sequence[bytes], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (train, held out) of rows named by the keys of their prompts; no prompt is on both sides.

    Each prompt is held out with probability ``fraction`` by a hash of seed and prompt, so that rows appended later
    change no other row's side. Both sides get at least one prompt. Raises :class:`ConfigError` for a fraction that is
    not between 0 and 1 and :class:`DataError` for fewer than two different prompts.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--eval-fraction {fraction} should lie between 0 and 1")
    place = {key: _place(key, seed) for key in set(keys)}
    if len(place) < 2:
        raise DataError("all rows have the same prompt, so none can be held out; name a file with --eval-data")
    ranked = sorted(place, key=lambda key: (place[key], key))
    held = {key for key in ranked if place[key] < fraction} or {ranked[0]}
    if len(held) == len(ranked):
        held.discard(ranked[-1])
    train = [i for i, key in enumerate(keys) if key not in held]
    return train, [i for i, key in enumerate(keys) if key in held]


def _place(key: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and prompt."""
    digest = hashlib.blake2b(key, digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
