"""prefopt aligns a language model with preferences on the hardware you have.

``prefopt.dpo(model=..., data=..., output=...)`` runs what ``prefopt dpo`` runs, and so do the other functions; torch is
imported by then, not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.api import compare, dpo, ppo, report, reward, rlhf, sample, sft
    from prefopt.runs.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "__version__", "compare", "dpo", "ppo", "report", "reward", "rlhf", "sample", "sft"]
_FUNCTIONS = ("compare", "dpo", "ppo", "report", "reward", "rlhf", "sample", "sft")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        from prefopt import api

        return getattr(api, name)
    if name == "Callback":
        from prefopt.runs.callbacks import Callback

        return Callback
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "Callback", *_FUNCTIONS])
