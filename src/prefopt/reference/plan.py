"""Which groups are scored together: planned once, and kept on disk until all of it is done.

The rounding of a value depends on what shares its forward pass. An interrupted run therefore continues with the batches
that are left of its plan, and ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from prefopt.core.cache_folder import Damaged, cache_errors
from prefopt.data.table import KEY, IndexArray, KeyArray, ranges
from prefopt.reference.blocks import find_sorted, read_sealed, write_sealed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class NamedGroups:
    """G groups by the keys of their N responses: group g has ``keys_N[starts[g]:starts[g + 1]]``, ``names_G`` [G]."""

    keys_N: KeyArray
    starts: IndexArray
    names_G: KeyArray

    @classmethod
    def of(cls, keys_N: KeyArray, starts: IndexArray) -> NamedGroups:
        """Name groups by a hash over the keys of their responses."""
        data = np.ascontiguousarray(keys_N).view(np.uint8).data
        names = bytearray()
        for first in range(0, len(starts) - 1, 1 << 14):  # in chunks: there may be millions
            bounds = (starts[first : first + (1 << 14) + 1] * KEY.itemsize).tolist()
            names += b"".join(hashlib.blake2b(data[a:b], digest_size=16).digest() for a, b in pairwise(bounds))
        return cls(keys_N, starts, np.frombuffer(bytes(names), KEY))

    def find(self, names: KeyArray) -> IndexArray:
        """Positions of the groups of these names; each must be there."""
        order = np.argsort(self.names_G, kind="stable")
        at: IndexArray = order[np.searchsorted(self.names_G[order], names)]
        assert (self.names_G[at] == names).all()
        return at

    def take(self, groups: IndexArray) -> NamedGroups:
        """Some of the groups, in the order given."""
        sizes = np.diff(self.starts)
        starts = np.concatenate([[0], np.cumsum(sizes[groups], dtype=np.int64)])
        return NamedGroups(self.keys_N[ranges(self.starts, sizes, groups)], starts, self.names_G[groups])


@dataclass(frozen=True, slots=True, eq=False)
class ScoringPlan:
    """Batches of groups: batch b has the groups ``batch_starts[b]:batch_starts[b + 1]``; it fits ``token_budget``. A
    group larger than the budget has a batch to itself."""

    token_budget: int
    groups: NamedGroups
    batch_starts: IndexArray

    @classmethod
    def make(cls, groups: NamedGroups, costs_G: IndexArray, wanted: KeyArray, token_budget: int) -> ScoringPlan:
        """Batches that cover the keys ``wanted`` (sorted); ``costs_G``: tokens of each group.

        Longest first, so that memory runs out at once or never, and the remaining time is never underestimated. A group
        is planned if it is the first to hold a wanted response.
        """
        order = np.lexsort((groups.names_G, -costs_G))  # by name where costs are equal, whatever the data's order
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        at, needed_N = find_sorted(groups.keys_N, wanted)
        first = np.full(len(wanted), len(order))
        np.minimum.at(first, at[needed_N], np.repeat(rank, np.diff(groups.starts))[needed_N])
        needed = order[np.unique(first[first < len(order)])]
        starts: list[int] = []
        room = 0
        for g, cost in enumerate(costs_G[needed].tolist()):
            if not starts or cost > room:
                starts.append(g)
                room = token_budget
            room -= cost
        return cls(token_budget, groups.take(needed), np.array([*starts, len(needed)], np.int64))

    def work(self, wanted: KeyArray) -> Iterator[tuple[range, IndexArray]]:
        """The batches left for the keys ``wanted`` (sorted): their groups, and the responses whose values count.

        Responses are numbered over the whole plan. One that several groups hold is taken from the first, so that an
        interruption does not change which.
        """
        keys, starts = self.groups.keys_N, self.groups.starts
        take = np.zeros(len(keys), np.bool_)
        take[np.unique(keys, return_index=True)[1]] = True
        take &= find_sorted(keys, wanted)[1]
        for first, last in pairwise(self.batch_starts.tolist()):
            here: IndexArray = np.flatnonzero(take[starts[first] : starts[last]]) + starts[first]
            if len(here):
                yield range(first, last), here

    def covers(self, wanted: KeyArray) -> bool:
        """Whether all of ``wanted`` was planned (a block damaged since then was not)."""
        return bool(find_sorted(wanted, np.unique(self.groups.keys_N))[1].all())

    def write(self, path: Path, space: str) -> None:
        """Raises ``CacheError``."""
        arrays = {
            "keys": np.frombuffer(self.groups.keys_N.tobytes(), np.uint8),
            "group_sizes": np.diff(self.groups.starts),
            "batch_sizes": np.diff(self.batch_starts),
            "token_budget": np.array([self.token_budget], np.int64),
        }
        write_sealed(path, arrays, space)

    @classmethod
    def read(cls, path: Path, space: str) -> ScoringPlan | None:
        """The plan at ``path``; None where there is none or it is damaged, and a new one must be made."""
        try:
            with cache_errors(path):
                if not path.exists():
                    return None
                arrays = read_sealed(path, space)
        except Damaged as damage:
            log.warning("cache plan %s is damaged (%s): planning again what is missing", path, damage)
            return None
        keys = np.frombuffer(arrays["keys"].tobytes(), KEY)
        starts, batches = (
            np.concatenate([[0], np.cumsum(arrays[name], dtype=np.int64)]) for name in ("group_sizes", "batch_sizes")
        )
        return cls(int(arrays["token_budget"][0]), NamedGroups.of(keys, starts), batches)


def plan_file(folder: Path, groups: NamedGroups, token_values: bool) -> Path:
    """The file of the plan for a set of groups, in whatever order."""
    digest = hashlib.sha256(np.unique(groups.names_G).tobytes())
    return folder / f"plan-{'tokens' if token_values else 'sums'}-{digest.hexdigest()[:16]}.safetensors"
