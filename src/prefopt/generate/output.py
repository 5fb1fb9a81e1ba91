"""The file that samples are written to: row by row, and gone on with after a kill.

A row is one prompt with its samples, in the canonical layout, so that every verb that reads data reads it::

    {"prompt": ..., "responses": [...], "logprobs": [...], "sampling_logprobs": [...], "tokens": [...],
     "finish": [...], "token_ids": [[...], ...], "source": "prompts.jsonl", "source_row": 7}

Beside the file stands ``FILE.run.json``: the options that made it and digests of model and prompts, so that a run is
only ever gone on with as it was begun; and how many rows were written, with a digest of each, so that rows which were
changed or lost meanwhile are found and named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from prefopt.config.option import flag
from prefopt.disk.entries import SAMPLES, clear, sample_entries
from prefopt.disk.read import parsed, read_json
from prefopt.disk.write import output_errors, remove_leftovers, sync_folder, write_json
from prefopt.errors import RunError

# Options that may differ at a resume: they change what is shown, never what is drawn.
FREE = frozenset({"resume", "progress", "output"})
WRITTEN = "written"
"""The key of the record that holds the number of rows and their digests; records of earlier versions have none."""
WIDTH = 16
"""Hexadecimal digits of a row's digest."""


def altered(path: Path, record: Mapping[str, Any]) -> str | None:
    """What is wrong with the rows of a file that its record tells of, None where they are what was written.

    Rows behind those that the record counts may be there: a kill comes between a row and its count.
    """
    if WRITTEN not in record:
        return None
    digests = _digests(record)
    if digests is None:
        return f"cannot be checked: {WRITTEN} in its .run.json is damaged"
    count, more = 0, False
    with path.open("rb") as file:
        for line in file:
            more = count == len(digests)
            if more or not line.endswith(b"\n"):
                break
            if _digest(line) != digests[count]:
                return f"has a row {count + 1} that is not what was written"
            count += 1
    if count < len(digests):
        return f"holds {count} of the {len(digests)} rows that were written"
    return "holds more rows than were written" if more and "results" in record else None


def _read_record(path: Path) -> dict[str, Any]:
    """What stands beside a file of samples. Raises :class:`RunError` where it is not there, or damaged."""
    return read_json(path.with_name(path.name + ".run.json"), _record, "name another --output")


def _record(found: dict[str, Any]) -> dict[str, Any]:
    """Raises where it is not what a run wrote."""
    dict(found["options"])
    rows = found.get("rows", 1)
    if not isinstance(rows, int) or not 0 < rows < 2**53:  # "in range" would try all numbers for what is none
        raise ValueError("rows is no number of rows")
    return found


def _digests(record: Mapping[str, Any]) -> list[str] | None:
    """Of each row that was written; None where the record does not say."""
    match record.get(WRITTEN):
        case {"rows": int(rows), "digests": str(text)} if len(text) == rows * WIDTH:
            return [text[i : i + WIDTH] for i in range(0, len(text), WIDTH)]
    return None


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=WIDTH // 2).hexdigest()


def wrong_with(path: Path) -> str | None:
    """What is wrong with a file of samples, read with the record beside it; None where nothing is."""
    try:
        return altered(path, _read_record(path))
    except (OSError, RunError):
        return "has no .run.json that can be read"


def verify_samples(*, repair: bool) -> list[tuple[Path, str]]:
    """The kept samples that are not what was written, and why; with ``repair`` they are removed, to be drawn anew."""
    problems = []
    for folder in sample_entries():
        path = folder / SAMPLES
        if wrong := wrong_with(path):
            problems.append((path, wrong))
            if repair:
                clear(ids=[folder.name])
    return problems


@dataclass(frozen=True, slots=True)
class Place:
    """Where a prompt stands: its file, and its row from 1."""

    source: str
    row: int


class SampleFile:
    """An output file, opened for a new run or to go on with the one it holds; ``done`` rows are in it already.

    ``notes`` say what a person should know of the rows that were found.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, resume: bool) -> None:
        """Raises :class:`RunError` where the file is there and not to be gone on with, or was made otherwise."""
        self.path, self.beside = path, path.with_name(path.name + ".run.json")
        self.done = 0
        self.notes: list[str] = []
        self.record: dict[str, Any] = {"status": "started", "options": dict(options), **_written("")}
        self._file: IO[bytes] | None = None
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        if path.is_dir():
            raise RunError(f"--output {path} is a folder; name a file")
        self._found = path.exists()
        if self._found and not resume:
            raise RunError(f"--output {path} exists; go on with it by --resume, or name another file")
        self._digests = ""
        if self._found:
            self.record = {**_read_record(path), "status": "resumed"}
            self._refuse_other_options(options)
            if wrong := altered(path, self.record):
                raise RunError(f"--resume: {path} {wrong}; put it back, or name another --output")
            if WRITTEN not in self.record:
                self.notes.append(f"{path} is of an earlier version, which kept no digests: its rows cannot be checked")

    @property
    def finished(self) -> bool:
        """Whether every row was written by an earlier run."""
        return self._found and "results" in self.record

    def same(self, name: str, value: Any, what: str) -> None:
        """Record ``value`` at the first start; refuse another one at a resume."""
        before = self.record.setdefault(name, value)
        if before != value:
            raise RunError(f"--resume: {what} changed since {self.path} was begun; put it back, or name another file")

    def open(self, places: Sequence[Place]) -> None:
        """Take the file, drop a line that a kill tore, and count what is there. Raises :class:`RunError`."""
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"--output {self.path} is being written by another process; wait for it") from None
            remove_leftovers(self.path.parent, self.beside.name)
            write_json(self.beside, self.record)
            self._file = self.path.open("r+b" if self._found else "xb")
            end = self._check(self._file, places) if self._found else 0
            self.record |= _written(self._digests)
            self._file.truncate(end)
            self._file.seek(end)
            sync_folder(self.path.parent)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; they are on the disk when this returns."""
        assert self._file is not None
        with output_errors(self.path):
            for row in rows:
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                self._file.write(line)
                self._file.flush()
                self._digests += _digest(line)
            os.fsync(self._file.fileno())
        self.done += len(rows)
        self.record |= _written(self._digests)
        write_json(self.beside, self.record)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Note what came out."""
        self.record |= {"status": "finished", "results": dict(results)}
        write_json(self.beside, self.record)

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _check(self, file: IO[bytes], places: Sequence[Place]) -> int:
        """Count the whole rows, each of which must be that of its prompt; where the last of them ends.

        Rows behind those that the record counts are not known for this program's, and are drawn again.
        """
        counted = _digests(self.record)
        end, dropped = 0, False
        for line in file:
            if not line.endswith(b"\n"):
                break
            if counted is not None and self.done >= len(counted):
                dropped = True
                break
            if self.done >= len(places) or _place(line) != places[self.done]:
                raise RunError(f"--resume: row {self.done + 1} of {self.path} is not the one that the run wrote")
            self.done += 1
            self._digests += _digest(line)
            end += len(line)
        if dropped:
            self.notes.append(
                f"{self.path}: what stood behind its first {self.done} rows is drawn again: no record counts it"
            )
        return end

    def _refuse_other_options(self, now: Mapping[str, Any]) -> None:
        before = self.record["options"]
        changed = [n for n in now if n not in FREE and before.get(n) != now[n]]
        if changed:
            listed = ", ".join(f"{flag(n)} was {before.get(n)!r} and is {now[n]!r}" for n in changed)
            raise RunError(f"--resume goes on with the same run, but {listed}; put it back, or name another --output")


def _written(digests: str) -> dict[str, Any]:
    return {WRITTEN: {"rows": len(digests) // WIDTH, "digests": digests}}


def _place(line: bytes) -> Place | None:
    try:
        row = parsed(line)
        return Place(str(row["source"]), int(row["source_row"]))
    except Exception:  # a row of another make
        return None
