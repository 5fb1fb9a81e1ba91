"""The samples of a run on held-out prompts, ``samples.jsonl`` in its folder: rows of the canonical layout, with one
response before training, or two once it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"
BEFORE, AFTER = "before training", "after training"

Row = dict[str, Any]
"""``prompt``, ``responses``, ``models`` (:data:`BEFORE`, :data:`AFTER`), ``finish`` and ``source_row``."""


def read_samples(folder: Path) -> list[Row]:
    """The rows of a folder; none where the file is absent, or not as a run writes it."""
    try:
        lines = (folder / SAMPLES).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError):
        return []
    return rows if all(map(_is_row, rows)) else []


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or row.get("models") not in ([BEFORE], [BEFORE, AFTER]):
        return False
    count = len(row["models"])
    lists = [row.get(name) for name in ("responses", "finish")]
    whole = all(isinstance(x, list) and len(x) == count and all(isinstance(s, str) for s in x) for x in lists)
    return whole and isinstance(row.get("prompt"), str) and isinstance(row.get("source_row"), int)
