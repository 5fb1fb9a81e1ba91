"""Repeats and contradictions, against a comparison of every row with every other."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.audit.statistics import Duplicates
from prefopt.records import Comparison, Message, Response, tiers_of


@st.composite
def rows(draw: st.DrawFn) -> Comparison:
    """Few prompts, few responses: much comes again."""
    texts = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3))
    sides = tuple(Response((Message("assistant", draw(st.sampled_from(["", " "])) + text),)) for text in texts)
    said: dict[str, Any] = {"tiers": ()}
    match draw(st.sampled_from(["tiers", "labels", "votes"])):
        case "tiers":
            said["tiers"] = tiers_of([draw(st.integers(0, 1)) for _ in texts])
        case "labels":
            said["labels"] = tuple(draw(st.booleans()) for _ in texts)
        case _:
            pairs = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
            chosen = draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
            said["votes"] = tuple((*pair, 1.0) for pair in chosen)
    return Comparison((Message("user", draw(st.sampled_from("pq"))),), sides, row=1, **said)


def claims(c: Comparison) -> set[tuple[str, str]]:
    """(better, worse) by words, those that a row says both ways left out as far as they cancel."""
    words = [r.text.strip() for r in c.responses]
    weights = [v[2] for v in c.votes] if c.votes is not None else [1.0] * len(c.pairs)
    said = [(words[i], words[j], weight) for (i, j), weight in zip(c.pairs, weights, strict=True)]
    said += [(word, "", 1.0) if good else ("", word, 1.0) for word, good in zip(words, c.labels or (), strict=False)]
    margin: dict[tuple[str, str], float] = {}
    for a, b, weight in said:
        margin[a, b] = margin.get((a, b), 0) + weight
    return {(a, b) for (a, b), weight in margin.items() if a != b and weight > margin.get((b, a), 0)}


def judgement(c: Comparison) -> Any:
    """Prompt, and each response with what is said of it, in any order."""
    standing = []
    for k, r in enumerate(c.responses):
        tier = next((t for t, tier in enumerate(c.tiers) if k in tier), None)
        votes = c.votes or ()
        counts = sum(b == k for b, *_ in votes), sum(w == k for _, w, _ in votes)
        standing.append((r.text.strip(), str(tier), str(c.labels and c.labels[k]), counts))
    return c.prompt[0].content, sorted(standing)


@settings(max_examples=150)
@given(st.lists(rows(), max_size=12))
def test_duplicates_are_those_that_comparing_all_rows_finds(found: list[Comparison]) -> None:
    seen = Duplicates()
    for c in found:
        seen.add(c, source=0)
    first = [next(i for i, d in enumerate(found) if judgement(d) == judgement(c)) for c in found]
    assert seen.duplicates() == [(i, f) for i, f in enumerate(first) if f != i]
    against = {}
    for i, c in enumerate(found):
        opposite = {(b, a) for a, b in claims(c)}
        others = [j for j, d in enumerate(found) if j != i and d.prompt == c.prompt and claims(d) & opposite]
        if others:
            against[i] = others
    contradictions = dict(seen.contradictions())
    assert contradictions.keys() == against.keys()
    assert all(other in against[i] for i, other in contradictions.items())
    assert len(set(seen.prompts.tolist())) == len({c.prompt for c in found})


@given(st.lists(rows(), max_size=6), st.lists(rows(), max_size=6))
def test_prompts_in_common(mine: list[Comparison], theirs: list[Comparison]) -> None:
    one, other = Duplicates(), Duplicates()
    for c in mine:
        one.add(c, source=0)
    for c in theirs:
        other.add(c, source=0)
    prompts = [c.prompt for c in theirs]
    assert one.prompts_of(other) == [(i, prompts.index(c.prompt)) for i, c in enumerate(mine) if c.prompt in prompts]
