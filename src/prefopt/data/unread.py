"""Columns that seem to hold responses, told by name and look: where none of them is read, a preference is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

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
