"""The languages of pages, and which of them a request asks for.

>>> language_of(("en", "zh"), "", "fr, zh-CN;q=0.9, en;q=0.8")
'zh'
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.resources import files


def read_languages(package: str) -> Mapping[str, Mapping[str, str]]:
    """Language code to the texts of the pages, from the ``languages.json`` of a package."""
    found: Mapping[str, Mapping[str, str]] = json.loads((files(package) / "languages.json").read_text("utf-8"))
    return found


def language_of(known: Collection[str], chosen: str, accepted: str) -> str:
    """The chosen language if it is ``known``, else the first known one in an Accept-Language header, else English."""
    if chosen in known:
        return chosen
    wanted: list[tuple[float, str]] = []
    for entry in accepted[:200].split(","):
        name, _, quality = entry.strip().partition(";q=")
        try:
            wanted.append((-float(quality or 1), name.lower()[:2]))
        except ValueError:
            continue
    return next((name for _, name in sorted(wanted, key=lambda w: w[0]) if name in known), "en")
