"""TRL's layouts: a prompt that is given or implied, plain text or turns, with sides, a completion, a label, or alone.

A prompt that is text is the plain text of a base model: it and the response are joined as they stand.

A prompt ends where both sides have had the same words so far, and never so late that a side is left without any:

>>> split_text("The capital is Paris", "The capital is London")
('The capital is', ' Paris', ' London')
>>> split_text("Capital: Paris", "Capital: Paris is")
('Capital:', ' Paris', ' Paris is')
>>> split_text("Paris", "Parma")
('', 'Paris', 'Parma')
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from prefopt.data.layouts.layout import (
    Layout,
    best_first,
    need_chat,
    need_demonstration,
    need_label,
    need_no_preference,
    need_pair,
    need_text,
    score_columns,
    words,
)
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row, answer, text_prompt
from prefopt.data.layouts.shapes import (
    SCORES,
    chat_prompt,
    chat_prompt_alone,
    implicit_chat,
    implicit_text,
    may_ask,
    prompt_alone,
    scored_sides,
)
from prefopt.data.layouts.values import BadRow
from prefopt.records import Comparison, Message, Response

# Scripts that put no space between words: a word of theirs is taken to be a character.
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # Han radicals, CJK punctuation, kana, Bopomofo
    (0x31A0, 0xA4CF),  # kana extensions, Han, Yi
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFF00, 0xFFEF),  # full-width forms
    (0x20000, 0x3FFFF),  # Han extensions
)
JOINERS = "\u200c\u200d"


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen response, rejected response. The space before a response belongs to the response."""
    limit = min(len(chosen), len(rejected))
    at = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    at = min(at, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while at > 0 and not (_parts(chosen, at) and _parts(rejected, at)):
        at -= 1
    at = max(at, 0)
    if at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def split_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns the prompt has: those in common, up to a turn of the assistant, which both sides keep."""
    limit = min(len(chosen), len(rejected))
    at = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while at and not all(at < len(side) and side[at].role == "assistant" for side in (chosen, rejected)):
        at -= 1
    return at


def first_answer(turns: Sequence[Message]) -> int:
    """How many turns stand before the first of the assistant."""
    return next((i for i, m in enumerate(turns) if m.role == "assistant"), len(turns))


def last_answer(turns: Sequence[Message]) -> int:
    """How many turns stand before the last, where that is the assistant's; else all of them."""
    return len(turns) - 1 if turns and turns[-1].role == "assistant" else len(turns)


def _parts(text: str, at: int) -> bool:
    """Whether a word ends before ``text[at]``, or one begins there."""
    before, after = text[at - 1], text[at]
    if unicodedata.combining(after) or unicodedata.category(after) in ("Mn", "Mc", "Me", "Sk") or after in JOINERS:
        return False
    if before in JOINERS:
        return False
    return before.isspace() or after.isspace() or _unspaced(before) or _unspaced(after)


def _unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in UNSPACED)


ORIGIN = "TRL"
USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "22"}
COMPLETION = {"response": "completion"}
POLES = {"pos": "chosen", "neg": "rejected"}


def _read_pair_chat(row: Row) -> Comparison:
    return row.pair(row.chat("prompt"), row.response("chosen"), row.response("rejected"))


def _write_pair_chat(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = need_pair(c)
    sides = {"chosen": write_messages(chosen.messages), "rejected": write_messages(rejected.messages)}
    return {"prompt": write_messages(c.prompt), **sides, **score_columns(c), **write_tools(c.tools)}


def _read_pair_text(row: Row) -> Comparison:
    chosen, rejected = (row.response(name, text=True) for name in ("chosen", "rejected"))
    return row.pair(text_prompt(row.text("prompt")), chosen, rejected, text=True)


def _write_pair_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    chosen, rejected = need_pair(c)
    sides = {"chosen": words(chosen.messages), "rejected": words(rejected.messages)}
    return {"prompt": words(c.prompt), **sides, **score_columns(c)}


def _read_implicit_chat(row: Row) -> Comparison:
    chosen, rejected = row.turns("chosen"), row.turns("rejected")
    at = split_turns(chosen, rejected)
    return row.pair(row.with_system(chosen[:at]), Response(chosen[at:]), Response(rejected[at:]))


def _write_implicit_chat(c: Comparison) -> dict[str, object]:
    need_chat(c)
    chosen, rejected = (write_messages((*c.prompt, *side.messages)) for side in need_pair(c))
    return {"chosen": chosen, "rejected": rejected, **score_columns(c), **write_tools(c.tools)}


def _read_implicit_text(row: Row) -> Comparison:
    prompt, chosen, rejected = split_text(row.text("chosen"), row.text("rejected"))
    if not prompt and (name := next((name for name, value in row.values.items() if may_ask(name, value)), "")):
        what = f"chosen and rejected have no words in common, and {name} may be their prompt: --columns prompt={name}"
        raise BadRow("missing field", f"{what}, or --ignore-columns {name}")
    return row.pair(text_prompt(prompt), answer(chosen), answer(rejected), text=True)


def _write_implicit_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    chosen, rejected = (words(c.prompt) + words(side.messages) for side in need_pair(c))
    return {"chosen": chosen, "rejected": rejected, **score_columns(c)}


def _read_unpaired_chat(row: Row) -> Comparison:
    labels = (row.label_of(row.given("label"), "label"),)
    return row.comparison(row.chat("prompt"), [row.response("completion")], labels=labels)


def _write_unpaired_chat(c: Comparison) -> dict[str, object]:
    need_chat(c)
    response, label = need_label(c)
    sides = {"completion": write_messages(response.messages), "label": label}
    return {"prompt": write_messages(c.prompt), **sides, **write_tools(c.tools)}


def _read_unpaired_text(row: Row) -> Comparison:
    labels = (row.label_of(row.given("label"), "label"),)
    prompt = text_prompt(row.text("prompt"))
    return row.comparison(prompt, [row.response("completion", text=True)], text=True, labels=labels)


def _write_unpaired_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    response, label = need_label(c)
    return {"prompt": words(c.prompt), "completion": words(response.messages), "label": label}


def _read_completion_chat(row: Row) -> Comparison:
    return row.comparison(row.chat("prompt"), [row.response("completion")])


def _write_completion_chat(c: Comparison) -> dict[str, object]:
    need_chat(c)
    completion = write_messages(need_demonstration(c).messages)
    return {"prompt": write_messages(c.prompt), "completion": completion, **write_tools(c.tools)}


def _read_completion_text(row: Row) -> Comparison:
    return row.comparison(text_prompt(row.text("prompt")), [row.response("completion", text=True)], text=True)


def _write_completion_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    return {"prompt": words(c.prompt), "completion": words(need_demonstration(c).messages)}


def _read_prompt_chat(row: Row) -> Comparison:
    return row.comparison(row.chat("prompt"), ())


def _write_prompt_chat(c: Comparison) -> dict[str, object]:
    need_chat(c)
    need_no_preference(c)
    return {"prompt": write_messages(c.prompt), **write_tools(c.tools)}


def _read_prompt_text(row: Row) -> Comparison:
    return row.comparison(text_prompt(row.text("prompt")), (), text=True)


def _write_prompt_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    need_no_preference(c)
    return {"prompt": words(c.prompt)}


PREFERENCE_CHAT = Layout(
    name="preference-chat",
    fields=("prompt", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    shape=chat_prompt,
    aliases=POLES,
    gives="pairs",
    says="a prompt and two responses, in turns",
    origin=ORIGIN,
    example={"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    reader=_read_pair_chat,
    writer=_write_pair_chat,
    reads=scored_sides,
    arranged=best_first,
)
PREFERENCE_TEXT = Layout(
    name="preference-text",
    fields=("prompt", "chosen", "rejected"),
    optional=SCORES,
    aliases=POLES,
    gives="pairs",
    says="a prompt and two responses, as plain text",
    origin=ORIGIN,
    example={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22"},
    reader=_read_pair_text,
    writer=_write_pair_text,
    reads=scored_sides,
    arranged=best_first,
)
IMPLICIT_CHAT = Layout(
    name="implicit-chat",
    fields=("chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    shape=implicit_chat,
    gives="pairs",
    says="two whole conversations; the prompt is the turns they share",
    origin=ORIGIN,
    example={"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    reader=_read_implicit_chat,
    writer=_write_implicit_chat,
    reads=scored_sides,
    arranged=best_first,
)
IMPLICIT_TEXT = Layout(
    name="implicit-text",
    fields=("chosen", "rejected"),
    optional=SCORES,
    shape=implicit_text,
    gives="pairs",
    says="two whole texts; the prompt is the words they share",
    origin=ORIGIN,
    example={"chosen": "The capital of France is Paris.", "rejected": "The capital of France is London."},
    reader=_read_implicit_text,
    writer=_write_implicit_text,
    reads=scored_sides,
    arranged=best_first,
)
UNPAIRED_CHAT = Layout(
    name="unpaired-chat",
    fields=("prompt", "completion", "label"),
    optional=("system", "tools"),
    aliases=COMPLETION,
    shape=chat_prompt,
    gives="labels",
    says="a prompt and a response that is desirable or not, in turns",
    origin=ORIGIN,
    example={"prompt": [USER], "completion": [GOOD], "label": True},
    reader=_read_unpaired_chat,
    writer=_write_unpaired_chat,
)
UNPAIRED_TEXT = Layout(
    name="unpaired-text",
    fields=("prompt", "completion", "label"),
    aliases=COMPLETION,
    gives="labels",
    says="a prompt and a response that is desirable or not, as plain text",
    origin=ORIGIN,
    example={"prompt": "2 + 2 =", "completion": " 22", "label": False},
    reader=_read_unpaired_text,
    writer=_write_unpaired_text,
)
COMPLETION_CHAT = Layout(
    name="completion-chat",
    fields=("prompt", "completion"),
    optional=("system", "tools"),
    aliases=COMPLETION,
    shape=chat_prompt,
    gives="demonstrations",
    says="a prompt and a response to learn, in turns",
    origin=ORIGIN,
    example={"prompt": [USER], "completion": [GOOD]},
    reader=_read_completion_chat,
    writer=_write_completion_chat,
)
COMPLETION_TEXT = Layout(
    name="completion-text",
    fields=("prompt", "completion"),
    aliases=COMPLETION,
    gives="demonstrations",
    says="a prompt and a response to learn, as plain text",
    origin=ORIGIN,
    example={"prompt": "2 + 2 =", "completion": " 4"},
    reader=_read_completion_text,
    writer=_write_completion_text,
)
PROMPT_CHAT = Layout(
    name="prompt-chat",
    fields=("prompt",),
    optional=("system", "tools"),
    shape=chat_prompt_alone,
    gives="prompts",
    says="a prompt alone, in turns",
    origin=ORIGIN,
    example={"prompt": [USER]},
    reader=_read_prompt_chat,
    writer=_write_prompt_chat,
)
PROMPT_TEXT = Layout(
    name="prompt-text",
    fields=("prompt",),
    shape=prompt_alone,
    gives="prompts",
    says="a prompt alone, as plain text",
    origin=ORIGIN,
    example={"prompt": "2 + 2 ="},
    reader=_read_prompt_text,
    writer=_write_prompt_text,
)
