"""Conversion of rows to what methods need, and every problem that prevents it."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.validate import DataKind, Problem, check, convert, tiers_from_votes
from prefopt.records import Comparison, Message, Response, ToolCall, tiers_of

ASKED = (Message("user", "q"),)


def row(count: int = 3, tiers: Any = (), **said: Any) -> Comparison:
    return Comparison(ASKED, tuple(Response((Message("assistant", f"r{k}"),)) for k in range(count)), tiers, 7, **said)


PAIR = row(2, ((0,), (1,)))
TIED = row(3, ((0, 1, 2),))
CYCLE = row(votes=((0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)))
AGREED = row(votes=((0, 1, 1.0), (0, 2, 3.0), (2, 0, 1.0), (1, 2, 1.0)))
LABELLED = row(labels=(True, False, True))


def got(c: Comparison, kind: DataKind) -> Comparison:
    found = convert(c, kind)
    assert isinstance(found, Comparison), found
    assert (found.row, found.prompt) == (c.row, c.prompt)
    return found


def test_what_gives_pairs_and_rankings() -> None:
    assert got(PAIR, "pairs") == got(PAIR, "ranking") == PAIR
    scored = row(scores=(1.0, 9.0, 1.0))
    assert got(scored, "pairs").pairs == got(scored, "ranking").pairs == ((1, 0), (1, 2))
    assert got(LABELLED, "pairs").pairs == got(LABELLED, "ranking").pairs == ((0, 1), (2, 1))
    assert got(scored, "scored") == got(scored, "pairs") and got(scored, "scored").scores == (1.0, 9.0, 1.0)
    assert got(CYCLE, "pairs").votes == CYCLE.votes
    assert got(AGREED, "pairs").votes == AGREED.votes
    assert got(AGREED, "ranking").tiers == ((0,), (1,), (2,)) and got(AGREED, "ranking").votes is None


def test_what_gives_labels() -> None:
    assert got(LABELLED, "labels") == LABELLED
    assert got(PAIR, "labels") == replace(PAIR, labels=(True, False))
    assert got(row(2, ((1,), (0,))), "labels").labels == (False, True)
    assert got(row(3, ((1, 2), (0,))), "labels").labels == (False, True, True)
    alone = row(1, labels=(False,))
    assert got(alone, "labels") == alone


def test_what_gives_demonstrations_and_prompts() -> None:
    def learned(c: Comparison) -> list[str]:
        found = got(c, "demonstrations")
        assert (found.tiers, found.scores, found.labels, found.votes) == ((), None, None, None)
        return [r.text for r in found.responses]

    assert learned(PAIR) == ["r0"] and learned(row(2, ((1,), (0,)))) == ["r1"]
    assert learned(row(3, ((2, 1), (0,)))) == ["r1"] and learned(TIED) == ["r0"]
    assert learned(LABELLED) == ["r0"] and learned(row(labels=(False, True, True))) == ["r1"]
    assert learned(row(votes=((0, 1, 1.0), (2, 0, 1.0)))) == ["r2"]
    assert learned(row(votes=((0, 1, 0.2), (1, 0, 0.8)))) == ["r1"]
    assert learned(row(1)) == ["r0"] and learned(row(3)) == ["r0", "r1", "r2"]
    for c in (PAIR, TIED, CYCLE, LABELLED, row(0)):
        assert got(c, "prompts").responses == () and check(c, "prompts") == []


IMPOSSIBLE: list[tuple[Comparison, DataKind, str]] = [
    (TIED, "pairs", "only ties"),
    (TIED, "ranking", "only ties"),
    (TIED, "labels", "only ties"),
    (row(scores=(3.0, 3.0, 3.0)), "pairs", "only ties"),
    (row(labels=(True, True, True)), "pairs", "only ties"),
    (row(labels=(False, False, False)), "ranking", "only ties"),
    (row(labels=(False, False, False)), "demonstrations", "no desirable response"),
    (row(2), "pairs", "no preference"),
    (row(2), "labels", "no preference"),
    (PAIR, "scored", "no scores"),
    (row(scores=(3.0, 3.0, 3.0)), "scored", "only ties"),
    (row(1), "pairs", "too few responses"),
    (row(1, scores=(4.0,)), "ranking", "too few responses"),
    (row(1, labels=(True,)), "pairs", "too few responses"),
    (row(0), "pairs", "no response"),
    (row(0), "demonstrations", "no response"),
    (row(0), "labels", "no response"),
    (row(3, ((0,), (1,), (2,))), "labels", "no label"),
    (CYCLE, "ranking", "no order"),
    (CYCLE, "labels", "no order"),
    (row(votes=((0, 1, 1.0), (1, 2, 1.0))), "ranking", "no order"),
    (CYCLE, "demonstrations", "no best response"),
    (row(votes=((0, 1, 1.0), (1, 0, 1.0))), "demonstrations", "no best response"),  # r2 was compared with none
]


def test_what_cannot_be_converted_is_a_problem_with_the_row() -> None:
    for c, kind, problem in IMPOSSIBLE:
        found = convert(c, kind)
        assert isinstance(found, Problem) and (found.kind, found.row) == (problem, 7) and found.what, (c, kind)
        assert check(c, kind) == [found]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.integers(1, 3))
def test_votes_for_every_pair_of_an_order_give_the_order(ranks: list[int], weight: int) -> None:
    count = len(ranks)
    pairs = [(i, j) for i, j in permutations(range(count), 2) if ranks[i] > ranks[j]]
    tied = [(i, j) for i, j in permutations(range(count), 2) if ranks[i] == ranks[j]]
    votes = tuple((i, j, float(weight)) for i, j in pairs) + tuple((i, j, 0.5) for i, j in tied)
    assert tiers_from_votes(row(count, votes=votes)) == tiers_of([float(r) for r in ranks])
    if pairs:
        assert tiers_from_votes(row(count, votes=votes[1:])) == ()


def said(c: Comparison, kind: DataKind = "pairs") -> list[str]:
    return [p.kind for p in check(c, kind)]


def response(*turns: Message) -> Response:
    return Response(turns)


def pair(*sides: Response, prompt: tuple[Message, ...] = ASKED, text: bool = False) -> Comparison:
    return Comparison(prompt, sides, ((0,), (1,)), 1, text=text)


A, B, EMPTY = (response(Message("assistant", words)) for words in ("a", "b", " \n"))


def test_every_problem_of_a_row_is_found() -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("f", "{}"),))
    assert said(pair(A, B)) == [] == said(pair(response(call), B))
    assert said(pair(A, A)) == ["identical responses"]
    assert said(pair(EMPTY, EMPTY)) == ["empty response", "empty response", "identical responses"]
    assert said(pair(A, response())) == ["response without an answer"]
    assert said(pair(A, response(Message("assistant", "b"), Message("user", "c")))) == ["response without an answer"]
    assert said(pair(A, response(*ASKED, Message("assistant", "b")))) == ["response begins with no answer"]
    assert said(pair(A, response(Message("assistant", "b", trained=False)))) == ["nothing to train"]
    assert said(pair(A, B, prompt=())) == said(pair(A, B, prompt=(Message("system", "s"),))) == ["empty prompt"]
    assert said(pair(A, B, prompt=(*ASKED, Message("assistant", "x")))) == ["prompt ends with an answer"]
    assert said(pair(A, B, prompt=(Message("user", ""),), text=True)) == []
    assert said(pair(EMPTY, B), "prompts") == []
    assert said(pair(A, B, prompt=(Message("user", " "),), text=True), "prompts") == ["empty prompt"]
    broken = "\ud83d"
    for m in (
        Message("assistant", broken),
        Message("assistant", "x", reasoning=broken),
        Message("assistant", "x", tool_calls=(ToolCall("f", broken),)),
    ):
        assert said(pair(A, response(m))) == ["broken text"]
    assert said(replace(pair(A, B), tools=(broken,))) == ["broken text"]
    # Alike responses are a problem where one is preferred to the other, not where they are tied.
    three = Comparison(ASKED, (A, B, A), ((0, 2), (1,)), 1)
    assert said(three) == [] and said(replace(three, tiers=((0,), (1,), (2,)))) == ["identical responses"]
    assert said(replace(three, tiers=(), labels=(True, True, False)), "labels") == ["identical responses"]
    assert said(PAIR) == [] and said(TIED) == ["only ties"] and said(row(1)) == ["too few responses"]
