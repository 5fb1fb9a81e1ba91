"""Data sets of the Hugging Face Hub, by the ``datasets`` library: downloaded once, then mapped from its cache."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefopt.core.cache_folder import file_hashes
from prefopt.data.files.columnar import table_rows
from prefopt.data.files.content import reason
from prefopt.data.files.folder import choose, nearest
from prefopt.errors import DataError


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
