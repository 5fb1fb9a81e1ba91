"""Folders that the ``datasets`` library saved: one data set, or a dict of them by split. Read without that library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data.columnar import arrow_batches, table_rows
from prefopt.data.content import look
from prefopt.disk.hashes import file_hashes
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
