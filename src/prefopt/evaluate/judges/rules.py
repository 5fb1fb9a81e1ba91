"""Judges that look something up in a response: a pattern, or the answer to a sum.

>>> last_number("3 + 4 = 7, so she has $1,250.00 left.")
'1250'
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefopt.errors import ConfigError, DataError
from prefopt.evaluate.judges.judge import Question, by_score
from prefopt.studies.votes import Vote

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
