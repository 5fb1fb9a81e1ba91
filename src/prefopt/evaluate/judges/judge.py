"""What a judge is asked and what it answers: a vote, the same that a person gives.

>>> from prefopt.records import Comparison
>>> from prefopt.evaluate.score import by_text
>>> from prefopt.rewards import load_reward
>>> judge = ScoreJudge("length", by_text(load_reward("length")))
>>> asked = Question(Comparison.pair("Say hello.", chosen="Hello there", rejected="Hi", row=1))
>>> [outcome(vote) for vote in judge([asked])]
[1.0]

>>> last_number("3 + 4 = 7, so she has $1,250.00 left.")
'1250'
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefopt.errors import ConfigError, DataError
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


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class PatternJudge:
    """The response that a regular expression is found in wins; in both or in neither, it is a tie."""

    def __init__(self, pattern: str) -> None:
        """Raises :class:`ConfigError` where it is no regular expression."""
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--judge regex:{pattern}: no regular expression ({error})") from None
        self.name = f"regex:{pattern}"

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.judge.Judge`."""
        return [by_score(*(bool(self._pattern.search(text)) for text in q.responses)) for q in questions]


class AnswerJudge:
    """The response whose last number is the right one wins; that stands behind #### in the file of prompts (GSM8K)."""

    name = "gsm8k"

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.judge.Judge`. Raises :class:`DataError` for a row without an answer."""
        votes = []
        for q in questions:
            right = _right(q)
            votes.append(by_score(*(last_number(text) == right for text in q.responses)))
        return votes


def last_number(text: str) -> str | None:
    """The last number of a text, without commas and trailing zeros; none where there is no number."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number = str(found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _right(q: Question) -> str:
    file, row = q.pair.file or None, q.pair.row
    if q.row is None:
        raise DataError("its prompt is not in --prompts, where --judge gsm8k looks for the answer", file=file, row=row)
    for response in q.row.responses:
        _, mark, answer = response.text.rpartition("####")
        if mark and (number := last_number(answer)) is not None:
            return number
    raise DataError("has no answer behind ####, which --judge gsm8k compares with", file=file, row=row)
