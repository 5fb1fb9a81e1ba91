"""Cache of the reference's log-probabilities.

Values are in a *space*: one folder per reference identity and way of scoring. Within it a response is named by its
token ids and mask, so that no other option matters, and appended data cost only themselves. The caller brings the
function that scores a batch; nothing here needs torch.

Finished batches are committed in blocks every few seconds: a killed process loses what it did since the last commit, an
interrupted one nothing that was finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.core.cache_folder import cache_errors, reference_folder, space_locked, used, write_cached
from prefopt.data.group import Group
from prefopt.data.table import Array, GroupTable, IndexArray, KeyArray, Selection, ranges
from prefopt.errors import CacheError, ModelError
from prefopt.parallel.world import ALONE, World
from prefopt.reference.blocks import Arrays, Index, NamedGroups, ScoringPlan, plan_file, write_block

log = logging.getLogger(__name__)

# A kill loses at most this much work, or this fraction of what was done: long runs leave few blocks, not thousands.
COMMIT_SECONDS = 5.0
COMMIT_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Identity:
    """SHA-256 (hex) of each part of a model, empty for an absent part. ``name`` is for people and is not compared."""

    weights: str
    config: str
    adapter: str = ""
    quantization: str = ""
    name: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        """One SHA-256 (hex) over all parts."""
        return json_digest([self.weights, self.config, self.adapter, self.quantization])


@dataclass(frozen=True, slots=True)
class SpaceKey:
    """All that a cached value depends on beside the tokens: equal keys share values, others never do.

    ``path``: "shared" where a group's common prefix is encoded once, else "separate". ``kernel``: the attention
    implementation. ``device``: its type (cpu, cuda, mps), on CUDA with the name of the GPU.
    """

    identity: Identity
    dtype: str
    path: str
    kernel: str
    device: str
    scorer_version: int

    @property
    def id(self) -> str:
        """Name of the space's folder, 12 hex digits."""
        parts = [self.identity.digest, self.dtype, self.path, self.kernel, self.device, self.scorer_version]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def costs(self, groups: GroupTable) -> IndexArray:
        """Tokens that scoring each group encodes, [G], whatever the limit of rotary frequencies."""
        tokens: IndexArray = groups.tokens_G.astype(np.int64)
        if self.path != "shared":
            tokens += groups.prefix_G * (groups.sequences_G - 1)
        return tokens


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value; other values (dtypes, enums) count by their text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ResponseScore:
    """One response's log-probability under the reference. ``sum`` over its ``count`` scored tokens, natural logarithm;
    ``token_values`` [count] float32 where requested."""

    sum: float
    count: int
    token_values: npt.NDArray[np.float32] | None = None


Scores = Sequence[Sequence[ResponseScore]]
ScoreBatch = Callable[[list[Group]], Scores]
"""Scores one packed batch: for each group, for each of its responses, in order."""
Scored = tuple[KeyArray, list[ResponseScore]]
ProgressCallback = Callable[[int, int, float], None]
"""Called after every batch with responses done, responses in all, and seconds since the first batch began."""
StopCallback = Callable[[], None] | None
"""Called between batches; it may raise."""


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceValues:
    """Values of G groups with N responses in all, M scored tokens.

    ``sums_N`` float64, ``counts_N`` int32; group g has the responses ``starts[g]:starts[g + 1]``. Where requested,
    ``token_values_M`` float32, response n's from ``token_starts[n]`` to ``token_starts[n + 1]``.
    """

    sums_N: npt.NDArray[np.float64]
    counts_N: npt.NDArray[np.int32]
    starts: IndexArray
    token_starts: IndexArray
    token_values_M: npt.NDArray[np.float32] | None = None

    def arrays(self) -> dict[str, Array]:
        """The fields that are there, by name."""
        found = {column.name: getattr(self, column.name) for column in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def columns(self, groups: IndexArray) -> dict[str, Array]:
        """``ref_logp_N`` and, where there are token values, ``ref_logp_M`` of some groups, in the order given."""
        at_N = ranges(self.starts, np.diff(self.starts), groups)
        found: dict[str, Array] = {"ref_logp_N": self.sums_N[at_N]}
        if self.token_values_M is not None:
            found["ref_logp_M"] = self.token_values_M[ranges(self.token_starts, np.diff(self.token_starts), at_N)]
        return found


class FillReport(NamedTuple):
    """Work of ``fill`` in distinct responses; ``seconds`` spent scoring."""

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
        """Number of distinct responses of ``groups`` without a value."""
        return len(self._missing(np.unique(GroupTable.of(groups).key_N), token_values))

    def values(self, groups: Sequence[Group], *, token_values: bool = False) -> ReferenceValues:
        """The values of ``groups``, in their order. Raises ``CacheError`` where ``fill`` was not called for them."""
        table = GroupTable.of(groups)
        keys, index = table.key_N, self._index
        if absent := len(self._missing(keys, token_values)):
            raise CacheError(f"cache {self.folder}: {absent} of {len(keys)} values are missing; run the command again")
        rows, token_rows = index.find(keys), index.find(keys, token_values=token_values)
        counts = index.counts[rows]
        token_starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        tokens = None
        if token_values:
            shift = index.token_starts[token_rows] - token_starts[:-1]
            tokens = index.token_values[np.repeat(shift, counts) + np.arange(token_starts[-1])]
        with suppress(OSError):  # of a read-only cache
            used(self.folder)
        return ReferenceValues(index.sums[rows], counts, table.response_starts, token_starts, tokens)

    def fill(
        self,
        groups: Sequence[Group],
        make_score: Callable[[], ScoreBatch],
        *,
        token_budget: int,
        token_values: bool = False,
        progress: ProgressCallback | None = None,
        stop: StopCallback = None,
        world: World = ALONE,
        lockstep: bool = False,
    ) -> FillReport:
        """Score and keep the missing values of ``groups``; waits for another process that scores into the same space.

        ``make_score`` is called at most once, and only where a value is missing: it may load a model. Its function gets
        groups of at most ``token_budget`` tokens (``SpaceKey.costs``), or one larger group. The plan of an interrupted
        run keeps its budget, unless that is at least twice this one (halved on out-of-memory). Finished
        batches are committed before ``stop`` raises. Every rank of ``world`` calls this: each scores batches in turn,
        and the first one plans and commits, so that the values are those of one process. ``lockstep``: scoring
        communicates (shards), so that ranks without a batch score one for nothing. Raises ``CacheError`` where the disk
        refuses, ``ModelError`` where the reference gives no finite number.
        """
        table = GroupTable.of(groups)
        requested = np.unique(table.key_N)
        missing = world.on_first(lambda: self._missing(requested, token_values))
        calls, seconds = 0, 0.0
        if len(missing):
            with space_locked(self.folder, stop) if world.first else nullcontext():
                missing, plan = world.on_first(lambda: self._plan(table, requested, token_budget, token_values))
                if plan is not None:
                    named = NamedGroups.of(table.key_N, table.response_starts)
                    planned = Selection(table, named.find(plan.groups.names_G).tolist())
                    scored = self._scored(plan, planned, missing, make_score(), stop, world, lockstep)
                    if world.first:
                        calls, seconds = self._commit_all(scored, len(missing), token_values, progress)
                        self._index.refresh()
                    else:
                        deque(scored, maxlen=0)
                if world.first:
                    self._remove_finished_plans()
        with suppress(OSError):
            used(self.folder)
        return world.from_first(FillReport(len(missing), len(requested) - len(missing), calls, seconds))

    def _plan(
        self, table: GroupTable, requested: KeyArray, token_budget: int, token_values: bool
    ) -> tuple[KeyArray, ScoringPlan | None]:
        """What is missing now that the space is locked, and the plan to score it; none where nothing is."""
        missing = self._missing(requested, token_values)
        if not len(missing):
            return missing, None
        self._describe()
        named = NamedGroups.of(table.key_N, table.response_starts)
        path = plan_file(self.folder, named, token_values)
        plan = ScoringPlan.read(path, self.space.id)
        if plan is None or 2 * token_budget <= plan.token_budget or not plan.covers(missing):
            plan = ScoringPlan.make(named, self.space.costs(table), missing, token_budget)
            plan.write(path, self.space.id)
        return missing, plan

    def _missing(self, keys: KeyArray, token_values: bool) -> KeyArray:
        """Those of ``keys`` without a value."""
        if (self._index.find(keys, token_values=token_values) < 0).any():
            self._index.refresh()
        return keys[self._index.find(keys, token_values=token_values) < 0]

    def _scored(
        self,
        plan: ScoringPlan,
        groups: Selection,
        missing: KeyArray,
        score: ScoreBatch,
        stop: StopCallback,
        world: World,
        lockstep: bool,
    ) -> Iterator[Scored]:
        """The ``missing`` responses of ``plan``, whose groups are given, batch by batch; ranks take turns."""

        def scored(mine: tuple[range, IndexArray] | None, found: Scores | None) -> Scored | None:
            """The responses of this rank's batch, and their scores, where they are not ``found`` already."""
            if mine is None:
                return None
            batch, take = mine
            here = groups[batch.start : batch.stop]
            if found is None:
                if stop is not None:
                    stop()
                found = score(here)
            every = [(v, group, k) for group, values in zip(here, found, strict=True) for k, v in enumerate(values)]
            first = plan.groups.starts[batch.start]
            return plan.groups.keys_N[take], [_checked(*every[n]) for n in (take - first).tolist()]

        work = iter(plan.work(missing))
        while turn := list(islice(work, world.size)):
            mine = turn[world.rank] if world.rank < len(turn) else None  # the last round has fewer batches than ranks
            found = None
            if lockstep:  # what fails in these passes cannot be told to the others, which wait in them
                if stop is not None:
                    world.together(stop)
                batch, _ = mine or turn[0]
                found = score(groups[batch.start : batch.stop])
            own = world.together(partial(scored, mine, found))
            yield from (other for other in world.gather(own) if other is not None)

    def _commit_all(
        self,
        batches: Iterator[Scored],
        total: int,
        token_values: bool,
        progress: ProgressCallback | None,
    ) -> tuple[int, float]:
        """Commit batches every few seconds as they are scored; returns their number and the seconds."""
        calls = done = 0
        started = committed = time.monotonic()
        pending: list[Scored] = []
        try:
            for batch in batches:
                calls, done = calls + 1, done + len(batch[1])
                pending.append(batch)
                now = time.monotonic()
                if now - committed >= max(COMMIT_SECONDS, COMMIT_SHARE * (now - started)):
                    self._commit(pending, token_values)
                    committed = time.monotonic()
                if progress is not None:
                    progress(done, total, now - started)
        finally:
            self._commit(pending, token_values)
        return calls, time.monotonic() - started

    def _commit(self, pending: list[Scored], token_values: bool) -> None:
        ready = pending.copy()
        pending.clear()  # first: what the disk refused is not tried again
        if not ready:
            return
        scores = [scored for _, batch in ready for scored in batch]
        block: Arrays = {
            "keys": np.frombuffer(b"".join(keys.tobytes() for keys, _ in ready), np.uint8).reshape(-1, 16),
            "sums": np.array([scored.sum for scored in scores], np.float64),
            "counts": np.array([scored.count for scored in scores], np.int32),
        }
        if token_values:
            tokens = [scored.token_values for scored in scores if scored.token_values is not None]
            assert [len(values) for values in tokens] == block["counts"].tolist()
            block["token_values"] = np.concatenate(tokens, dtype=np.float32)
        write_block(self.folder, block, self.space.id)

    def _remove_finished_plans(self) -> None:
        for path in self.folder.glob("plan-*.safetensors"):
            plan = ScoringPlan.read(path, self.space.id)
            if not (plan and len(self._missing(plan.groups.keys_N, token_values=path.name.startswith("plan-tokens")))):
                with cache_errors(path):
                    path.unlink()

    def _describe(self) -> None:
        """Write the description of the space, for people and for ``prefopt cache list``."""
        path = self.folder / "about.json"
        if not path.exists():
            created = datetime.now(UTC).isoformat("T", "seconds")
            about = {"model": self.space.identity.name, **asdict(self.space), "created": created}
            write_cached(path, json.dumps(about, indent=2).encode())


def _checked(scored: ResponseScore, group: Group, k: int) -> ResponseScore:
    """The score, refused where it is not finite: once kept it would come back in every later run."""
    if not math.isfinite(scored.sum):
        raise ModelError(
            f"the reference gives {scored.sum} for response {k + 1} of row {group.row}; "
            "check its weights, or score in float32"
        )
    assert scored.count == int(group.continuations[k].trained.sum()), "every trained token is scored, and no other"
    return scored
