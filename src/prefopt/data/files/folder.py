"""The data files below a folder."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.cache_folder import file_hashes
from prefopt.data.files.columnar import arrow_batches, table_rows
from prefopt.data.files.content import look
from prefopt.data.files.read import is_data_name
from prefopt.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class SavedSplit:
    """One split of a saved folder: its arrow files, in order."""

    files: tuple[Path, ...]

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """Rows of all files, as of one table."""
        contents = [look(file) for file in self.files]
        return table_rows(lambda: (batch for content in contents for batch in arrow_batches(content)), name)

    def digest(self) -> str:
        """SHA-256 of the hashes of the files."""
        return hashlib.sha256("\n".join(file_hashes(self.files, error=DataError)).encode()).hexdigest()


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` made a folder."""
    return (folder / SPLITS).is_file() or ((folder / STATE).is_file() and (folder / "dataset_info.json").is_file())


def saved_split(folder: Path, split: str | None) -> SavedSplit:
    """The split of a saved folder. Raises :class:`DataError` where it is not said which, where there is none of that
    name, and where files are missing."""
    splits = _splits(folder)
    if splits is None:
        if split is not None:
            state = _read(folder / STATE)
            if split != str(state.get("_split")):
                what = f"is one data set without splits (saved as {state.get('_split')}); leave ,split={split} away"
                raise DataError(what, file=str(folder))
        return SavedSplit(_files(folder))
    return SavedSplit(_files(folder / choose(split, splits, str(folder))))


def choose(split: str | None, splits: list[str], name: str) -> str:
    """The split that was named, or the only one. Raises :class:`DataError` with the splits there are."""
    if split is None and len(splits) == 1:
        return splits[0]
    known = ", ".join(splits) or "none"
    if split is None:
        likely = "train" if "train" in splits else splits[0]
        raise DataError(f"has several splits ({known}); name one: {name},split={likely}", file=name)
    if split not in splits:
        raise DataError(f"has no split {split!r}; its splits are {known}", file=name)
    return split


def _splits(folder: Path) -> list[str] | None:
    if not (folder / SPLITS).is_file():
        return None
    splits = _read(folder / SPLITS).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise DataError("lists no splits; save the data set again", file=str(folder / SPLITS))
    return [Path(name).name for name in splits]


def _files(folder: Path) -> tuple[Path, ...]:
    state = _read(folder / STATE)
    listed = state.get("_data_files")
    names = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    files = [folder / Path(name).name for name in names if isinstance(name, str)]
    if not files or len(files) < len(names):
        raise DataError("names no data files; save the data set again", file=str(folder / STATE))
    if state.get("_indices_data_files"):
        what = "selects rows by a table of indices, as old versions of datasets saved it; save the data set again"
        raise DataError(what, file=str(folder / STATE))
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"lacks {missing[0]}; copy the whole folder", file=str(folder))
    return tuple(files)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError("is not there; copy the whole folder", file=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"is damaged ({error}); copy the folder again", file=str(path)) from None
    if not isinstance(value, dict):
        raise DataError("is damaged (not an object); copy the folder again", file=str(path))
    return value


# Files beside the data that look like data by their names.
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json"}
# Words in a path that name a split, as the Hub reads them too.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def data_files(folder: Path, split: str | None) -> tuple[list[Path], list[str]]:
    """The data files below ``folder``, sorted by path, and notes on what was passed over.

    Paths may name splits (``train-00000.parquet``, ``test/rows.jsonl``). Where they name several, ``split`` has to say
    which is meant. Raises :class:`DataError` where it does not, where there is no data, and where the folder cannot be
    read.
    """
    files, passed = _walk(folder)
    if not files:
        what = f"holds no data files, only {listed(passed)}" if passed else "is an empty folder"
        endings = ".json, .jsonl, .csv, .tsv, .parquet or .arrow, maybe .gz"
        raise DataError(f"{what}; it should hold files that end in {endings}", file=str(folder))
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(split_of(file), []).append(file)
    named = [name for name in by_split if name]
    if split is not None or len(named) > 1:
        chosen = choose(split, sorted(named), str(folder))
        passed += [file for file in files if file not in by_split[chosen]]
        files = by_split[chosen]
    notes = [f"{folder}: passed over {listed(sorted(passed))}"] if passed else []
    return [folder / file for file in files], notes


def split_of(file: str) -> str:
    """The split that a relative path names, or nothing.

    What stands before the number of a shard is one (``train_sft-00000-of-00003.parquet``); else one of the words of
    the path is, the file's own name first.
    """
    if shard := re.match(r"(\w+)-\d{5}-of-\d{5}", Path(file).name):
        return shard[1]
    for part in reversed(Path(file).parts):
        words = re.split(r"[^a-z]+", part.lower())
        for name, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return name
    return ""


def listed(names: list[str], most: int = 5) -> str:
    """Names in a line, the first few of them."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str) -> Path | None:
    """What lies where ``name`` points to and is spelt almost like it."""
    path = Path(name).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return None
    stems = {_stem(name): name for name in sorted(names)}  # two endings alike say nothing
    close = difflib.get_close_matches(_stem(path.name), stems, 1, cutoff=0.75)
    return path.parent / stems[close[0]] if close else None


def _stem(name: str) -> str:
    return name.partition(".")[0] or name


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Relative paths of data files and of what is none, sorted; hidden files and folders are neither."""
    files: list[str] = []
    passed: list[str] = []
    seen = set()

    def fail(error: OSError) -> None:
        raise DataError(f"cannot be read: {error.strerror}", file=str(error.filename or folder))

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        # A link to a folder that was seen already would lead round in circles.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(place)
        if real in seen:
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
