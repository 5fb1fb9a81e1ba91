"""A part of a table on disk: one raw file for each column, and a manifest that holds their sizes and checksums.

A column's file is what its arrays are one after the other, so that writing needs no more memory than one chunk, and
reading none: the files are mapped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from prefopt.core.cache_folder import Damaged, file_hashes
from prefopt.core.files import write_flushed
from prefopt.data.table import COLUMNS, Array, Columns, Part
from prefopt.errors import CacheError

MANIFEST = "manifest.json"
# A folder with fewer bytes is not waited for until it is on the disk, and its checksums are taken at every opening: a
# flush takes longer than reading so little. What a power cut leaves of it is made again.
SMALL = 64 << 20


class TableWriter:
    """Writes columns chunk by chunk into a new ``folder``; ``finish`` writes the manifest, without which it is nothing.

    Use it as a context: it closes its files. Raises ``OSError``.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.groups = self.tokens = 0
        self._max_id = -1
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in COLUMNS}
        for name in COLUMNS:
            self._files[name] = _file(folder, name).open("wb")

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what a full disk did not take; whatever is finished has been flushed
                file.close()

    def append(self, columns: Columns) -> None:
        """The next groups; see ``COLUMNS``."""
        for name, (dtype, _) in COLUMNS.items():
            array = np.ascontiguousarray(columns[name])
            assert array.dtype == dtype, name
            data = array.tobytes()
            self._digests[name].update(data)
            self._files[name].write(data)
        self._max_id = max(self._max_id, int(columns["ids_T"].max(initial=-1)))
        self.groups += len(columns["row_G"])
        self.tokens += len(columns["ids_T"])

    def finish(self, about: Mapping[str, Any], attached: Mapping[str, bytes]) -> None:
        """Make it whole: ``about`` goes into the manifest, ``attached`` into files of these names beside it."""
        files = {}
        for name, file in self._files.items():
            files[f"{name}.bin"] = {"bytes": file.tell(), "sha256": self._digests[name].hexdigest()}
        for name, data in attached.items():
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write = Path.write_bytes if _small(files) else write_flushed
        for file in self._files.values():
            file.flush()
            if not _small(files):
                os.fsync(file.fileno())
        for name, data in attached.items():
            write(self.folder / name, data)
        manifest = {"files": files, "max_id": self._max_id, "groups": self.groups, "about": dict(about)}
        text = json.dumps(manifest, sort_keys=True)
        sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest}
        write(self.folder / MANIFEST, json.dumps(sealed, sort_keys=True, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, which says what it was when it was written. Raises ``Damaged`` and ``OSError``."""
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        manifest = sealed["manifest"]
        good = sealed["sha256"] == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    except FileNotFoundError:
        raise Damaged("no manifest") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("its manifest is unreadable") from error
    if not good or not isinstance(manifest, dict) or {_file(folder, n).name for n in COLUMNS} - set(manifest["files"]):
        raise Damaged("its manifest is not what was written")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], *, root: Path | None = None, anew: bool = False) -> None:
    """Raise ``Damaged`` where a file is not what the manifest says.

    Checksums of large files that did not change since they were last taken are remembered (see :func:`file_hashes`),
    unless they are to be taken ``anew``.
    """
    files = {folder / name: entry for name, entry in manifest["files"].items()}
    for path, entry in files.items():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error
        if size != entry["bytes"]:
            raise Damaged(f"{path.name} has {size} bytes instead of {entry['bytes']}")
    try:
        anew = anew or _small(manifest["files"])
        found = [_sha256(path) for path in files] if anew else file_hashes(list(files), root, error=CacheError)
    except (OSError, CacheError) as error:
        raise Damaged(str(error)) from error
    for (path, entry), digest in zip(files.items(), found, strict=True):
        if digest != entry["sha256"]:
            raise Damaged(f"the bytes of {path.name} do not give the checksum written with them")


def open_part(folder: Path, manifest: Mapping[str, Any], *, source: int = 0) -> Part:
    """The columns of a folder, mapped."""
    columns: dict[str, Array] = {}
    for name, (dtype, width) in COLUMNS.items():
        columns[name] = _mapped(_file(folder, name), dtype).reshape(-1, *width)
    return Part(columns, max_id=int(manifest["max_id"]), source=source)


def _mapped(path: Path, dtype: np.dtype[Any]) -> Array:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _small(files: Mapping[str, Mapping[str, Any]]) -> bool:
    total: int = sum(entry["bytes"] for entry in files.values())
    return total < SMALL


def _file(folder: Path, column: str) -> Path:
    return folder / f"{column}.bin"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
