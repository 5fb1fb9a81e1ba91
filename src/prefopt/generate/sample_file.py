"""The output file of ``prefopt sample``: written row by row, and resumed after a kill.

A row is one prompt with its samples in the canonical layout::

    {"prompt": ..., "responses": [...], "logprobs": [...], "sampling_logprobs": [...], "tokens": [...],
     "finish": [...], "token_ids": [[...], ...], "source": "prompts.jsonl", "source_row": 7}

``FILE.run.json`` beside it records the options and digests of model and prompts, so that a run is only resumed as it
was started, and the number of rows with a digest of each, so that rows changed or lost meanwhile are found.
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

from prefopt.core.cache_folder import SAMPLES, clear, sample_entries
from prefopt.core.files import (
    RESUME,
    output_errors,
    parsed,
    read_json,
    refuse_existing,
    remove_leftovers,
    sync_folder,
    write_json,
)
from prefopt.core.options import flag
from prefopt.errors import RunError

FREE = frozenset({"resume", "progress", "output"})
"""Options that may change at a resume, as they change no sample."""
WRITTEN = "written"
"""Key of the record with the number of rows and their digests; records of earlier versions lack it."""
DIGEST_WIDTH = 16
"""Hexadecimal digits of a row's digest."""


@dataclass(frozen=True, slots=True)
class PromptOrigin:
    """The file of a prompt, and its row from 1."""

    source: str
    row: int


class SampleFile:
    """An output file, new or resumed; ``done`` rows are in it already. ``notes`` are lines about the rows found."""

    def __init__(self, path: Path, options: Mapping[str, Any], *, resume: bool) -> None:
        """Raises :class:`RunError` where the file exists without ``resume``, or was written with other options."""
        self.path, self.record_path = path, _record_path(path)
        self.done = 0
        self.notes: list[str] = []
        self.record: dict[str, Any] = {"status": "started", "options": dict(options), **_written("")}
        self._file: IO[bytes] | None = None
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        if path.is_dir():
            raise RunError(f"--output {path} is a folder; name a file")
        self._found = path.exists()
        refuse_existing(path, RESUME, unless=resume)
        self._digests = ""
        if self._found:
            self.record = {**read_record(path), "status": "resumed"}
            before = self.record["options"]
            if changed := [n for n in options if n not in FREE and before.get(n) != options[n]]:
                listed = ", ".join(f"{flag(n)} was {before.get(n)!r} and is {options[n]!r}" for n in changed)
                what = f"--resume continues the same run, but {listed}"
                raise RunError(f"{what}; restore it, or name another --output")
            if wrong := _altered(path, self.record):
                raise RunError(f"--resume: {path} {wrong}; restore it, or name another --output")
            if WRITTEN not in self.record:
                self.notes.append(f"{path} is of an earlier version, which kept no digests: its rows cannot be checked")

    @property
    def finished(self) -> bool:
        """Whether an earlier run wrote every row."""
        return self._found and "results" in self.record

    def same(self, name: str, value: Any, what: str) -> None:
        """Record ``value`` at the first start; refuse another one at a resume."""
        before = self.record.setdefault(name, value)
        if before != value:
            raise RunError(f"--resume: {what} changed since {self.path} was started; restore it, or name another file")

    def open(self, origins: Sequence[PromptOrigin]) -> None:
        """Lock the file, drop a partial last line, and count the rows. Raises :class:`RunError`."""
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"--output {self.path} is being written by another process; wait for it") from None
            remove_leftovers(self.path.parent, self.record_path.name)
            write_json(self.record_path, self.record)
            self._file = self.path.open("r+b" if self._found else "xb")
            end = self._count_rows(self._file, origins) if self._found else 0
            self.record |= _written(self._digests)
            self._file.truncate(end)
            self._file.seek(end)
            sync_folder(self.path.parent)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
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
        write_json(self.record_path, self.record)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record the results of the run."""
        self.record |= {"status": "finished", "results": dict(results)}
        write_json(self.record_path, self.record)

    def close(self) -> None:
        """Close and unlock the file."""
        if self._file is not None:
            self._file.close()
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _count_rows(self, file: IO[bytes], origins: Sequence[PromptOrigin]) -> int:
        """Count the whole rows, each of which must be that of its prompt; returns where the last of them ends. Rows
        beyond those that the record counts are drawn again."""
        recorded = _digests(self.record)
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            if recorded is not None and self.done >= len(recorded):
                self.notes.append(
                    f"{self.path}: rows after the first {self.done} are drawn again: its record does not count them"
                )
                break
            if self.done >= len(origins) or _origin(line) != origins[self.done]:
                raise RunError(f"--resume: row {self.done + 1} of {self.path} is not the one that the run wrote")
            self.done += 1
            self._digests += _digest(line)
            end += len(line)
        return end


def sample_file_error(path: Path) -> str | None:
    """How a file of samples differs from what its record says was written; None where it does not."""
    try:
        return _altered(path, read_record(path))
    except (OSError, RunError):
        return "has no .run.json that can be read"


def verify_samples(*, repair: bool) -> list[tuple[Path, str]]:
    """Cached samples that differ from what was written, and how; ``repair`` removes them."""
    paths = [folder / SAMPLES for folder in sample_entries()]
    problems = [(path, wrong) for path in paths if (wrong := sample_file_error(path))]
    if repair and problems:
        clear(ids=[path.parent.name for path, _ in problems])
    return problems


def _altered(path: Path, record: Mapping[str, Any]) -> str | None:
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
    # A killed run may have written rows that it had not counted yet.
    return "holds more rows than were written" if more and "results" in record else None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def read_record(path: Path) -> dict[str, Any]:
    """The record beside a file of samples: options, and digests of model and prompts. Raises :class:`RunError`."""

    def check(found: dict[str, Any]) -> dict[str, Any]:
        dict(found["options"])
        rows = found.get("rows", 1)
        if not isinstance(rows, int) or not 0 < rows < 2**53:  # "in range" would iterate for other types
            raise ValueError("its number of rows is not valid")
        return found

    return read_json(_record_path(path), check, "name another --output")


def _written(digests: str) -> dict[str, Any]:
    return {WRITTEN: {"rows": len(digests) // DIGEST_WIDTH, "digests": digests}}


def _digests(record: Mapping[str, Any]) -> list[str] | None:
    match record.get(WRITTEN):
        case {"rows": int(rows), "digests": str(text)} if len(text) == rows * DIGEST_WIDTH:
            return [text[i : i + DIGEST_WIDTH] for i in range(0, len(text), DIGEST_WIDTH)]
    return None


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=DIGEST_WIDTH // 2).hexdigest()


def _origin(line: bytes) -> PromptOrigin | None:
    try:
        row = parsed(line)
        return PromptOrigin(str(row["source"]), int(row["source_row"]))
    except Exception:  # not a row of this program
        return None
