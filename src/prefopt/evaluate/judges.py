"""Judges: which of two responses is better, by rules, reward models, implicit rewards or a language model.

A judge answers with votes, the same that a person gives.

>>> judge = ScoreJudge("length", TextScorer(load_reward("length")))
>>> question = Question(Comparison.pair("Say hello.", chosen="Hello there", rejected="Hi", row=1))
>>> [vote.tiers for vote in judge([question])]
[((0,), (1,))]
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.config.compare import CompareConfig
from prefopt.config.scoring import IMPLICIT, is_model_reward
from prefopt.config.tools import ScoreConfig
from prefopt.core.options import nearest
from prefopt.errors import ConfigError, DataError
from prefopt.evaluate.score import RowScorer, TextScorer, load_row_scorer
from prefopt.generate.language_judge import LanguageJudge
from prefopt.records import Comparison
from prefopt.rewards import RULES, Reward, load_reward, prompt_text
from prefopt.studies.votes import Vote

FIRST, SECOND, TIE = Vote(((0,), (1,))), Vote(((1,), (0,))), Vote(((0, 1),))
REPEAT = "start it again and repeat the command; answers so far are kept"
NAMED = ("regex:PATTERN", "gsm8k", "implicit:MODEL,REFERENCE", "llm")


@dataclass(frozen=True, slots=True)
class ScoredVote(Vote):
    """A vote by two ``scores``, the first response's and the second's."""

    scores: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the two responses to compare; ``row`` is the row of ``--prompts`` with this prompt, if any."""

    pair: Comparison
    row: Comparison | None = None

    @property
    def responses(self) -> tuple[str, str]:
        """The text of both responses."""
        first, second = self.pair.responses
        return first.text, second.text


class Judge(ABC):
    """Decides which of two responses is better."""

    name: str

    def notes(self) -> list[str]:
        """Lines for the report on how the votes came about."""
        return []

    @abstractmethod
    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """A vote on each question, skipped with a reason where the judge cannot decide. Raises ``UserError``."""


def load_judge(config: CompareConfig, reward: Reward | None = None) -> Judge:
    """The judge that ``config`` names, or a ``reward`` given in Python. Raises :class:`prefopt.errors.UserError`."""
    if reward is not None:
        return ScoreJudge(reward.name, TextScorer(reward))
    name = config.judge
    assert name is not None
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon:
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise ConfigError(f"--judge {name}: no regular expression ({error})") from None
        return TextJudge(name, lambda q, text: bool(pattern.search(text)))
    if name == "gsm8k":
        return TextJudge(name, lambda q, text: last_number(text) == _final_answer(q))
    if kind == "implicit" and colon:
        policy, comma, reference = rest.partition(",")
        if not (policy and comma and reference):
            raise ConfigError(f"--judge {name}: write implicit:MODEL,REFERENCE")
        return _model_judge(name, config, reward=IMPLICIT, model=policy, reference=reference)
    if name == "llm":
        assert config.judge_url is not None
        return LlmJudge(config.judge_url, config.judge_model, key_variable=config.judge_key)
    if is_model_reward(name):
        return _model_judge(name, config, reward=name)
    if not colon and name not in RULES:
        known = [*RULES, *NAMED]
        raise ConfigError(
            f"--judge {name}: there is no such judge{nearest(name, known)}; there are {', '.join(known)}, the folder of"
            " a reward model, and MODULE:FUNCTION for one of your own"
        )
    return ScoreJudge(name, TextScorer(load_reward(name)))


def _model_judge(name: str, config: CompareConfig, **options: Any) -> ScoreJudge:
    options |= {"device": config.device, "dtype": config.dtype, "threads": config.threads}
    # The config of `prefopt score` requires files, which a judge does not read.
    return ScoreJudge(name, load_row_scorer(ScoreConfig(files=["samples"], output="none", **options)))


def vote_by_score(first: float, second: float) -> Vote:
    """The higher score wins; equal scores tie."""
    return TIE if first == second else FIRST if first > second else SECOND


def vote_with_empty(judge: Judge, questions: Sequence[Question]) -> tuple[list[Vote], int]:
    """The judge's votes, and how many were decided without it: an empty response loses against one with text."""
    votes: list[Vote | None] = []
    for q in questions:
        first, second = (bool(text.strip()) for text in q.responses)
        votes.append(None if first and second else vote_by_score(first, second))
    judged = iter(judge([q for q, vote in zip(questions, votes, strict=True) if vote is None]))
    return [next(judged) if vote is None else vote for vote in votes], sum(vote is not None for vote in votes)


class ScoreJudge(Judge):
    """The response with the higher score wins; equal scores tie."""

    def __init__(self, name: str, scorer: RowScorer) -> None:
        self.name, self._scorer = name, scorer

    def notes(self) -> list[str]:
        cut = self._scorer.truncated
        return [f"{cut} comparisons were truncated for the judge"] if cut else []

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        scores = self._scorer([q.pair for q in questions]) if questions else []
        return [ScoredVote(vote_by_score(*pair).tiers, scores=(pair[0], pair[1])) for pair in scores]


class TextJudge(Judge):
    """The response for which ``good`` holds wins; both or neither tie."""

    def __init__(self, name: str, good: Callable[[Question, str], bool]) -> None:
        self.name, self._good = name, good

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        return [vote_by_score(*(self._good(q, text) for text in q.responses)) for q in questions]


# -- final answers (GSM8K): the last number of a response is right, where it follows #### in the row of --prompts ---

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str | None:
    """The last number of a text, without commas and trailing zeros.

    >>> last_number("3 + 4 = 7, so she has $1,250.00 left.")
    '1250'
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    number = str(found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def _final_answer(q: Question) -> str:
    """Raises :class:`DataError` for a row without an answer."""
    file, row = q.pair.file or None, q.pair.row
    if q.row is None:
        raise DataError("its prompt is not in --prompts, where --judge gsm8k looks for the answer", file=file, row=row)
    for response in q.row.responses:
        _, mark, answer = response.text.rpartition("####")
        if mark and (number := last_number(answer)) is not None:
            return number
    raise DataError("has no answer after ####, which --judge gsm8k compares with", file=file, row=row)


class LlmJudge(Judge):
    """A language model behind an OpenAI-compatible URL, see :class:`prefopt.generate.language_judge.LanguageJudge`."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None) -> None:
        """Raises :class:`prefopt.errors.UserError` where the server cannot be asked."""
        self._judge = LanguageJudge(url, model, key_variable=key_variable, remedy=REPEAT)
        self.name = self._judge.name

    def notes(self) -> list[str]:
        return [self._judge.words]

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """Raises :class:`RunError` where no attempt is answered, and :class:`DataError` for prompts with pictures."""
        if any(q.pair.pictures for q in questions):
            raise DataError("--prompts has pictures, which --judge llm is not shown; name another --judge")
        return self._judge.votes([(prompt_text(q.pair), *q.responses) for q in questions])
