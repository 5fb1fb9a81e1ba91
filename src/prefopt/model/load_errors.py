"""What the loading libraries raise, as one line for the person who named the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prefopt.disk.hub import why_not_read
from prefopt.errors import ModelError


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What the loading libraries raise, in one line that names the model and the remedy."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    folder = Path(name)
    if not folder.exists():
        if is_path(name):
            return f"{name}: no such folder"
        return f"{name}: {why_not_read(error, name) or f'the Hub did not give it ({first_line(error)})'}"
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return f"{name}: no config.json in this folder; it should hold a model saved by save_pretrained"
    if "size mismatch" in text:
        return f"{name}: its weights have other shapes than those of the model: it belongs to another one"
    if isinstance(error, SafetensorError) or ("safetensors" in text and "deserial" in text):
        return f"{name}: the weight file is damaged ({first_line(error)}); copy it again"
    if not list(folder.glob("*.safetensors")):
        pickled = list(folder.glob("*.bin"))
        remedy = "convert its .bin files with save_pretrained" if pickled else "the weights are missing"
        return f"{name}: no .safetensors file in this folder; {remedy}"
    return f"{name}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder on this machine, never a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
