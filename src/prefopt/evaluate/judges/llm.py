"""A language model behind an OpenAI-compatible URL as judge: asked twice, once in each order.

Such a judge leans to what stands first, or second. A preference counts where it survives the exchange of both; where it
does not, the vote is a tie. What was answered is kept on disk, so that the same question is asked and paid for once.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from prefopt.core.cache_folder import cache_root
from prefopt.core.files import write_json
from prefopt.errors import RunError
from prefopt.evaluate.judges.judge import Question, outcome
from prefopt.generate.talker import Asked, RemoteTalker, TooLong
from prefopt.records import Message
from prefopt.studies.votes import LONGEST_RATIONALE, Vote

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


class LanguageJudge:
    """``url`` and ``model`` are a server's; ``asked`` counts questions that were sent, ``kept`` those found on disk."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None) -> None:
        """Raises :class:`prefopt.errors.UserError` where the server cannot be asked."""
        self._talker = RemoteTalker(url, model, key_variable=key_variable, options={"temperature": 0})
        self.name = self._talker.name
        self._folder = cache_root() / "judgements"
        self.asked = self.kept = 0

    def __call__(self, questions: Sequence[Question]) -> list[Vote]:
        """See :class:`prefopt.evaluate.judges.judge.Judge`. Raises :class:`RunError` where no attempt is answered."""
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
        answer = self._patiently(Asked((Message("system", SYSTEM), Message("user", asked))))
        if _read(answer) is not None:  # what makes no sense may be asked again another day
            write_json(path, {"judge": self.name, "answer": answer})
        return answer

    def _patiently(self, asked: Asked) -> str:
        for attempt in range(ATTEMPTS):
            try:
                answer = "".join(self._talker.answer(asked, attempt))
                if _read(answer) is not None or attempt == ATTEMPTS - 1:
                    return answer
            except TooLong as error:
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
