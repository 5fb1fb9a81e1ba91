"""A language model that compares two responses, asked over an OpenAI-compatible interface."""

from __future__ import annotations

import re

from prefopt.generate.judged import CachedJudge
from prefopt.studies.votes import LONGEST_RATIONALE, Vote

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
        self._judge = CachedJudge(
            url,
            model,
            key_variable=key_variable,
            instructions=SYSTEM,
            valid=lambda answer: _verdict(answer) is not None,
        )
        self.name: str = self._judge.name
        self.model: str = self._judge.model

    @property
    def words(self) -> str:
        """How many questions were sent, and how many were found on disk."""
        asked, cached = self._judge.asked, self._judge.cached
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
        return self._judge(f"# Prompt\n\n{prompt}\n\n# First answer\n\n{first}\n\n# Second answer\n\n{second}")


def _verdict(answer: str) -> str | None:
    """The last verdict of an answer: 1, 2 or tie."""
    found = VERDICT.findall(answer)
    return str(found[-1]).lower() if found else None
