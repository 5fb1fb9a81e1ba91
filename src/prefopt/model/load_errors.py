"""What the loading libraries raise, as one line for the person who named the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from prefopt.disk.hub import why_not_read
from prefopt.disk.nested import one_below
from prefopt.disk.vetted import read_object
from prefopt.errors import ModelError, UserError, first_line


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """What the loading libraries raise, in one line that names the model and the remedy."""
    try:
        yield
    except (UserError, Warning):  # a warning is one by who asked for it, as merging does
        raise
    except Exception as error:  # of whatever class: the libraries raise what the folder's contents lead them into
        raise ModelError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    folder = Path(name)
    if not folder.exists():
        if is_path(name):
            return f"{name}: no such folder"
        return f"{name}: {why_not_read(error, name) or f'the Hub did not give it ({first_line(error)})'}"
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if below := one_below(folder):
            return f"{name} holds no model of its own{below}"
        return f"{name}: no config.json in this folder; it should hold a model saved by save_pretrained"
    if "size mismatch" in text:
        return f"{name}: its weights have other shapes than those of the model: it belongs to another one"
    if isinstance(error, SafetensorError) or ("safetensors" in text and "deserial" in text):
        return f"{name}: the weight file is damaged ({first_line(error)}); copy it again"
    if not list(folder.glob("*.safetensors")):
        pickled = list(folder.glob("*.bin"))
        remedy = "convert its .bin files with save_pretrained" if pickled else "the weights are missing"
        return f"{name}: no .safetensors file in this folder; {remedy}"
    if isinstance(error, MemoryError):
        return f"{name}: does not fit into the memory"
    if isinstance(error, KeyError) and (key := _key_of(folder, error.args)):
        return (
            f"{name}: config.json has {key} {error.args[0]!r}, which transformers {transformers_version} does not know"
        )
    if isinstance(error, (OSError, ValueError, RuntimeError)) and str(error).strip():
        return f"{name}: {first_line(error)}"
    return f"{name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); is config.json as it was saved?"


def _key_of(folder: Path, args: tuple[object, ...]) -> str:
    """The key of config.json whose value a library looked up in vain; nothing where there is none."""
    waiting = [*read_object(folder / "config.json").items()] if args and isinstance(args[0], str) else []
    while waiting:
        key, value = waiting.pop()
        if value == args[0]:
            return key
        if isinstance(value, dict):
            waiting += value.items()
    return ""


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder on this machine, never a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
