"""``--columns NAME=COLUMN``: columns and roles by another name, in the words of the layouts and of LLaMA-Factory.

>>> columns_of(parse_columns(["prompt=question", "user_tag=player"])).names
{'prompt': 'question'}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prefopt.core.options import nearest
from prefopt.data.layouts import LAYOUTS
from prefopt.data.layouts.layout import Columns
from prefopt.data.layouts.messages import CALL, TAGS, Tags
from prefopt.data.layouts.values import parse_means
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


WORD = re.compile(r"[a-z]+|[A-Z][a-z]*")
HOLDS = frozenset(
    "response responses answer answers completion completions output outputs generation generations reply replies"
    " candidate candidates prediction predictions summary summaries chosen rejected preferred dispreferred"
    " better worse good bad pos neg positive negative winner loser".split()
)
# Beside one of the words above, these say that the column is about responses, or holds those of a reference.
ABOUT = frozenset(
    "id ids model models source sources score scores rating ratings rank ranks url urls link links type types label"
    " labels lang language len length tokens token count num n hash time date created at by author name names policy"
    " category tag tags reason rationale rationales feedback critique explanation comment comments note notes quotes"
    " correct incorrect gold reference references expected ground truth final parsed extracted format finish is has"
    " metadata meta info prompt question system safe safety harm severity aspect key keys index start end list style"
    " best example examples processed original raw quality level status choice preference annotator worker"
    " subset domain constraint constraints aliases".split()
)
LOOKS = ("text", "transcript", "texts", "messages", "replies", "weighted", "message")


def holds_responses(name: str, looks: str) -> bool:
    """Whether a column of this name, whose values look so, seems to hold responses of a model."""
    words = {word.lower() for word in WORD.findall(name)}
    return looks in LOOKS and bool(words & HOLDS) and not words & ABOUT


def responses_among(columns: Mapping[str, str]) -> list[str]:
    """The columns, by name and look, that seem to hold responses. ``winner`` is one where there is a ``loser``, and
    else a label."""
    names = {name.lower() for name in columns}
    against = dict(POLES)
    labels = {name for name in LABELS if against.get(name) not in names}
    return [name for name, looks in columns.items() if holds_responses(name, looks) and name.lower() not in labels]


def single_messages(columns: Mapping[str, str]) -> str:
    """What is said of rows that are messages of trees, one each, so that a prompt and its replies are several rows;
    nothing of others."""
    if not {"parent_id", "role", "text"} <= columns.keys() or "replies" in columns:
        return ""
    what = "each row is one message of a tree (parent_id, role), and no prompt with its replies"
    row = '{"text": ..., "replies": [{"text": ..., "rank": ...}, ...]}'
    return f"{what}: take the trees (OpenAssistant's .trees.jsonl), or make a row of each message with replies, {row}"


def suggestion(columns: Mapping[str, str]) -> str:
    """What to type so that two responses, and a label of which is better, are read; nothing where no two are there."""
    found = responses_among(columns)
    prompt = next((n for n in columns if n in ("prompt", "instruction", "question", "query", "input", "context")), "")
    poles = _poles(found)
    if not poles and len(found) == 2:
        poles = _one_pole(found)
    if poles:
        return f"--columns {f'prompt={prompt} ' * bool(prompt)}chosen={poles[0]} rejected={poles[1]}"
    if len(found) != 2:
        return ""
    label = next((n for n in columns if n.lower() in LABELS or n.lower().startswith(("better", "prefer"))), "")
    numbers = columns.get(label) in ("number", "truth")  # text may well name a side
    means = " --label-means 0=first,1=second,2=tie (or as the file has it)" if numbers else ""
    judged = f"label={label}" if label else "label=COLUMN"
    return f"--columns prompt={prompt or 'COLUMN'} first={found[0]} second={found[1]} {judged}{means}"


LABELS = (
    "label",
    "labels",
    "winner",
    "choice",
    "preference",
    "verdict",
    "better",
    "preferred",
    "judgment",
    "judgement",
)
POLES = (
    ("chosen", "rejected"),
    ("preferred", "dispreferred"),
    ("better", "worse"),
    ("good", "bad"),
    ("positive", "negative"),
    ("pos", "neg"),
    ("winner", "loser"),
)


def _one_pole(names: Sequence[str]) -> tuple[str, str] | None:
    """Of two columns the preferred one and the other, where one is called rejected and the other says nothing of it."""
    bad = [name for name in names if {word.lower() for word in WORD.findall(name)} & {"rejected", "dispreferred"}]
    return next(((other, bad[0]) for other in names if other != bad[0]), None) if len(bad) == 1 else None


def _poles(names: Iterable[str]) -> tuple[str, str] | None:
    """Of several columns the one that is preferred and the one that is not, where their names say so."""
    words = {name: {word.lower() for word in WORD.findall(name)} for name in names}
    for good, bad in POLES:
        best = [name for name, parts in words.items() if good in parts]
        worst = [name for name, parts in words.items() if bad in parts]
        if len(best) == len(worst) == 1:
            return best[0], worst[0]
    return None
