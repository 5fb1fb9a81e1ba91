r"""Text that is probably not what its author wrote: damaged characters, invisible ones, left-overs of templates.

>>> list(suspicions("It\u00e2\u20ac\u2122s &quot;fine&quot;"))
['mojibake', 'HTML entities']
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prefopt.records import Comparison, Message

# UTF-8 that was read as Windows-1252 or Latin-1: what the bytes 0x80 to 0xBF look like then.
_TAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    f"Ã[{_TAIL}]|Â[\u00a0-\u00bf]|â[€\u0080\u0082„†‡ˆ‰Š‹Œž™][{_TAIL}]|ð[Ÿ\u009f][{_TAIL}]|(?:[ÐÑ][{_TAIL}]){{2}}|ï»¿|ï¿½"
)
# Joiners are left alone: emoji and several scripts need them.
_HIDDEN = re.compile("[\u200b\u2060-\u2064\ufeff\u00ad\u180e]")
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u0080-\u009f]")
_HTML = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|mdash|rsquo|#\d{2,6}|#x[0-9a-fA-F]{2,6});|<br ?/?>")
_ESCAPED = re.compile(r"\\n(?![a-z]).*\\n(?![a-z])|\\u[0-9a-fA-F]{4}.*\\u[0-9a-fA-F]{4}", re.S)
_TEMPLATE = re.compile(
    r"<\|[a-z_]{2,24}\|>|<｜[^｜<>]{2,24}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<bos>|<eos>"
    r"|^#{2,3} ?(?:Response|Instruction|Input|Human|Assistant):|^</?s>|</?s>$",
    re.M,
)
CODE = ("```", "</")  # where HTML is what was meant
TURNS = "turns inside a response"
BESIDE, LONGEST = 10, 20  # characters of a text that are shown beside a match, and of the match
SPEAKERS = ("Human:", "User:", "Assistant:")
_TURN = re.compile(rf"^(?:{'|'.join(SPEAKERS)}) ?\S", re.M)
# A cheap look first, for almost all texts have none of these.
_BEYOND_ASCII = (
    ("replacement character", re.compile("\ufffd")),
    ("mojibake", _MOJIBAKE),
    ("zero-width characters", _HIDDEN),
    ("direction controls", _BIDI),
    ("private-use characters", _PRIVATE),
)

KINDS = {
    "replacement character": "U+FFFD stands for bytes that were no text",
    "mojibake": "UTF-8 that was read in another encoding, such as \u00c3\u00a9 for \u00e9",
    "zero-width characters": "characters that cannot be seen",
    "direction controls": "bidirectional control characters, which can hide text",
    "private-use characters": "characters that mean nothing outside one font",
    "control characters": "control characters besides line ends and tabs",
    "HTML entities": "HTML that was not decoded, such as &quot; or <br>",
    "escaped line ends": "\\n or \\u0000 written out, and no line end in the text",
    "template text": "marks of a chat template written out, such as <|im_end|> or ### Response:",
    TURNS: "a line of a response begins with Human:, User: or Assistant:",
}
"""Every kind of suspicion, and what it means."""


def suspicions(text: str) -> dict[str, str]:
    """The kinds of a text, of :data:`KINDS`, each with the place where it is first seen.

    Turns inside a response are looked for in :func:`row_suspicions`.
    """
    found = {}
    for kind, pattern in _patterns(text):
        if match := pattern.search(text):
            found[kind] = _around(text, match)
    return found


def row_suspicions(c: Comparison) -> dict[str, str]:
    """The kinds that any text of a row has, each with a place in it, in the order of :data:`KINDS`."""
    found: dict[str, str] = {}
    for turns in _turns(c):
        for m in turns:
            for text in _texts(m):
                found = suspicions(text) | found
    for r in c.responses:
        for m in r.messages:
            spoken = m.role == "assistant" and any(name in m.content for name in SPEAKERS)
            if spoken and (match := _TURN.search(m.content)):
                found.setdefault(TURNS, _around(m.content, match))
    return {kind: found[kind] for kind in KINDS if kind in found} if found else found


def _patterns(text: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """What to look for in a text, judged by what is quick to see."""
    if not text.isascii():
        yield from _BEYOND_ASCII
    if not text.isprintable():
        yield "control characters", _CONTROL
    if ("&" in text or "<" in text) and not any(mark in text for mark in CODE):
        yield "HTML entities", _HTML
    if "\\" in text and "\n" not in text:
        yield "escaped line ends", _ESCAPED
    if "<" in text or "[" in text or "#" in text:
        yield "template text", _TEMPLATE


def _around(text: str, match: re.Match[str]) -> str:
    """A match with some text around it, what cannot be seen spelt out."""
    start, end = max(match.start() - BESIDE, 0), min(match.end(), match.start() + LONGEST) + BESIDE
    return ascii(text[start:end]) if not match[0].isprintable() else repr(text[start:end])


def _turns(c: Comparison) -> Sequence[Sequence[Message]]:
    return (c.prompt, *(r.messages for r in c.responses))


def _texts(m: Message) -> Sequence[str]:
    return (m.content, m.reasoning) if m.reasoning else (m.content,)
