"""TRL's layouts: pairs, labels, demonstrations and prompts, each as plain text and as messages; raw text; questions.

A prompt that is text is the plain text of a base model: it and the response are joined as they are.

An implicit prompt ends where both sides last share a word, and before the last word of either:

>>> split_text("The capital is Paris", "The capital is London")
('The capital is', ' Paris', ' London')
>>> split_text("Capital: Paris", "Capital: Paris is")
('Capital:', ' Paris', ' Paris is')
>>> split_text("Paris", "Parma")
('', 'Paris', 'Parma')
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from prefopt.data.layouts.layout import (
    BAD,
    GOOD,
    QUESTION,
    SIDES,
    USER,
    CannotHold,
    Layout,
    always,
    pair_of,
    plain_text,
    response_of,
    score_columns,
)
from prefopt.data.layouts.messages import split_turns, write_messages, write_tools
from prefopt.data.layouts.row import RowReader, answer, text_prompt
from prefopt.data.layouts.values import LISTS, SCORES, BadRow, look
from prefopt.data.validate import DataKind
from prefopt.records import Comparison, Message, Response

# Scripts without spaces between words, where every character counts as a word: Thai, Lao, Tibetan and Burmese; Khmer;
# kana, Bopomofo, Han, Yi and full-width forms.
UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
JOINERS = "\u200c\u200d"
Match = Callable[[Mapping[str, object]], bool]


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen response, rejected response. The space before a response belongs to the response."""
    limit = min(len(chosen), len(rejected))
    at = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    at = min(at, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while at > 0 and not (_is_boundary(chosen, at) and _is_boundary(rejected, at)):
        at -= 1
    at = max(at, 0)
    if at and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def _is_boundary(text: str, at: int) -> bool:
    """Whether a word ends before ``text[at]`` or begins there."""
    before, after = text[at - 1], text[at]
    marked = unicodedata.combining(after) or unicodedata.category(after) in ("Mn", "Mc", "Me", "Sk")
    if marked or after in JOINERS or before in JOINERS:
        return False
    return before.isspace() or after.isspace() or bool(UNSPACED.search(before + after))


# Columns that may hold the prompt: with one of them, no prompt is inferred from what chosen and rejected share.
PROMPTS = ("prompt", "question", "instruction", "input", "query", "context", "conversations")
# More of them, which also occur beside whole conversations and texts.
TOPICS = ("problem", "post", "history", "request", "dialogue", "conversation", "user", "user_prompt", "prompt_text")
# Columns that may hold responses: with one of them, a row is more than a prompt.
RESPONSES = ("completion", "response", "responses", "completions", "output", "outputs", "answer", "answers")


def chat_prompt(row: Mapping[str, object]) -> bool:
    return look(row["prompt"]) in LISTS


def _prompt_only(row: Mapping[str, object]) -> bool:
    return not any(row.get(name) is not None for name in RESPONSES)


def _implicit(row: Mapping[str, object]) -> bool:
    """No column but chosen and rejected holds a prompt."""
    return not any(row.get(name) is not None for name in PROMPTS)


def transcripts(row: Mapping[str, object]) -> bool:
    """Chosen and rejected are transcripts as in Anthropic's HH."""
    return _implicit(row) and all(look(row[name]) == "transcript" for name in SIDES)


def _implicit_chat(row: Mapping[str, object]) -> bool:
    return _implicit(row) and look(row["chosen"]) in LISTS


def _prompt(row: RowReader, text: bool) -> tuple[Message, ...]:
    return text_prompt(row.text("prompt")) if text else row.chat("prompt")


def _written(turns: tuple[Message, ...], text: bool) -> object:
    return plain_text(turns) if text else write_messages(turns)


def _read_pair(row: RowReader, *, text: bool) -> Comparison:
    prompt = _prompt(row, text)
    return row.pair(prompt, row.response("chosen", text=text), row.response("rejected", text=text), text=text)


def _write_pair(c: Comparison, *, text: bool) -> dict[str, object]:
    chosen, rejected = (_written(side.messages, text) for side in pair_of(c))
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": _written(c.prompt, text), **sides, **score_columns(c), **write_tools(c.tools)}


def _read_implicit(row: RowReader, *, text: bool) -> Comparison:
    if not text:
        chosen, rejected = row.turns("chosen"), row.turns("rejected")
        at = split_turns(chosen, rejected)
        return row.pair(row.with_system(chosen[:at]), Response(chosen[at:]), Response(rejected[at:]))
    prompt, good, bad = split_text(row.text("chosen"), row.text("rejected"))
    asking = (name for name, v in row.values.items() if name in TOPICS or look(v) == "messages")
    if not prompt and (name := next(asking, "")):
        what = f"chosen and rejected share no words, and {name} may be their prompt: --columns prompt={name}"
        raise BadRow("missing field", f"{what}, or --ignore-columns {name}")
    return row.pair(text_prompt(prompt), answer(good), answer(bad), text=True)


def _write_implicit(c: Comparison, *, text: bool) -> dict[str, object]:
    chosen, rejected = (_written((*c.prompt, *side.messages), text) for side in pair_of(c))
    return {"chosen": chosen, "rejected": rejected, **score_columns(c), **write_tools(c.tools)}


def _read_label(row: RowReader, *, text: bool) -> Comparison:
    labels, prompt = row.labels, _prompt(row, text)
    return row.comparison(prompt, [row.response("completion", text=text)], text=text, labels=labels)


def _write_completion(c: Comparison, *, text: bool, labelled: bool = False) -> dict[str, object]:
    completion = _written(response_of(c).messages, text)
    if labelled and c.labels is None:
        raise CannotHold("a response without a label")
    label = {"label": c.labels[0]} if labelled and c.labels else {}
    return {"prompt": _written(c.prompt, text), "completion": completion, **label, **write_tools(c.tools)}


def _chat_and_text(
    name: str,
    kind: DataKind,
    description: str,
    reader: Callable[..., Comparison],
    writer: Callable[..., dict[str, object]],
    *,
    chat: Mapping[str, object],
    text: Mapping[str, object],
    optional: tuple[str, ...] = (),
    matches: tuple[Match, Match] = (chat_prompt, always),
    **more: Any,
) -> tuple[Layout, ...]:
    """The layouts ``NAME-chat`` and ``NAME-text``; ``chat`` and ``text`` are their example rows."""
    return tuple(
        Layout(
            name=f"{name}-{'text' if plain else 'chat'}",
            optional=optional if plain else ("system", "tools", *optional),
            kind=kind,
            description=f"{description}, as {'plain text' if plain else 'messages'}",
            origin="TRL",
            example=text if plain else chat,
            reader=partial(reader, text=plain),
            writer=partial(writer, text=plain),
            matches=matches[plain],
            **more,
        )
        for plain in (False, True)
    )


PREFERENCE = _chat_and_text(
    "preference",
    "pairs",
    "a prompt and two responses",
    _read_pair,
    _write_pair,
    chat={"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    text={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 22"},
    optional=SCORES,
    aliases={"pos": "chosen", "neg": "rejected"},
)
IMPLICIT = _chat_and_text(
    "implicit",
    "pairs",
    "two conversations or texts that begin with the same prompt",
    _read_implicit,
    _write_implicit,
    chat={"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    text={"chosen": "The capital of France is Paris.", "rejected": "The capital of France is London."},
    optional=SCORES,
    matches=(_implicit_chat, lambda row: _implicit(row) and not _implicit_chat(row) and not transcripts(row)),
)
UNPAIRED = _chat_and_text(
    "unpaired",
    "labels",
    "a prompt and a response that is desirable or not",
    _read_label,
    partial(_write_completion, labelled=True),
    chat={"prompt": [USER], "completion": [GOOD], "label": True},
    text={"prompt": "2 + 2 =", "completion": " 22", "label": False},
    aliases={"response": "completion"},
)
COMPLETION = _chat_and_text(
    "completion",
    "demonstrations",
    "a prompt and a response to train on",
    lambda row, text: row.comparison(_prompt(row, text), [row.response("completion", text=text)], text=text),
    _write_completion,
    chat={"prompt": [USER], "completion": [GOOD]},
    text={"prompt": "2 + 2 =", "completion": " 4"},
    aliases={"response": "completion"},
)
PROMPT = _chat_and_text(
    "prompt",
    "prompts",
    "a prompt alone",
    lambda row, text: row.comparison(_prompt(row, text), (), text=text),
    lambda c, text: {"prompt": _written(c.prompt, text), **write_tools(c.tools)},
    chat={"prompt": [USER]},
    text={"prompt": "2 + 2 ="},
    matches=(lambda row: _prompt_only(row) and chat_prompt(row), _prompt_only),
)
ANSWER = Layout(
    name="question-answer",
    optional=("system",),
    kind="demonstrations",
    description="a question and an answer to train on",
    origin="GSM8K",
    example={"question": QUESTION, "answer": "2 + 2 = 4\n#### 4"},
    reader=lambda row: row.comparison(row.user_prompt("question"), [answer(row.text("answer"))]),
)
RAW_TEXT = Layout(
    name="raw-text",
    option_names={"prompt": "text"},
    kind="demonstrations",
    description="text for language modelling; a label beside it is not read",
    origin="TRL, IMDb",
    example={"text": "It was the best film that I saw in years."},
    reader=lambda row: row.comparison(text_prompt(""), [answer(row.text("text"))], text=True),
    writer=lambda c: {"text": plain_text(c.prompt) + plain_text(response_of(c).messages)},
)
LAYOUTS = {50: PREFERENCE, 60: IMPLICIT, 70: UNPAIRED, 85: COMPLETION, 92: (ANSWER, RAW_TEXT), 95: PROMPT}
