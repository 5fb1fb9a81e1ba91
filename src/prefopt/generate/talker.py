"""Who answers in a chat: one protocol for a model on this machine and for one behind a URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prefopt.data.problem import Problem
from prefopt.data.render import Renderer
from prefopt.errors import RunError
from prefopt.generate.loaded import SampledModel
from prefopt.generate.sample import Ids, Settings
from prefopt.generate.text import TextStream
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.records import Comparison, Message

Turns = tuple[Message, ...]
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""What a model without a chat template writes when it goes on for the other side."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a talker will answer: the turns that it takes in, and how many of the oldest were left out for them."""

    turns: Turns
    left_out: int = 0


class TooLong(RunError):
    """Whoever answers has no room for the conversation; without its oldest turns there may be."""


class Talker(Protocol):
    """Answers conversations, piece by piece, and continues text."""

    name: str

    def fit(self, turns: Turns) -> Asked:
        """The turns, less the oldest where all are too long. Raises :class:`prefopt.errors.RunError` where one is."""

    def answer(self, asked: Asked, attempt: int) -> Iterator[str]:
        """The answer as it comes; another ``attempt`` is another answer.

        Raises :class:`prefopt.errors.UserError`, before the first piece :class:`TooLong`.
        """

    def continued(self, text: str, attempt: int) -> Iterator[str]:
        """How a text goes on, as it comes."""


def without_oldest(asked: Asked) -> Asked | None:
    """Without the oldest question and what answers it; the system turn stays. Nothing where one question is left."""
    turns = asked.turns
    head, rest = (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)
    later = next((i for i, m in enumerate(rest) if i and m.role == "user"), 0)
    return Asked(head + rest[later:], asked.left_out + later) if later else None


class LocalTalker:
    """A model on this machine."""

    def __init__(self, model: SampledModel, renderer: Renderer, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.name = model.label
        self._renderer, self._sampler = renderer, TransformersSampler(model.scorer, rows=1)
        plain = renderer.rendering.chat_template is None and model.tokenizer.chat_template is None
        self._stops = PLAIN_STOPS if plain else ()

    @property
    def note(self) -> str | None:
        """What is slow, in one line."""
        return self._sampler.note

    def fit(self, turns: Turns) -> Asked:
        """Room is left for an answer: as many tokens as it may have, or a quarter of the context."""
        asked: Asked | None = Asked(turns)
        while asked is not None:
            ids = self._ids(Comparison(asked.turns, (), (), 0))
            if self.model.context is None or len(ids) <= self._room(self.model.context):
                return asked
            asked = without_oldest(asked)
        raise RunError(
            f"this message alone has {len(ids)} tokens, and the model's context is {self.model.context}: shorten it"
        )

    def answer(self, asked: Asked, attempt: int) -> Iterator[str]:
        """Without the white space that the template puts before it."""
        started = False
        for piece in self._pieces(self._ids(Comparison(asked.turns, (), (), 0)), attempt, self._stops):
            piece = piece if started else piece.lstrip()
            started = started or bool(piece)
            if piece:
                yield piece

    def continued(self, text: str, attempt: int) -> Iterator[str]:
        """The end of a text that is too long for the context is continued."""
        ids = self._ids(Comparison((Message("user", text),), (), (), 0, text=True))
        if self.model.context is not None:
            ids = ids[-self._room(self.model.context) :]
        yield from self._pieces(ids, attempt, ())

    def _room(self, context: int) -> int:
        return context - min(self.settings.max_new_tokens, max(1, context // 4))

    def _ids(self, prompt: Comparison) -> Ids:
        found = next(iter(self._renderer.prompts([prompt])))
        if isinstance(found, Problem):
            raise RunError(f"the model cannot be asked this: {found.what}")
        return found

    def _pieces(self, ids: Ids, attempt: int, stops: Sequence[str]) -> Iterator[str]:
        text = TextStream(self.model.tokenizer, ids, stops=stops)
        tokens = self._sampler.stream(ids, self.settings, sample=attempt)
        try:
            for token in tokens:
                if token in self.settings.stop:
                    break
                if piece := text.add(token):
                    yield piece
                if text.ended:
                    break
        finally:
            tokens.close()
        if piece := text.finish():
            yield piece


def system_and(system: str | None, turns: Sequence[Message]) -> Turns:
    """A conversation with its system turn, where there is one."""
    head = (Message("system", system),) if system else ()
    return (*head, *turns)
