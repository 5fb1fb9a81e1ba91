"""Cache of what a teacher behind a URL says of sequences, in the folders and files of the reference cache.

A response is named by its token ids and mask; of its M trained tokens a block holds ``ids`` [M, K], ``logps`` [M, K]
and ``own`` [M].

A server may serve other weights tomorrow under the same name. So a space holds the answers to a few sequences, its
probe, and is used only where the server still gives them, but for rounding; otherwise another space is found or begun.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import numpy as np

from prefopt.core.cache_folder import Damaged, cache_errors, reference_folder, space_locked, used, write_cached
from prefopt.core.dispatch import PAUSE, Dispatch
from prefopt.data.group import Group
from prefopt.data.table import KEY, Array, GroupTable, KeyArray, Selection
from prefopt.reference.blocks import block_files, move_aside, read_sealed, write_block, write_sealed
from prefopt.reference.teacher_server import FLAG, TeacherServer, TopLogprobs

log = logging.getLogger(__name__)

VERSION = 1
PROBE_ROWS, PROBE_TOKENS = 4, 64
PROBE_ROUNDING = 0.02
"""Mean difference, in nats per token, of two answers to the same sequence by the same weights: a server rounds by what
else it computes at the time."""
COMMIT_SECONDS = 5.0
NAMES = ("ids", "logps", "own")


def whole(key: np.bytes_) -> bytes:
    """All bytes of a key: numpy drops the zeros at the end of one.

    >>> whole(np.array([b"ab"], "S4")[0])[:4]
    b'ab\\x00\\x00'
    """
    return bytes(key).ljust(KEY.itemsize, b"\0")


class TeacherCache:
    """The space of a server's present weights. ``values`` reads it, ``fill`` asks for what is missing."""

    def __init__(
        self,
        server: TeacherServer,
        groups: Sequence[Group],
        *,
        concurrency: int,
        root: Path | None = None,
        pause: float = PAUSE,
    ) -> None:
        """Finds the space, or begins one with a probe taken from ``groups``. Raises :class:`RunError` where the server
        fails, and :class:`CacheError` where the disk refuses."""
        self.server, self.concurrency, self.pause = server, concurrency, pause
        self._parent = reference_folder(root)
        self.folder, self.probe = self._find(groups)
        self._read: set[str] = set()
        self._rows: dict[bytes, dict[str, Array]] = {}

    @property
    def id(self) -> str:
        """The name of the space on this machine."""
        return self.folder.name

    def missing(self, groups: Sequence[Group]) -> int:
        """How many responses of ``groups`` the teacher has not been asked of."""
        return len(self._missing(groups)[0])

    def fill(
        self,
        groups: Sequence[Group],
        progress: Callable[[int], None] = lambda done: None,
        stop: Callable[[], None] | None = None,
    ) -> int:
        """Ask for what is missing; what was answered is kept, whatever ends this. Returns the number of responses.
        Raises :class:`prefopt.core.dispatch.ServersLost`."""
        if not self.missing(groups):
            return 0
        with space_locked(self.folder, stop):
            keys, sequences = self._missing(groups)  # another process may have asked meanwhile
            pending: list[tuple[int, TopLogprobs]] = []
            done, committed = 0, time.monotonic()

            def told(answer: tuple[int, TopLogprobs] | None) -> None:
                nonlocal done, committed
                if answer is not None:
                    pending.append(answer)
                    done += 1
                    progress(done)
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    self._commit(pending, keys, sequences)
                    committed = time.monotonic()
                if stop is not None:
                    stop()

            try:
                self._ask([ids for ids, _ in sequences], told)
            finally:
                self._commit(pending, keys, sequences)
        return len(keys)

    def values(self, groups: Sequence[Group]) -> dict[str, Array]:
        """``ids`` [M, K] (int32), ``logps`` [M, K] and ``own`` [M] (float32) of the trained tokens of ``groups``, which
        :meth:`fill` was called for."""
        rows = [self._rows[whole(key)] for key in GroupTable.of(groups).key_N]
        with suppress(OSError):  # of a read-only cache
            used(self.folder)
        return {name: np.concatenate([row[name] for row in rows]) for name in NAMES}

    def _missing(self, groups: Sequence[Group]) -> tuple[KeyArray, list[tuple[Array, Array]]]:
        """Keys, and ids with masks, of the distinct responses without values."""
        self._refresh()
        table = GroupTable.of(groups)
        keys, first = np.unique(table.key_N, return_index=True)
        there = np.array([whole(key) in self._rows for key in keys], np.bool_)
        group_of = np.repeat(np.arange(len(table)), np.diff(table.response_starts))
        sequences = []
        for n in first[~there].tolist():
            g = int(group_of[n])
            sequences.append(table[g].sequence(n - int(table.response_starts[g])))
        return keys[~there], sequences

    def _ask(self, sequences: Sequence[Array], told: Callable[[tuple[int, TopLogprobs] | None], None]) -> None:
        Dispatch(
            [self.server],
            len(sequences),
            lambda server, n: (n, server.top_logprobs(sequences[n].tolist())),
            flag=FLAG,
            concurrency=self.concurrency,
            pause=self.pause,
        ).run(told)

    def _commit(
        self, pending: list[tuple[int, TopLogprobs]], keys: KeyArray, sequences: Sequence[tuple[Array, Array]]
    ) -> None:
        ready = sorted(pending, key=lambda answer: answer[0])
        pending.clear()  # first: what the disk refused is not tried again
        if not ready:
            return
        taken = [sequences[n][1][1:] for n, _ in ready]  # the first token of a sequence is never trained
        block: dict[str, Array] = {
            "keys": np.frombuffer(keys[[n for n, _ in ready]].tobytes(), np.uint8).reshape(-1, KEY.itemsize),
            "counts": np.array([int(mask.sum()) for mask in taken], np.int32),
        }
        for name in NAMES:
            answers = [getattr(top, name)[mask] for (_, top), mask in zip(ready, taken, strict=True)]
            block[name] = np.concatenate(answers)
        self._read.add(write_block(self.folder, block, self.id).name)
        self._learn(block)

    def _refresh(self) -> None:
        """Read blocks of other processes. A damaged one is moved aside with a warning; its responses are asked of
        again."""
        for path in block_files(self.folder):
            if path.name in self._read:
                continue
            try:
                with cache_errors(path), suppress(FileNotFoundError):  # cleared since it was listed
                    block = read_sealed(path, self.id)
                    self._read.add(path.name)
                    self._learn(block)
            except Damaged as damage:
                move_aside(path)
                log.warning("cache block %s is damaged (%s): moved aside, the teacher is asked again", path, damage)

    def _learn(self, block: dict[str, Array]) -> None:
        """Know the values of a block, of which each response keeps a view. The older of two values stays."""
        ends = np.cumsum(block["counts"], dtype=np.int64)
        for n, key in enumerate(block["keys"]):
            rows = slice(int(ends[n] - block["counts"][n]), int(ends[n]))
            self._rows.setdefault(key.tobytes(), {name: block[name][rows] for name in NAMES})

    # -- which weights the server has ------------------------------------------------------------------------------

    def same_weights(self, probe: Mapping[str, Array]) -> bool:
        """Whether the server has the weights that answered ``probe``, that of a cache."""
        same = all(np.array_equal(probe[name], self.probe[name]) for name in self.probe)
        return same or self._answers(probe)

    def _find(self, groups: Sequence[Group]) -> tuple[Path, dict[str, Array]]:
        """The folder of the present weights with its probe: the first that they answer as before, or a new one."""
        about = {"model": self.server.model, "top_k": self.server.top_k, "version": VERSION}
        for number in count():
            name = hashlib.sha256(json.dumps([about, "teacher", number]).encode()).hexdigest()[:12]
            folder = self._parent / name
            path = folder / "probe.safetensors"
            with space_locked(folder):
                if path.exists():
                    try:
                        if self._answers(probe := read_sealed(path, name)):
                            return folder, probe
                        continue
                    except Damaged as damage:
                        log.warning("cache file %s is damaged (%s): the space is left alone", path, damage)
                        continue
                few = list(Selection(GroupTable.of(groups), range(min(PROBE_ROWS, len(groups)))))
                probes = [group.sequence(0)[0][:PROBE_TOKENS] for group in few]
                answers = self._probed(probes)
                with cache_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                created = datetime.now(UTC).isoformat("T", "seconds")
                kind = {"path": f"the likeliest {self.server.top_k}", "device": "a server", "created": created}
                write_cached(folder / "about.json", json.dumps({**about, **kind}, indent=2).encode())
                lengths = np.array([len(ids) for ids in probes], np.int64)
                probe = {"tokens": np.concatenate(probes).astype(np.int32), "lengths": lengths, **answers}
                write_sealed(path, probe, name)
                return folder, probe
        raise AssertionError("count() does not end")

    def _answers(self, probe: Mapping[str, Array]) -> bool:
        """Whether the server says of the sequences of a probe what it said before."""
        cuts = np.cumsum(probe["lengths"])[:-1]
        now = self._probed(np.split(probe["tokens"], cuts))
        gaps = [np.abs(now[name] - probe[name]).mean() for name in ("own", "best")]
        return bool(max(gaps) <= PROBE_ROUNDING)

    def _probed(self, sequences: Sequence[Array]) -> dict[str, Array]:
        """Log-probabilities of the tokens of sequences, and of the likeliest in their places."""
        found: dict[int, TopLogprobs] = {}
        self._ask(sequences, lambda answer: found.update([answer] if answer is not None else []))
        every = [found[n] for n in range(len(sequences))]
        return {
            "own": np.concatenate([top.own for top in every]),
            "best": np.concatenate([top.logps[:, 0] for top in every]),
        }
