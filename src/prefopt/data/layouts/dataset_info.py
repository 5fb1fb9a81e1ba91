"""What a ``dataset_info.json`` beside a file says of it: LLaMA-Factory's registry of data sets.

An entry names a file, its layout (``formatting``, ``ranking``), its columns and the tags of its messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.columns import KEY_TAGS, ROLE_TAGS
from prefopt.data.layouts.values import parse_means
from prefopt.errors import DataError

NAME = "dataset_info.json"
TAGS = (*KEY_TAGS, *ROLE_TAGS)
FORMATTINGS = ("alpaca", "sharegpt", "openai")
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True, slots=True)
class Entry:
    """One data set: the layout's name, columns and tags by LLaMA-Factory's names, the columns that hold media,
    and what its labels mean (``label_means``, a key of our own)."""

    name: str
    layout: str
    pairs: Mapping[str, str]
    media: tuple[str, ...]
    means: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """What a person is told."""
        return f"read as {self.layout}, as {NAME} beside it says (entry {self.name})"


def find_entry(path: Path | None) -> Entry | None:
    """The entry for a file, or None where there is none, or no such registry beside it.

    Raises :class:`DataError` where two entries say different things of the file, where one says what is not known here,
    and for a registry that names the file and is no JSON. A ``dataset_info.json`` of another kind, such as ``datasets``
    writes, says nothing of files and is passed over.
    """
    if path is None:
        return None
    beside = path.parent / NAME
    text = ""
    try:
        text = beside.read_text("utf-8-sig")
        registry = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if path.name in text:
            what = f"is no JSON ({error}), and it names {path.name}; put it right, or name the layout with --format"
            raise DataError(what, file=str(beside)) from None
        return None
    if not isinstance(registry, dict):
        return None
    named = [(k, e) for k, e in registry.items() if isinstance(e, dict) and e.get("file_name") == path.name]
    for name, entry in named:
        if (formatting := entry.get("formatting", "alpaca")) not in FORMATTINGS:
            what = f"says {formatting!r} for formatting (entry {name}); it should be one of {', '.join(FORMATTINGS)}"
            raise DataError(f"{what}; put it right, or name the layout with --format", file=str(beside))
    found = [_entry(name, entry) for name, entry in named]
    if not found:
        return None
    if other := next((e for e in found if _said(e) != _said(found[0])), None):
        what = f"{NAME} beside it has two entries for it, {found[0].name} and {other.name}; say --format and --columns"
        raise DataError(what, file=str(path))
    return found[0]


def _said(entry: Entry) -> tuple[object, ...]:
    return entry.layout, entry.pairs, entry.media, entry.means


def _entry(name: str, entry: Mapping[str, object]) -> Entry:
    columns, tags = (_texts(entry.get(key)) for key in ("columns", "tags"))
    formatting = entry.get("formatting", "alpaca")
    pairs = columns | {tag: spelt for tag, spelt in tags.items() if tag in TAGS}
    kind = "ranking" if entry.get("ranking") is True else "kto" if "kto_tag" in columns else ""
    if formatting in ("sharegpt", "openai"):
        layout = {"ranking": "sharegpt-ranking", "kto": "kto"}.get(kind, "sharegpt")
        pairs.setdefault("messages", "conversations")
    elif {"first", "second"} <= set(columns):
        layout = "two-responses-chat"
    elif set(columns) == {"prompt"} and not kind:
        layout = "raw-text"
    else:
        layout = {"ranking": "alpaca-ranking", "kto": "alpaca-kto"}.get(kind, "alpaca")
    known = LAYOUTS[layout]
    pairs = {word: column for word, column in pairs.items() if word in TAGS or known.field_of(word)}
    means = parse_means([f"{label}={meaning}" for label, meaning in _texts(entry.get("label_means")).items()])
    return Entry(name, layout, pairs, tuple(columns[word] for word in MEDIA if word in columns), means)


def _texts(value: object) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
