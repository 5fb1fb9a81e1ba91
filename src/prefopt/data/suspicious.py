r"""Text that is probably not what its author wrote: damaged characters, invisible ones, left-overs of templates.

>>> suspicions("It\u00e2\u20ac\u2122s &quot;fine&quot;")
['mojibake', 'HTML entities']
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
_HTML = re.compile(r"&(?:amp|lt|gt|quot|nbsp|apos|mdash|rsquo|#\d{2,6}|#x[0-9a-fA-F]{2,6});|<br ?/?>|</(?:p|div|span)>")
_ESCAPED = re.compile(r"\\n(?![a-z]).*\\n(?![a-z])|\\u[0-9a-fA-F]{4}.*\\u[0-9a-fA-F]{4}", re.S)
_TEMPLATE = re.compile(
    r"<\|[a-z_]{2,24}\|>|<｜[^｜<>]{2,24}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<bos>|<eos>"
    r"|^#{2,3} ?(?:Response|Instruction|Input|Human|Assistant):|^</?s>|</?s>$",
    re.M,
)
_TURN = re.compile(r"^(?:Human|User|Assistant): ?\S", re.M)
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
    "turns inside a response": "a line of a response begins with Human:, User: or Assistant:",
}
"""Every kind of suspicion, and what it means."""


def suspicions(text: str) -> list[str]:
    """The kinds of a text, of :data:`KINDS`; turns inside a response are looked for in :func:`row_suspicions`."""
    found = []
    if not text.isascii():
        found += [kind for kind, pattern in _BEYOND_ASCII if pattern.search(text)]
    if not text.isprintable() and _CONTROL.search(text):
        found.append("control characters")
    if ("&" in text or "<" in text) and _HTML.search(text):
        found.append("HTML entities")
    if "\\" in text and "\n" not in text and _ESCAPED.search(text):
        found.append("escaped line ends")
    if _TEMPLATE.search(text):
        found.append("template text")
    return found


def row_suspicions(c: Comparison) -> list[str]:
    """The kinds that any text of a row has, each once, in the order of :data:`KINDS`."""
    found = {kind for turns in _turns(c) for m in turns for text in _texts(m) for kind in suspicions(text)}
    if any(_TURN.search(m.content) for r in c.responses for m in r.messages if m.role == "assistant"):
        found.add("turns inside a response")
    return [kind for kind in KINDS if kind in found]


def _turns(c: Comparison) -> Sequence[Sequence[Message]]:
    return (c.prompt, *(r.messages for r in c.responses))


def _texts(m: Message) -> Sequence[str]:
    return (m.content, m.reasoning) if m.reasoning else (m.content,)
