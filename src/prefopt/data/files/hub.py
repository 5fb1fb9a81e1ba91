"""Data sets of the Hugging Face Hub, by the ``datasets`` library: downloaded once, then mapped from its cache."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefopt.core.hashes import file_hashes
from prefopt.data.files.columnar import arrow_batches, table_rows
from prefopt.data.files.content import look, reason
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


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a data set of the Hub. It is found, and where need be downloaded, when it is first read."""

    repo: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """As it is given on a command line."""
        options = {"config": self.config, "split": self.split, "revision": self.revision}
        return ",".join([self.repo, *(f"{key}={value}" for key, value in options.items() if value)])

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """Rows of the split."""
        return dataset_rows(_load(self), name)

    def digest(self) -> str:
        """SHA-256 of name, config, split and the hashes of the files that the library made of the revision."""
        data = _load(self)
        files = [Path(entry["filename"]) for entry in data.cache_files]
        parts = [self.repo, data.info.config_name or "", str(data.split), *file_hashes(files, error=DataError)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dataset_rows(data: Any, name: str) -> Iterator[object]:
    """Rows of a ``datasets.Dataset``; unlike its own, without the nulls that Arrow fills in."""

    def batches() -> Iterator[Any]:
        for table in data.with_format("arrow").iter(batch_size=1024):
            yield from table.combine_chunks().to_batches()

    return table_rows(batches, name)


def is_dataset(data: object) -> bool:
    """Whether it is a ``datasets.Dataset`` whose rows are what its table holds."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(data, library.Dataset) and data.format["type"] is None


@lru_cache(maxsize=8)
def _load(wanted: HubSplit) -> Any:
    """The data set, mapped into memory. Raises :class:`DataError` for whatever stands in the way, with the remedy."""
    try:
        import datasets
    except ImportError:
        what = "there is no such file or folder; if it is on the Hugging Face Hub: pip install 'prefopt[hub]'"
        raise DataError(what, file=wanted.name) from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nobody is told what is loaded
    try:
        builder = datasets.load_dataset_builder(wanted.repo, wanted.config, revision=wanted.revision)
        if builder.repo_id is None and "/" not in wanted.repo:
            # "json" and its like are readers of the library, which take whatever lies in the current folder.
            raise DataError("is no file or folder here, and names no data set; check the spelling", file=wanted.name)
        if wanted.config is None and len(builder.builder_configs) > 1:
            raise _which_config(wanted, list(builder.builder_configs))
        if wanted.revision and type(builder).__module__.endswith(".cache.cache"):
            what = f"the Hub cannot be reached, and what is cached may be another revision than {wanted.revision}"
            raise DataError(f"{what}; go online, or leave the revision away", file=wanted.name)
        builder.download_and_prepare()
        splits = list(builder.info.splits)
        split = wanted.split or ("train" if "train" in splits else choose(None, splits, wanted.name))
        for part in split.split("+"):  # the library's own language: train[:1000], train+test
            choose(part.partition("[")[0].strip(), splits, wanted.name)
        return builder.as_dataset(split=split, in_memory=False)
    except DataError:
        raise
    except Exception as error:  # whatever the library, the network and the host raise is one line for a person
        raise _explained(error, wanted) from error


def _which_config(wanted: HubSplit, configs: list[str]) -> DataError:
    shown = ", ".join(configs[:20]) + (f" and {len(configs) - 20} more" if len(configs) > 20 else "")
    if wanted.config is None:
        what = f"has several configs ({shown}); name one: {wanted.repo},config={configs[0]}"
    else:
        close = difflib.get_close_matches(wanted.config, configs, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        what = f"has no config {wanted.config!r}; its configs are {shown}{hint}"
    return DataError(what, file=wanted.name)


def _explained(error: Exception, wanted: HubSplit) -> DataError:
    """One line for what the library raised: what it is, and what to do."""
    said = reason(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, ValueError) and (configs := re.search(r"(?:Available|configs): (\[.*\])", said)):
        return _which_config(wanted, re.findall(r"'([^']*)'", configs[1]))
    if re.search(r"\bgated\b", said) or "GatedRepoError" in kinds:
        page = f"https://huggingface.co/datasets/{wanted.repo}"
        what = f"is gated: ask for access at {page}, then log in with: hf auth login"
    elif said.startswith("Revision ") or "RevisionNotFoundError" in kinds:
        what = f"has no revision {wanted.revision!r}; name a branch, a tag or a commit of it"
    elif kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        what = "holds no data files that can be read"
    elif "RepositoryNotFoundError" in kinds or (isinstance(error, FileNotFoundError) and error.errno is None):
        what = f"is no file or folder here{_near(wanted)} and no data set on the Hub; check the spelling"
        what += " (a private one needs: hf auth login)"
    elif kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "HTTPError"}:
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0") else ""
        what = f"is no file or folder here{_near(wanted)}, and the Hub cannot be asked ({said}{offline}); "
        what += "check path and network"
    elif "scripts are no longer supported" in said:
        what = "is made by a script of its author, which is not run; use a copy of it in parquet or JSON"
    elif isinstance(error, OSError) and error.errno is not None:
        what = f"cannot be loaded: {said}; the library keeps its files below HF_HOME, or ~/.cache/huggingface"
    else:
        cause = error.__cause__
        what = f"cannot be loaded ({said}" + (f": {reason(cause)})" if cause is not None else ")")
        what += "; download its files and name them instead"
    return DataError(what, file=wanted.name)


def _near(wanted: HubSplit) -> str:
    close = nearest(wanted.repo)
    return f" (did you mean {close}?)" if close else ""


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
