"""What a judge is asked and what it answers: a vote, the same that a person gives.

>>> from prefopt.records import Comparison
>>> from prefopt.evaluate.score import text_scorer
>>> from prefopt.rewards import load_reward
>>> judge = ScoreJudge("length", text_scorer(load_reward("length")))
>>> asked = Question(Comparison.pair("Say hello.", chosen="Hello there", rejected="Hi", row=1))
>>> [outcome(vote) for vote in judge([asked])]
[1.0]

>>> last_number("3 + 4 = 7, so she has $1,250.00 left.")
'1250'
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prefopt.config.compare import CompareConfig
from prefopt.config.tools import IMPLICIT, ScoreConfig, is_model_reward
from prefopt.core.cache_folder import cache_root
from prefopt.core.files import write_json
from prefopt.core.options import nearest
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.score import RowScorer, load_row_scorer, text_scorer
from prefopt.generate.chat_model import ChatRequest, ContextLengthError, RemoteChatModel
from prefopt.records import Comparison, Message
from prefopt.rewards import RULES, Reward, load_reward, prompt_text
from prefopt.studies.votes import LONGEST_RATIONALE, Vote

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

    def __init__(self, name: str, scores: RowScorer) -> None:
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


class RegexJudge:
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
        """See :class:`prefopt.evaluate.judges.Judge`."""
        return [by_score(*(bool(self._pattern.search(text)) for text in q.responses)) for q in questions]


class FinalAnswerJudge:
    """The response whose last number is the right one wins; that stands behind #### in the file of prompts (GSM8K)."""

    name = "gsm8k"

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.Judge`. Raises :class:`DataError` for a row without an answer."""
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


ATTEMPTS = 3
PAUSE = 2.0
"""Seconds before a second attempt, twice as many before the third."""
SYSTEM = (
    "You compare two answers to the same prompt. Judge how well each does what the prompt asks: whether it is right,"
    " useful, clear and safe. Length by itself is no merit, and which answer comes first means nothing. Explain in a"
    " few sentences what decides it. Then write a last line that is exactly one of: [[1]] where the first answer is"
    " better, [[2]] where the second is, [[tie]] where neither is."
)
VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.I)
PLACES = {"1": ((0,), (1,)), "2": ((1,), (0,)), "tie": ((0, 1),)}


class LlmJudge:
    """``url`` and ``model`` are a server's; ``asked`` counts questions that were sent, ``kept`` those found on disk."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None) -> None:
        """Raises :class:`prefopt.errors.UserError` where the server cannot be asked."""
        self._talker = RemoteChatModel(url, model, key_variable=key_variable, options={"temperature": 0})
        self.name = self._talker.name
        self._folder = cache_root() / "judgements"
        self.asked = self.kept = 0

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.Judge`. Raises :class:`RunError` where no attempt is answered."""
        return [self._vote(q) for q in questions]

    def notes(self) -> list[str]:
        """How many questions were sent."""
        return [f"{self.asked} questions were asked of {self.name}, {self.kept} answers came from the cache"]

    def _vote(self, q: Question) -> Vote:
        first, second = q.responses
        answers = [self._answer(q.prompt, *pair) for pair in ((first, second), (second, first))]
        found = [_read(answer) for answer in answers]
        if None in found:
            return Vote(skipped="the judge gave no verdict")
        outcomes = [outcome(Vote(PLACES[str(word)])) for word in found]
        outcomes[1] = 1 - outcomes[1]
        tiers = PLACES[str(found[0])] if outcomes[0] == outcomes[1] else PLACES["tie"]
        return Vote(tiers, rationale="\n\n".join(answers)[:LONGEST_RATIONALE])

    def _answer(self, prompt: str, first: str, second: str) -> str:
        asked = f"# Prompt\n\n{prompt}\n\n# First answer\n\n{first}\n\n# Second answer\n\n{second}"
        path = self._place(asked)
        if (known := _known(path)) is not None:
            self.kept += 1
            return known
        self.asked += 1
        answer = self._patiently(ChatRequest((Message("system", SYSTEM), Message("user", asked))))
        if _read(answer) is not None:  # what makes no sense may be asked again another day
            write_json(path, {"judge": self.name, "answer": answer})
        return answer

    def _patiently(self, asked: ChatRequest) -> str:
        for attempt in range(ATTEMPTS):
            try:
                answer = "".join(self._talker.answer(asked, attempt))
                if _read(answer) is not None or attempt == ATTEMPTS - 1:
                    return answer
            except ContextLengthError as error:
                return f"no verdict: {error}"
            except RunError:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _place(self, asked: str) -> Path:
        digest = hashlib.blake2b(
            json.dumps([self.name, SYSTEM, asked]).encode("utf-8", "surrogatepass"), digest_size=16
        )
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name}.json"


def _read(answer: str) -> str | None:
    """The last verdict of an answer: 1, 2 or tie."""
    found = VERDICT.findall(answer)
    return str(found[-1]).lower() if found else None


def _known(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text("utf-8"))["answer"])
    except Exception:  # damaged: it is asked again
        return None


NAMED = ("regex:PATTERN", "gsm8k", "implicit:MODEL,REFERENCE", "llm")


def load_judge(config: CompareConfig, own: Reward | None = None) -> Judge:
    """The judge that ``config`` names, or ``own`` function. Raises :class:`prefopt.errors.UserError`."""
    if own is not None:
        return ScoreJudge(own.name, text_scorer(own))
    name = config.judge
    assert name is not None
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon:
        return RegexJudge(rest)
    if name == "gsm8k":
        return FinalAnswerJudge()
    if kind == "implicit" and colon:
        policy, comma, reference = rest.partition(",")
        if not (policy and comma and reference):
            raise ConfigError(f"--judge {name}: write implicit:MODEL,REFERENCE")
        return _by_scores(name, config, reward=IMPLICIT, model=policy, reference=reference)
    if name == "llm":
        assert config.judge_url is not None
        return LlmJudge(config.judge_url, config.judge_model, key_variable=config.judge_key)
    if is_model_reward(name):
        return _by_scores(name, config, reward=name)
    if not colon and name not in RULES:
        known = [*RULES, *NAMED]
        raise ConfigError(
            f"--judge {name}: there is no such judge{nearest(name, known)}; there are {', '.join(known)}, the folder of"
            " a reward model, and MODULE:FUNCTION for one of your own"
        )
    return ScoreJudge(name, text_scorer(load_reward(name)))


def _by_scores(name: str, config: CompareConfig, **options: str) -> ScoreJudge:
    """A judge by what ``prefopt score`` would give; nothing is read from files or written."""
    machine = {"device": config.device, "dtype": config.dtype, "threads": config.threads}
    scores, _ = load_row_scorer(ScoreConfig(files=["samples"], output="none", **options, **machine))  # type: ignore[arg-type]
    return ScoreJudge(name, scores)
