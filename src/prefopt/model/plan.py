"""Which groups are scored together: decided once, kept on disk until all of it is done.

The rounding of a value depends on what shares its forward pass. A run that was interrupted therefore goes on with
the batches that were planned before, whichever of them are left, and ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt.disk.cache import cache_errors
from prefopt.model.blocks import Damaged, read_sealed, write_sealed

log = logging.getLogger(__name__)

Keys = tuple[bytes, ...]  # the names of a group's responses


@dataclass(frozen=True, slots=True)
class Plan:
    """Batches of groups, each group by the keys of its responses; a batch fits ``token_budget``.

    A group larger than the budget has a batch to itself.
    """

    token_budget: int
    batches: tuple[tuple[Keys, ...], ...]

    @classmethod
    def make(cls, costs: Mapping[Keys, int], wanted: set[bytes], token_budget: int) -> Plan:
        """Batches that cover ``wanted``; ``costs`` gives the tokens of each group that may be scored.

        Longest first: memory runs out at once or never, and the time left is never estimated too short. A group is
        left out where others already bring all it has.
        """
        batches: list[tuple[Keys, ...]] = []
        batch: list[Keys] = []
        left, room = set(wanted), token_budget
        for keys in sorted(costs, key=lambda k: (-costs[k], k)):
            if left.isdisjoint(keys):
                continue
            left.difference_update(keys)
            if batch and costs[keys] > room:
                batches.append(tuple(batch))
                batch, room = [], token_budget
            batch.append(keys)
            room -= costs[keys]
        return cls(token_budget, tuple([*batches, tuple(batch)] if batch else batches))

    def work(self, wanted: set[bytes]) -> Iterator[tuple[tuple[Keys, ...], list[set[int]]]]:
        """The batches still to run for ``wanted`` and, for each group, the responses whose values count.

        A response that several groups hold is taken from the first, so that interruption cannot change which.
        """
        seen: set[bytes] = set()
        for batch in self.batches:
            take = []
            for keys in batch:
                fresh = {k: key for k, key in enumerate(keys) if key not in seen and key not in keys[:k]}
                seen.update(keys)
                take.append({k for k, key in fresh.items() if key in wanted})
            if any(take):
                yield batch, take

    def write(self, path: Path, space: str) -> None:
        """Raises ``CacheError``."""
        groups = [keys for batch in self.batches for keys in batch]
        write_sealed(
            path,
            {
                "keys": np.frombuffer(b"".join(key for keys in groups for key in keys), np.uint8),
                "group_sizes": np.array([len(keys) for keys in groups], np.int64),
                "batch_sizes": np.array([len(batch) for batch in self.batches], np.int64),
                "token_budget": np.array([self.token_budget], np.int64),
            },
            space,
        )

    @classmethod
    def read(cls, path: Path, space: str) -> Plan | None:
        """The plan kept at ``path``; None where there is none or it is damaged, and a new one must be made."""
        try:
            with cache_errors(path):
                if not path.exists():
                    return None
                arrays = read_sealed(path, space)
        except Damaged as damage:
            log.warning("cache plan %s is damaged (%s): planning again what is missing", path, damage)
            return None
        names = arrays["keys"].tobytes()
        keys = iter([names[i : i + 16] for i in range(0, len(names), 16)])
        groups = iter([tuple(next(keys) for _ in range(size)) for size in arrays["group_sizes"].tolist()])
        batches = tuple(tuple(next(groups) for _ in range(size)) for size in arrays["batch_sizes"].tolist())
        return cls(int(arrays["token_budget"][0]), batches)

    def covers(self, wanted: set[bytes]) -> bool:
        """Whether all that is wanted was planned (a block damaged since then was not)."""
        return wanted <= {key for batch in self.batches for keys in batch for key in keys}


def plan_file(folder: Path, groups: Iterable[Keys], token_values: bool) -> Path:
    """Where the plan for a set of groups is kept: named by what was asked for, in whatever order."""
    digest = hashlib.sha256()
    for keys in sorted(set(groups)):
        digest.update(len(keys).to_bytes(4, "little") + b"".join(keys))
    return folder / f"plan-{'tokens' if token_values else 'sums'}-{digest.hexdigest()[:16]}.safetensors"
