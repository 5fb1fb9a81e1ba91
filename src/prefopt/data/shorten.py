"""Conversations that are too long: whole turns go first, the oldest first, then words of the turns that are left.

A conversation that is cut by tokens begins in the middle of a turn, or of the marker that opens one, which no model has
ever seen. So what is left of it is a conversation again: system turns stay, the rest begins with a turn of the user,
and a turn that is too long by itself keeps its role and its last words.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from prefopt.data.encoding import Encoded
from prefopt.data.group import BoolArray, IntArray
from prefopt.data.truncate import prompt_excess
from prefopt.records import Comparison

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
