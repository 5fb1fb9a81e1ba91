"""Studies in which people compare responses.

``prefopt.collect.new``, ``invite``, ``stats`` and so on are the commands of ``prefopt collect`` as functions; the page
itself is served by ``prefopt collect serve``.
"""

from __future__ import annotations

from typing import Any

from prefopt.core.plugins import function_of

FUNCTIONS = ("backup", "check", "export", "import_", "invite", "new", "stats")


def __getattr__(name: str) -> Any:
    return function_of(__name__, name, FUNCTIONS)


def __dir__() -> list[str]:
    return [*FUNCTIONS]
