"""The output folder of a run. ``run.json`` holds options, fingerprints of data and models, budgets and results."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.core.endpoint import is_url
from prefopt.core.files import output_errors, remove_folder, remove_leftovers, write_json
from prefopt.core.options import flag
from prefopt.data.group import Group, IntArray, PicturedIds
from prefopt.data.table import GroupTable
from prefopt.errors import RunError
from prefopt.runs.history import POINTS, RECORD, WORKING, in_use, read_metrics, read_record

FREE = frozenset(
    "resume overwrite shard progress save_every keep_last output dry_run track track_project samples".split()
)
"""Options that say nothing of the training: they are not listed as set, nor compared between runs."""
FREE_AT_RESUME = (
    FREE
    | {"gradient_checkpointing", "find_learning_rate"}
    | set("rollout_server rollout_key rollout_folder server_concurrency server_timeout".split())
)
"""Options that may change at a resume: they no longer affect the weights."""
ADDRESSES, KEYS = ("teacher", "judge_url"), ("teacher_key", "judge_key")
"""Options that may be the address of a server, and those that give its key. It may move: what it serves is compared,
and not where it is."""

AUTO, RESOLVED = "auto", "resolved"
"""The value of an option that a run replaces by a number, and the key of ``run.json`` with what it replaced, by option,
``from`` and ``to``: a resumed run takes it from there, whatever it would find now."""
_LOCK, CHECKPOINTS, LAST_GOOD = ".lock", "checkpoints", "last-good"

PROBED = 0.5
"""Seconds to wait for the lock of a folder: whoever lists runs holds it for a moment to see whether it is free."""


class RunFolder:
    """An output folder, opened for a new run or to resume the one in it. ``last_good``: where a diverged run keeps a
    model."""

    writes = True
    """Whether this process writes it: of several, the first alone does, and the others only know the record."""

    def __init__(
        self, path: Path, options: Mapping[str, Any], *, resume: bool, dry: bool = False, overwrite: bool = False
    ) -> None:
        """Raises :class:`RunError` if the folder holds something else, or the run with other options. ``dry``: nothing
        is written. ``overwrite``: :meth:`take` removes a run that is there."""
        self.path, self._dry, self._overwrite = path, dry, overwrite
        self._lock = FileLock(path / _LOCK)
        self.checkpoints, self.last_good = path / CHECKPOINTS, path / LAST_GOOD
        here = {WORKING: _working_folder()}
        self.record: dict[str, Any] = {"status": "started", "options": dict(options), **here}
        if dry:
            return
        before = check_output(path, resume=resume, overwrite=overwrite)
        if before is not None:
            read_metrics(path)  # a damaged file is reported before anything slow
            old, resolved = before.get("options", {}), before.get(RESOLVED, {})
            given = {n: _resolved(resolved.get(n), x) for n, x in options.items()}
            kept = [n for n in given if n not in FREE_AT_RESUME and n in old]
            if changed := [n for n in kept if old[n] != given[n] and not _moved(n, old[n], given[n])]:
                listed = ", ".join(f"{flag(n)} was {old[n]!r} and is {options[n]!r}" for n in changed)
                raise RunError(f"--resume continues the same run, but {listed}; restore it, or start a new run")
            self.record = {**before, "status": "resumed", **here}

    def __getstate__(self) -> dict[str, Any]:
        """For other processes of the run, none of which holds the folder."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=FileLock(state["path"] / _LOCK))

    def take(self) -> None:
        """Create and lock the folder. Raises :class:`RunError` if another process holds it."""
        if self._overwrite:
            _refuse_runs_below(self.path)  # again: another may have begun while this one got ready
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=PROBED)
            except Timeout:
                pass
            else:
                if self._overwrite and (self.path / RECORD).exists():
                    self._clear()
            there = (self.path / RECORD).exists()
        if (there and self.record["status"] == "started") or not self.taken:
            raise RunError(f"--output {self.path} is in use by another process; wait for it, or name another folder")
        remove_leftovers(self.path)

    def _clear(self) -> None:
        """Remove the run that is there; its record last, so that what a kill leaves is still a run."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == RECORD):
            if entry.is_dir() and not entry.is_symlink():
                remove_folder(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    @property
    def taken(self) -> bool:
        """Whether this process holds the folder."""
        return self._lock.is_locked

    def leave(self) -> None:
        if self.taken:
            (self.path / _LOCK).unlink(missing_ok=True)
            self._lock.release()

    def resolve(self, name: str, value: float) -> None:
        """Record what the run takes for an option in the place of what was given."""
        before = self.record.get(RESOLVED, {})
        given = before[name]["from"] if name in before else self.record["options"][name]
        self.record["options"] = {**self.record["options"], name: value}
        self.record[RESOLVED] = {**before, name: {"from": given, "to": value}}

    def remember(self, **values: Any) -> None:
        """Add values to ``run.json``."""
        self.record.update(values)
        if self.writes and not self._dry:
            write_json(self.path / RECORD, self.record)

    def finish(self, results: Mapping[str, Any], *, keep_checkpoints: bool) -> None:
        """Record that the model is written, then remove checkpoints unless they are to be kept: a run killed in between
        is finished, and does not start again."""
        self.record["checkpoints_kept"] = keep_checkpoints
        self.remember(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), results=dict(results))
        if not self.writes:
            return
        if not keep_checkpoints:
            remove_folder(self.checkpoints)
        remove_folder(self.last_good)  # of an earlier start of this run that diverged

    def same(self, name: str, value: Any, what: str) -> None:
        """Record ``value`` at the first start; refuse a different one at a resume."""
        before = self.record.get(name)
        if before is not None and before != value:
            raise RunError(
                f"--resume: {what} changed since {self.path} was started; restore it, or start a new run elsewhere"
            )
        self.record[name] = value


def _moved(name: str, *values: object) -> bool:
    """Whether an option names a server at two addresses, or their keys."""
    addresses = name in ADDRESSES and all(isinstance(value, str) and is_url(value) for value in values)
    return addresses or name in KEYS


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return ""


def _resolved(known: Mapping[str, Any] | None, given: Any) -> Any:
    """What a run took for the value ``given``, if it did so."""
    return known["to"] if known is not None and given in (AUTO, known["from"]) else given


def check_output(path: Path, *, resume: bool, overwrite: bool = False) -> dict[str, Any] | None:
    """The ``run.json`` of the unfinished run in ``path`` that ``resume`` continues; None for a new run. Raises
    :class:`RunError` where the folder holds a finished run, an unfinished one without ``resume``, or other files.
    ``overwrite`` allows a run that no process holds, without other runs below it."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--output {path} is a file; name a folder")
    if overwrite and (path / RECORD).exists():
        if in_use(path):
            raise RunError(f"--output {path} is in use by another process; wait for it, or name another folder")
        _refuse_runs_below(path)
        return None
    if (path / RECORD).exists():
        before = read_record(path, "name another --output")
        finished = before.get("status") == "finished"
        if not resume:
            what = "a finished run;" if finished else "an unfinished run; continue it with --resume, or"
            raise RunError(f"--output {path} holds {what} name another folder, or replace it by --overwrite")
        if finished:
            _tidy(path, before)
            raise RunError(f"--resume: the run in {path} is finished; to train further, name its folder as --model")
        return before
    if path.exists() and any(not entry.name.startswith((".run.json.", _LOCK, POINTS)) for entry in path.iterdir()):
        # (A run killed in its first moment leaves only its lock and its record, half written; a sweep may have points
        # of a training that was made on another machine.)
        raise RunError(f"--output {path} is not empty and holds no run of prefopt; name another folder")
    return None


def _refuse_runs_below(path: Path) -> None:
    """Raises :class:`RunError` where a folder below that of a run, which ``overwrite`` would remove, holds another."""
    for below, folders, files in os.walk(path):
        folders.sort()
        if RECORD in files and Path(below) != path:
            raise RunError(f"--output {path} holds other runs, such as {below}; name another folder")


def _tidy(path: Path, record: Mapping[str, Any]) -> None:
    """Finish what a kill kept :meth:`RunFolder.finish` from doing, unless its process is still at it."""
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return
    remove_leftovers(path)
    if record.get("checkpoints_kept") is False:
        remove_folder(path / CHECKPOINTS)
        remove_folder(path / LAST_GOOD)
    (path / _LOCK).unlink(missing_ok=True)
    lock.release()


def digest_of(many: Sequence[IntArray | PicturedIds]) -> str:
    """A digest of sequences of token ids with their pictures, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in many:
        held = ids.tobytes() if isinstance(ids, PicturedIds) else ids.astype("<i4").tobytes()
        digest.update(len(ids).to_bytes(4, "little") + held)
    return digest.hexdigest()


def fingerprint(groups: Sequence[Group]) -> str:
    """A digest of all token ids and masks, in order."""
    return hashlib.blake2b(GroupTable.of(groups).key_N.tobytes(), digest_size=16).hexdigest()
