"""``--columns NAME=COLUMN``: columns and roles by another name, in the words of the layouts and of LLaMA-Factory.

>>> columns_of(parse_columns(["prompt=question", "user_tag=player"])).names
{'prompt': 'question'}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefopt.config.option import nearest
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import Columns
from prefopt.data.layouts.messages import CALL, TAGS, Tags
from prefopt.data.layouts.verdict import parse_means
from prefopt.errors import ConfigError

# What is said of columns beside their names travels with them, as words that no NAME=COLUMN can be.
MEANS, IGNORED, HEADLESS = "--label-means=", "--ignore-columns=", "--header=none"


@dataclass(frozen=True, slots=True)
class Said:
    """What a person says of the columns of a file: NAME=COLUMN, what labels mean, what is not read on purpose, and
    whether the first line of separated values is a row already."""

    pairs: dict[str, str]
    means: dict[str, str]
    ignored: tuple[str, ...]
    headless: bool


def said_of_columns(given: Sequence[str] | None) -> Said:
    """The words of :attr:`prefopt.config.data.ReadOptions.column_words` in parts; raises :class:`ConfigError`."""
    words = list(given or ())
    means = parse_means([word.removeprefix(MEANS) for word in words if word.startswith(MEANS)])
    ignored = tuple(word.removeprefix(IGNORED) for word in words if word.startswith(IGNORED))
    named = [word for word in words if not word.startswith((MEANS, IGNORED)) and word != HEADLESS]
    return Said(parse_columns(named), means, ignored, HEADLESS in words)


# LLaMA-Factory's names for what a role is spelt as.
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": CALL,
    "system_tag": "system",
}
KEY_TAGS = ("role_tag", "content_tag")


def known_names() -> list[str]:
    """Every NAME that ``--columns`` may give."""
    named = [name for x in LAYOUTS.values() for name in (*x.fields, *x.optional, *x.aliases, *x.words)]
    return list(dict.fromkeys([*named, *KEY_TAGS, *ROLE_TAGS]))


def parse_columns(given: Sequence[str] | None) -> dict[str, str]:
    """Columns by NAME from ``NAME=COLUMN`` words.

    Raises :class:`ConfigError` for a NAME that no layout knows, and one that comes twice.
    """
    pairs: dict[str, str] = {}
    known = known_names()
    for word in given or ():
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
    """The column that two fields are given, and which they are; nothing where each has one of its own."""
    named: dict[str, str] = {}
    for name, column in pairs.items():
        if name in KEY_TAGS or name in ROLE_TAGS:
            continue
        if (other := named.setdefault(column, name)) != name:
            return f"the column {column!r} to both {other} and {name}"
    return ""


def columns_of(
    pairs: Mapping[str, str],
    *,
    refused: Sequence[str] = (),
    cells: bool = False,
    means: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> Columns:
    """What a layout needs to know of columns and tags; a tag that is given goes before those that are known anyway."""
    names = {name: column for name, column in pairs.items() if name not in KEY_TAGS and name not in ROLE_TAGS}
    roles = {spelt: ROLE_TAGS[tag] for tag, spelt in pairs.items() if tag in ROLE_TAGS}
    role, content = (pairs.get(tag) for tag in KEY_TAGS)
    # The keys go in pairs; one that is given stands in each pair for its half.
    keys = [(role or r, content or c) for r, c in zip(TAGS.role, TAGS.content, strict=True)]
    tags = Tags(tuple(r for r, _ in keys), tuple(c for _, c in keys), {**TAGS.roles, **roles}, unread=set())
    return Columns(names, tags, tuple(refused), cells, means or {}, tuple(ignored))
