"""From votes to rows: what each way of counting gives, worked out by hand; and the figures of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.load import find_sources
from prefopt.data.validate import convert
from prefopt.records import Comparison
from prefopt.studies.export import ExportOptions, StudyRows, export_rows
from prefopt.studies.study import Study
from prefopt.studies.summary import summarise
from prefopt.studies.votes import Vote, record, undo
from studies.small import new_item, new_study, people, say, shown

FIRST, SECOND, TIE = Vote(((0,), (1,)), 2), Vote(((1,), (0,)), 3), Vote(((0, 1),))
BAD, SKIP = Vote(all_bad=True), Vote(skipped="unclear")


def voted(path: Path, votes: Sequence[Sequence[Vote]], count: int = 2, **settings: Any) -> Study:
    """A study in which person p said ``votes[item][p]``."""
    study = new_study(path, len(votes), count, overlap=99, **settings)
    for n, person in enumerate(people(study, *(f"P{n}" for n in range(max(map(len, votes)))))):
        for _ in votes:
            found = shown(study, person)
            if n < len(votes[found.item.id - 1]):
                record(study, person, found.ticket, votes[found.item.id - 1][n])
            else:
                record(study, person, found.ticket, SKIP)
    return study


CASES = [[FIRST, FIRST, SECOND], [TIE, TIE, FIRST], [BAD, BAD, BAD], [FIRST, SECOND], [SECOND], [TIE, TIE]]
CHOSEN: dict[tuple[Any, Any], dict[int, str]] = {
    ("majority", "drop"): {1: "0", 2: "0", 5: "1"},
    ("majority", "half"): {1: "0", 2: "0", 5: "1"},
    ("majority", "keep"): {1: "0", 2: "tie", 5: "1", 6: "tie"},
    ("unanimous", "drop"): {5: "1"},
    ("unanimous", "keep"): {5: "1", 6: "tie"},
    ("every", "drop"): {1: "001", 2: "0", 4: "01", 5: "1"},
}


def test_pairs(tmp_path: Path) -> None:
    study = voted(tmp_path / "s.db", CASES)
    for (disagreement, ties), chosen in CHOSEN.items():
        found = export_rows(study, ExportOptions(form="pairs", disagreement=disagreement, ties=ties))
        best_of: dict[int, str] = {}
        for row in found.rows:
            best = row["responses"][0][0]["content"][-1]
            best_of[row["item"]] = best_of.get(row["item"], "") + ("tie" if len(row["tiers"]) == 1 else best)
        assert best_of == chosen, (disagreement, ties)
        assert found.counts["rows"] == len(found.rows)
        assert found.counts["votes that all responses are bad left out (--all-bad)"] == 3
        assert found.counts["votes used"] == 11 and found.counts["skips left out"] == 4
        assert all(isinstance(c, Comparison) for c in parse_comparisons(found.rows, "rows"))


def test_provenance_tells_who_said_what_of_which_response(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 1)
    (ann,) = people(study, "Ann")
    seen = say(study, ann, 1, 0, strength=3, rationale="why", tags=("style",))
    (row,) = export_rows(study, ExportOptions(form="pairs")).rows
    assert [r[0]["content"] for r in row["responses"]] == ["answer 0.1", "answer 0.0"] and row["tiers"] == [[0], [1]]
    assert row["numbers"] == [1, 0] and row["models"] == ["model-1", "model-0"]
    assert row["sampling"][0] == {"temperature": 1.0, "seed": 1}
    assert (row["source"], row["source_row"], row["study"]) == ("prompts.jsonl", 1, study.settings.id)
    (told,) = row["annotations"]
    assert told["annotator"] == ann.pseudonym and "Ann" not in str(row)
    assert told["shown"] == list(seen.shown) and told["tiers"] == [[1], [0]] and told["strength"] == 3
    assert (told["rationale"], told["tags"]) == ("why", ["style"]) and told["seconds"] >= 0 and "T" in told["at"]


def test_soft_labels_are_shares_of_votes(tmp_path: Path) -> None:
    study = voted(tmp_path / "s.db", CASES)
    rows = {row["item"]: row for row in export_rows(study, ExportOptions(form="soft")).rows}
    assert rows[1]["votes"] == [[0, 1, pytest.approx(2 / 3)], [1, 0, pytest.approx(1 / 3)]]
    assert rows[1]["tiers"] == [[0], [1]] and set(rows) == {1, 2, 4, 5, 6}
    assert rows[2]["votes"] == [[0, 1, pytest.approx(2 / 3)], [1, 0, pytest.approx(1 / 3)]]
    assert rows[4]["votes"] == [[0, 1, 0.5], [1, 0, 0.5]] and rows[4]["tiers"] == [[0, 1]]
    assert rows[5]["votes"] == [[1, 0, 1.0]]
    dropped = {row["item"]: row for row in export_rows(study, ExportOptions(form="soft", ties="drop")).rows}
    assert dropped[2]["votes"] == [[0, 1, 1.0]] and 6 not in dropped
    bad = {row["item"]: row for row in export_rows(study, ExportOptions(form="soft", all_bad="tie")).rows}
    assert bad[3]["votes"] == [[0, 1, 0.5], [1, 0, 0.5]]


def test_votes_can_be_left_out(tmp_path: Path) -> None:
    study = voted(tmp_path / "s.db", CASES)
    with study.reading() as connection:
        names = [row[0] for row in connection.execute("SELECT pseudonym FROM annotator ORDER BY id")]
    found = export_rows(study, ExportOptions(form="pairs", exclude=frozenset(names[:2]), ties="drop"))
    assert {row["item"]: row["responses"][0][0]["content"][-1] for row in found.rows} == {1: "1", 2: "0"}
    found = export_rows(study, ExportOptions(form="pairs", min_votes=3))
    assert [row["item"] for row in found.rows] == [1, 2]
    assert found.counts["items with too few votes left out (--min-votes)"] == 3


def test_rankings_with_ties_partial_orders_and_cycles(tmp_path: Path) -> None:
    order = Vote(((2,), (0, 1)))
    partial = Vote(((1,), (2,)))
    cycle = [Vote(((0,), (1,), (2,))), Vote(((1,), (2,), (0,))), Vote(((2,), (0,), (1,)))]
    study = voted(
        tmp_path / "s.db", [[order], [partial], cycle, [Vote(((0,), (1,), (2,))), Vote(((0,), (2,), (1,)))]], 3
    )
    found = export_rows(study, ExportOptions(form="rankings", ties="keep"))
    rows = {row["item"]: row for row in found.rows}
    assert rows[1]["tiers"] == [[2], [0, 1]]
    assert rows[2]["votes"] == [[1, 2, 1.0]] and "tiers" not in rows[2]
    assert sorted(rows[3]["votes"]) == [[0, 1, 1.0], [1, 2, 1.0], [2, 0, 1.0]]
    assert rows[4]["votes"] == [[0, 1, 1.0], [0, 2, 1.0]]
    assert found.counts["rows whose votes form no order of all responses, written as pairs"] == 3
    pairs = export_rows(study, ExportOptions(form="pairs", ties="drop"))
    assert len([row for row in pairs.rows if row["item"] == 1]) == 2
    soft = {row["item"]: row for row in export_rows(study).rows}
    assert soft[3]["votes"][0] == [0, 1, pytest.approx(2 / 3)] and "tiers" not in soft[3]


def test_a_study_is_read_as_it_is(tmp_path: Path) -> None:
    study = voted(tmp_path / "s.db", CASES)
    (source,) = find_sources([tmp_path / "s.db"])
    reading = open_comparisons(source)
    assert reading.layout == "canonical" and reading.count == 5
    assert [c.extra for c in reading.comparisons] == [{"models": ["model-0", "model-1"]}] * 5
    assert any("votes that all responses are bad left out" in note for note in source.notes)
    pairs = [convert(c, "pairs") for c in reading.comparisons]
    assert [len(c.votes or ()) for c in pairs if isinstance(c, Comparison)] == [2, 2, 2, 1, 2]
    best = [convert(c, "demonstrations") for c in reading.comparisons]
    assert [c.responses[0].text for c in best if isinstance(c, Comparison)][:2] == ["answer 0.0", "answer 1.0"]
    before = source.digest()
    with study.reading() as connection:
        assert connection.execute("SELECT count(*) FROM event").fetchone()[0]
    assert source.digest() == before == StudyRows(tmp_path / "s.db").digest()
    (ann,) = people(study, "P0")
    assert undo(study, ann) and undo(study, ann)
    assert source.digest() != before


def test_the_figures_of_a_study(tmp_path: Path) -> None:
    gold = [new_item(50, gold=((1,), (0,)))]
    study = new_study(tmp_path / "s.db", 3, gold=gold, overlap=2, gold_every=1, title="T")
    ann, bob, _ = people(study, "Ann", "Bob", "Cay")
    says = {ann.id: {1: FIRST, 2: FIRST, 3: TIE, 4: SECOND}, bob.id: {1: FIRST, 2: SECOND, 3: TIE, 4: FIRST}}
    for person in (ann, bob):
        for _ in range(4):
            found = shown(study, person)
            record(study, person, found.ticket, says[person.id][found.item.id], active=2.0)
    s = summarise(study)
    assert (s.title, s.items, s.complete, s.wanted, s.votes) == ("T", 3, 3, 6, 6)
    assert (s.gold_items, s.gold_votes, s.undone, s.skips) == (1, 2, 0, {})
    assert s.answers == {"better": 3, "much better": 1, "tie": 2}
    assert s.raw == pytest.approx(2 / 3) and s.annotator_pairs[0].units == 3
    assert [p.name for p in s.annotators] == ["Ann", "Bob", "Cay"]
    assert [p.gold.value for p in s.annotators[:2]] == [1, 0] and math.isnan(s.annotators[2].gold.value)
    assert [p.agreement for p in s.annotators[:2]] == [pytest.approx(2 / 3)] * 2
    assert s.annotators[0].kappa == s.annotator_pairs[0].kappa == s.kappa
    assert [d.item for d in s.disputed] == [2] and s.disputed[0].disagreement == 1
    assert [(m.name, m.won, m.tied, m.lost) for m in s.models] == [("model-0", 3, 2, 1), ("model-1", 1, 2, 3)]
    assert s.annotators[0].seconds == 2.0 or s.annotators[0].seconds < 2


def test_a_side_that_is_preferred_for_its_place_shows(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 200)
    left, fair = people(study, "Left", "Fair")
    for _ in range(100):
        found = shown(study, left)
        record(study, left, found.ticket, Vote(((found.shown[0],), (found.shown[1],)), 1))
        say(study, fair, 0, 1)
    by_name = {p.name: p.first for p in summarise(study).annotators}
    assert by_name["Left"].value == 1 and by_name["Left"].low > 0.9
    assert by_name["Fair"].low < 0.5 < by_name["Fair"].high
