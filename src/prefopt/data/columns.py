"""``--columns NAME=COLUMN``: columns and roles by another name, in the words of the layouts and of LLaMA-Factory.

>>> parse_columns(["prompt=question", "user_tag=player"]).names
{'prompt': 'question'}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from prefopt.config.option import nearest
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import PLAIN, Columns
from prefopt.data.layouts.messages import CALL, TAGS, Tags
from prefopt.errors import ConfigError

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


def parse_columns(given: Sequence[str] | None) -> Columns:
    """Columns from ``NAME=COLUMN`` words; raises :class:`ConfigError` for an unknown NAME or one that comes twice."""
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
    return columns_of(pairs)


def columns_of(pairs: Mapping[str, str]) -> Columns:
    """Columns from names that are known; those of tags change how messages are read."""
    names = {name: column for name, column in pairs.items() if name not in KEY_TAGS and name not in ROLE_TAGS}
    if len(names) == len(pairs):
        return Columns(names) if names else PLAIN
    roles = {spelt: ROLE_TAGS[tag] for tag, spelt in pairs.items() if tag in ROLE_TAGS}
    keys = {tag: (pairs[tag],) for tag in KEY_TAGS if tag in pairs}
    tags: Tags = replace(TAGS, roles={**TAGS.roles, **roles}, unread=set())
    if keys:
        # A key that is not given keeps the other half of each known pair.
        role, content = keys.get("role_tag", TAGS.role), keys.get("content_tag", TAGS.content)
        longest = max(len(role), len(content))
        tags = replace(tags, role=(role * longest)[:longest], content=(content * longest)[:longest])
    return Columns(names, tags)
