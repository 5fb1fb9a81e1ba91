"""Data sources by name (files, folders, globs, studies, saved data sets, the Hub), and the rows of a file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import expanded
from prefopt.core.options import nearest as did_you_mean
from prefopt.data.files import text_rows
from prefopt.data.files.content import (
    CSV_NAMES,
    DAMAGED,
    TABLE_NAMES,
    Content,
    damaged,
    data_suffix,
    is_data_name,
    lines_of,
    look,
)
from prefopt.data.files.hub import HubSplit, choose_split, is_saved, listed, nearest, saved_split
from prefopt.errors import ConfigError, DataError
from prefopt.studies.export import StudyRows
from prefopt.studies.study import is_study

OPTIONS = ("config", "split", "revision")
# Names like those of data files, beside the data.
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json"}
# Words in a path that name a split, as on the Hub.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Origin(Protocol):
    """A file, a study, a saved split, a split of the Hub or rows in memory; methods as of :class:`Source`."""

    def rows(self, name: str, keep_going: bool) -> Iterator[object]: ...
    def digest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Rows with a name for messages: the path of a file, or a Hub name with its options.

    ``path`` is the file, where it is one; ``entry`` the index of the name given to :func:`find_sources` that led here.
    ``notes`` names what was passed over; the first source of an entry has them.
    """

    name: str
    path: Path | None
    origin: Origin
    entry: int = 0
    notes: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return data_suffix(self.path) if self.path else ""

    def rows(self, *, keep_going: bool = False) -> Iterator[object]:
        """Stream the rows, from the start at each call; ``keep_going`` and errors as in :func:`read_rows`."""
        return self.origin.rows(self.name, keep_going)

    def digest(self) -> str:
        """SHA-256 of the contents: of a file's bytes; of the arrow files of a saved split or one from the Hub (with
        name, config and split); of the rows that the votes of a study give."""
        return self.origin.digest()


@dataclass(frozen=True, slots=True)
class FileOrigin:
    path: Path
    header: bool = True

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        return read_rows(self.path, keep_going=keep_going, header=self.header)

    def digest(self) -> str:
        return file_hashes([self.path], error=DataError)[0]


@dataclass(frozen=True, slots=True)
class MemoryOrigin:
    """Rows in memory, which are not cached."""

    held: Sequence[object]

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        return iter(self.held)

    def digest(self) -> str:
        raise AssertionError("rows in memory are tokenised every time, never looked up in the cache")


def find_sources(names: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """All sources of the names, in order; the files of a folder or glob are sorted by path.

    A name is a file; a study; a folder, for all data files below it or what ``datasets`` saved in it; a glob; or a data
    set of the Hub. What exists on disk has precedence. Options follow after commas, ``split`` also for a folder:
    ``org/name,config=main,split=train``. Raises :class:`DataError` for what does not exist or holds no data,
    :class:`ConfigError` for options that do not fit and for a file that is named twice, by whatever names.
    """
    given = [os.fspath(name) for name in names]
    sources = [replace(source, entry=entry) for entry, name in enumerate(given) for source in _find(name)]
    _refuse_duplicates(sources, given)
    return sources


def _find(name: str) -> list[Source]:
    if not name.strip():
        raise ConfigError("the name of a data file is empty")
    path = expanded(name)
    if _exists(path):
        return _on_disk(path, None)
    base, options = _options(name)
    path = expanded(base)
    if options and _exists(path):
        if extra := sorted(options.keys() - {"split"}):
            raise ConfigError(f"{name}: {extra[0]}= is for data sets of the Hub, and {base} is on disk; remove it")
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
    except OSError:  # a folder above it cannot be read
        return False


def _options(name: str) -> tuple[str, dict[str, str]]:
    """Base and options of ``base,key=value,...``; a name whose commas are followed by no ``=`` has no options."""
    base, *parts = name.split(",")
    if not parts or not all("=" in part for part in parts):
        return name, {}
    options: dict[str, str] = {}
    for part in parts:
        key, value = (word.strip() for word in part.split("=", 1))
        if key not in OPTIONS:
            hint = f"known are {', '.join(OPTIONS)}{did_you_mean(key, OPTIONS)}"
            raise ConfigError(f"{name}: {key}= is not an option of a data set; {hint}")
        if key in options or not value:
            raise ConfigError(f"{name}: {key}= {'is given twice' if key in options else 'has no value'}")
        options[key] = value
    return base.strip(), options


def _on_disk(path: Path, split: str | None) -> list[Source]:
    if not path.is_dir():
        if split is not None:
            raise ConfigError(f"{path}: is one file, which has no splits; remove ,split={split}")
        if not is_study(path):
            return _files([path], str(path))
        votes = StudyRows(path)
        return [Source(str(path), None, votes, notes=tuple(votes.notes()))]
    if is_saved(path):
        name = str(path) if split is None else f"{path},split={split}"
        return [Source(name, None, saved_split(path, split))]
    files, passed = _folder_files(path, split)
    return _files(files, str(path), passed)


def _glob(pattern: str) -> list[Source]:
    found = glob.iglob(str(expanded(pattern)), recursive=True)  # noqa: PTH207  (absolute patterns too)
    matches = sorted(Path(match) for match in found)
    files = [match for match in matches if match.is_file() and is_data_name(match)]
    if not files:
        what = "matches nothing" if not matches else f"matches no data file, only {matches[0]}"
        raise DataError(f"{what}; check the pattern", file=pattern)
    return _files(files, pattern, [str(match) for match in matches if match not in set(files)])


def _files(paths: Sequence[Path], name: str, passed: Sequence[str] = ()) -> list[Source]:
    notes = (f"{name}: passed over {listed(passed)}",) if passed else ()
    return [Source(str(path), path, FileOrigin(path), notes=() if at else notes) for at, path in enumerate(paths)]


def _absent(base: str) -> DataError:
    parent, close = expanded(base).parent, nearest(base)
    hint = "check the path" if _exists(parent) else f"there is no folder {parent}"
    return DataError(f"no such file or folder; {f'did you mean {close}?' if close else hint}", file=base)


def _refuse_duplicates(sources: list[Source], names: list[str]) -> None:
    seen: dict[object, Source] = {}
    for source in sources:
        key = source.origin if source.path is None else os.path.realpath(source.path)
        if (other := seen.setdefault(key, source)) is source:
            continue
        same = source.name if source.name == other.name else f"{other.name} and {source.name}, one file,"
        by = [names[each.entry] for each in (other, source) if names[each.entry] != each.name]
        through = f" (through {' and '.join(dict.fromkeys(by))})" if by else ""
        raise ConfigError(f"{same} would be read twice{through}; name it once")


def read_rows(path: str | os.PathLike[str], *, keep_going: bool = False, header: bool = True) -> Iterator[object]:
    """Stream the rows of a file of JSON, comma- or tab-separated values, parquet or arrow as Python values.

    JSON and separated values may be compressed (gzip, bzip2, xz, zstd). The kind of file is recognised from its
    contents, and from its name where they leave it open. ``header``: the first line of separated values names the
    columns; else they are called 1, 2, ...

    Raises :class:`DataError` where the file is missing, a folder, unreadable, empty, damaged, not UTF-8 or of no known
    kind, and where a row cannot be read (with row and line). With ``keep_going``, that error is yielded in place of the
    row, and the next rows follow, where their beginning is certain: in JSON lines, in a list where a row is JSON but
    unusable, and where a record has a wrong number of cells.
    """
    content = look(Path(path))
    number = 0
    try:
        for row in _reader(content, header):
            if isinstance(row, DataError) and not keep_going:
                raise row
            number += 1
            yield row
    except DAMAGED as error:
        raise damaged(error, str(path), number) from None


def raw_lines(path: Path) -> Iterator[bytes] | None:
    """The decompressed bytes of each row of a file of JSON lines, with line end; None for any other file.

    Rows and their order are those of :func:`read_rows` with ``keep_going``.
    """
    content = look(path)
    return None if content.is_table or content.first == b"[" or not content.is_json else _lines(content)


def _lines(content: Content) -> Iterator[bytes]:
    with content.opened() as handle:
        for line, _ in lines_of(handle):
            if line.strip(b" \t\r\n"):
                yield line


def _reader(content: Content, header: bool) -> Iterator[object]:
    if content.is_table:
        from prefopt.data.files.columnar import read_table  # pyarrow takes time to import

        yield from read_table(content)
    elif content.is_json:
        read = text_rows.read_json_list if content.first == b"[" else text_rows.read_json_lines
        with content.opened() as handle:
            yield from read(handle, str(content.path))
    elif data_suffix(content.path) in CSV_NAMES:
        yield from text_rows.read_csv(content, header=header)
    else:
        what = "is of no known kind; name it by what it holds: .jsonl, .json, .csv, .tsv, .parquet or .arrow"
        if (suffix := data_suffix(content.path)) in TABLE_NAMES:
            what = f"is not a {suffix[1:]} file, despite its name; download or copy it again"
        raise DataError(what, file=str(content.path))


def _folder_files(folder: Path, split: str | None) -> tuple[list[Path], list[str]]:
    """The data files below ``folder``, and the names of those that were passed over, sorted.

    Where the paths name several splits (``train-00000.parquet``, ``test/rows.jsonl``), ``split`` selects one.
    """
    files, passed = _walk(folder)
    if not files:
        what = f"holds no data files, only {listed(passed)}" if passed else "is an empty folder"
        endings = ".json, .jsonl, .csv, .tsv, .parquet or .arrow, maybe .gz"
        raise DataError(f"{what}; it should hold files that end in {endings}", file=str(folder))
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    named = [name for name in by_split if name]
    if split is not None or len(named) > 1:
        chosen = choose_split(split, sorted(named), str(folder))
        passed += [file for file in files if file not in by_split[chosen]]
        files = by_split[chosen]
    return [folder / file for file in files], sorted(passed)


def _split_of(file: str) -> str:
    """The split that a relative path names, or nothing: the words before the number of a shard
    (``train_sft-00000-of-00003.parquet``), or one of the words in the path, the file's name first."""
    if shard := re.match(r"(\w+)-\d{5}-of-\d{5}", Path(file).name):
        return shard[1]
    for part in reversed(Path(file).parts):
        words = re.split(r"[^a-z]+", part.lower())
        for name, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return name
    return ""


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Relative paths of data files and of other files, sorted; hidden files and folders are left out."""
    files: list[str] = []
    passed: list[str] = []
    seen = set()

    def fail(error: OSError) -> None:
        raise DataError(f"cannot be read: {error.strerror}", file=str(error.filename or folder))

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if name.startswith("."):
                continue
            path = Path(place, name)
            is_data = is_data_name(path) and name not in NO_DATA and not re.match(r"cache-.*\.arrow$", name)
            (files if is_data else passed).append(path.relative_to(folder).as_posix())
    return sorted(files), sorted(passed)
