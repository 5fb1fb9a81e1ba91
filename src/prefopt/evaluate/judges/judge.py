"""What a judge is asked and what it answers: a vote, the same that a person gives.

>>> from prefopt.records import Comparison
>>> from prefopt.evaluate.score import by_text
>>> from prefopt.rewards import load_reward
>>> judge = ScoreJudge("length", by_text(load_reward("length")))
>>> asked = Question(Comparison.pair("Say hello.", chosen="Hello there", rejected="Hi", row=1))
>>> [outcome(vote) for vote in judge([asked])]
[1.0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefopt.evaluate.score import Scores
from prefopt.records import Comparison
from prefopt.rewards import prompt_text
from prefopt.studies.votes import Vote

FIRST, SECOND, TIE = Vote(((0,), (1,))), Vote(((1,), (0,))), Vote(((0, 1),))


@dataclass(frozen=True, slots=True)
class ScoredVote(Vote):
    """A vote by two ``scores``, the first response's and the second's."""

    scores: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the two responses that are compared; ``row`` is as the prompt's file has it, where it has more."""

    pair: Comparison
    row: Comparison | None = None

    @property
    def prompt(self) -> str:
        """The prompt in words."""
        return prompt_text(self.pair)

    @property
    def responses(self) -> tuple[str, str]:
        """The two responses in words."""
        first, second = self.pair.responses
        return first.text, second.text


class Judge(Protocol):
    """Says which of two responses is better. ``name`` is what a person reads."""

    name: str

    def notes(self) -> list[str]:
        """What a person should know of how it came to its votes."""

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """A vote on each question, skipped with a reason where the judge cannot tell. Raises ``UserError``."""


class ScoreJudge:
    """The higher score wins; equal ones are a tie. ``scores`` gives a number for each response of some rows."""

    def __init__(self, name: str, scores: Scores) -> None:
        self.name, self._scores = name, scores

    def notes(self) -> list[str]:
        """How many comparisons a model saw cut short."""
        cut = getattr(self._scores, "truncated", 0)
        return [f"{cut} comparisons were truncated for the judge"] if cut else []

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`Judge`."""
        found = self._scores([q.pair for q in questions]) if questions else []
        return [ScoredVote(by_score(*pair).tiers, scores=(pair[0], pair[1])) for pair in found]


def by_score(first: float, second: float) -> Vote:
    """The vote of two scores."""
    return TIE if first == second else FIRST if first > second else SECOND


def outcome(vote: Vote) -> float:
    """1 where the first of two responses is preferred, 1/2 at a tie, 0 where the second is; NaN for no vote."""
    place = {k: t for t, tier in enumerate(vote.tiers) for k in tier}
    if 0 not in place or 1 not in place:
        return math.nan
    return 0.5 if place[0] == place[1] else float(place[0] < place[1])


def with_empty(judge: Judge, questions: Sequence[Question]) -> tuple[list[Vote], int]:
    """The judge's votes, and how many were not its own: a response without words loses against one with some."""
    votes: list[Vote | None] = []
    for q in questions:
        first, second = (bool(text.strip()) for text in q.responses)
        votes.append(None if first and second else by_score(first, second))
    own = iter(judge([q for q, vote in zip(questions, votes, strict=True) if vote is None]))
    return [next(own) if vote is None else vote for vote in votes], sum(vote is not None for vote in votes)
