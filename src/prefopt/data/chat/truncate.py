"""Over-long rows: the prompt is cut from the left, then the end of each response.

Of the prompt of a conversation whole turns go first, the oldest first, then words of the system message.

>>> ids = [1, 2, 3, 4, 5, 6, 7, 8]
>>> cut = truncate([(ids, [0, 0, 0, 0, 1, 1, 1, 1])], max_length=4)
>>> cut.sequences[0][0].tolist(), cut.prompt, cut.responses
([3, 4, 5, 6], 2, (2,))

A response that lost its end lost its EOS with it: it is never trained as if it were finished.

A conversation that is cut by tokens begins in the middle of a turn, or of the marker that opens one, which no model has
ever seen. So what is left of it is a conversation again: system turns stay, the rest begins with a turn of the user,
and a turn that is too long by itself keeps its role and its last words.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prefopt.data.chat.encoding import Encoded
from prefopt.data.group import BoolArray, IntArray
from prefopt.errors import ConfigError
from prefopt.records import Comparison

KEEP_PROMPT = 128
DEFAULT_LENGTH = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """K sequences (ids [L], trained [L]), tokens cut from the prompt they share, and from each response's end."""

    sequences: tuple[tuple[IntArray, BoolArray], ...]
    prompt: int
    responses: tuple[int, ...]


def check_max_length(max_length: int | None) -> None:
    """Raise :class:`ConfigError` for a length that cannot hold a token of prompt and one of response."""
    if max_length is not None and max_length < 2:
        raise ConfigError(f"--max-length {max_length} is too small; it should be at least 2 tokens")


def sequence_limit(max_length: int | None, context: int | None) -> int:
    """Tokens of prompt and response that a run trains on at most.

    ``max_length`` is what was asked for, ``context`` the positions that the model has, where it says so. Raises
    :class:`ConfigError` where more is asked for than it has.
    """
    if max_length is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and max_length > context:
        raise ConfigError(f"--max-length {max_length} is over the model's context of {context} tokens; give no more")
    return max_length


def longer_limit(rows: int, kept: int, limit: int, context: int | None) -> str | None:
    """What to say where rows were cut to ``limit`` tokens and the model has positions for more; None elsewhere.

    >>> longer_limit(137, 300, 1024, 2048)
    '137 of 300 rows are longer than --max-length 1024 and were cut; the model has 2048 positions'
    """
    if not rows or context is None or context <= limit:
        return None
    some = f"{rows} of {kept} rows are longer than --max-length {limit} and were cut"
    return f"{some}; the model has {context} positions"


def prompt_excess(sequences: Sequence[tuple[IntArray, BoolArray]], limit: int) -> int:
    """Tokens that the prompt of K sequences (ids [L], trained [L]) has to lose: until the longest of them fits, or
    min(128, limit // 2) tokens of it are left, as :func:`truncate` keeps them.

    >>> prompt_excess([(np.arange(9), np.arange(9) > 6)], 6), prompt_excess([(np.arange(9), np.arange(9) > 6)], 2)
    (3, 6)
    """
    need = max(len(ids) for ids, _ in sequences) - limit
    prompt = min(int(np.argmax(trained)) for _, trained in sequences)
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

    The prompt loses tokens on its left, the same ones for all K, until the longest sequence fits or
    min(128, max_length // 2) tokens of it are left; a BOS at its start stays. A ``whole_prompt``, that of a
    conversation, loses none. Then each response loses its end, and with it the ``ends`` (ids that may end a turn) that
    its own words spell out just there: they would say that it is finished. Raises ``ValueError`` where no token of a
    response fits: its own part of the prompt is too long.
    """
    check_max_length(max_length)
    whole = [(np.asarray(i, np.int32), np.asarray(t, np.bool_)) for i, t in sequences]
    prompts = [int(np.argmax(trained)) for _, trained in whole]
    need = max(len(ids) for ids, _ in whole) - max_length
    first = whole[0][0]
    shared = min(prompts)
    for ids, _ in whole[1:]:
        differs = np.nonzero(ids[:shared] != first[:shared])[0]
        shared = int(differs[0]) if len(differs) else shared
    start = 1 if shared and bos is not None and first[0] == bos else 0
    cut = max(0, min(need, min(prompts) - min(KEEP_PROMPT, max_length // 2), shared - start))
    cut = 0 if whole_prompt else cut
    kept, lost = [], []
    for ids, trained in whole:
        left = np.concatenate([ids[:start], ids[start + cut :]])
        mask = np.concatenate([trained[:start], trained[start + cut :]])
        end = _end(left, mask, max_length, ends) if len(left) > max_length else len(left)
        if not mask[:end].any():
            raise ValueError("the prompt leaves no room for the response")
        kept.append((left[:end], mask[:end]))
        lost.append(len(left) - end)
    return Truncated(tuple(kept), cut, tuple(lost))


def windows(ids: IntArray, trained: BoolArray, max_length: int) -> list[tuple[IntArray, BoolArray]]:
    """A text (ids [L], trained [L]) as runs of at most ``max_length`` tokens, as equal in length as can be.

    The first token of a run has nothing before it there, and is not trained.

    >>> [w.tolist() for w, _ in windows(np.arange(7), np.ones(7, bool), 3)]
    [[0, 1], [2, 3], [4, 5, 6]]
    """
    count = -(-len(ids) // max_length)
    cuts = [len(ids) * i // count for i in range(count + 1)]
    return [(ids[a:b], trained[a:b]) for a, b in itertools.pairwise(cuts)]


def _end(ids: IntArray, trained: BoolArray, max_length: int, ends: Collection[int]) -> int:
    """How many of the first ``max_length`` tokens to keep: up to the last trained one that ends no unfinished turn."""
    end = max_length
    while end and (not trained[end - 1] or (trained[end] and int(ids[end - 1]) in ends)):
        end -= 1
    return end


Sequences = Sequence[tuple[IntArray, BoolArray]]

TRIES = 4
"""How often a turn is cut again where its words, tokenized anew, have come to more tokens than before."""


@dataclass(frozen=True, slots=True)
class Shortener:
    """``lay`` gives the K sequences of a row (None where the template refuses it), ``encode`` the tokens of a text with
    their characters, and ``special`` finds special tokens that are written out, which no cut goes through."""

    limit: int
    lay: Callable[[Comparison], Sequences | None]
    encode: Callable[[str], Encoded]
    special: re.Pattern[str]

    def drop_turns(self, c: Comparison, sequences: Sequences) -> tuple[Comparison, Sequences]:
        """The row without the oldest turns of its prompt: as few as will do, at most all but the last of the user."""
        system = tuple(itertools.takewhile(lambda m: m.role == "system", c.prompt))
        begins = [i for i, m in enumerate(c.prompt) if i > len(system) and m.role == "user"]
        tried: dict[int, tuple[Comparison, Sequences | None]] = {}

        def will_do(k: int) -> bool:
            fewer = replace(c, prompt=(*system, *c.prompt[begins[k] :]))
            laid = self.lay(fewer)
            tried[k] = fewer, laid
            return laid is None or not prompt_excess(laid, self.limit)

        # Halving, for a conversation may have thousands of turns, and each try shows the whole of it.
        first = bisect_left(range(len(begins)), True, key=will_do) if prompt_excess(sequences, self.limit) else -1
        for k in (first, first - 1):  # the one before where the template refuses this one, or none will do
            fewer, laid = tried.get(k, (c, None))
            if laid is not None:
                return fewer, laid
        return c, sequences

    def cut_words(self, c: Comparison, sequences: Sequences) -> Sequences:
        """The row with its longest turns cut, one after another: a system turn last, and at its end."""
        order = sorted(range(len(c.prompt)), key=lambda i: (c.prompt[i].role == "system", -len(c.prompt[i].content)))
        for at in order:
            if not prompt_excess(sequences, self.limit):
                break
            content = c.prompt[at].content
            tokens = self.encode(content)
            keep = len(tokens.ids)
            for _ in range(TRIES):
                excess = prompt_excess(sequences, self.limit)
                if not excess or keep <= 1:
                    break
                keep = max(1, keep - excess)
                shorter = self._cut(content, tokens, keep, at_end=c.prompt[at].role == "system")
                turns = (*c.prompt[:at], replace(c.prompt[at], content=shorter), *c.prompt[at + 1 :])
                fewer = replace(c, prompt=turns)
                laid = self.lay(fewer)
                if laid is None:
                    break
                c, sequences = fewer, laid
        return sequences

    def _cut(self, content: str, tokens: Encoded, keep: int, *, at_end: bool) -> str:
        """The last ``keep`` tokens of a text, or the first: whole characters, and no part of a token written out."""
        place = int(tokens.ends[keep - 1]) if at_end else int(tokens.starts[len(tokens.ids) - keep])
        for found in self.special.finditer(content):
            if found.start() < place < found.end():
                place = found.start() if at_end else found.end()
        return content[:place].rstrip() if at_end else content[place:].lstrip()
