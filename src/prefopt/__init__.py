"""prefopt aligns a language model with preferences on the hardware you have.

``prefopt.dpo(model=..., data=..., output=...)`` runs what ``prefopt dpo`` runs, and so do the other functions.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.api import compare, report, rlhf, sample
    from prefopt.runs.callbacks import Callback

    __all__ = ["Callback", "__version__", "compare", "report", "rlhf", "sample"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Callback":
        return import_module("prefopt.runs.callbacks").Callback
    if name == "__all__":
        return ["Callback", "__version__", *import_module("prefopt.api").FUNCTIONS]
    if not name.startswith("_") and name in (functions := import_module("prefopt.api").FUNCTIONS):
        return functions[name]
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
