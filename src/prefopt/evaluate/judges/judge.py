"""What a judge is asked and what it answers: a vote, the same that a person gives.

>>> from prefopt.records import Comparison
>>> from prefopt.rewards import load_reward
>>> judge = ScoreJudge(load_reward("length"))
>>> asked = Question(Comparison.pair("Say hello.", chosen="Hello there", rejected="Hi", row=1))
>>> [outcome(vote) for vote in judge([asked])]
[1.0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefopt.evaluate.score import prompt_text
from prefopt.records import Comparison
from prefopt.rewards import Reward
from prefopt.studies.votes import Vote

FIRST, SECOND, TIE = Vote(((0,), (1,))), Vote(((1,), (0,))), Vote(((0, 1),))


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

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """A vote on each question, skipped with a reason where the judge cannot tell. Raises ``UserError``."""


class ScoreJudge:
    """The higher score wins; equal ones are a tie."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`Judge`."""
        prompts = [q.prompt for q in questions for _ in (0, 1)]
        scores = self.reward(prompts, [text for q in questions for text in q.responses])
        return [by_score(*pair) for pair in zip(scores[::2], scores[1::2], strict=True)]


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
