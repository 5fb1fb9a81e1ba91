"""The reference's log-probabilities, computed once and kept.

Values live in a *space*: one folder per reference identity and way of scoring. Within it a response is named by its
token ids and mask, so that beta, loss, seed, order, learning rate, LoRA rank and output folder change nothing, and
appended data cost only themselves. This module knows no model: the caller brings a function that scores a batch.

While scoring, finished batches are committed in blocks every few seconds: a killed process loses what it did since
the last commit, an interrupted one nothing that was finished. Batches are planned beforehand (``plan.py``), so that
going on after an interruption gives the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.core.cache_folder import acquired, cache_errors, reference_folder, space_lock, write_cached
from prefopt.data.group import Group
from prefopt.data.table import Array, GroupTable, IndexArray, KeyArray, ranges
from prefopt.errors import CacheError, ModelError
from prefopt.reference.blocks import Block, Index
from prefopt.reference.identity import SpaceKey
from prefopt.reference.plan import NamedGroups, ScoringPlan, plan_file

log = logging.getLogger(__name__)

# A kill loses at most this much work, or this share of what was done: long runs leave few blocks, not thousands.
COMMIT_SECONDS = 5.0
COMMIT_SHARE = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class ResponseScore:
    """One response's log-probability under the reference.

    ``sum`` over its ``count`` scored tokens, natural logarithm; ``token_values`` [count] float32 where asked for.
    """

    sum: float
    count: int
    token_values: npt.NDArray[np.float32] | None = None


ScoreBatch = Callable[[list[Group]], Sequence[Sequence[ResponseScore]]]
"""Scores one packed batch: for each group, for each of its responses, in order."""

ProgressCallback = Callable[[int, int, float], None]
"""Called after every batch with responses done, responses to do in all, seconds since the first batch began."""


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceValues:
    """Values of G groups with N responses in all, M scored tokens.

    ``sums_N`` float64, ``counts_N`` int32; group g has the responses ``starts[g]:starts[g + 1]``. Where asked for,
    ``token_values_M`` float32, response n's from ``token_starts[n]`` to ``token_starts[n + 1]``.
    """

    sums_N: npt.NDArray[np.float64]
    counts_N: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    token_starts: npt.NDArray[np.int64]
    token_values_M: npt.NDArray[np.float32] | None = None

    def columns(self, groups: IndexArray) -> dict[str, Array]:
        """``ref_logp_N`` and, where there are values of tokens, ``ref_logp_M`` of some groups, in the order given."""
        at_N = ranges(self.starts, np.diff(self.starts), groups)
        found: dict[str, Array] = {"ref_logp_N": self.sums_N[at_N]}
        if self.token_values_M is not None:
            found["ref_logp_M"] = self.token_values_M[ranges(self.token_starts, np.diff(self.token_starts), at_N)]
        return found

    def of(self, g: int) -> npt.NDArray[np.float64]:
        """Sums of group g's responses, [K]."""
        return self.sums_N[self.starts[g] : self.starts[g + 1]]

    def tokens_of(self, n: int) -> npt.NDArray[np.float32]:
        """Token values of response n, [count]."""
        assert self.token_values_M is not None
        return self.token_values_M[self.token_starts[n] : self.token_starts[n + 1]]


class FillReport(NamedTuple):
    """What ``fill`` did, in distinct responses; ``seconds`` spent scoring."""

    scored_responses: int
    reused_responses: int
    forward_calls: int
    seconds: float


class ReferenceCache:
    """The values of one space."""

    def __init__(self, space: SpaceKey, root: Path | None = None) -> None:
        """``root`` defaults to ``cache_root()``; nothing is created before there is something to write."""
        self.space = space
        self.folder = reference_folder(root) / space.id
        self._index = Index(self.folder, space.id)

    def missing(self, groups: Sequence[Group], *, token_values: bool = False) -> int:
        """How many distinct responses of ``groups`` would have to be scored."""
        return len(self._missing(np.unique(GroupTable.of(groups).key_N), token_values))

    def values(self, groups: Sequence[Group], *, token_values: bool = False) -> ReferenceValues:
        """The values of ``groups``, in their order. Raises ``CacheError`` where ``fill`` has not been there before."""
        table = GroupTable.of(groups)
        keys = table.key_N
        rows = self._index.find(keys)
        token_rows = self._index.find(keys, token_values=True) if token_values else rows
        if (rows < 0).any() or (token_rows < 0).any():
            self._index.refresh()
            rows = self._index.find(keys)
            token_rows = self._index.find(keys, token_values=True) if token_values else rows
        if lacking := int(((rows < 0) | (token_rows < 0)).sum()):
            raise CacheError(f"cache {self.folder}: {lacking} of {len(keys)} values are missing; run the command again")
        counts = self._index.counts[rows]
        token_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        tokens = None
        if token_values:
            shift = self._index.token_starts[token_rows] - token_starts[:-1]
            tokens = self._index.token_values[np.repeat(shift, counts) + np.arange(token_starts[-1])]
        self._touch()
        return ReferenceValues(self._index.sums[rows], counts, table.response_starts, token_starts, tokens)

    def fill(
        self,
        groups: Sequence[Group],
        make_score: Callable[[], ScoreBatch],
        *,
        token_budget: int,
        token_values: bool = False,
        progress: ProgressCallback | None = None,
        stop: Callable[[], None] | None = None,
    ) -> FillReport:
        """Score what is missing of ``groups`` and keep it.

        ``make_score`` is called at most once, and only where something is missing: a model can be loaded in it. The
        function it returns gets groups of at most ``token_budget`` tokens together (``SpaceKey.cost``), or one group
        that alone has more. A plan left by an interrupted run keeps its own budget, unless that is twice as large
        as this one or more: a budget halved for want of memory plans anew, one estimated a little differently
        does not. ``stop`` is called between batches and may raise; what is finished is committed first.

        Another process that scores into the same space is waited for. Raises ``CacheError`` where the disk refuses,
        ``ModelError`` where the reference gives no finite number.
        """
        table = GroupTable.of(groups)
        asked = np.unique(table.key_N)
        wanted = self._missing(asked, token_values)
        calls, seconds = 0, 0.0
        if len(wanted):
            with self._locked(stop):
                wanted = self._missing(asked, token_values)
                if len(wanted):
                    self._describe()
                    named = NamedGroups.of(table.key_N, table.response_starts)
                    plan = self._plan(named, self.space.costs(table), wanted, token_budget, token_values)
                    run = _Scoring(self.folder, self.space.id, len(wanted), token_values)
                    run.score(plan, table, named.find(plan.groups.names_G), wanted, make_score(), progress, stop)
                    calls, seconds = run.calls, time.monotonic() - run.started
                    self._index.refresh()
                self._forget_finished_plans()
        self._touch()
        return FillReport(len(wanted), len(asked) - len(wanted), calls, seconds)

    def _missing(self, asked: KeyArray, token_values: bool) -> KeyArray:
        """Those of ``asked`` that have no value yet."""
        if (self._index.find(asked, token_values=token_values) < 0).any():
            self._index.refresh()
        return asked[self._index.find(asked, token_values=token_values) < 0]

    def _plan(
        self, groups: NamedGroups, costs_G: IndexArray, wanted: KeyArray, token_budget: int, token_values: bool
    ) -> ScoringPlan:
        path = plan_file(self.folder, groups, token_values)
        plan = ScoringPlan.read(path, self.space.id)
        if plan is not None and 2 * token_budget > plan.token_budget and plan.covers(wanted):
            return plan
        plan = ScoringPlan.make(groups, costs_G, wanted, token_budget)
        plan.write(path, self.space.id)
        return plan

    def _forget_finished_plans(self) -> None:
        for path in self.folder.glob("plan-*.safetensors"):
            plan = ScoringPlan.read(path, self.space.id)
            if not (plan and len(self._missing(plan.groups.keys_N, token_values=path.name.startswith("plan-tokens")))):
                with cache_errors(path):
                    path.unlink()

    @contextmanager
    def _locked(self, stop: Callable[[], None] | None) -> Iterator[None]:
        lock = space_lock(self.folder)
        if not acquired(lock):
            log.warning("another process is scoring the same reference (space %s): waiting for it", self.space.id)
            while not acquired(lock, seconds=0.5):
                if stop is not None:
                    stop()
        try:
            yield
        finally:
            lock.release()

    def _describe(self) -> None:
        """Write what this space is, for people and for ``prefopt cache list``."""
        path = self.folder / "about.json"
        if path.exists():
            return
        fields: dict[str, Any] = asdict(self.space)
        about = {"model": self.space.identity.name, **fields, "created": datetime.now(UTC).isoformat("T", "seconds")}
        write_cached(path, json.dumps(about, indent=2).encode())

    def _touch(self) -> None:
        """Note the use, by which old spaces are told; a cache that may only be read keeps no such note."""
        with suppress(OSError):
            os.utime(self.folder / "about.json")


class _Scoring:
    """Runs a plan and commits what it gives."""

    def __init__(self, folder: Path, space: str, total: int, token_values: bool) -> None:
        self.folder, self.space, self.total, self.token_values = folder, space, total, token_values
        self.calls = self.done = 0
        self.started = self.committed = time.monotonic()
        self._keys: list[Array] = []
        self._pending: list[ResponseScore] = []

    def score(
        self,
        plan: ScoringPlan,
        table: GroupTable,
        place: IndexArray,
        wanted: KeyArray,
        score: ScoreBatch,
        progress: ProgressCallback | None,
        stop: Callable[[], None] | None,
    ) -> None:
        """``place`` says where in ``table`` each group of the plan is."""
        self.started = self.committed = time.monotonic()
        try:
            for batch, take in plan.work(wanted):
                if stop is not None:
                    stop()
                groups = [table[g] for g in place[batch.start : batch.stop].tolist()]
                results = score(groups)
                self.calls += 1
                every = [
                    (scored, group, k)
                    for group, result in zip(groups, results, strict=True)
                    for k, scored in enumerate(result)
                ]
                first = plan.groups.starts[batch.start]
                found = [_checked(*every[n], token_values=self.token_values) for n in (take - first).tolist()]
                self._keys.append(plan.groups.keys_N[take])
                self._pending += found
                self.done += len(found)
                now = time.monotonic()
                if now - self.committed >= max(COMMIT_SECONDS, COMMIT_SHARE * (now - self.started)):
                    self._commit()
                if progress is not None:
                    progress(self.done, self.total, now - self.started)
        finally:
            self._commit()

    def _commit(self) -> None:
        # Emptied first: what the disk refused is not tried again.
        keys, ready, self._keys, self._pending = self._keys, self._pending, [], []
        if not ready:
            return
        tokens = [scored.token_values for scored in ready if scored.token_values is not None]
        Block(
            keys=np.frombuffer(b"".join(k.tobytes() for k in keys), np.uint8).reshape(-1, 16),
            sums=np.array([scored.sum for scored in ready], np.float64),
            counts=np.array([scored.count for scored in ready], np.int32),
            token_values=np.concatenate(tokens, dtype=np.float32) if self.token_values else None,
        ).write(self.folder, self.space)
        self.committed = time.monotonic()


def _checked(scored: ResponseScore, group: Group, k: int, *, token_values: bool) -> ResponseScore:
    """A number that is wrong must not be kept: it would come back in every later run."""
    if not math.isfinite(scored.sum):
        raise ModelError(
            f"the reference gives {scored.sum} for response {k + 1} of row {group.row}; "
            "check its weights, or score in float32"
        )
    assert scored.count == int(group.continuations[k].trained.sum()), "every trained token is scored, and no other"
    if token_values:
        assert scored.token_values is not None and scored.token_values.shape == (scored.count,)
    return scored
