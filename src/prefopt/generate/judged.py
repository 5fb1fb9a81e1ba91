"""A language model behind an OpenAI-compatible URL as judge: its answers, cached on disk, and scores read from them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from prefopt.config.judges import LLM
from prefopt.config.rewards import JUDGE_PATTERN, RewardOptions
from prefopt.core.cache_folder import cache_root
from prefopt.core.dispatch import AGAIN, Dispatch, failures
from prefopt.core.endpoint import Flags
from prefopt.core.files import expanded, write_json
from prefopt.errors import ConfigError, RunError
from prefopt.generate.chat_model import ContextLengthError, RemoteChatModel
from prefopt.records import Message

FLAGS = Flags("--judge-url", "--judge-key", "--judge-model")
ATTEMPTS = 3
"""Times that a question is asked whose answers are not valid."""
PAUSE = 2.0
"""Seconds before a server that failed is asked again, doubled before every other attempt."""
AT_ONCE = 8
"""Questions that wait for the server at the same time."""
WAVES = 4
"""Questions between two looks at stop requests, by how many are asked at once."""
UNSCORED = 0.5
"""More than this fraction of a step without a score stops the run: the judge does not do what it was asked."""
SCORE_PROMPT = (
    "You grade an answer to a prompt. Judge how well it does what the prompt asks: whether it is right, useful, clear"
    " and safe. Length by itself is no merit. Explain in a few sentences what decides it. Then write a last line that"
    " is exactly a whole number from 1 (useless) to 10 (could not be better) in double brackets, such as [[7]]."
)


class CachedJudge:
    """Asks a model questions under fixed instructions. Answers that are ``valid`` are kept on disk, so that a question
    is paid for once. ``asked`` counts questions that the server answered, ``cached`` those found on disk. It is the
    one server of a :class:`prefopt.core.dispatch.Dispatch`."""

    def __init__(
        self,
        url: str,
        model: str | None,
        *,
        key_variable: str | None,
        instructions: str,
        valid: Callable[[str], bool],
        pause: float | None = None,
        remedy: str = AGAIN,
    ) -> None:
        """``remedy``: what to do where the server is lost. Raises :class:`prefopt.errors.UserError` where it cannot be
        asked."""
        self._model = RemoteChatModel(url, model, key_variable=key_variable, options={"temperature": 0}, flags=FLAGS)
        self.name, self.model, self.place = self._model.name, self._model.model, self._model.place
        self.lost, self._remedy = "", remedy
        self._instructions, self._valid = instructions, valid
        self._pause = PAUSE if pause is None else pause
        self._folder = cache_root() / "judgements"
        self.asked = self.cached = 0
        self._turn = threading.Lock()

    def answers(
        self, questions: Sequence[str], *, at_once: int | None = None, pause: Callable[[], None] = lambda: None
    ) -> list[str]:
        """The answers, equal questions asked once. ``pause`` is called several times a second, also while the server is
        silent, and may raise: questions that wait then are given up. Raises
        :class:`prefopt.core.dispatch.ServersLost` where the server fails, and :class:`RunError` where it refuses."""
        self.lost = ""
        at_once = AT_ONCE if at_once is None else at_once
        unique = list(dict.fromkeys(questions))
        found: dict[str, str] = {}
        for first in range(0, len(unique), WAVES * at_once):
            part = unique[first : first + WAVES * at_once]
            requests = Dispatch(
                [self],
                len(part),
                lambda judge, n, part=part: judge(part[n]),  # type: ignore[misc]
                flag=FLAGS.url,
                concurrency=at_once,
                pause=self._pause,
                remedy=self._remedy,
            )
            found |= dict(zip(part, requests.run(lambda answer: pause()), strict=True))
        return [found[question] for question in questions]

    def __call__(self, question: str) -> str:
        """One answer, which after the last attempt may be not valid. Several threads may ask. Raises
        :class:`prefopt.core.dispatch.ServerFailed` where the server fails, and :class:`RunError` where it refuses."""
        key = json.dumps([self.name, self._instructions, question]).encode("utf-8", "surrogatepass")
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        path = self._folder / name[:2] / f"{name}.json"
        try:
            answer: str | None = str(json.loads(path.read_text("utf-8"))["answer"])
        except Exception:  # absent or damaged: ask again
            answer = None
        known = answer is not None and self._valid(answer)  # what is valid may have changed since
        if answer is not None and known:
            self._count(cached=1)
            return answer
        answer = self._ask(question)
        self._count(asked=1)
        if self._valid(answer):
            write_json(path, {"judge": self.name, "answer": answer})
        return answer

    def _count(self, *, asked: int = 0, cached: int = 0) -> None:
        with self._turn:
            self.asked += asked
            self.cached += cached

    def _ask(self, question: str) -> str:
        messages = (Message("system", self._instructions), Message("user", question))
        answer = ""
        for attempt in range(ATTEMPTS):
            try:
                with failures(FLAGS):
                    answer = "".join(self._model.answer(messages, attempt))
            except ContextLengthError as error:
                return f"no verdict: {error}"
            if self._valid(answer):
                break
        return answer


class LlmScores:
    """A reward: the number that a language model gives each response. Several questions are asked at once.

    A response whose answers hold no score gets NaN, which is replaced when all scores of a step are known
    (:func:`prefopt.rl.rollouts.completed`).
    """

    def __init__(self, options: RewardOptions, *, pause: float = PAUSE) -> None:
        """Raises :class:`prefopt.errors.UserError` where the server cannot be asked, or the instructions not read."""
        assert options.judge_url is not None
        self.instructions = _read(options.judge_prompt) if options.judge_prompt is not None else SCORE_PROMPT
        self.pattern = options.judge_pattern or JUDGE_PATTERN
        self._score = re.compile(self.pattern)
        self._judge = CachedJudge(
            options.judge_url,
            options.judge_model,
            key_variable=options.judge_key,
            instructions=self.instructions,
            valid=lambda answer: self.score_in(answer) is not None,
            pause=pause,
        )
        self.name = f"{LLM}, {self._judge.name}"
        self._unread = ""

    def digest(self) -> str:
        """A digest of what decides the scores: the model's name, the instructions and the pattern."""
        text = json.dumps([self._judge.model, self.instructions, self.pattern])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def score_in(self, answer: str) -> float | None:
        """The score of an answer: the last match of the pattern that is a number."""
        for found in reversed([*self._score.finditer(answer)]):
            with suppress(TypeError, ValueError):  # the group took no part in the match, or matched another text
                if math.isfinite(score := float(found[1])):
                    return score
        return None

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], pause: Callable[[], None] = lambda: None
    ) -> list[float]:
        """A score for each response, or NaN. ``pause`` and errors: as :meth:`CachedJudge.answers`."""
        questions = [f"# Prompt\n\n{p}\n\n# Answer\n\n{r}" for p, r in zip(prompts, responses, strict=True)]
        scores = []
        for answer in self._judge.answers(questions, pause=pause):
            score = self.score_in(answer)
            if score is None:
                self._unread = " ".join(answer.split())[-80:]
            scores.append(math.nan if score is None else score)
        return scores

    def refuse_unscored(self, lacking: int, responses: int) -> None:
        """Raises :class:`RunError` where most of the responses of a step have no score."""
        if lacking <= UNSCORED * responses:
            return
        example = f", such as {self._unread!r}" if self._unread else ""  # there is none where other ranks asked
        raise RunError(
            f"{lacking} of {responses} answers hold no score that --judge-pattern {self.pattern} finds{example}; change"
            " it or --judge-prompt"
        )


def _read(name: str) -> str:
    path: Path = expanded(name)
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--judge-prompt {name} cannot be read ({error}); name a text file") from None
    if not text:
        raise ConfigError(f"--judge-prompt {name} is empty; write what the judge is to do")
    return text
