"""Names of columns: ``--columns NAME=COLUMN`` and its companions, and LLaMA-Factory's ``dataset_info.json``.

>>> column_map(parse_columns(["prompt=question", "user_tag=player"])).names
{'prompt': 'question'}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from prefopt.core.options import nearest
from prefopt.data.layouts import LAYOUTS, all_layouts
from prefopt.data.layouts.layout import ColumnMap
from prefopt.data.layouts.messages import CALL, TAGS, Tags
from prefopt.data.layouts.values import parse_means
from prefopt.data.pictures import PictureFolder
from prefopt.errors import ConfigError, DataError

# Prefixes of the options other than --columns in ReadOptions.column_words; no NAME=COLUMN begins so.
MEANS, IGNORED, HEADLESS = "--label-means=", "--ignore-columns=", "--header=none"
PICTURES_IN = "--picture-folder="


class ColumnOptions(NamedTuple):
    """Columns by name, meanings of labels, columns to ignore, whether a table of text has no header, and the folder of
    pictures where one is named."""

    pairs: dict[str, str]
    means: dict[str, str]
    ignored: tuple[str, ...]
    headless: bool
    pictures: PictureFolder | None


def parse_column_options(words: Sequence[str] | None) -> ColumnOptions:
    """Parse :attr:`prefopt.config.data.ReadOptions.column_words`. Raises :class:`ConfigError`."""
    words = words or ()
    means = parse_means([word.removeprefix(MEANS) for word in words if word.startswith(MEANS)])
    ignored = tuple(word.removeprefix(IGNORED) for word in words if word.startswith(IGNORED))
    named = [word for word in words if not word.startswith((MEANS, IGNORED, PICTURES_IN)) and word != HEADLESS]
    folders = [PictureFolder.of(w.removeprefix(PICTURES_IN)) for w in words if w.startswith(PICTURES_IN)]
    pictures = folders[0] if folders else None
    return ColumnOptions(parse_columns(named), means, ignored, HEADLESS in words, pictures)


# LLaMA-Factory's options for the names of roles.
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL,
    "system_tag": "system",
}
KEY_TAGS = ("role_tag", "content_tag")
MESSAGE_TAGS = (*KEY_TAGS, *ROLE_TAGS)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Columns by NAME from ``NAME=COLUMN`` words.

    Raises :class:`ConfigError` for a NAME that no layout has, and for one that is given twice.
    """
    pairs: dict[str, str] = {}
    named = [name for x in all_layouts().values() for name in (*x.fields, *x.optional, *x.aliases, *x.option_names)]
    known = list(dict.fromkeys([*named, *MESSAGE_TAGS]))
    for word in given:
        name, equals, column = word.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--columns {word!r} should be NAME=COLUMN, such as prompt=question")
        if name not in known:
            raise ConfigError(f"--columns knows no {name!r}{nearest(name, known) or '; it knows ' + ', '.join(known)}")
        if name in pairs:
            raise ConfigError(f"--columns gives {name} twice; leave one out")
        pairs[name] = column
    if clash := shared_column(pairs):
        raise ConfigError(f"--columns gives {clash}; leave one out")
    return pairs


def shared_column(pairs: Mapping[str, str]) -> str:
    """A column that is given to two fields, with their names; empty if there is none."""
    named: dict[str, str] = {}
    for name, column in pairs.items():
        if name not in MESSAGE_TAGS and (other := named.setdefault(column, name)) != name:
            return f"the column {column!r} to both {other} and {name}"
    return ""


def column_map(
    pairs: Mapping[str, str],
    *,
    refused: Sequence[str] = (),
    cells: bool = False,
    means: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
    folder: PictureFolder | None = None,
) -> ColumnMap:
    """The :class:`ColumnMap` of NAME=COLUMN pairs; a tag among them is tried before the known ones. Files of pictures
    are in ``folder``."""
    names = {name: column for name, column in pairs.items() if name not in MESSAGE_TAGS}
    roles = {role: ROLE_TAGS[tag] for tag, role in pairs.items() if tag in ROLE_TAGS}
    role, content = (pairs.get(tag) for tag in KEY_TAGS)
    # Keys go in pairs (role, content): a given one replaces its half in every pair.
    keys = [(role or r, content or c) for r, c in zip(TAGS.role, TAGS.content, strict=True)]
    tags = Tags(
        tuple(r for r, _ in keys), tuple(c for _, c in keys), {**TAGS.roles, **roles}, folder=folder, unread=set()
    )
    return ColumnMap(names, tags, tuple(refused), cells, means or {}, tuple(ignored))


DATASET_INFO = "dataset_info.json"
FORMATTINGS = ("alpaca", "sharegpt", "openai")
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """One data set: its layout, columns and tags by LLaMA-Factory's names, columns with media, and the meaning of
    labels (``label_means``, a key of prefopt's)."""

    name: str
    layout: str
    pairs: Mapping[str, str]
    media: tuple[str, ...]
    means: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        return f"read as {self.layout}, by the entry {self.name} of {DATASET_INFO} beside it"


def find_dataset_info(path: Path | None) -> DatasetInfo | None:
    """The entry for a file in the ``dataset_info.json`` beside it, or None.

    Raises :class:`DataError` for two entries that differ, an unknown ``formatting``, and a registry that names the file
    and is not JSON. A ``dataset_info.json`` of another kind, such as that of ``datasets``, is passed over.
    """
    if path is None:
        return None
    beside = path.parent / DATASET_INFO
    text = ""
    try:
        text = beside.read_text("utf-8-sig")
        registry = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if path.name in text:
            what = f"is not JSON ({error}), and it names {path.name}; correct it, or give --format"
            raise DataError(what, file=str(beside)) from None
        return None
    if not isinstance(registry, dict):
        return None
    named = {k: e for k, e in registry.items() if isinstance(e, dict) and e.get("file_name") == path.name}
    found = [_entry(name, entry, str(beside)) for name, entry in named.items()]
    if other := next((e for e in found if replace(e, name=found[0].name) != found[0]), None):
        what = f"{DATASET_INFO} beside it has two entries for it, {found[0].name} and {other.name}; give --format"
        raise DataError(what, file=str(path))
    return found[0] if found else None


def _entry(name: str, entry: Mapping[str, object], file: str) -> DatasetInfo:
    columns, tags = (_texts(entry.get(key)) for key in ("columns", "tags"))
    if (formatting := entry.get("formatting", "alpaca")) not in FORMATTINGS:
        what = f"has the formatting {formatting!r} (entry {name}); it should be one of {', '.join(FORMATTINGS)}"
        raise DataError(f"{what}; correct it, or give --format", file=file)
    pairs = columns | {tag: text for tag, text in tags.items() if tag in MESSAGE_TAGS}
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
    pairs = {word: column for word, column in pairs.items() if word in MESSAGE_TAGS or known.field_of(word)}
    means = parse_means([f"{label}={meaning}" for label, meaning in _texts(entry.get("label_means")).items()])
    return DatasetInfo(
        name, layout, pairs, tuple(columns[word] for word in MEDIA if word in columns and word not in pairs), means
    )


def _texts(value: object) -> dict[str, str]:
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
