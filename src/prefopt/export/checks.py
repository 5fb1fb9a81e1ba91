"""Checks of an export that need neither torch nor the model."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from prefopt.config.export import GGUF, ExportConfig
from prefopt.core.files import expanded
from prefopt.errors import ConfigError, RunError

CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf")


def check_export(config: ExportConfig) -> None:
    """Raises :class:`prefopt.errors.UserError` for an output that exists, and a package or converter that is absent."""
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"--output {output} exists; name a new folder")
    if config.to in GGUF:
        require_gguf()
        find_converter(config.converter)


def require_gguf() -> None:
    """Raises :class:`ConfigError` where the ``gguf`` package is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError('GGUF files are written by the package gguf, which is absent: pip install "prefopt[gguf]"')


def find_converter(given: str | None) -> Path | None:
    """The converter that was named, or the one on ``PATH``. Raises :class:`ConfigError` for a name without a file."""
    if given is not None:
        path = expanded(given)
        if not path.is_file():
            raise ConfigError(f"--converter {given}: no such file; name llama.cpp's convert_hf_to_gguf.py")
        return path
    return next((Path(found) for name in CONVERTERS if (found := shutil.which(name))), None)
