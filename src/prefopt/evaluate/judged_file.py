"""The file of judged pairs that ``prefopt compare --output`` writes: never over what is there unasked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from prefopt.config.compare import CompareConfig, is_file
from prefopt.data.sources import find_sources
from prefopt.disk.hashes import file_hashes
from prefopt.disk.write import output_errors, replace_file
from prefopt.errors import ConfigError, DataError, RunError


def check_output(config: CompareConfig, data: Sequence[str]) -> None:
    """Refuse an ``--output`` that is there already, before anything is computed: :class:`RunError`, unless it may be
    replaced; :class:`ConfigError` for a file that the comparison reads, which is never replaced: ``data`` among them.
    """
    if config.output is None or not (path := Path(config.output)).exists():
        return
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it")
    names = [Path(name) for name in (*filter(is_file, config.models), *(config.task_results or ()))]
    names += [source.path for source in find_sources(data) if source.path is not None]
    if any(name.exists() and name.samefile(path) for name in names):
        raise ConfigError(f"--output {path} is read by this comparison; name another file")
    if not config.overwrite:
        raise RunError(f"--output {path} is there already; name another file, or add --overwrite")


def write_judged(path: Path, rows: Sequence[dict[str, object]]) -> str:
    """Write the rows; returns the SHA-256 of the file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogatepass")
    with output_errors(path):
        replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def check_judged(path: Path, digest: str) -> None:
    """Refuse a file that is gone, or not the one of this digest. Raises :class:`DataError`."""
    if file_hashes([path], error=DataError)[0] != digest:
        raise DataError(
            f"{path} no longer holds the pairs of this comparison: something wrote to it since; compare again, with an"
            " --output of its own"
        )
