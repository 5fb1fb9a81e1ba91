"""A study is what was written, or an error says that it is not: bits are flipped all over the file."""

from __future__ import annotations

import random
import sqlite3
import stat
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.errors import StudyError
from prefopt.studies.export import ExportOptions, export_rows
from prefopt.studies.study import Study, backup, check_study_file
from prefopt.studies.votes import undo
from studies.small import new_item, new_study, people, say

FLIPS = 150


def voted(path: Path) -> Path:
    """Votes, skips, ties, an undone vote and a gold item, in one file without a log."""
    with new_study(path, 12, gold=[new_item(90, gold=((0,), (1,)))], overlap=2, gold_every=3) as study:
        for number, person in enumerate(people(study, "Ann", "Bob")):
            for n in range(8):
                say(study, person, *((0, 1) if (n + number) % 3 else (1, 0)), rationale=f"because {n}", tags=("style",))
            undo(study, person)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path


def exported(path: Path) -> object:
    with Study(path, read_only=True) as study:
        found = export_rows(study, ExportOptions(form="pairs"))
    return found.rows, found.counts


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    whole = voted(tmp_path / "s.db")
    data, right = whole.read_bytes(), exported(whole)
    assert check_study_file(whole) == []
    damaged, said = tmp_path / "damaged.db", 0
    draw = random.Random(7)
    for _ in range(FLIPS):
        spoilt = bytearray(data)
        for _ in range(3):
            spoilt[draw.randrange(100, len(data))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(spoilt)
        try:
            assert exported(damaged) == right
        except StudyError as error:
            assert "\n" not in str(error) and str(damaged) in str(error)
            said += 1
    assert said > FLIPS / 4


def test_an_index_that_lies_changes_no_export(tmp_path: Path) -> None:
    """SQLite does not compare an index with its table: each bit of what the indexes of events hold, one by one."""
    whole = voted(tmp_path / "s.db")
    data, right = whole.read_bytes(), exported(whole)
    connection = sqlite3.connect(whole)
    pages = dict(connection.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'index'"))
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    damaged, lied = tmp_path / "damaged.db", 0
    for name in ("event_undone_once", "event_on"):
        page = data[(pages[name] - 1) * size : pages[name] * size]
        first = int.from_bytes(page[5:7], "big")
        for at in range(first, size, max(1, (size - first) // 40)):
            spoilt = bytearray(data)
            spoilt[(pages[name] - 1) * size + at] ^= 1
            damaged.write_bytes(spoilt)
            try:
                assert exported(damaged) == right, (name, at)
            except StudyError:
                continue
            lied += bool(check_study_file(damaged))
    assert lied, "collect check names an index that no longer fits"


CHANGES = {  # a change of the file, and the row that messages name
    "UPDATE event SET body = replace(body, '[[0], [1]]', '[[1], [0]]') WHERE kind = 'vote'": "event",
    "UPDATE event SET kind = 'shown' WHERE id = 2": "event 2",
    "DELETE FROM event WHERE id = 3": "1 rows of its events",
    "DELETE FROM event WHERE id = (SELECT max(id) FROM event)": "1 rows of its events",
    "UPDATE item SET row = replace(row, 'answer', 'Answer') WHERE id = 4": "item 4",
    "DELETE FROM item WHERE id = 5": "1 rows of its items",
    "UPDATE annotator SET pseudonym = 'annotator-0' WHERE id = 1": "annotator 1",
    "UPDATE sampling SET settings = '{}' WHERE id = 1": "sampling 1",
    "UPDATE setting SET value = '\"other\"' WHERE name = 'id'": "setting id",
    "UPDATE item SET gold = NULL": "item 13",
}


def test_a_row_that_was_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voted(tmp_path / "whole.db").read_bytes()
    path = tmp_path / "s.db"
    for change, named in CHANGES.items():
        path.write_bytes(data)
        connection = sqlite3.connect(path)
        connection.executescript(f"DROP TRIGGER event_stays; DROP TRIGGER event_kept; {change};")
        connection.close()
        with pytest.raises(StudyError, match=named):
            exported(path)
        assert main(["collect", "check", str(path)]) == 1, change
        assert named in capsys.readouterr().out
        with pytest.raises(StudyError, match="is damaged"):
            backup(path, tmp_path / "copy.db")
        assert not (tmp_path / "copy.db").exists(), change


def test_votes_are_read_from_events_alone(tmp_path: Path) -> None:
    path = voted(tmp_path / "s.db")
    right = exported(path)
    connection = sqlite3.connect(path)
    connection.executescript("UPDATE assignment SET state = 'lapsed', event = NULL WHERE item = 2")
    connection.close()
    assert exported(path) == right
    assert any("item 2" in line for line in check_study_file(path))


def test_studies_and_copies_are_their_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = voted(tmp_path / "s.db")
    assert main(["collect", "backup", str(path), str(tmp_path / "copy.db")]) == 0
    assert main(["collect", "check", str(tmp_path / "copy.db")]) == 0
    assert "no damage: every item and event is as it was written" in capsys.readouterr().out
    with Study(path) as study:
        people(study, "Cem")
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
