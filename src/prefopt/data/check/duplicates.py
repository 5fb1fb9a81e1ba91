r"""Rows that say the same again, or the opposite: found by 8-byte hashes, so that a million rows fit in memory.

>>> from prefopt.records import Comparison
>>> repeats = Repeats()
>>> for row, sides in enumerate([("4", "22"), ("22", "4"), ("4", "22")], 1):
...     repeats.add(Comparison.pair("2 + 2 =", chosen=sides[0], rejected=sides[1], row=row), source=0)
>>> repeats.duplicates()
[(2, 0)]
>>> repeats.contradictions()
[(0, 1), (1, 0), (2, 1)]

>>> list(suspicions("It\u00e2\u20ac\u2122s &quot;fine&quot;"))
['mojibake', 'HTML entities']
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from prefopt.records import Comparison, Message, Response

Found = list[tuple[int, int]]
"""(place of a row, place of the row that it repeats or contradicts); places count rows in the order they were added."""


class Repeats:
    """What rows said, as hashes. Two different rows share one by chance in 3 of 100 million files of a million rows."""

    def __init__(self) -> None:
        self.source, self.row = array("i"), array("q")
        self._prompts, self._rows = array("Q"), array("Q")
        self._claims, self._sides, self._claimers = array("Q"), array("b"), array("q")

    def __len__(self) -> int:
        return len(self.row)

    def add(self, c: Comparison, source: int) -> None:
        """Take note of a row; ``source`` is the number of its file."""
        place = len(self.row)
        self.source.append(source)
        self.row.append(c.row)
        prompt = c.prompt_key
        names = [_name(r) for r in c.responses]
        self._prompts.append(_number(prompt[:8]))
        self._rows.append(_hash(prompt, *sorted(_standing(c, k) + names[k] for k in range(len(names)))))
        for better, worse in _claims(c, names):
            self._claims.append(_hash(prompt, *sorted((better, worse))))
            self._sides.append(better < worse)
            self._claimers.append(place)

    @property
    def prompts(self) -> npt.NDArray[np.uint64]:
        """[rows] a number for each row's prompt."""
        return np.frombuffer(self._prompts, np.uint64)

    def duplicates(self) -> Found:
        """Rows with the prompt, the responses and the preference of a row before them."""
        return _again(np.frombuffer(self._rows, np.uint64))

    def contradictions(self) -> Found:
        """Rows that prefer one response to another where another row, of the same prompt, says the opposite.

        A label of a response claims that it is better, or worse, than nothing.
        """
        keys = np.frombuffer(self._claims, np.uint64)
        if not len(keys):
            return []
        sides, places = np.frombuffer(self._sides, np.int8), np.frombuffer(self._claimers, np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        none = len(self.row)
        first = [np.minimum.reduceat(np.where(sides[order] == s, places[order], none), starts) for s in (0, 1)]
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(keys)))
        other = np.where(sides[order] == 0, first[1][group], first[0][group])
        claimed = places[order]
        at = np.flatnonzero(other < none)
        at = at[np.lexsort((other[at], claimed[at]))]
        rows, first_of = np.unique(claimed[at], return_index=True)
        return list(zip(rows.tolist(), other[at][first_of].tolist(), strict=True))

    def prompts_of(self, other: Repeats) -> Found:
        """Rows of this whose prompt ``other`` has too, each with the first place of it there."""
        mine, theirs = self.prompts, other.prompts
        known, first = np.unique(theirs, return_index=True)
        if not len(known):
            return []
        at = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        places = np.flatnonzero(known[at] == mine)
        return list(zip(places.tolist(), first[at[places]].tolist(), strict=True))


def _again(keys: npt.NDArray[np.uint64]) -> Found:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found = first[inverse] if len(keys) else inverse
    return [(i, int(found[i])) for i in np.flatnonzero(found != np.arange(len(keys))).tolist()]


def _claims(c: Comparison, names: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """(better, worse) by name, each pair once; what a row says both ways counts as what it sums to."""
    weights = [vote[2] for vote in c.votes] if c.votes is not None else [1.0] * len(c.pairs)
    said = [(names[best], names[worse], weight) for (best, worse), weight in zip(c.pairs, weights, strict=True)]
    for name, good in zip(names, c.labels or (), strict=bool(c.labels)):
        said.append((name, _NOTHING, 1.0) if good else (_NOTHING, name, 1.0))
    margin: dict[tuple[bytes, bytes], float] = {}
    for better, worse, weight in said:
        key, sign = ((better, worse), 1) if better < worse else ((worse, better), -1)
        margin[key] = margin.get(key, 0.0) + sign * weight
    for (a, b), difference in margin.items():
        if a != b and difference:
            yield (a, b) if difference > 0 else (b, a)


_NOTHING = bytes(8)


def _standing(c: Comparison, k: int) -> bytes:
    """What is said of response k, as bytes of one length: its tier, its label, and how often it wins and loses."""
    tier = next((t for t, tier in enumerate(c.tiers) if k in tier), -1)
    label = -1 if c.labels is None else int(c.labels[k])
    votes = c.votes or ()
    counts = sum(best == k for best, *_ in votes), sum(worse == k for _, worse, _ in votes)
    return b"".join(n.to_bytes(4, "little", signed=True) for n in (tier, label, *counts))


def _name(response: Response) -> bytes:
    parts = [part for m in response.messages for part in (m.role, m.content.strip(), m.reasoning or "")]
    parts += [part for m in response.messages for call in m.tool_calls for part in (call.name, call.arguments)]
    return _hash(*(part.encode("utf-8", "surrogatepass") for part in parts)).to_bytes(8, "little")


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return _number(digest.digest())


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


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
