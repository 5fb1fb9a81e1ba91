"""Data sets of the ``datasets`` library: folders written by ``save_to_disk``, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import expanded
from prefopt.core.options import nearest as did_you_mean
from prefopt.core.plugins import how_to_install
from prefopt.data.files.content import look, reason
from prefopt.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class SavedSplit:
    """One split of a saved folder: its arrow files, in order. They are read without the library."""

    files: tuple[Path, ...]

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        from prefopt.data.files.columnar import arrow_batches, table_rows  # pyarrow takes time to import

        contents = [look(file) for file in self.files]
        return table_rows(lambda: (batch for content in contents for batch in arrow_batches(content)), name)

    def digest(self) -> str:
        return hashlib.sha256("\n".join(file_hashes(self.files, error=DataError)).encode()).hexdigest()


def is_saved(folder: Path) -> bool:
    return (folder / SPLITS).is_file() or ((folder / STATE).is_file() and (folder / "dataset_info.json").is_file())


def saved_split(folder: Path, split: str | None) -> SavedSplit:
    """A split of a saved folder. Raises :class:`DataError` for an unknown or ambiguous split and for missing files."""
    if (folder / SPLITS).is_file():
        splits = _read(folder / SPLITS).get("splits")
        if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
            raise DataError("lists no splits; save the data set again", file=str(folder / SPLITS))
        folder = folder / choose_split(split, [Path(name).name for name in splits], str(folder))
        split = None
    state = _read(folder / STATE)
    if split is not None and split != str(state.get("_split")):
        what = f"is one data set without splits (saved as {state.get('_split')}); remove ,split={split}"
        raise DataError(what, file=str(folder))
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (KeyError, TypeError):
        files = []
    if not files:
        raise DataError("names no data files; save the data set again", file=str(folder / STATE))
    if state.get("_indices_data_files"):
        what = "selects rows by a table of indices, as old versions of datasets saved them; save the data set again"
        raise DataError(what, file=str(folder / STATE))
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(f"lacks {missing[0]}; copy the whole folder", file=str(folder))
    return SavedSplit(tuple(files))


def choose_split(split: str | None, splits: list[str], name: str) -> str:
    """The named split, or the only one. Raises :class:`DataError` that lists the splits."""
    if split in splits or (split is None and len(splits) == 1):
        return split or splits[0]
    known = ", ".join(splits) or "none"
    if split is None:
        likely = "train" if "train" in splits else splits[0]
        raise DataError(f"has several splits ({known}); name one: {name},split={likely}", file=name)
    raise DataError(f"has no split {split!r}; its splits are {known}", file=name)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")).items())
    except FileNotFoundError:
        raise DataError("is absent; copy the whole folder", file=str(path)) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"is damaged ({error}); copy the folder again", file=str(path)) from None


@dataclass(frozen=True, slots=True)
class HubSplit:
    """One split of a data set of the Hub, which is downloaded, if need be, when it is first read."""

    repo: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        options = {"config": self.config, "split": self.split, "revision": self.revision}
        return ",".join([self.repo, *(f"{key}={value}" for key, value in options.items() if value)])

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        return dataset_rows(_load(self), name)

    def digest(self) -> str:
        data = _load(self)
        files = [Path(entry["filename"]) for entry in data.cache_files]
        parts = [self.repo, data.info.config_name or "", str(data.split), *file_hashes(files, error=DataError)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dataset_rows(data: Any, name: str) -> Iterator[object]:
    """Rows of a ``datasets.Dataset`` without the nulls that Arrow fills in."""
    from prefopt.data.files.columnar import table_rows

    def batches() -> Iterator[Any]:
        for table in data.with_format("arrow").iter(batch_size=1024):
            yield from table.combine_chunks().to_batches()

    return table_rows(batches, name)


def is_dataset(data: object) -> bool:
    """Whether it is a ``datasets.Dataset`` without a format or transform of its own."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(data, library.Dataset) and data.format["type"] is None


@lru_cache(maxsize=8)
def _load(wanted: HubSplit) -> Any:
    """The data set, mapped into memory. Raises :class:`DataError` with the remedy."""
    try:
        import datasets
    except ImportError:
        what = f"there is no such file or folder; if it is on the Hugging Face Hub: {how_to_install('hub')}"
        raise DataError(what, file=wanted.name) from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no telemetry
    try:
        builder = datasets.load_dataset_builder(wanted.repo, wanted.config, revision=wanted.revision)
        if builder.repo_id is None and "/" not in wanted.repo:
            # "json" and the like are readers of the library, which take any file in the current folder.
            raise DataError("is not a file or folder here, and names no data set; check the spelling", file=wanted.name)
        if wanted.config is None and len(builder.builder_configs) > 1:
            raise DataError(_which_config(wanted, list(builder.builder_configs)), file=wanted.name)
        if wanted.revision and type(builder).__module__.endswith(".cache.cache"):
            what = f"the Hub cannot be reached, and what is cached may be another revision than {wanted.revision}"
            raise DataError(f"{what}; go online, or remove revision=", file=wanted.name)
        builder.download_and_prepare()
        splits = list(builder.info.splits)
        split = wanted.split or ("train" if "train" in splits else choose_split(None, splits, wanted.name))
        for part in split.split("+"):  # the library's syntax: train[:1000], train+test
            choose_split(part.partition("[")[0].strip(), splits, wanted.name)
        return builder.as_dataset(split=split, in_memory=False)
    except DataError:
        raise
    except Exception as error:  # the library, the network and the disk raise errors of many classes
        raise DataError(_explain(error, wanted), file=wanted.name) from error


def _which_config(wanted: HubSplit, configs: list[str]) -> str:
    shown = listed(configs, 20)
    if wanted.config is None:
        return f"has several configs ({shown}); name one: {wanted.repo},config={configs[0]}"
    return f"has no config {wanted.config!r}; its configs are {shown}{did_you_mean(wanted.config, configs)}"


def _explain(error: Exception, wanted: HubSplit) -> str:
    """One line for an error of the library: cause and remedy."""
    message, near = reason(error), nearest(wanted.repo)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    absent = f"is not a file or folder here{f' (did you mean {near}?)' if near else ''}"
    if isinstance(error, ValueError) and (configs := re.search(r"(?:Available|configs): (\[.*\])", message)):
        return _which_config(wanted, re.findall(r"'([^']*)'", configs[1]))
    if re.search(r"\bgated\b", message) or "GatedRepoError" in kinds:
        page = f"https://huggingface.co/datasets/{wanted.repo}"
        return f"is gated: ask for access at {page}, then log in with: hf auth login"
    if message.startswith("Revision ") or "RevisionNotFoundError" in kinds:
        return f"has no revision {wanted.revision!r}; name a branch, a tag or a commit of it"
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return "holds no data files that can be read"
    if "RepositoryNotFoundError" in kinds or (isinstance(error, FileNotFoundError) and error.errno is None):
        return f"{absent} and no data set on the Hub; check the spelling (a private one needs: hf auth login)"
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "HTTPError"}:
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0") else ""
        return f"{absent}, and the Hub cannot be asked ({message}{offline}); check path and network"
    if "scripts are no longer supported" in message:
        return "is made by its author's script, which is not run; use a copy of it in parquet or JSON"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be loaded: {message}; the library keeps its files below HF_HOME, or ~/.cache/huggingface"
    cause = f": {reason(error.__cause__)}" if error.__cause__ is not None else ""
    return f"cannot be loaded ({message}{cause}); download its files and name them instead"


def nearest(name: str) -> Path | None:
    """An existing path whose name is spelt almost like ``name``."""
    path = expanded(name)
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except (OSError, ValueError):
        return None
    stems = {name.partition(".")[0]: name for name in names}  # equal endings are no similarity
    close = difflib.get_close_matches(path.name.partition(".")[0] or path.name, stems, 1, cutoff=0.75)
    return path.parent / stems[close[0]] if close else None


def listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
