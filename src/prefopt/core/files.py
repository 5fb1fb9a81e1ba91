"""Files: atomic writes, JSON with one-line errors, and dataclasses from JSON.

>>> from dataclasses import dataclass
>>> @dataclass
... class Place:
...     name: str
...     reward: float | None = None
>>> typed(Place, {"name": "a", "reward": 1})
Place(name='a', reward=1)
>>> typed(Place, {"name": "a", "reward": "abc"})
Traceback (most recent call last):
TypeError: reward is 'abc'
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import shutil
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import psutil
from safetensors import SafetensorError

from prefopt.errors import ConfigError, RunError, UserError

LEFT_SECONDS = 3600.0
"""Age of a temporary file that counts as left over, where no lock excludes a writer."""
SHIPPED = "prefopt:"
"""Begins the name of a file or folder that ships with prefopt."""
_ASIDE = re.compile(r"\.(\d{1,9})(?:-\w+)?$")  # SQLite adds -journal


def expanded(name: str | Path) -> Path:
    """The path that a user named, with ``~`` expanded, and ``prefopt:`` to the folder that prefopt is installed in, for
    what ships with it: ``prefopt:recipes/sentiment.yaml``. Raises :class:`ConfigError` where no system has one so
    long."""
    if str(name).startswith(SHIPPED):
        return Path(__file__).resolve().parents[1] / str(name).removeprefix(SHIPPED)
    path = Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser fails where there is no such user)
    with suppress(ValueError):
        try:
            path.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ConfigError(f"{str(name)[:60]}...: too long for the name of a file or folder") from None
    return path


def is_path(name: str) -> bool:
    """Whether a name can only be a local file or folder, never a repository of the Hub."""
    return name.startswith((".", "/", "~", SHIPPED)) or name.count("/") > 1


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def making_room(error: Exception) -> str:
    """The first half of a remedy where a disk is full, or may be; else nothing.

    >>> making_room(OSError(errno.ENOSPC, "No space left on device")), making_room(PermissionError(errno.EACCES, "no"))
    ('free some space, or ', '')
    """
    return "" if isinstance(error, OSError) and error.errno not in FULL else "free some space, or "


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an error about a full or read-only disk into a one-line ``RunError``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RunError(f"{path}: cannot be written ({reason}); {making_room(error)}name another --output") from error


OVERWRITE = "name another file, or add --overwrite"
RESUME = "continue it with --resume, or name another file"


def refuse_existing(path: Path, remedy: str, *, unless: bool) -> None:
    """Raises :class:`RunError` where the file of ``--output`` is there already, ``unless`` that is wanted."""
    if path.exists() and not unless:
        raise RunError(f"--output {path} exists; {remedy}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ``RunError``."""
    with output_errors(path):
        replace_file(path, json.dumps(value, indent=2).encode())


def replace_file(path: Path, data: bytes, *, aside: str | None = None) -> None:
    """Replace the contents of ``path`` atomically, even across a power cut; an ``OSError`` leaves it unchanged.

    ``aside``: name of the temporary file beside it; by default each process has its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first = path.with_name(aside) if aside else aside_of(path)
    try:
        write_flushed(first, data)
        first.replace(path)
    except OSError:
        first.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the rename itself becomes durable only with its folder


def aside_of(path: Path) -> Path:
    """The temporary name of this process for ``path``, ``.NAME.PID``; removes those of killed processes."""
    if path.parent.is_dir():
        remove_leftovers(path.parent, path.name, seconds=LEFT_SECONDS)
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_leftovers(folder: Path, name: str | None = None, *, seconds: float = 0.0) -> None:
    """Remove temporary files (:func:`aside_of`) of killed processes, for the file ``name`` or all.

    Only those unchanged for ``seconds``, which a caller without the folder's lock needs: on a disk that machines share,
    the number may be that of a process elsewhere.
    """
    for left in folder.glob(f".{glob.escape(name) if name else '*'}.*"):
        found = _ASIDE.search(left.name)
        if found is None or int(found[1]) == os.getpid() or psutil.pid_exists(int(found[1])):
            continue
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime < seconds:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists; renamed first, so that a kill never leaves half of it under its name."""
    aside = aside_of(folder)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def write_flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk, where the system needs it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


Made = TypeVar("Made")


def parsed(text: bytes) -> Any:
    """The value of a JSON text. Raises ``ValueError`` for what is no JSON in UTF-8, or nested too deep."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError:
        raise ValueError("it is not JSON") from None
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deep") from None


def read_json(path: Path, make: Callable[[Any], Made], remedy: str) -> Made:
    """``make`` of the JSON in a file; it may raise anything on a damaged one.

    Raises :class:`RunError` with ``remedy`` where the file cannot be read or ``make`` fails; passes on user errors.
    """
    try:
        return make(parsed(path.read_bytes()))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); restore it, or {remedy}") from None
    except UserError:
        raise
    except Exception as error:
        text = " ".join(f"{error}".split())[:100]
        why = text if isinstance(error, (ValueError, TypeError)) else "it is not what was written there"
        raise RunError(
            f"{path} cannot be read ({why}): damaged, or of another version; restore it, or {remedy}"
        ) from None


def printable(value: Any) -> Any:
    """The same value with lone surrogates, which no file and terminal accepts, replaced in its texts."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [printable(x) for x in value]
    return {printable(n): printable(x) for n, x in value.items()} if isinstance(value, dict) else value


MARKS = ("config.json", "adapter_config.json")
"""Files that make a folder a model or an adapter."""


def models_below(folder: Path) -> list[Path]:
    """Folders of models one or two levels down, sorted; none where the folder is a model itself."""
    if any((folder / mark).is_file() for mark in MARKS):
        return []
    return sorted({path.parent for mark in MARKS for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{mark}")})


def one_below(folder: Path) -> str:
    """A hint to models below a folder that is no model itself; empty without any."""
    found = models_below(folder)
    many = "there are models" if len(found) > 1 else "there is a model"
    return f"; {many} below it: name one, such as {found[0]}" if found else ""


Record = TypeVar("Record")


def typed(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """The dataclass ``kind`` of ``values``. Raises ``TypeError`` for wrong types and unknown or missing names.

    A float may be a whole number, and must be finite.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.80}")
    return kind(**values)


def _is(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and (
            all(_is(v, parts[0]) for v in value)
            if parts[-1] is Ellipsis
            else len(value) == len(parts) and all(map(_is, value, parts))
        )
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, parts[0]) and _is(v, parts[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
