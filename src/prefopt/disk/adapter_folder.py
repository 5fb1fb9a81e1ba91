"""Folders that hold a PEFT adapter and no model: what they are known by, and which model they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.disk.nested import one_below
from prefopt.disk.read import parsed
from prefopt.errors import ModelError

CONFIG = "adapter_config.json"
WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def is_adapter(name: str | Path) -> bool:
    """Whether a folder on this machine holds an adapter, and no weights of a whole model."""
    folder = Path(name).expanduser()
    return (folder / CONFIG).is_file() and not any(file for pattern in WHOLE for file in folder.glob(pattern))


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
    found = read_adapter(folder).get("task_type") if (Path(folder).expanduser() / CONFIG).is_file() else None
    return found if isinstance(found, str) else None


def require_adapter(folder: str | Path) -> None:
    """Raises :class:`ModelError` for a folder on this machine that is none of a PEFT adapter."""
    path = Path(folder).expanduser()
    if not path.exists() or (path / CONFIG).is_file():
        return
    whole = "it is a whole model and no adapter; name it as --model"
    what = whole if (path / "config.json").is_file() else f"it is not a PEFT adapter{one_below(path)}"
    raise ModelError(f"--adapter {folder} holds no {CONFIG}: {what}")


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder. Raises :class:`ModelError` where there is none, or a damaged one."""
    require_adapter(folder)
    path = Path(folder).expanduser() / CONFIG
    try:
        found = parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); copy the adapter again") from None
    return found if isinstance(found, dict) else {}
