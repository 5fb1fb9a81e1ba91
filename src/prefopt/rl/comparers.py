"""Judges that compare the responses to a prompt with each other: a language model, or people who vote in a study."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Protocol

from prefopt.core.terminal import StopRequest
from prefopt.data.group import Group
from prefopt.data.layouts import LAYOUTS
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import RunError
from prefopt.generate.judged import UNSCORED, WAVES
from prefopt.generate.language_judge import LanguageJudge
from prefopt.generate.rewards import Pause, TextRewardScorer, never
from prefopt.parallel.world import World
from prefopt.records import Comparison, Message, Response
from prefopt.rewards import Reward, prompt_text
from prefopt.rl.judgement import Outcome
from prefopt.studies.export import votes_by_pair
from prefopt.studies.items import Item, NewItem, ResponseOrigin, add_items, all_items
from prefopt.studies.study import Study, StudySettings
from prefopt.studies.votes import StoredVote, Vote, stored_votes

POLL_SECONDS = 1.0
"""How often a run that waits for people looks at their study."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt with the texts of its responses."""

    prompt: Comparison
    texts: Sequence[str]

    def outcomes(self, judged: Mapping[tuple[str, str], float]) -> list[Outcome]:
        """The outcome of every pair: equal texts tie, an empty one loses, others as ``judged``, by their texts."""
        found = []
        for i, k in combinations(range(len(self.texts)), 2):
            first, second = self.texts[i], self.texts[k]
            some = bool(first.strip()), bool(second.strip())
            x = 0.5 if first == second else judged.get((first, second), math.nan)
            if not all(some) and first != second:
                x = 0.5 + 0.5 * (some[0] - some[1])
            found.append((i, k, x))
        return found

    @property
    def distinct(self) -> list[str]:
        """The different texts that a judge is shown."""
        return list(dict.fromkeys(text for text in self.texts if text.strip()))


class Comparer(Protocol):
    """Compares the responses of a round."""

    words: str

    def __call__(self, name: str, answered: Sequence[Answered], pause: Callable[[], None]) -> list[list[Outcome]]:
        """The outcomes by prompt of the round ``name``. Every rank calls this, and ``pause`` equally often, which may
        raise to stop the run. Raises :class:`prefopt.errors.UserError`."""
        ...


class Unscored(TextRewardScorer):
    """In the place of a reward, where a ``comparer`` judges later: all scores are 0."""

    def __init__(self, comparer: Comparer, tokenizer: Tokenizer, stop: Sequence[int]) -> None:
        super().__init__(Reward("length", lambda prompts, texts: [0.0] * len(texts)), tokenizer, stop)
        self.words = comparer.words

    def __call__(
        self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int, pause: Pause = never
    ) -> list[float]:
        return [0.0 for group in groups for _ in group.continuations]


class Abandoned(Exception):
    """Questions were given up because this rank has a stop request, which the others may not know yet."""


class LanguageComparer:
    """A language model, asked of every pair in both orders, ``parallel`` questions at once by each rank, until there is
    a ``stop`` request."""

    def __init__(self, judge: LanguageJudge, world: World, parallel: int, stop: StopRequest) -> None:
        self._judge, self._world, self._parallel, self._stop = judge, world, parallel, stop
        self.model = judge.model
        self.words = f"{judge.name}, which compares in both orders"

    def __call__(self, name: str, answered: Sequence[Answered], pause: Callable[[], None]) -> list[list[Outcome]]:
        """See :class:`Comparer`."""
        questions = [(n, *pair) for n, a in enumerate(answered) for pair in combinations(a.distinct, 2)]
        world, at_once = self._world, max(1, WAVES * self._parallel // 2)  # pairs, of two questions each
        mine = questions[world.rank :: world.size]
        found: dict[tuple[int, str, str], float] = {}
        for first in range(0, len(questions[:: world.size]), at_once):
            part = mine[first : first + at_once]
            try:
                found |= world.together(lambda part=part: self._asked(answered, part))  # type: ignore[misc]
            except Abandoned:
                pause()  # now all ranks know, and this raises
                raise
            pause()
        every: list[dict[tuple[str, str], float]] = [{} for _ in answered]
        parts = world.gather(found)
        lacking = sum(math.isnan(x) for judged in parts for x in judged.values())
        if lacking > UNSCORED * len(questions):
            raise RunError(
                f"{name}: the judge {self._judge.name} gave no verdict on {lacking} of {len(questions)} pairs, and"
                " nothing is learned from those; take a --judge-model that follows its instructions"
            )
        for judged in parts:
            for (n, one, other), x in judged.items():
                every[n] |= {(one, other): x, (other, one): 1 - x}
        return [a.outcomes(judged) for a, judged in zip(answered, every, strict=True)]

    def _asked(
        self, answered: Sequence[Answered], questions: Sequence[tuple[int, str, str]]
    ) -> dict[tuple[int, str, str], float]:
        asked = [(prompt_text(answered[n].prompt), first, second) for n, first, second in questions]
        votes = self._judge.votes(asked, at_once=self._parallel, pause=self._refuse_stopped)
        return dict(zip(questions, map(_outcome, votes), strict=True))

    def _refuse_stopped(self) -> None:
        if self._stop.signal is not None:
            raise Abandoned


def _outcome(vote: Vote) -> float:
    """1 where the first response wins, 1/2 for a tie, NaN without a verdict."""
    if vote.skipped is not None:
        return math.nan
    return 0.5 if len(vote.tiers) == 1 else float(vote.tiers[0] == (0,))


class PeopleComparer:
    """People who vote in the study at ``path``, which ``prefopt collect serve`` serves meanwhile.

    The prompts of a round are items of the study; one is answered when as many annotators as its settings ask for have
    voted or skipped. Without a vote it is undecided; votes that all responses are bad are ties.
    """

    def __init__(
        self, path: Path, world: World, say: Callable[[str], None], *, overlap: int, title: str, model: str
    ) -> None:
        self._path, self._world, self._say = path, world, say
        self._overlap, self._title, self._model = overlap, title, model
        self.words = f"people, who vote in {path}"

    def __call__(self, name: str, answered: Sequence[Answered], pause: Callable[[], None]) -> list[list[Outcome]]:
        """See :class:`Comparer`; returns when every item is answered."""
        world, seen = self._world, None
        world.on_first(lambda: self._add(name, answered))
        while True:
            revision = world.on_first(self._revision)
            if revision != seen:
                left, found = world.on_first(lambda: self._look(answered))
                if not left:
                    return found
                if seen is None:
                    self._say(
                        f"{name}: {left} prompts wait for votes; serve them with prefopt collect serve"
                        f" {self._path}, or stop here and continue with --resume"
                    )
                seen = revision
            pause()
            time.sleep(POLL_SECONDS)

    def _add(self, name: str, answered: Sequence[Answered]) -> None:
        """Add the items of a round; those that are there already keep their votes."""
        if not self._path.exists():
            Study.create(self._path, StudySettings(title=self._title, overlap=self._overlap)).close()
        items = [
            NewItem(_row(a), a.prompt.prompt_key, [ResponseOrigin(self._model)] * len(a.distinct), None, name, n)
            for n, a in enumerate(answered, 1)
            if len(a.distinct) > 1
        ]
        with Study(self._path) as study:
            add_items(study, items)

    def _revision(self) -> tuple[int, int]:
        with Study(self._path, read_only=True) as study:
            return study.revision()

    def _look(self, answered: Sequence[Answered]) -> tuple[int, list[list[Outcome]]]:
        """How many items are not answered yet, and the outcomes by prompt."""
        with Study(self._path, read_only=True) as study, study.reading() as connection:
            wanted = {_key(_row(a)) for a in answered if len(a.distinct) > 1}
            items = {key: item for item in all_items(connection) if (key := _key(item.row)) in wanted}
            numbers = {item.id for item in items.values()}
            votes: dict[int, list[StoredVote]] = {number: [] for number in numbers}
            answers: Counter[int] = Counter()
            for vote in stored_votes(connection):
                if vote.item in numbers:
                    answers[vote.item] += 1
                    if vote.vote.skipped is None:
                        votes[vote.item].append(vote)
            left = sum(answers[number] < study.settings.overlap for number in numbers)
        found = []
        for a in answered:
            item = items.get(_key(_row(a))) if len(a.distinct) > 1 else None
            found.append(a.outcomes({} if item is None else _judged(item, votes[item.id], a.distinct)))
        return left, found


def _row(a: Answered) -> Mapping[str, object]:
    responses = tuple(Response((Message("assistant", text),)) for text in a.distinct)
    return LAYOUTS["canonical"].write(replace(a.prompt, responses=responses, extra={}))


def _key(row: Mapping[str, object]) -> str:
    return json.dumps(row, sort_keys=True)


def _judged(item: Item, votes: Sequence[StoredVote], texts: Sequence[str]) -> dict[tuple[str, str], float]:
    """The fraction of votes for the first of two texts, a tie counting half, by their texts in both orders."""
    found: dict[tuple[str, str], float] = {}
    for (i, k), (first, second, ties) in votes_by_pair(item, votes).items():
        x = (first + ties / 2) / (first + second + ties)
        found |= {(texts[i], texts[k]): x, (texts[k], texts[i]): 1 - x}
    return found
