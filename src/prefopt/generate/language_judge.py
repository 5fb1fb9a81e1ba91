"""A language model that compares two responses, asked over an OpenAI-compatible interface."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter

from prefopt.core.cache_folder import cache_root
from prefopt.core.files import write_json
from prefopt.errors import RunError
from prefopt.generate.chat_model import ContextLengthError, Messages, RemoteChatModel
from prefopt.records import Message
from prefopt.studies.votes import LONGEST_RATIONALE, Vote

ATTEMPTS = 3
PAUSE = 2.0
"""Seconds before the second attempt, doubled before the third."""
SYSTEM = (
    "You compare two answers to the same prompt. Judge how well each does what the prompt asks: whether it is right,"
    " useful, clear and safe. Length by itself is no merit, and which answer comes first means nothing. Explain in a"
    " few sentences what decides it. Then write a last line that is exactly one of: [[1]] where the first answer is"
    " better, [[2]] where the second is, [[tie]] where neither is."
)
VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.I)
TIERS = {"1": ((0,), (1,)), "2": ((1,), (0,)), "tie": ((0, 1),)}
SWAPPED = {"1": "2", "2": "1", "tie": "tie"}


class LanguageJudge:
    """A language model behind an OpenAI-compatible URL, asked twice, once in each order: a preference that does not
    survive the swap is position bias, and counts as a tie. Answers are cached on disk, so that a question is paid for
    once. Several threads may ask."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None) -> None:
        """Raises :class:`prefopt.errors.UserError` where the server cannot be asked."""
        self._model = RemoteChatModel(url, model, key_variable=key_variable, options={"temperature": 0})
        self.name = self._model.name
        self._folder = cache_root() / "judgements"
        self._counts, self._turn = Counter[str](), threading.Lock()

    @property
    def words(self) -> str:
        """How many questions were sent, and how many were found on disk."""
        asked, cached = self._counts["asked"], self._counts["cached"]
        return f"{asked} questions were asked of {self.name}, {cached} answers came from the cache"

    def vote(self, prompt: str, first: str, second: str) -> Vote:
        """The vote on two responses, skipped where the judge gives no verdict. Raises :class:`RunError` where no
        attempt is answered."""
        answers = [self._answer(prompt, first, second), self._answer(prompt, second, first)]
        one, two = map(_verdict, answers)
        if one is None or two is None:
            return Vote(skipped="the judge gave no verdict")
        agreed = one if one == SWAPPED[two] else "tie"
        return Vote(TIERS[agreed], rationale="\n\n".join(answers)[:LONGEST_RATIONALE])

    def _answer(self, prompt: str, first: str, second: str) -> str:
        question = f"# Prompt\n\n{prompt}\n\n# First answer\n\n{first}\n\n# Second answer\n\n{second}"
        key = json.dumps([self.name, SYSTEM, question]).encode("utf-8", "surrogatepass")
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        path = self._folder / name[:2] / f"{name}.json"
        try:
            answer = str(json.loads(path.read_text("utf-8"))["answer"])
            self._count("cached")
            return answer
        except Exception:  # absent or damaged: ask again
            self._count("asked")
        answer = self._ask((Message("system", SYSTEM), Message("user", question)))
        if _verdict(answer) is not None:
            write_json(path, {"judge": self.name, "answer": answer})
        return answer

    def _count(self, what: str) -> None:
        with self._turn:
            self._counts[what] += 1

    def _ask(self, messages: Messages) -> str:
        for attempt in range(ATTEMPTS):
            try:
                answer = "".join(self._model.answer(messages, attempt))
                if _verdict(answer) is not None or attempt == ATTEMPTS - 1:
                    return answer
            except ContextLengthError as error:
                return f"no verdict: {error}"
            except RunError:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _verdict(answer: str) -> str | None:
    """The last verdict of an answer: 1, 2 or tie."""
    found = VERDICT.findall(answer)
    return str(found[-1]).lower() if found else None
