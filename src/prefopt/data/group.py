"""A group: one prompt with its K responses, as token ids.

>>> import numpy as np
>>> chosen = (np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1], bool))
>>> rejected = (np.array([1, 2, 3, 9, 9]), np.array([0, 0, 1, 1, 1], bool))
>>> group = Group.from_sequences([chosen, rejected], row=1)
>>> group.prefix.tolist(), [c.ids.tolist() for c in group.continuations], group.tokens
([1, 2], [[3, 4], [3, 9, 9]], 7)

The shared prefix ends before the first trained token of any response: token 3 above is common, but trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.data.tokenizer import Tokenizer
from prefopt.records import PICTURE, Comparison, Message, Picture

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

OPEN, CLOSE = "⟦", "⟧"  # around trained tokens


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture and the tokens [start, stop) that stand for it: its image tokens and the marks between them."""

    picture: Picture
    start: int
    stop: int

    def moved(self, by: int) -> Placed:
        """The same picture ``by`` tokens later."""
        return replace(self, start=self.start + by, stop=self.stop + by)


Pictures = tuple[Placed, ...]


class PicturedIds(Sequence[int]):
    """Token ids [P] of a prompt with the pictures that some of them stand for."""

    def __init__(self, ids: IntArray, pictures: Pictures) -> None:
        self.ids, self.pictures = ids, pictures

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> IntArray:
        return np.array(self.ids, dtype, copy=copy)

    def tobytes(self) -> bytes:
        """What identifies the prompt: its ids, and its pictures with their places."""
        held = (p.picture.digest + p.start.to_bytes(8, "little") for p in self.pictures)
        return self.ids.tobytes() + b"".join(held)


def pictures_in(prompt: object) -> Pictures:
    """The pictures of a prompt."""
    return prompt.pictures if isinstance(prompt, PicturedIds) else ()


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """What one response adds to the shared prefix: ``ids`` and ``trained``, both [R], and its pictures.

    A response of several turns may be several *steps*, laid end to end: sequences that each follow the shared prefix
    and do not see one another, because the chat template shows an earlier turn differently from how it was generated.
    ``starts`` are the places in ``ids`` where the second step and the later ones begin. It has no pictures then.
    """

    ids: IntArray
    trained: BoolArray
    starts: tuple[int, ...] = ()
    pictures: Pictures = ()

    @property
    def steps(self) -> list[tuple[IntArray, BoolArray]]:
        """What each step adds to the shared prefix."""
        if not self.starts:
            return [(self.ids, self.trained)]
        return [(self.ids[a:b], self.trained[a:b]) for a, b in pairwise((0, *self.starts, len(self.ids)))]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """``prefix`` [P] and K continuations, with their preferences (see :class:`prefopt.records.Comparison`).

    ``pairs`` are (preferred, dispreferred) indices of continuations, ``weights`` theirs (None: equal); ``tiers``,
    ``scores`` [K] and ``labels`` [K] are those of the record. ``pictures`` are those of the prefix; the tokens of one
    picture are in one of the parts.
    """

    prefix: IntArray
    continuations: tuple[Continuation, ...]
    row: int
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    weights: tuple[float, ...] | None = None
    tiers: tuple[tuple[int, ...], ...] = ()
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    pictures: Pictures = ()

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
        row: int,
        pairs: tuple[tuple[int, int], ...] = ((0, 1),),
        steps: Sequence[int] | None = None,
        pictures: Sequence[Pictures] = (),
    ) -> Group:
        """Compute the shared prefix of whole sequences, each (ids [L], trained [L]), with the ``pictures`` of each: the
        same tokens are not shared where they stand for different pictures.

        Each is a response; or ``steps`` [K] says how many consecutive ones are the steps of each response. Raises
        ``ValueError`` where a sequence has no trained token after its first token, which is never scored.
        """
        whole = [(np.asarray(i, np.int32), np.array(t, np.bool_)) for i, t in sequences]
        for ids, trained in whole:
            if ids.shape != trained.shape or ids.ndim != 1:
                raise ValueError(f"ids {ids.shape} and mask {trained.shape} differ in shape")
            if not trained[1:].any():
                raise ValueError("a response has no token to train")
        length = common_length([ids for ids, _ in whole], min(int(trained.argmax()) for _, trained in whole))
        length = _before_differing(pictures, length) if any(pictures) else length
        if not length:
            for _, trained in whole:
                trained[0] = False
        added = iter([(ids[length:], trained[length:]) for ids, trained in whole])
        counts = [1] * len(whole) if steps is None else steps
        continuations = tuple(_continuation(list(islice(added, count))) for count in counts)
        if not any(pictures):
            return cls(whole[0][0][:length], continuations, row, pairs)
        assert len(continuations) == len(pictures), "a response with pictures has one step"
        own = [tuple(p.moved(-length) for p in found if p.start >= length) for found in pictures]
        continuations = tuple(replace(c, pictures=found) for c, found in zip(continuations, own, strict=True))
        shared = tuple(p for p in pictures[0] if p.stop <= length)
        return cls(whole[0][0][:length], continuations, row, pairs, pictures=shared)

    @property
    def tokens(self) -> int:
        """Tokens that one shared forward pass encodes: P + sum of R."""
        return len(self.prefix) + sum(len(c.ids) for c in self.continuations)

    @property
    def longest(self) -> int:
        """Tokens of the longest whole sequence."""
        return len(self.prefix) + max(len(ids) for c in self.continuations for ids, _ in c.steps)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest whole sequence."""
        return len(self.prefix) + min(len(ids) for c in self.continuations for ids, _ in c.steps)

    @property
    def count(self) -> int:
        """The number of sequences: the steps of all responses, most of which have one."""
        return sum(1 + len(c.starts) for c in self.continuations)

    def sequence(self, k: int) -> tuple[IntArray, BoolArray]:
        """The first step of response k, in most cases its only one, as a whole sequence: ids [L], trained [L]."""
        return self.sequences(k)[0]

    def sequences(self, k: int) -> list[tuple[IntArray, BoolArray]]:
        """All steps of response k as whole sequences, ids [L] and trained [L] each."""
        untrained = np.zeros(len(self.prefix), np.bool_)
        steps = self.continuations[k].steps
        return [(np.concatenate([self.prefix, ids]), np.concatenate([untrained, trained])) for ids, trained in steps]

    def placed(self, k: int) -> Pictures:
        """The pictures of response k as a whole sequence."""
        return (*self.pictures, *(p.moved(len(self.prefix)) for p in self.continuations[k].pictures))

    @property
    def prompt(self) -> IntArray | PicturedIds:
        """The prefix as what a sampler goes on from: with its pictures."""
        return PicturedIds(self.prefix, self.pictures) if self.pictures else self.prefix

    @property
    def has_pictures(self) -> bool:
        """Whether there is a picture in the prefix or in a response."""
        return bool(self.pictures) or any(c.pictures for c in self.continuations)

    def key(self, k: int) -> bytes:
        """Digest (16 bytes) of the ids, masks and pictures of response k as whole sequences."""
        digest = hashlib.blake2b(digest_size=16)
        for ids, trained in self.sequences(k):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(np.packbits(trained).tobytes())
        for p in self.placed(k):
            digest.update(p.picture.digest + p.start.to_bytes(8, "little"))
        return digest.digest()


def _continuation(steps: Sequence[tuple[IntArray, BoolArray]]) -> Continuation:
    if len(steps) == 1:
        return Continuation(*steps[0])
    ids, trained = (np.concatenate(column) for column in zip(*steps, strict=True))
    return Continuation(ids, trained, tuple(accumulate(len(one) for one, _ in steps[:-1])))


def common_length(sequences: Sequence[IntArray], most: int) -> int:
    """How many tokens all sequences begin with, at most ``most``."""
    for ids in sequences[1:]:
        differs = np.flatnonzero(ids[:most] != sequences[0][:most])
        most = int(differs[0]) if len(differs) else most
    return most


def _before_differing(pictures: Sequence[Pictures], length: int) -> int:
    """The part of a common prefix of ``length`` tokens in which all sequences have the same pictures, none cut."""
    for found in pictures:
        for n, placed in enumerate(found):
            if placed.start < length and (placed.stop > length or any(p[n : n + 1] != (placed,) for p in pictures)):
                length = placed.start
                break
    return length


def show(group: Group, tokenizer: Tokenizer, *, most: int | None = None, flat: bool = False) -> str:
    """A group as text with special tokens: the shared prefix, then each response with its trained tokens marked.

    Responses are labelled chosen or rejected, or with rank, score or label. ``most`` cuts longer texts in the middle.
    ``flat`` writes each on one line, with ↵ for its line ends.
    """
    lines = []
    for place, (name, spans) in enumerate(parts(group, tokenizer)):
        text = "".join(f"{OPEN}{text}{CLOSE}" if trained else text for text, trained in spans)
        lines += [name, shortened(text, most, flat=flat)] if text or place or not group.continuations else [name]
    return "\n".join(lines)


def show_words(c: Comparison, *, most: int | None = None) -> str:
    """A row as text, without a tokenizer."""
    lines = []
    for name, spans in parts_of_words(c):
        lines += [f"{name}:", *(shortened(text, most) for text, _ in spans)]
    return "\n".join(lines)


def with_sizes(m: Message) -> str:
    """The words of a message with the size of each picture in its place: ``[picture 640x480] What is this?``"""
    if not m.pictures:
        return m.content
    words = m.content.split(PICTURE)
    return words[0] + "".join(f"[picture {p.size}]{text}" for p, text in zip(m.pictures, words[1:], strict=True))


def shortened(text: str, most: int | None, *, flat: bool = False) -> str:
    """The text, or its beginning and end: ``01 [... 6 characters ...] 89``; ``flat`` on one line."""
    text = text.replace("\n", "↵") if flat else text
    if most is None or len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _name(group: Group | Comparison, of: int, k: int) -> str:
    """``chosen``; ``response 2, ranked 1 of 3, score 8.5``; ``response 1, desirable``; ``response``."""
    if of == 2 and group.pairs in (((0, 1),), ((1, 0),)) and group.scores is None:
        return "chosen" if group.pairs[0][0] == k else "rejected"
    parts = [f"response {k + 1}" if of > 1 else "response"]
    if len(group.tiers) > 1:
        place = next(i for i, tier in enumerate(group.tiers) if k in tier)
        tied = " (tied)" if len(group.tiers[place]) > 1 else ""
        parts.append(f"ranked {place + 1} of {len(group.tiers)}{tied}")
    elif group.pairs:
        better, worse = ([p[i] for p in group.pairs].count(k) for i in (0, 1))
        parts.append(f"preferred in {better} and dispreferred in {worse} of {len(group.pairs)} pairs")
    if group.scores is not None:
        parts.append(f"score {group.scores[k]:g}")
    if group.labels is not None:
        parts.append("desirable" if group.labels[k] else "undesirable")
    return ", ".join(parts)


def _count(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def parts(group: Group, tokenizer: Tokenizer) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The shared prefix and each response, or each step of it: its name with its count of tokens, and its text in spans
    that are trained or not."""
    if not group.continuations:
        return [(f"prompt ({_count(len(group.prefix))})", [(_decode(tokenizer, group.prefix), False)])]
    found = [(f"shared prefix ({_count(len(group.prefix))})", [(_decode(tokenizer, group.prefix), False)])]
    for k, c in enumerate(group.continuations):
        name = _name(group, len(group.continuations), k)
        for number, (ids, trained) in enumerate(c.steps, 1):
            step = f", step {number} of {len(c.starts) + 1}" if c.starts else ""
            title = f"{name}{step} ({_count(len(ids))}, {int(trained.sum())} trained)"
            found.append((title, list(_spans(tokenizer, group.prefix, ids, trained))))
    return found


def parts_of_words(c: Comparison) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The same for a row without a tokenizer: a part for each turn of the prompt and each response, with a span for
    each message. Nothing is known to be trained."""
    found = [("prompt" if c.text else m.role, [(with_sizes(m), False)]) for m in c.prompt]
    for k, response in enumerate(c.responses):
        found.append((_name(c, len(c.responses), k), [(with_sizes(m), False) for m in response.messages]))
    return found


def _spans(tokenizer: Tokenizer, prefix: IntArray, ids: IntArray, trained: BoolArray) -> Iterator[tuple[str, bool]]:
    """The tokens after the prefix as text, by whether they are trained. Decoding starts in the prefix: a space may
    depend on it."""
    cuts = [0, *(np.nonzero(np.diff(trained))[0] + 1).tolist(), len(ids)]
    before = prefix[-1:]
    for start, end in pairwise(cuts):
        if start == end:
            continue
        whole, known = (_decode(tokenizer, np.concatenate([before, ids[start:stop]])) for stop in (end, start))
        text = whole[len(known) :] if whole.startswith(known) else _decode(tokenizer, ids[start:end])
        yield text, bool(trained[start])
        before = ids[end - 1 : end]


def _decode(tokenizer: Tokenizer, ids: IntArray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
