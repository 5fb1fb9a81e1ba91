"""Files of any layout, as tables of token ids. ``prefopt.data.check``, ``convert`` and ``split`` are the commands of
``prefopt data`` as functions."""

from __future__ import annotations

from typing import Any

from prefopt.core.plugins import function_of

FUNCTIONS = ("check", "convert", "split")


def __getattr__(name: str) -> Any:
    return function_of(__name__, name, FUNCTIONS)


def __dir__() -> list[str]:
    return [*FUNCTIONS]
