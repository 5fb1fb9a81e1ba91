"""Cache of tokenised data: each source is tokenised once and mapped from disk afterwards.

An entry is one source tokenised in one way. Its key holds the contents of the source and everything else that the
tokens depend on, never the path or the time of writing. It consists of one raw file per column of
:data:`prefopt.data.table.COLUMNS`, written chunk by chunk and mapped, and a manifest with checksums and the report on
rows that became no group. It is written aside and renamed when complete; its writer holds a lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unicodedata import unidata_version

import numpy as np

import prefopt
from prefopt import records
from prefopt.core.cache_folder import (
    Damaged,
    acquired,
    cache_errors,
    file_hashes,
    last_used,
    remove,
    size_of,
    space_lock,
    token_entries,
    tokens_folder,
    used,
)
from prefopt.core.files import sync_folder, write_flushed
from prefopt.data.table import COLUMNS, Array, Columns, Part
from prefopt.data.validate import Problem, Warnings
from prefopt.errors import CacheError

log = logging.getLogger(__name__)

# Token ids also depend on the versions of these libraries.
LIBRARIES = ("transformers", "tokenizers", "jinja2")
# The code that makes groups of rows. Its digest is part of the key: a version number would be forgotten.
CODE = (Path(__file__).parent, Path(records.__file__))
MANIFEST, BUILDING = "manifest.json", ".building"
# Smaller entries are not flushed to disk, which takes longer than verifying their checksums at every opening.
SMALL = 64 << 20

Append = Callable[[Columns], None]


@dataclass(frozen=True, slots=True)
class TokenKey:
    """All that tokens depend on: digest of the ``source``, how its rows are parsed (``reading``) and converted
    (``kind``), and the digest of tokenizer, template and options (``Renderer.digest``)."""

    source: str
    reading: tuple[str, ...]
    kind: str
    rendering: str

    @property
    def id(self) -> str:
        """Name of the entry's folder, 16 hex digits."""
        versions = [prefopt.__version__, code_digest(CODE), unidata_version, *map(version, LIBRARIES)]
        text = json.dumps([asdict(self), versions], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache
def code_digest(places: tuple[Path, ...]) -> str:
    """SHA-256 of the names and contents of Python sources, among files and below folders."""
    digest = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{file.relative_to(place.parent).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Report:
    """The ``read`` rows of ``file``: problems, notes and warnings, and ``Renderer.template``.

    ``pictures``: the files that problems may be in, as :func:`prefopt.data.pictures.file_state` found them; -1 of one
    that changed meanwhile. ``folder``: where relative paths of pictures started.
    """

    file: str
    read: int
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: Warnings = field(default_factory=dict)
    template: str | None = None
    pictures: dict[str, list[int]] = field(default_factory=dict)
    folder: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; problems without the file, which :meth:`from_dict` is given."""
        return asdict(self) | {"problems": [(p.kind, p.row, p.what) for p in self.problems]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], file: str) -> Report:
        """The report with ``file`` as the name: the same contents may have another path by now."""
        start = f"{plain['file']}: "
        notes = [f"{file}: {n.removeprefix(start)}" if n.startswith(start) else n for n in plain["notes"]]
        problems = [Problem(kind, row, what, file) for kind, row, what in plain["problems"]]
        same = {name: plain[name] for name in ("read", "warnings", "template", "pictures", "folder")}
        return cls(file=file, problems=problems, notes=notes, **same)


@dataclass(frozen=True, slots=True)
class Tokenised:
    """The groups of one source and its report; ``cached``: they were in the cache already."""

    part: Part
    report: Report
    cached: bool = False

    @property
    def named_pictures(self) -> bool:
        """Whether rows name files of pictures, those of refused rows too."""
        return bool(self.part.picture_files or self.report.pictures)


class TableWriter:
    """Writes columns chunk by chunk into a new ``folder``, complete after ``finish``. Raises ``CacheError``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups = self.tokens = 0
        self._max_id = -1
        self._digests = {name: hashlib.sha256() for name in COLUMNS}
        self._stack = ExitStack()
        with cache_errors(folder):
            folder.mkdir(parents=True)
            self._files = {name: self._stack.enter_context(_file(folder, name).open("wb")) for name in COLUMNS}

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk; finished files have been flushed
            self._stack.close()

    def append(self, columns: Columns) -> None:
        """Append the columns of the next groups."""
        for name, (dtype, _) in COLUMNS.items():
            array = np.ascontiguousarray(columns[name])
            assert array.dtype == dtype, name
            data = array.tobytes()
            self._digests[name].update(data)
            with cache_errors(self.folder):
                self._files[name].write(data)
        self._max_id = max(self._max_id, int(columns["ids_T"].max(initial=-1)))
        self.groups += len(columns["row_G"])
        self.tokens += len(columns["ids_T"])

    def finish(self, about: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Write the manifest, with ``about`` and the report."""
        files = {}
        for name, file in self._files.items():
            files[f"{name}.bin"] = {"bytes": file.tell(), "sha256": self._digests[name].hexdigest()}
        manifest = {"files": files, "max_id": self._max_id, "groups": self.groups, "about": about, "report": report}
        text = json.dumps(manifest)  # unsorted, since the order of warnings is that of the notes
        sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}
        small = _small(files)
        with cache_errors(self.folder):
            for file in self._files.values():
                file.flush()
                if not small:
                    os.fsync(file.fileno())
            write = Path.write_bytes if small else write_flushed
            write(self.folder / MANIFEST, json.dumps(sealed, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises ``Damaged`` and ``OSError``."""
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        manifest = sealed["manifest"]
        good = sealed["sha256"] == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    except FileNotFoundError:
        raise Damaged("no manifest") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("its manifest is unreadable") from error
    if not good or not isinstance(manifest, dict) or {_file(folder, n).name for n in COLUMNS} - set(manifest["files"]):
        raise Damaged("its manifest is not what was written")
    return manifest


def check_files(
    folder: Path, manifest: Mapping[str, Any], *, root: Path | None = None, recompute: bool = False
) -> None:
    """Raise ``Damaged`` where the checksum of a file differs from the manifest.

    Checksums of large, unchanged files are remembered (see :func:`file_hashes`); ``recompute`` computes them all.
    """
    files = manifest["files"]
    paths = [folder / name for name in files]
    try:
        recompute = recompute or _small(files)
        found = list(map(_sha256, paths)) if recompute else file_hashes(paths, root, error=CacheError)
    except (OSError, CacheError) as error:
        raise Damaged(str(error)) from error
    for name, digest in zip(files, found, strict=True):
        if digest != files[name]["sha256"]:
            raise Damaged(f"the checksum of {name} does not match its contents")


def open_part(folder: Path, manifest: Mapping[str, Any], *, source: int = 0) -> Part:
    """The columns of a folder, mapped."""
    columns: dict[str, Array] = {}
    for name, (dtype, width) in COLUMNS.items():
        path = _file(folder, name)
        # An empty file cannot be mapped.
        column = np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)
        columns[name] = column.reshape(-1, *width)
    return Part(columns, max_id=int(manifest["max_id"]), source=source)


def _small(files: Mapping[str, Mapping[str, Any]]) -> bool:
    total: int = sum(entry["bytes"] for entry in files.values())
    return total < SMALL


def _file(folder: Path, column: str) -> Path:
    return folder / f"{column}.bin"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenCache:
    """The entries below ``root``, by default :func:`prefopt.core.cache_folder.cache_root`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root, self.folder = root, tokens_folder(root)

    def get(
        self,
        key: TokenKey,
        make: Callable[[Append], Report],
        *,
        file: str,
        source: int = 0,
        stop: Callable[[], None] = lambda: None,
    ) -> Tokenised:
        """The entry of ``key``; where it is missing or damaged, ``make`` appends its columns chunk by chunk.

        Waits for another process that writes the same entry; ``stop`` is called meanwhile and may raise. Raises
        ``CacheError`` where the disk refuses.
        """
        folder = self.folder / key.id
        found = None
        with suppress(Damaged):  # checked again, with a warning, under the lock
            found = self._open(folder, file, source)
        if found is None:
            with self._locked(folder, stop):
                try:
                    found = self._open(folder, file, source)
                except Damaged as damage:
                    log.warning("token cache %s is damaged (%s): %s is tokenised again", folder, damage, file)
                    remove(folder)
                if found is None:
                    self._make(folder, key, make)
                    found = self._open(folder, file, source, fresh=True)
        assert found is not None
        with suppress(OSError):  # a read-only cache
            used(folder)
        return found

    def remove(self, key: TokenKey) -> None:
        """Remove an entry."""
        with self._locked(self.folder / key.id, lambda: None):
            remove(self.folder / key.id)

    def _open(self, folder: Path, file: str, source: int, *, fresh: bool = False) -> Tokenised | None:
        """The entry; None where there is none. Raises ``Damaged``."""
        if not folder.exists():
            return None
        try:
            manifest = read_manifest(folder)
            if not fresh:
                check_files(folder, manifest, root=self.root)
            report = Report.from_dict(manifest["report"], file)
            return Tokenised(open_part(folder, manifest, source=source), report, cached=not fresh)
        except OSError as error:
            raise Damaged(error.strerror or str(error)) from error

    def _make(self, folder: Path, key: TokenKey, make: Callable[[Append], Report]) -> None:
        aside = folder.with_name(folder.name + BUILDING)
        for left in self.folder.glob(f"*{BUILDING}"):  # by processes that were killed
            lock = space_lock(left.with_name(left.name.removesuffix(BUILDING)))
            if left == aside or acquired(lock):
                shutil.rmtree(left, ignore_errors=True)
                lock.release()
        try:
            with TableWriter(aside) as writer:
                report = make(writer.append)
                created = datetime.now(UTC).isoformat("T", "seconds")
                about = {"file": report.file, "read": report.read, "tokens": writer.tokens, "created": created}
                writer.finish(about | {"key": asdict(key)}, report.to_dict())
            with cache_errors(folder):
                aside.rename(folder)
                sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    @contextmanager
    def _locked(self, folder: Path, stop: Callable[[], None]) -> Iterator[None]:
        lock = space_lock(folder)
        if not acquired(lock):
            log.warning("another process is tokenising the same data (%s): waiting for it", folder.name)
            while not acquired(lock, seconds=0.2):
                stop()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One entry; ``about`` is from its manifest, empty if unreadable."""

    id: str
    about: dict[str, Any]
    groups: int
    bytes: int
    last_used: datetime


def list_tokens(root: Path | None = None) -> list[TokenInfo]:
    """All entries, last used first; ``verify_tokens`` checks them."""
    found = []
    for folder in token_entries(root):
        try:
            manifest = read_manifest(folder)
        except (Damaged, OSError):
            manifest = {"about": {}, "groups": 0}
        last = datetime.fromtimestamp(last_used(folder), UTC)
        found.append(TokenInfo(folder.name, manifest["about"], manifest["groups"], size_of(folder), last))
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def verify_tokens(root: Path | None = None, *, repair: bool = False) -> list[tuple[Path, str]]:
    """Damaged folders with the reason; every file is hashed. ``repair`` removes them. Raises ``CacheError``."""
    problems = []
    for folder in token_entries(root):
        try:
            with cache_errors(folder):
                check_files(folder, read_manifest(folder), recompute=True)
        except Damaged as damage:
            problems.append((folder, str(damage)))
            if repair:
                remove(folder)
    return problems
