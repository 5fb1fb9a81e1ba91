"""Rows that say the same again, or the opposite: found by 8-byte hashes, so that a million rows fit in memory.

>>> from prefopt.records import Comparison
>>> repeats = Repeats()
>>> for row, sides in enumerate([("4", "22"), ("22", "4"), ("4", "22")], 1):
...     repeats.add(Comparison.pair("2 + 2 =", chosen=sides[0], rejected=sides[1], row=row), source=0)
>>> repeats.duplicates()
[(2, 0)]
>>> repeats.contradictions()
[(0, 1), (1, 0), (2, 1)]
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from prefopt.records import Comparison, Response

Found = list[tuple[int, int]]
"""(place of a row, place of the row that it repeats or contradicts); places count rows in the order they were added."""


class Repeats:
    """What rows said, as hashes. Two different rows share one by chance in 3 of 100 million files of a million rows."""

    def __init__(self) -> None:
        self.source, self.row = array("i"), array("q")
        self._prompts, self._rows = array("Q"), array("Q")
        self._claims, self._sides, self._claimers = array("Q"), array("b"), array("q")

    def __len__(self) -> int:
        return len(self.row)

    def add(self, c: Comparison, source: int) -> None:
        """Take note of a row; ``source`` is the number of its file."""
        place = len(self.row)
        self.source.append(source)
        self.row.append(c.row)
        prompt = c.prompt_key
        names = [_name(r) for r in c.responses]
        self._prompts.append(_number(prompt[:8]))
        self._rows.append(_hash(prompt, *sorted(_standing(c, k) + names[k] for k in range(len(names)))))
        for better, worse in _claims(c, names):
            self._claims.append(_hash(prompt, *sorted((better, worse))))
            self._sides.append(better < worse)
            self._claimers.append(place)

    @property
    def prompts(self) -> npt.NDArray[np.uint64]:
        """[rows] a number for each row's prompt."""
        return np.frombuffer(self._prompts, np.uint64)

    def duplicates(self) -> Found:
        """Rows with the prompt, the responses and the preference of a row before them."""
        return _again(np.frombuffer(self._rows, np.uint64))

    def contradictions(self) -> Found:
        """Rows that prefer one response to another where another row, of the same prompt, says the opposite.

        A label of a response claims that it is better, or worse, than nothing.
        """
        keys = np.frombuffer(self._claims, np.uint64)
        if not len(keys):
            return []
        sides, places = np.frombuffer(self._sides, np.int8), np.frombuffer(self._claimers, np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        none = len(self.row)
        first = [np.minimum.reduceat(np.where(sides[order] == s, places[order], none), starts) for s in (0, 1)]
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(keys)))
        other = np.where(sides[order] == 0, first[1][group], first[0][group])
        claimed = places[order]
        at = np.flatnonzero(other < none)
        at = at[np.lexsort((other[at], claimed[at]))]
        rows, first_of = np.unique(claimed[at], return_index=True)
        return list(zip(rows.tolist(), other[at][first_of].tolist(), strict=True))

    def prompts_of(self, other: Repeats) -> Found:
        """Rows of this whose prompt ``other`` has too, each with the first place of it there."""
        mine, theirs = self.prompts, other.prompts
        known, first = np.unique(theirs, return_index=True)
        if not len(known):
            return []
        at = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        places = np.flatnonzero(known[at] == mine)
        return list(zip(places.tolist(), first[at[places]].tolist(), strict=True))


def _again(keys: npt.NDArray[np.uint64]) -> Found:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found = first[inverse] if len(keys) else inverse
    return [(i, int(found[i])) for i in np.flatnonzero(found != np.arange(len(keys))).tolist()]


def _claims(c: Comparison, names: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """(better, worse) by name, each pair once; what a row says both ways counts as what it sums to."""
    weights = [vote[2] for vote in c.votes] if c.votes is not None else [1.0] * len(c.pairs)
    said = [(names[best], names[worse], weight) for (best, worse), weight in zip(c.pairs, weights, strict=True)]
    for name, good in zip(names, c.labels or (), strict=bool(c.labels)):
        said.append((name, _NOTHING, 1.0) if good else (_NOTHING, name, 1.0))
    margin: dict[tuple[bytes, bytes], float] = {}
    for better, worse, weight in said:
        key, sign = ((better, worse), 1) if better < worse else ((worse, better), -1)
        margin[key] = margin.get(key, 0.0) + sign * weight
    for (a, b), difference in margin.items():
        if a != b and difference:
            yield (a, b) if difference > 0 else (b, a)


_NOTHING = bytes(8)


def _standing(c: Comparison, k: int) -> bytes:
    """What is said of response k, as bytes of one length: its tier, its label, and how often it wins and loses."""
    tier = next((t for t, tier in enumerate(c.tiers) if k in tier), -1)
    label = -1 if c.labels is None else int(c.labels[k])
    votes = c.votes or ()
    counts = sum(best == k for best, *_ in votes), sum(worse == k for _, worse, _ in votes)
    return b"".join(n.to_bytes(4, "little", signed=True) for n in (tier, label, *counts))


def _name(response: Response) -> bytes:
    parts = [part for m in response.messages for part in (m.role, m.content.strip(), m.reasoning or "")]
    parts += [part for m in response.messages for call in m.tool_calls for part in (call.name, call.arguments)]
    return _hash(*(part.encode("utf-8", "surrogatepass") for part in parts)).to_bytes(8, "little")


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return _number(digest.digest())


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
