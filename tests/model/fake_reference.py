"""A reference model that is none, for the tests of the cache.

Its score depends, in the last digits, on everything that shares the batch, as a real one does. Run as a script it
scores in a process of its own, to be killed and raced.
"""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dying import Death, die_at
from prefopt.data.group import Group
from prefopt.errors import CacheError, Interrupted
from prefopt.reference import cache
from prefopt.reference.blocks import block_files, read_sealed
from prefopt.reference.cache import Identity, ReferenceCache, ResponseScore, ScoreBatch, SpaceKey

SPACE = SpaceKey(Identity("weights", "config", name="a model"), "float32", "shared", "sdpa", "cpu", 1)
BUDGET = 200


def make_groups(n: int, seed: int = 0, responses: int = 2) -> list[Group]:
    rng = np.random.default_rng(seed)
    groups = []
    for row in range(n):
        prompt = rng.integers(1000, size=rng.integers(2, 30))
        sequences = []
        for _ in range(responses):
            response = rng.integers(1000, size=rng.integers(2, 30))
            mask = np.repeat([False, True], [len(prompt), len(response)])
            sequences.append((np.concatenate([prompt, response]), mask))
        groups.append(Group.from_sequences(sequences, row=row + 1))
    return groups


def keys_of(groups: Sequence[Group]) -> list[bytes]:
    return [group.key(k) for group in groups for k in range(len(group.continuations))]


class Fake:
    """Scores without a model and notes what it was asked."""

    def __init__(self, token_values: bool = False, before: Callable[[], None] = lambda: None) -> None:
        self.token_values, self.before = token_values, before
        self.loads = 0
        self.batches: list[list[Group]] = []

    def make(self) -> ScoreBatch:
        self.loads += 1
        return self.score

    def score(self, groups: list[Group]) -> list[list[ResponseScore]]:
        self.before()
        self.batches.append(groups)
        together = hashlib.sha256(b"".join(keys_of(groups))).digest()
        rounding = int.from_bytes(together[:4], "little") * 1e-18
        return [[self._response(group, k, rounding) for k in range(len(group.continuations))] for group in groups]

    def _response(self, group: Group, k: int, rounding: float) -> ResponseScore:
        total = -int.from_bytes(group.key(k)[:4], "little") / 1e8 + rounding
        count = int(group.continuations[k].trained.sum())
        return ResponseScore(total, count, np.full(count, total / count, np.float32) if self.token_values else None)

    @property
    def responses(self) -> int:
        return len({key for batch in self.batches for key in keys_of(batch)})


def fill(root: Path, groups: Sequence[Group], fake: Fake | None = None, **options: Any) -> Fake:
    fake = fake or Fake(options.get("token_values", False))
    ReferenceCache(SPACE, root).fill(groups, fake.make, **({"token_budget": BUDGET} | options))
    return fake


def sums(root: Path, groups: Sequence[Group]) -> bytes:
    return ReferenceCache(SPACE, root).values(groups).sums_N.tobytes()


def committed(root: Path) -> set[bytes]:
    folder = ReferenceCache(SPACE, root).folder
    blocks = [read_sealed(path, SPACE.id)["keys"] for path in block_files(folder)]
    return {row.tobytes() for keys in blocks for row in keys}


class Once:
    """Interrupts at the nth call."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self) -> None:
        self.n -= 1
        if self.n == 0:
            raise Interrupted("stopped", signal.SIGTERM)


def child(root: Path, n: int, name: str, delay: float, fill_disk_after: int, death: Death | None = None) -> None:
    """``death``: where it dies. Then its clock counts batches, so that every third commits."""
    import resource

    cache.COMMIT_SECONDS = 0.01 if not fill_disk_after else 0.0
    cache.COMMIT_SHARE = 0.0
    log = root / f"{name}.log"
    calls = 0

    def score(batch: list[Group]) -> list[list[ResponseScore]]:
        nonlocal calls
        calls += 1
        if fill_disk_after and calls > fill_disk_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
        else:
            with log.open("a") as handle:
                handle.write(" ".join(key.hex() for key in keys_of(batch)) + "\n")
        time.sleep(delay)
        return Fake().score(batch)

    groups = make_groups(n)
    if death:
        cache.time = SimpleNamespace(monotonic=lambda: calls * 0.004)  # type: ignore[assignment]
        die_at(death)
    try:
        report = ReferenceCache(SPACE, root).fill(groups, lambda: score, token_budget=BUDGET)
    except CacheError as error:
        print(error, end="")
        raise SystemExit(2) from None
    print(report.scored_responses, end="")


if __name__ == "__main__":
    _, folder, count, name, delay, fill, *given = sys.argv
    death = Death(given[0], int(given[1]), int(given[2])) if given else None
    child(Path(folder), int(count), name, float(delay), int(fill), death)
