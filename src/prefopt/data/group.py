"""A group: one prompt with its K responses, as token ids.

>>> import numpy as np
>>> chosen = (np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1], bool))
>>> rejected = (np.array([1, 2, 3, 9, 9]), np.array([0, 0, 1, 1, 1], bool))
>>> group = Group.from_sequences([chosen, rejected], row=1)
>>> group.prefix.tolist(), [c.ids.tolist() for c in group.continuations], group.tokens
([1, 2], [[3, 4], [3, 9, 9]], 7)

The shared prefix ends before the first trained token of any response (token 3 above is common, but trained),
so that whatever the chat template or the tokenizer did at the boundary is right by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """What one response adds to the shared prefix: ``ids`` and ``trained``, both [R]."""

    ids: IntArray
    trained: BoolArray


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """``prefix`` [P] and K continuations, with what people said of them (see :class:`prefopt.records.Comparison`).

    ``pairs`` are (preferred, dispreferred) indices into the continuations, ``weights`` one number for each pair (none:
    all weigh the same); ``tiers``, ``scores`` [K] and ``labels`` [K] are the record's.
    """

    prefix: IntArray
    continuations: tuple[Continuation, ...]
    row: int
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    weights: tuple[float, ...] | None = None
    tiers: tuple[tuple[int, ...], ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
        row: int,
        pairs: tuple[tuple[int, int], ...] = ((0, 1),),
    ) -> Group:
        """Compute the shared prefix of K whole sequences, each (ids [L], trained [L]).

        Raises ``ValueError`` where a sequence is left without a trained token that has any context: a token with
        nothing before it is never scored.
        """
        whole = [(np.asarray(i, np.int32), np.array(t, np.bool_)) for i, t in sequences]
        length = min(_first_trained(ids, trained) for ids, trained in whole)
        first = whole[0][0]
        for ids, _ in whole[1:]:
            differs = np.nonzero(ids[:length] != first[:length])[0]
            length = int(differs[0]) if len(differs) else length
        continuations = []
        for ids, trained in whole:
            rest = trained[length:].copy()
            if length == 0:
                rest[0] = False
            if not rest.any():
                raise ValueError("a response has no token to train")
            continuations.append(Continuation(ids[length:], rest))
        return cls(first[:length], tuple(continuations), row, pairs)

    @property
    def tokens(self) -> int:
        """Tokens that one shared forward pass encodes: P + sum of R."""
        return len(self.prefix) + sum(len(c.ids) for c in self.continuations)

    @property
    def longest(self) -> int:
        """Tokens of the longest whole sequence."""
        return len(self.prefix) + max(len(c.ids) for c in self.continuations)

    def sequence(self, k: int) -> tuple[IntArray, BoolArray]:
        """Response k as a whole sequence: ids [L], trained [L]."""
        c = self.continuations[k]
        trained = np.concatenate([np.zeros(len(self.prefix), np.bool_), c.trained])
        return np.concatenate([self.prefix, c.ids]), trained

    def key(self, k: int) -> bytes:
        """16 bytes that name response k by its token ids and mask, wherever the shared prefix ends."""
        ids, trained = self.sequence(k)
        digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=16)
        digest.update(ids.astype("<i4").tobytes())
        digest.update(np.packbits(trained).tobytes())
        return digest.digest()


def _first_trained(ids: IntArray, trained: BoolArray) -> int:
    if ids.shape != trained.shape or ids.ndim != 1:
        raise ValueError(f"ids {ids.shape} and mask {trained.shape} differ in shape")
    where = np.nonzero(trained)[0]
    if not len(where):
        raise ValueError("a response has no token to train")
    return int(where[0])
