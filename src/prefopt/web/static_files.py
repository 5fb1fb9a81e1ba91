"""Scripts, styles and icons of pages, from memory: a path cannot lead anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from starlette.responses import Response

KINDS = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SHARED = ("base.css",)
"""Files of this room, for the pages of all others."""


class StaticFiles:
    """The files ``names`` in the folder ``static`` of a package, and those that all pages share."""

    def __init__(self, package: str, names: Sequence[str]) -> None:
        places = dict.fromkeys(SHARED, __package__) | dict.fromkeys(names, package)
        self._files = {name: (files(place) / "static" / name).read_bytes() for name, place in places.items()}

    def answer(self, name: str) -> Response | None:
        """The file, or None where there is none of this name."""
        if name not in self._files:
            return None
        kind = KINDS[name.rpartition(".")[2]]
        return Response(self._files[name], media_type=kind, headers={"Cache-Control": "no-cache"})
