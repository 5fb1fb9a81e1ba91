"""Docstrings as Markdown, for the site: examples become blocks of code, and roles plain names."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|attr|meth|data):`~?([^`]+)`")
_EXAMPLE = re.compile(r"(?:^ *>>>.*\n?(?:^(?! *$).*\n?)*)+", re.M)


def markdown(docstring: str) -> str:
    """Examples fenced, without the marks of doctest; ``:func:`name``` as ```name```."""
    text = _ROLE.sub(r"`\1`", docstring).replace("``", "`")
    text = re.sub(r" *# doctest: .*", "", text)
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
