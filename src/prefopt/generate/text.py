"""From sampled tokens to text: whole, and piece by piece as they come.

>>> pieces = TextStream(tokenizer, prompt_ids, stops=("User:",))                      # doctest: +SKIP
>>> for token in sampler.stream(prompt_ids, settings):                                # doctest: +SKIP
...     print(pieces.add(token), end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Sequence

from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.sampler import Ids

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Tokens of the prompt that are decoded along: some tokenizers write a token otherwise at the start of a text."""
LONGEST = 8
"""Tokens of a character at most; beyond that, what cannot be decoded is shown as it is."""


def decode(tokenizer: Tokenizer, ids: Ids) -> str:
    """The text of tokens, special ones and all."""
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def continuation(tokenizer: Tokenizer, prompt: Ids, ids: Ids) -> str:
    """What sampled tokens add to the text of their prompt."""
    before = list(prompt[-CONTEXT:])
    start, whole = decode(tokenizer, before), decode(tokenizer, [*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else decode(tokenizer, ids)


def without_stop(ids: Ids, stop: Sequence[int]) -> list[int]:
    """The tokens without the stop token at their end."""
    kept = [int(i) for i in ids]
    return kept[:-1] if kept and kept[-1] in stop else kept


class TextStream:
    """Text as its tokens come. A character is given out when it is whole, a text that may be a stop when it is not.

    ``stops`` are texts that end it, themselves left out; ``ended`` says that one has come. ``text`` is what was given
    out so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Ids, *, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._kept = [int(i) for i in prompt[-CONTEXT:]]  # tokens whose text has been given out
        self._fresh: list[int] = []
        self._held = ""
        self.text = ""
        self.ended = False

    def add(self, token: int) -> str:
        """What can be shown now."""
        if self.ended:
            return ""
        self._fresh.append(token)
        new = self._decoded(final=False)
        return "" if new is None else self._give(new, final=False)

    def finish(self) -> str:
        """What was held back, where no more tokens come."""
        if self.ended:
            return ""
        return self._give(self._decoded(final=True) or "", final=True)

    def _decoded(self, final: bool) -> str | None:
        """The text of the fresh tokens, or nothing while their last character is not whole."""
        if not self._fresh:
            return None
        start, whole = decode(self._tokenizer, self._kept), decode(self._tokenizer, self._kept + self._fresh)
        new = whole[len(start) :] if whole.startswith(start) else decode(self._tokenizer, self._fresh)
        if new.endswith(BROKEN) and not final and len(self._fresh) < LONGEST:
            return None
        self._kept = (self._kept + self._fresh)[-CONTEXT:]
        self._fresh = []
        return new

    def _give(self, new: str, final: bool) -> str:
        self._held += new
        found = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            self.ended = True
            out, self._held = self._held[: min(found)], ""
        else:
            hold = 0 if final else max((_overlap(self._held, s) for s in self._stops), default=0)
            cut = len(self._held) - hold
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the start of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
