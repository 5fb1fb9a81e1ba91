"""Where rows come from: files, folders, globs, studies, saved data sets and data sets of the Hub, by name."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from prefopt.core.cache_folder import file_hashes
from prefopt.data.files.folder import data_files, is_saved, listed, nearest, saved_split
from prefopt.data.files.hub import HubSplit
from prefopt.data.files.read import is_data_name, read_rows
from prefopt.errors import ConfigError, DataError
from prefopt.studies.export import StudyRows
from prefopt.studies.study import is_study

OPTIONS = ("config", "split", "revision")


class Origin(Protocol):
    """What gives the rows of a source: a file, a study, a split that was saved, a split of the Hub."""

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """See :meth:`Source.rows`."""

    def digest(self) -> str:
        """See :meth:`Source.digest`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows with a name.

    ``name`` is what messages call it: the path of a file, or a Hub name with its options. ``path`` is the file, where
    it is one. ``entry`` tells which of the names given to :func:`find_sources` led here (from 0). ``notes`` say what
    was passed over on the way; they stand with the first source of an entry.

    >>> [source.name for source in find_sources(["pairs.jsonl", "more/"])]  # doctest: +SKIP
    ['pairs.jsonl', 'more/a.parquet', 'more/b.csv.gz']
    """

    name: str
    path: Path | None
    origin: Origin
    entry: int = 0
    notes: tuple[str, ...] = ()

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        """The rows, streamed, from the start at each call. Raises :class:`DataError` with file and row or line.

        ``keep_going``: a row that cannot be read is given as the :class:`DataError` that tells why, in its place,
        where the rows after it can be read all the same; see :func:`prefopt.data.files.read.read_rows`.
        """
        return self.origin.rows(self.name, keep_going)

    def digest(self) -> str:
        """Hex digest of the contents: the SHA-256 of a file's bytes; for a split that was saved or comes from the Hub
        that of its arrow files (and its name, config and split); of a study that of the rows its votes give."""
        return self.origin.digest()


@dataclass(frozen=True, slots=True)
class FileOrigin:
    """One file."""

    path: Path

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """Rows as :func:`prefopt.data.files.read.read_rows` gives them."""
        return read_rows(self.path, keep_going=keep_going)

    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        return file_hashes([self.path], error=DataError)[0]


def find_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Everything that the names stand for, in their order; the files of a folder or glob sorted by path.

    A name is a file; a study that people voted in; a folder, for all data files below it or what ``datasets`` saved in
    it; a glob; or a data set of the Hub. Options follow after commas: ``org/name,config=main,split=train``; a folder
    takes ``split``. What exists on disk comes first. Raises :class:`DataError` for what is not there or holds
    no data, and :class:`ConfigError` for options that do not fit and for a file that is named twice, by whatever names.
    """
    sources: list[Source] = []
    for entry, given in enumerate(names):
        found = _find(os.fspath(given))
        sources += [replace(source, entry=entry) for source in found]
    _refuse_twice(sources, [os.fspath(name) for name in names])
    return sources


def _find(name: str) -> list[Source]:
    if not name.strip():
        raise ConfigError("the name of a data file is empty")
    path = Path(name).expanduser()
    if _exists(path):
        return _on_disk(path, None)
    base, options = _options(name)
    path = Path(base).expanduser()
    if options and _exists(path):
        if extra := sorted(options.keys() - {"split"}):
            raise ConfigError(f"{name}: {extra[0]}= is for data sets of the Hub, and {base} is on disk; leave it away")
        return _on_disk(path, options["split"])
    if glob.has_magic(base):
        if options:
            raise ConfigError(f"{name}: a glob takes no options; name the files")
        return _glob(base)
    if not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", base) or is_data_name(path):
        raise _absent(base)
    wanted = HubSplit(base, **options)
    return [Source(wanted.name, None, wanted)]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or one that no path may have
        return False


def _options(name: str) -> tuple[str, dict[str, str]]:
    """``base,key=value,...`` in parts; all of it is the base where what follows a comma is no option."""
    base, *parts = name.split(",")
    if not parts or not all("=" in part for part in parts):
        return name, {}
    options: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if key not in OPTIONS:
            close = difflib.get_close_matches(key, OPTIONS, 1)
            hint = f"; did you mean {close[0]}=?" if close else ""
            raise ConfigError(f"{name}: {key}= is no option of a data set; known are {', '.join(OPTIONS)}{hint}")
        if key in options:
            raise ConfigError(f"{name}: {key}= is given twice")
        if not value:
            raise ConfigError(f"{name}: {key}= has no value")
        options[key] = value
    return base.strip(), options


def _on_disk(path: Path, split: str | None) -> list[Source]:
    if not path.is_dir():
        if split is not None:
            raise ConfigError(f"{path}: is one file, which has no splits; leave ,split={split} away")
        if is_study(path):
            votes = StudyRows(path)
            return [Source(str(path), None, votes, notes=tuple(votes.notes()))]
        return [_file(path)]
    if is_saved(path):
        name = str(path) if split is None else f"{path},split={split}"
        return [Source(name, None, saved_split(path, split))]
    files, notes = data_files(path, split)
    return _noted([_file(file) for file in files], notes)


def _glob(pattern: str) -> list[Source]:
    found = glob.iglob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  (absolute patterns too)
    matches = sorted(Path(match) for match in found)
    files = [match for match in matches if match.is_file() and is_data_name(match)]
    if not files:
        what = "matches nothing" if not matches else f"matches no data file, only {matches[0]}"
        raise DataError(f"{what}; check the pattern", file=pattern)
    passed = [str(match) for match in matches if match not in set(files)]
    notes = [f"{pattern}: passed over {listed(passed)}"] if passed else []
    return _noted([_file(file) for file in files], notes)


def _file(path: Path) -> Source:
    return Source(str(path), path, FileOrigin(path))


def _noted(sources: list[Source], notes: list[str]) -> list[Source]:
    return [replace(sources[0], notes=tuple(notes)), *sources[1:]]


def _absent(base: str) -> DataError:
    parent = Path(base).expanduser().parent
    if close := nearest(base):
        return DataError(f"no such file or folder; did you mean {close}?", file=base)
    if not _exists(parent):
        return DataError(f"no such file or folder: there is no folder {parent}; check the path", file=base)
    return DataError("no such file or folder; check the path", file=base)


def _refuse_twice(sources: list[Source], names: list[str]) -> None:
    seen: dict[object, Source] = {}
    for source in sources:
        key = source.origin if source.path is None else os.path.realpath(source.path)
        if (other := seen.setdefault(key, source)) is source:
            continue
        same = source.name if source.name == other.name else f"{other.name} and {source.name}, one file,"
        by = [names[each.entry] for each in (other, source) if names[each.entry] != each.name]
        through = f" (through {' and '.join(dict.fromkeys(by))})" if by else ""
        raise ConfigError(f"{same} would be read twice{through}; name it once")
