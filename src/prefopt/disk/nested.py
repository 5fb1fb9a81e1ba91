"""Folders that hold no model of their own, as those of chains and sweeps: what stands below them instead."""

from __future__ import annotations

from pathlib import Path

MARKS = ("config.json", "adapter_config.json")
"""A folder with one of these is a model's or an adapter's."""


def models_below(folder: Path) -> list[Path]:
    """The folders of models one or two levels down, sorted; none where the folder is a model's itself."""
    if any((folder / mark).is_file() for mark in MARKS):
        return []
    return sorted({path.parent for mark in MARKS for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{mark}")})


def one_below(folder: Path) -> str:
    """What to add to the line that says that a folder holds no model; nothing where none is below it."""
    found = models_below(folder)
    many = "there are models" if len(found) > 1 else "there is a model"
    return f"; {many} below it: name one, such as {found[0]}" if found else ""
