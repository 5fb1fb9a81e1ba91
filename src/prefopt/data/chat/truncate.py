"""Truncation to --max-length: of turns and words of a conversation, then of the end of each response.

:class:`Shortener` leaves a conversation, as models know them: system turns stay, the rest begins with a user turn, and
a turn that is too long by itself keeps its role and its last words. :func:`truncate` cuts tokens: the start of a
plain-text prompt, then the end of each response with its EOS, so that it is never trained as a finished one.

>>> ids = [1, 2, 3, 4, 5, 6, 7, 8]
>>> cut = truncate([(ids, [0, 0, 0, 0, 1, 1, 1, 1])], max_length=4)
>>> cut.sequences[0][0].tolist(), cut.prompt, cut.responses
([3, 4, 5, 6], 2, (2,))
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.data.chat.encoding import Encoded
from prefopt.data.group import BoolArray, IntArray, Pictures, common_length
from prefopt.errors import ConfigError
from prefopt.records import Comparison, Message


class Tokens(NamedTuple):
    """One sequence: ids [L], trained [L], and its pictures; ``further``: a later step of the response that the one
    before it begins."""

    ids: IntArray
    trained: BoolArray
    further: bool = False
    pictures: Pictures = ()


Sequences = Sequence[Tokens]  # of one prompt, response after response

KEEP_PROMPT = 128
DEFAULT_LENGTH = 1024
TRIES = 4  # cuts of one turn, whose shortened words may be tokenized into more tokens than before
STEPS = 64  # halvings of the turns to cut; 2 log2(turns) are needed where the template refuses none


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """K sequences, the number of tokens cut from the prompt they share, and from the end of each response."""

    sequences: tuple[tuple[IntArray, BoolArray], ...]
    prompt: int
    responses: tuple[int, ...]


def by_response(sequences: Sequences) -> list[list[Tokens]]:
    """The steps of each response."""
    found: list[list[Tokens]] = []
    for s in sequences:
        found = [*found[:-1], [*found[-1], s]] if s.further else [*found, [s]]
    return found


def identical(c: Comparison, sequences: Sequences) -> bool:
    """Whether some pair of responses is the same, token for token, step for step and picture for picture."""
    steps = by_response(sequences)

    def same(one: int, other: int) -> bool:
        return len(steps[one]) == len(steps[other]) and all(
            np.array_equal(a.ids, b.ids) and np.array_equal(a.trained, b.trained) and a.pictures == b.pictures
            for a, b in zip(steps[one], steps[other], strict=True)
        )

    return any(same(*pair) for pair in c.pairs)


def sequence_limit(max_length: int | None, context: int | None) -> int:
    """The maximum number of tokens of prompt and response in training: ``max_length``, or 1024.

    ``context`` is the number of positions of the model, if known. Raises :class:`ConfigError` for a ``max_length``
    beyond it.
    """
    if max_length is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and max_length > context:
        raise ConfigError(f"--max-length {max_length} is over the model's context of {context} tokens; give no more")
    return max_length


def prompt_excess(sequences: Sequence[tuple[IntArray, BoolArray] | Tokens], limit: int) -> int:
    """Tokens that the prompt must lose until the longest sequence fits or min(128, limit // 2) of them are left.

    >>> prompt_excess([(np.arange(9), np.arange(9) > 6)], 6), prompt_excess([(np.arange(9), np.arange(9) > 6)], 2)
    (3, 6)
    """
    need = max(len(s[0]) for s in sequences) - limit
    prompt = min(int(np.argmax(s[1])) for s in sequences)
    return max(0, min(need, prompt - min(KEEP_PROMPT, limit // 2)))


def truncate(
    sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    max_length: int,
    *,
    bos: int | None = None,
    ends: Collection[int] = (),
    whole_prompt: bool = False,
) -> Truncated:
    """Cut K sequences of one prompt to ``max_length`` tokens each.

    The prompt loses tokens at its start, the same ones for all K, until the longest sequence fits or
    min(128, max_length // 2) of its tokens are left; a BOS at its start stays. A ``whole_prompt``, that of a
    conversation, loses none. Then each response loses its end, and with it any ``ends`` (ids that may end a turn) right
    before the cut, as they would mark it as finished. Raises ``ValueError`` where no token of a response fits.
    """
    whole = [(np.asarray(i, np.int32), np.asarray(t, np.bool_)) for i, t in sequences]
    prompts = [int(np.argmax(trained)) for _, trained in whole]
    need = max(len(ids) for ids, _ in whole) - max_length
    shared = common_length([ids for ids, _ in whole], min(prompts))
    start = 1 if shared and bos is not None and whole[0][0][0] == bos else 0
    cut = max(0, min(need, min(prompts) - min(KEEP_PROMPT, max_length // 2), shared - start))
    cut = 0 if whole_prompt else cut
    kept, lost = [], []
    for ids, trained in whole:
        left = np.concatenate([ids[:start], ids[start + cut :]])
        mask = np.concatenate([trained[:start], trained[start + cut :]])
        end = min(len(left), max_length)
        # A cut response ends with a trained token that ends no cut turn.
        while 0 < end < len(left) and (not mask[end - 1] or (mask[end] and int(left[end - 1]) in ends)):
            end -= 1
        if not mask[:end].any():
            raise ValueError("the prompt leaves no room for the response")
        kept.append((left[:end], mask[:end]))
        lost.append(len(left) - end)
    return Truncated(tuple(kept), cut, tuple(lost))


def with_room(sequences: Sequences, max_length: int) -> tuple[Sequences, tuple[int, ...]]:
    """The sequences without the later steps of a response whose answers begin at or beyond ``max_length``, and the
    tokens that each response loses with them. The first step of a response always stays.

    >>> ids, trained = np.arange(6), np.arange(6) > 3
    >>> kept, lost = with_room([Tokens(ids[:3], trained[1:4]), Tokens(ids, trained, further=True)], 4)
    >>> len(kept), lost
    (1, (6,))
    """
    kept: list[Tokens] = []
    lost: list[int] = []
    for s in sequences:
        if not s.further:
            lost.append(0)
        if s.further and int(np.argmax(s.trained)) >= max_length:
            lost[-1] += len(s.ids)
        else:
            kept.append(s)
    return kept, tuple(lost)


def windows(ids: IntArray, trained: BoolArray, max_length: int) -> list[tuple[IntArray, BoolArray]]:
    """A text (ids [L], trained [L]) as windows of at most ``max_length`` tokens, as equal in length as possible.

    The first token of a window has no context and is not trained.

    >>> [w.tolist() for w, _ in windows(np.arange(7), np.ones(7, bool), 3)]
    [[0, 1], [2, 3], [4, 5, 6]]
    """
    count = -(-len(ids) // max_length)
    cuts = [len(ids) * i // count for i in range(count + 1)]
    return [(ids[a:b], trained[a:b]) for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class Shortener:
    """Shortens the prompt of a conversation to ``limit`` tokens with its responses.

    ``tokenize`` gives the K sequences of a row (None where the template refuses it), ``encode`` the tokens of a text
    with their characters. ``special`` matches special tokens that are written out, which no cut splits.
    """

    limit: int
    tokenize: Callable[[Comparison], Sequences | None]
    encode: Callable[[str], Encoded]
    special: re.Pattern[str]

    def drop_turns(self, c: Comparison, sequences: Sequences) -> tuple[Comparison, Sequences]:
        """The row without the oldest turns of its prompt: as few as needed, at most all before the last user turn."""
        system = tuple(itertools.takewhile(lambda m: m.role == "system", c.prompt))
        begins = [i for i, m in enumerate(c.prompt) if i > len(system) and m.role == "user"]
        tried: dict[int, tuple[Comparison, Sequences | None]] = {}

        def fits(k: int) -> bool:
            fewer = replace(c, prompt=(*system, *c.prompt[begins[k] :]))
            found = self.tokenize(fewer)
            tried[k] = fewer, found
            return found is None or not prompt_excess(found, self.limit)

        # Bisection, for a conversation may have thousands of turns, and each try renders the whole of it.
        first = bisect_left(range(len(begins)), True, key=fits) if prompt_excess(sequences, self.limit) else -1
        for k in (first, first - 1):  # the one before where the template refuses this one, or none fits
            fewer, found = tried.get(k, (c, None))
            if found is not None:
                return fewer, found
        return c, sequences

    def cut_words(self, c: Comparison, sequences: Sequences) -> Sequences:
        """The row with its longest turns cut, one after another: a system turn last, and at its end."""
        order = sorted(range(len(c.prompt)), key=lambda i: (c.prompt[i].role == "system", -len(c.prompt[i].content)))
        waiting = [part for part in (order[1:], order[:1]) if part]
        # Halving, as for whole turns: where a token each of several turns is still too much, none is rendered alone.
        for _ in range(STEPS):
            if not waiting or not prompt_excess(sequences, self.limit):
                break
            turns = waiting.pop()
            if len(turns) == 1:
                c, sequences = self._cut_turn(c, turns[0], sequences)
                continue
            chosen = set(turns)
            fewer = replace(c, prompt=tuple(self._cut(m, 1) if i in chosen else m for i, m in enumerate(c.prompt)))
            found = self.tokenize(fewer)
            if found is not None and prompt_excess(found, self.limit):
                c, sequences = fewer, found
            else:
                waiting += [turns[len(turns) // 2 :], turns[: len(turns) // 2]]
        return sequences

    def _cut_turn(self, c: Comparison, at: int, sequences: Sequences) -> tuple[Comparison, Sequences]:
        turn = c.prompt[at]
        keep = len(self.encode(turn.content).ids)
        for _ in range(TRIES):
            excess = prompt_excess(sequences, self.limit)
            if not excess or keep <= 1:
                break
            keep = max(1, keep - excess)
            fewer = replace(c, prompt=(*c.prompt[:at], self._cut(turn, keep), *c.prompt[at + 1 :]))
            found = self.tokenize(fewer)
            if found is None:
                break
            c, sequences = fewer, found
        return c, sequences

    def _cut(self, turn: Message, keep: int) -> Message:
        """The turn with its last ``keep`` tokens, a system turn with its first: whole characters and special tokens."""
        content, tokens = turn.content, self.encode(turn.content)
        if len(tokens.ids) <= keep:
            return turn
        at_end = turn.role == "system"
        place = int(tokens.ends[keep - 1]) if at_end else int(tokens.starts[len(tokens.ids) - keep])
        for found in self.special.finditer(content):
            if found.start() < place < found.end():
                place = found.start() if at_end else found.end()
        return replace(turn, content=content[:place].rstrip() if at_end else content[place:].lstrip())
