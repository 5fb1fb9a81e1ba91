"""Where the prompt ends when both sides hold the whole.

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

from prefopt.records import Message

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
