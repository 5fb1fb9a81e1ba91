"""prefopt aligns a language model with preferences on the hardware you have.

``prefopt.dpo(model=..., data=..., output=...)`` runs what ``prefopt dpo`` runs, and so do the other functions.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

__version__ = "0.1.0"

_PACKAGES = ("collect", "data", "errors")
"""Packages that are part of what a user of Python sees."""


def __getattr__(name: str) -> _Any:
    if name in _PACKAGES:
        return _importlib.import_module(f"prefopt.{name}")
    if name == "Callback":
        return _importlib.import_module("prefopt.runs.callbacks").Callback
    if name == "__all__":
        return sorted(["Callback", "__version__", *_PACKAGES, *_importlib.import_module("prefopt.api").FUNCTIONS])
    longer = ""
    if not name.startswith("_"):
        functions = _importlib.import_module("prefopt.api").FUNCTIONS
        if name in functions:
            return functions[name]
        longer = next((f"; did you mean {known}?" for known in functions if known.startswith(f"{name}_")), "")
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}{longer}")


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__doc__", "__file__", "__name__", "__path__"]
