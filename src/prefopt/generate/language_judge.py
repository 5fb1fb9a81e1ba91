"""A language model that compares two responses, asked over an OpenAI-compatible interface."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from prefopt.core.dispatch import AGAIN
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
    once."""

    def __init__(self, url: str, model: str | None, *, key_variable: str | None, remedy: str = AGAIN) -> None:
        """``remedy``: what to do where the server is lost. Raises :class:`prefopt.errors.UserError` where it cannot be
        asked."""
        self._judge = CachedJudge(
            url,
            model,
            key_variable=key_variable,
            instructions=SYSTEM,
            valid=lambda answer: _verdict(answer) is not None,
            remedy=remedy,
        )
        self.name: str = self._judge.name
        self.model: str = self._judge.model

    @property
    def words(self) -> str:
        """How many questions were sent, and how many were found on disk."""
        asked, cached = self._judge.asked, self._judge.cached
        return f"{asked} questions were asked of {self.name}, {cached} answers came from the cache"

    def votes(
        self,
        asked: Sequence[tuple[str, str, str]],
        *,
        at_once: int | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> list[Vote]:
        """The votes on prompts with two responses each, skipped where the judge gives no verdict; ``at_once``:
        questions that wait for the server at the same time. ``pause`` and errors: as :meth:`CachedJudge.answers`."""
        questions = [_question(*one) for p, first, second in asked for one in ((p, first, second), (p, second, first))]
        answers = self._judge.answers(questions, at_once=at_once, pause=pause)
        return [_vote(*both) for both in zip(answers[::2], answers[1::2], strict=True)]


def _question(prompt: str, first: str, second: str) -> str:
    return f"# Prompt\n\n{prompt}\n\n# First answer\n\n{first}\n\n# Second answer\n\n{second}"


def _vote(answer: str, swapped: str) -> Vote:
    """The vote by the answers to both orders."""
    one, two = _verdict(answer), _verdict(swapped)
    if one is None or two is None:
        return Vote(skipped="the judge gave no verdict")
    agreed = one if one == SWAPPED[two] else "tie"
    return Vote(TIERS[agreed], rationale=f"{answer}\n\n{swapped}"[:LONGEST_RATIONALE])


def _verdict(answer: str) -> str | None:
    """The last verdict of an answer: 1, 2 or tie."""
    found = VERDICT.findall(answer)
    return str(found[-1]).lower() if found else None
