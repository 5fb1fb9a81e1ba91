"""Annotators to look at, items with an overlap of their own, progress, and votes as a table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from scipy.stats import binomtest

from prefopt.cli import main
from prefopt.errors import StudyError
from prefopt.studies.annotators import invite
from prefopt.studies.database import problems, rebuild
from prefopt.studies.items import add_items, for_everyone, items_left, items_seen, next_item
from prefopt.studies.quality import FAST_SECONDS, FEWEST, ONE_SIDE, flags_of
from prefopt.studies.study import Study
from prefopt.studies.summary import summarise
from prefopt.studies.votes import Vote, record, stored_votes, undo
from studies.small import new_item, new_study, people, say, shown


def test_one_side_is_the_exact_test_and_fast_needs_enough_votes() -> None:
    for n in range(1, 40):
        for ahead in range(n + 1):
            expected = n >= FEWEST and binomtest(ahead, n, 0.5).pvalue < ONE_SIDE
            assert ("one side" in flags_of([30.0] * n, ahead, n - ahead)) == expected
    assert flags_of([FAST_SECONDS - 0.1] * FEWEST, 0, 0) == ("fast",)
    assert flags_of([FAST_SECONDS - 0.1] * (FEWEST - 1), 0, 0) == () == flags_of([FAST_SECONDS] * FEWEST, 0, 0)
    # A quarter of what the others take, where that is more.
    assert flags_of([4.9] * 10, 0, 0, [20.0, 30.0, 10.0]) == ("fast",) and not flags_of([5.0] * 10, 0, 0, [20.0])


def test_annotators_who_click_are_flagged_and_those_who_read_are_not(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", items=24, overlap=2)
    clicks, reads = people(study, "Clicks", "Reads")
    for n in range(24):
        for person, seconds in ((clicks, 0.3), (reads, 20.0)):
            found = shown(study, person)
            best = found.shown[0] if person is clicks else n % 2
            vote = Vote(((best,), (1 - best,)), 2)
            record(study, person, found.ticket, vote, active=seconds, at=found.since + seconds)
    flags = {a.name: a.flags for a in summarise(study).annotators}
    assert flags == {"Clicks": ("fast", "one side"), "Reads": ()}


def test_progress_counts_what_is_left_for_an_annotator(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", items=5, gold=[new_item(99, gold=((0,), (1,)))], gold_every=3)
    anna, ben = people(study, "Anna", "Ben")

    def total(person: object) -> tuple[int, int]:
        with study.reading() as connection:
            seen = items_seen(connection, person)
            return seen, seen + items_left(connection, person)

    assert total(anna) == (0, 6)
    for n in range(1, 7):
        say(study, anna, 0, 1)
        assert total(anna) == (n, 6)
    assert next_item(study, anna) is None
    # Each of the five has its one vote; Ben has the gold item alone.
    assert total(ben) == (0, 1)
    say(study, ben, 0, 1)
    assert total(ben) == (1, 1) and next_item(study, ben) is None
    undo(study, anna)
    assert total(anna) == (6, 6)


def test_items_have_an_overlap_of_their_own(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", items=0, overlap=1)
    rows = [new_item(n) for n in range(4)]
    rows = [rows[0], _asking(rows[1], 3), _asking(rows[2], "all"), rows[3]]
    assert add_items(study, rows) == (4, 0)
    # The same items again are duplicates, whatever they ask for now.
    assert add_items(study, [new_item(n) for n in range(4)]) == (0, 4)
    everyone = people(study, "A", "B", "C", "D")
    for person in everyone:
        while next_item(study, person) is not None:
            say(study, person, 0, 1)
    with study.reading() as connection:
        voters: dict[int, set[int]] = {}
        for v in stored_votes(connection):
            voters.setdefault(v.item, set()).add(v.annotator)
        assert {item: len(names) for item, names in voters.items()} == {1: 1, 2: 3, 3: 4, 4: 1}
        assert not list(problems(connection))
        queue = [tuple(row) for row in connection.execute("SELECT item, taken, votes, fresh, overlap FROM queue")]
    summary = summarise(study)
    assert (summary.wanted, summary.votes, summary.complete) == (9, 9, 4)
    late = invite(study, "E")[0]
    assert shown(study, late).item.id == 3
    with study.writing() as connection:
        rebuild(connection)
        again = [tuple(row) for row in connection.execute("SELECT item, taken, votes, fresh, overlap FROM queue")]
    assert again == queue
    with pytest.raises(StudyError, match="overlap is 0; it should be a number of annotators"):
        add_items(study, [_asking(new_item(9), 0)])


def _asking(item: object, overlap: object) -> object:
    from dataclasses import replace

    return replace(item, row={**item.row, "overlap": overlap})


def test_a_fraction_of_the_items_is_for_everyone() -> None:
    items = [new_item(n) for n in range(10)] + [new_item(99, gold=((0,), (1,)))]
    chosen = [n for n, item in enumerate(for_everyone(items, 0.25)) if item.row.get("overlap") == "all"]
    assert len(chosen) == 3 and max(chosen) < 10
    shuffled = for_everyone(items[::-1], 0.25)
    assert {i.row["prompt"][0]["content"] for i in shuffled if "overlap" in i.row} == {f"question {n}" for n in chosen}
    assert for_everyone(items, 0.0) == items
    many = [new_item(n) for n in range(100)]
    assert sum(item.row.get("overlap") == "all" for item in for_everyone(many, 0.07)) == 7
    asking = [_asking(item, "all" if n < 5 else 2) if n < 50 else item for n, item in enumerate(many)]
    found = [item.row.get("overlap") for item in for_everyone(asking, 0.5)]
    assert found[:50] == ["all"] * 5 + [2] * 45 and found[50:].count("all") == 45


def test_votes_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = new_study(tmp_path / "s.db", items=2, count=3, gold=[new_item(99, gold=((0,), (1,)))], gold_every=2)
    anna, ben = people(study, "Anna", "Ben")
    for _ in range(3):
        found = shown(study, anna)
        order = tuple((k,) for k in range(found.item.count))
        record(study, anna, found.ticket, Vote(order, rationale="=1+1" if found.item.gold is None else ""), active=1.5)
    found = shown(study, ben)
    record(study, ben, found.ticket, Vote(skipped="unclear"))
    study.close()
    out = tmp_path / "v.csv"
    assert main(["collect", "export", str(tmp_path / "s.db"), "--form", "votes", "--output", str(out)]) == 0
    assert "4 votes and skips" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\xef\xbb\xbf")
    with out.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["annotator"] == anna.pseudonym]
    assert [row["order"] for row in own] == ["0 > 1 > 2", "0 > 1 > 2", "0 > 1"]
    assert [row["correct"] for row in own] == ["", "", "True"] and own[0]["seconds"] == "1.5"
    # Spreadsheets take no text for a formula.
    assert own[0]["rationale"] == "'=1+1" and own[0]["models"] == "model-0, model-1, model-2"
    assert [row["skipped"] for row in rows if row["annotator"] == ben.pseudonym] == ["unclear"]
    excluded = ["collect", "export", str(tmp_path / "s.db"), "--form", "votes", "--exclude", "Anna", "--overwrite"]
    assert main([*excluded, "--output", str(out)]) == 0 and "1 votes and skips" in capsys.readouterr().out
    assert main(["collect", "export", str(tmp_path / "s.db"), "--output", str(tmp_path / "p.csv")]) == 2
    assert "should end in .jsonl or .parquet" in capsys.readouterr().err
    assert main([*excluded, "--output", str(out), "--ties", "keep"]) == 2
    assert "leave out --ties" in capsys.readouterr().err


def test_a_study_of_the_version_before_gets_the_column_and_keeps_its_digests(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", items=2)
    (anna,) = people(study, "Anna")
    say(study, anna, 0, 1)
    with study.writing() as connection:
        connection.execute("ALTER TABLE queue DROP COLUMN overlap")
        connection.execute("UPDATE item SET file = 'changed' WHERE id = 2")
        connection.execute("PRAGMA user_version = 3")
    study.close()
    with Study(tmp_path / "s.db") as opened:
        assert opened.version == 4
        with opened.reading() as connection:
            assert list(problems(connection)) == ["item 2 was changed after it was written"]
