"""From rendered texts to token ids, with the characters that each token covers.

The ids are those of the whole text, with one exception. At inference the prompt is tokenized by itself, and some
tokenizers give its end other tokens when an answer follows, such as the last space joined to the first word. There
prompt and answer are tokenized apart, so that training sees the prompt as sampling does and exactly the answer is
trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefopt.data.group import BoolArray, IntArray
from prefopt.data.tokenizer import Tokenizer

OffsetArray = npt.NDArray[np.int64]
Tokens = tuple[IntArray, OffsetArray, OffsetArray]

WORTH_SHARING = 64  # characters of the shortest prompt that is encoded once for all responses
NEAR = 256  # characters before an answer that are searched for an added token to tokenize the prompt's end from
REMEMBERED = 4096  # ends of prompts; a template has a handful


@dataclass(frozen=True, slots=True)
class RenderedText:
    """One response with its prompt as text; ``spans`` are the trained characters, [start, end).

    ``bos`` and ``eos``: whether those are still to be added. The first ``shared`` characters are the prompt's, the same
    for all responses of a row. The last ``close`` characters close the answer behind its last words. ``further``: a
    later step of the response that the text before it begins. ``pictures`` are the characters that stand for each.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    bos: bool = False
    eos: bool = False
    shared: int = 0
    close: int = 0
    further: bool = False
    pictures: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids [L] of a text, and the characters [starts, ends) of all but the first ``skipped`` tokens.

    A token covers all characters since the end of the one before it, also a space that its offsets leave out. Tokens
    that share the bytes of one character all cover it, and a token without characters covers the one at its place. So
    ``ends`` never decrease. The skipped tokens encode the text before character ``cut``. ``boundary``: prompt and
    answer had to be tokenized ``apart``, or are ``joined`` because this tokenizer cannot do that.
    """

    ids: IntArray
    starts: OffsetArray
    ends: OffsetArray
    skipped: int = 0
    cut: int = 0
    boundary: Literal["", "apart", "joined"] = ""

    def covers(self, spans: Sequence[tuple[int, int]]) -> BoolArray:
        """Which tokens [L] cover any character of the spans."""
        trained = np.zeros(len(self.ids), np.bool_)
        for start, end in spans:
            trained[self.skipped :] |= (self.starts < end) & (self.ends > start)
        return trained

    def until(self, place: int) -> int:
        """The number of tokens that end at or before character ``place``, which is not before ``cut``."""
        return int(np.searchsorted(self.ends, place, side="right")) + self.skipped

    def straddles(self, place: int) -> bool:
        """Whether one token covers characters on both sides of ``place``."""
        return bool(np.any((self.starts < place) & (self.ends > place)))


class Encoder:
    """Encodes texts in batches, without special tokens around them. What the responses of a row share is encoded once.

    A tokenizer splits a text at its added tokens first and encodes the text between them separately. So a text may be
    cut before any of them, and the pieces give the ids of the whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = [t for t in tokenizer.added_tokens_decoder.values() if not t.normalized]
        usable = not tokenizer.split_special_tokens and not any(t.single_word for t in added)
        self._contents = sorted((t.content for t in added if t.content), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, self._contents)) if usable and added else r"(?!)")
        self._greedy = {t.content for t in added if t.lstrip}
        self._safe: dict[str, bool] = {}
        self._end = lru_cache(REMEMBERED)(self._ids)  # for the ends of prompts, which many rows share
        # Some tokenizers put a space before the start of a text, which must not happen in the middle of one.
        line = self._ids("\n")
        plain = any(self._ids("\n" + letter) == line + self._ids(letter) for letter in "aQ7~")
        self._anchor, self._anchor_ids = ("", []) if plain else ("\n", line)

    def encode(self, text: str) -> Encoded:
        return Encoded(*self._whole([text])[0])

    def encode_rows(self, rows: Sequence[Sequence[RenderedText]]) -> Iterator[list[Encoded]]:
        """The texts of each row."""
        cuts = [self._cut(row) for row in rows]
        pieces: list[str] = []
        for row, cut in zip(rows, cuts, strict=True):
            pieces += [row[0].text[:cut]] * bool(cut) + [rendered.text[cut:] for rendered in row]
        encoded = iter(self._whole(pieces))
        for row, cut in zip(rows, cuts, strict=True):
            head = next(encoded)[0] if cut else np.empty(0, np.int32)
            found = []
            for rendered, (ids, starts, ends) in zip(row, encoded, strict=False):  # no more than the row has
                tokens = Encoded(np.concatenate([head, ids]), starts + cut, ends + cut, len(head), cut)
                found.append(self._split_at_answers(rendered, tokens))
            yield found

    def _cut(self, row: Sequence[RenderedText]) -> int:
        """Where the texts of a row may be cut, within what they share; 0 for nowhere."""
        shared = min(rendered.shared for rendered in row)
        if len(row) < 2 or shared < WORTH_SHARING or row[0].pictures:  # whose tokens must be known in the prompt
            return 0
        text = row[0].text
        at = self._last_added(text, shared, shared - NEAR) or self._last_added(text, shared, 0)
        found = [self._added.match(rendered.text, at) for rendered in row]
        return at if all(match is not None and self._is_fixed(match[0]) for match in found) else 0

    def _last_added(self, text: str, end: int, start: int) -> int:
        """Where the last added token before ``end`` begins, or 0."""
        found = [m.start() for m in self._added.finditer(text, max(start, 0), end) if self._is_fixed(m[0])]
        return found[-1] if found else 0

    def _is_fixed(self, token: str) -> bool:
        """Whether an added token is one wherever it is written: no other that begins before it can overlap it."""
        if token not in self._safe:
            others = ((other, i) for other in self._contents for i in range(1, len(other)))
            overlap = any(token.startswith(other[i:]) or other.startswith(token, i) for other, i in others)
            self._safe[token] = token not in self._greedy and not overlap
        return self._safe[token]

    def _split_at_answers(self, rendered: RenderedText, tokens: Encoded) -> Encoded:
        """Encode the answers of a text apart from what precedes them where the tokenizer would join the two."""
        text = rendered.text
        places = [start for start, _ in rendered.spans if start and self._joins(rendered, tokens, start)]
        places += [end for _, end in rendered.spans if end < len(text) and tokens.straddles(end)]
        if not places:
            return tokens
        cuts = [0, *sorted(set(places)), len(text)]
        parts = [self._encode_piece(text, start, end) for start, end in pairwise(cuts)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return replace(tokens, boundary="joined")
        ids, starts, ends = (np.concatenate(column) for column in zip(*known, strict=True))
        return Encoded(ids, starts, ends, boundary="apart")

    def _joins(self, rendered: RenderedText, tokens: Encoded, start: int) -> bool:
        """Whether the text before ``start`` is encoded differently when it is encoded by itself."""
        if tokens.straddles(start):
            return True
        text = rendered.text
        known = tokens.cut > 0 and start == rendered.shared
        at = tokens.cut if known else self._last_added(text, start, start - NEAR)
        if not at or at < tokens.cut:
            # The start of a word changes no token before it; only spaces and digits merge with what follows.
            if not (text[start - 1].isspace() or text[start - 1].isdigit()):
                return False
            at = tokens.cut
        encode = self._end if start - at <= NEAR else self._ids
        return bool(encode(text[at:start]) != tokens.ids[tokens.until(at) : tokens.until(start)].tolist())

    def _encode_piece(self, text: str, start: int, end: int) -> Tokens | None:
        """The tokens of text[start:end] as in the middle of the text; None where this tokenizer cannot do that."""
        anchor = self._anchor if start else ""
        ((ids, starts, ends),) = self._whole([anchor + text[start:end]])
        skip = len(self._anchor_ids) if anchor else 0
        if ids[:skip].tolist() != self._anchor_ids[:skip]:
            return None
        move = start - len(anchor)
        return ids[skip:], np.maximum(starts[skip:] + move, start), ends[skip:] + move

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.encode(text).ids.tolist()
        return ids

    def _whole(self, texts: Sequence[str]) -> list[Tokens]:
        # transformers sets these before every call, and other users of the tokenizer may have changed them since.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.encode_special_tokens != self._tokenizer.split_special_tokens:
            self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
        batch = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), *_covered(e.offsets)) for e in batch]


def _covered(offsets: Sequence[tuple[int, int]]) -> tuple[OffsetArray, OffsetArray]:
    """The characters [starts, ends) that each token covers, from the tokenizer's offsets; see :class:`Encoded`."""
    both = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = both[::2], np.maximum.accumulate(both[1::2])
    starts[1:] = np.minimum(starts[1:], ends[:-1])
    starts[:1] = 0
    return starts, np.maximum.accumulate(np.maximum(ends, starts + 1))
