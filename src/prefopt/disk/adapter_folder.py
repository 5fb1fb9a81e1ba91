"""Folders that hold a PEFT adapter and no model: what they are known by, and which model they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.disk.nested import one_below
from prefopt.disk.vetted import ADAPTER_CONFIG, read_object
from prefopt.errors import ModelError

WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def is_adapter(name: str | Path) -> bool:
    """Whether a folder on this machine holds an adapter, and no weights of a whole model."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not any(file for pattern in WHOLE for file in folder.glob(pattern))


def refuse_both(name: str | Path) -> None:
    """Raises :class:`ModelError` for a folder with a whole model and an adapter: transformers would put the one on the
    other as it loads, and what it is then is neither in the name of the model nor in what is saved of it."""
    if (Path(name) / ADAPTER_CONFIG).is_file() and not is_adapter(name):
        raise ModelError(
            f"{name} holds a whole model and an adapter, which transformers would put on it: take {ADAPTER_CONFIG} out,"
            " or give each a folder of its own, one as --model and one as --adapter"
        )


def base_of(folder: str | Path) -> str:
    """The model that an adapter names: a folder, as it is named or seen from the adapter's, else a name on the Hub.

    Raises :class:`ModelError` where it names none.
    """
    name = read_adapter(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder} does not name the model it belongs to; give --model BASE --adapter {folder}")
    beside = Path(folder).expanduser() / name
    return str(beside) if not Path(name).expanduser().exists() and beside.exists() else name


def task_of(folder: str | Path) -> str | None:
    """What PEFT calls the task of an adapter: ``SEQ_CLS`` has a scalar head. None where nothing is said."""
    found = read_adapter(folder).get("task_type") if (Path(folder).expanduser() / ADAPTER_CONFIG).is_file() else None
    return found if isinstance(found, str) else None


def require_adapter(folder: str | Path) -> None:
    """Raises :class:`ModelError` for a folder on this machine that is none of a PEFT adapter."""
    path = Path(folder).expanduser()
    if not path.exists() or (path / ADAPTER_CONFIG).is_file():
        return
    whole = "it is a whole model and no adapter; name it as --model"
    what = whole if (path / "config.json").is_file() else f"it is not a PEFT adapter{one_below(path)}"
    raise ModelError(f"--adapter {folder} holds no {ADAPTER_CONFIG}: {what}")


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder. Raises :class:`ModelError` where there is none, or a damaged one."""
    require_adapter(folder)
    return read_object(Path(folder).expanduser() / ADAPTER_CONFIG)
