"""The store: what is acknowledged stays, what is appended is never changed, what follows from it can be made again."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest

from prefopt.errors import StudyError
from prefopt.studies.annotators import (
    close_session,
    invite,
    invited,
    live_invitations,
    open_session,
    revoke,
    session_of,
)
from prefopt.studies.database import APPLICATION_ID, VERSION, rebuild
from prefopt.studies.export import export_rows
from prefopt.studies.items import add_items, next_item, order_shown
from prefopt.studies.study import Study, StudySettings, backup
from prefopt.studies.votes import RefusedVote, Vote, latest_ticket, record, stored_votes, undo
from studies.small import new_item, new_study, people, say, shown


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return new_study(tmp_path / "s.db", overlap=2)


def in_force(study: Study) -> list[tuple[int, int, Vote]]:
    with study.reading() as connection:
        return [(j.annotator, j.item, j.vote) for j in stored_votes(connection)]


def test_a_vote_is_stored_once_however_often_it_is_sent(study: Study) -> None:
    (ann,) = people(study, "Ann")
    seen = shown(study, ann)
    assert shown(study, ann) == seen  # resumed: the same item, the same order, the same ticket
    vote = Vote(((1,), (0,)), 3, rationale="shorter", tags=("style",))
    assert record(study, ann, seen.ticket, vote, active=0.5) == "stored"
    assert record(study, ann, seen.ticket, vote) == "already stored"
    assert record(study, ann, seen.ticket, Vote(((0,), (1,)), 1)) == "already stored"
    assert in_force(study) == [(ann.id, seen.item.id, vote)]
    with study.reading() as connection:
        (j,) = stored_votes(connection)
    assert j.shown == seen.shown and j.active == 0.5 and 0 <= j.seconds < 60
    assert shown(study, ann).item.id != seen.item.id


def test_a_ticket_of_another_or_of_nobody_is_refused(study: Study) -> None:
    ann, bob = people(study, "Ann", "Bob")
    seen = shown(study, ann)
    for person, ticket in ((bob, seen.ticket), (ann, "made up"), (ann, "")):
        with pytest.raises(RefusedVote, match="out of date"):
            record(study, person, ticket, Vote(((0,), (1,))))
    assert not in_force(study)


INVALID = [
    Vote(),
    Vote(((0,),)),
    Vote(((0,), (0,))),
    Vote(((0,), (2,))),
    Vote(((0,), (-1,))),
    Vote(((0,), (), (1,))),
    Vote(((0, 1),), strength=1),
    Vote(((0,), (1,)), strength=4),
    Vote(((0,), (1,)), skipped="unclear"),
    Vote(skipped="  "),
    Vote(((0,), (1,)), rationale="x" * 4001),
    Vote(((0,), (1,)), tags=("x",) * 21),
]


def test_an_invalid_vote_is_refused(study: Study) -> None:
    (ann,) = people(study, "Ann")
    seen = shown(study, ann)
    for vote in INVALID:
        with pytest.raises(RefusedVote):
            record(study, ann, seen.ticket, vote)
    assert not in_force(study) and shown(study, ann) == seen


def test_undo_is_a_new_event_and_the_item_comes_back(study: Study) -> None:
    (ann,) = people(study, "Ann")
    first, second = say(study, ann, 0, 1), say(study, ann, 1, 0)
    with study.reading() as connection:
        ticket = latest_ticket(connection, ann)
    assert ticket == second.ticket
    assert undo(study, ann, ticket) and not undo(study, ann, ticket)  # the same request twice undoes one vote
    again = shown(study, ann)
    assert again.item == second.item and again.shown == second.shown and again.ticket != second.ticket
    with pytest.raises(RefusedVote):
        record(study, ann, second.ticket, Vote(((0,), (1,))))
    assert undo(study, ann) and {v[1] for v in in_force(study)} == set()
    kinds = [row[0] for row in study.connection.execute("SELECT kind FROM event ORDER BY id")]
    assert kinds == ["shown", "vote", "shown", "vote", "undo", "undo"]
    assert shown(study, ann).item == first.item and not undo(study, ann)


def test_events_are_never_changed(study: Study) -> None:
    (ann,) = people(study, "Ann")
    say(study, ann, 0, 1)
    for change in ("UPDATE event SET body = '{}'", "DELETE FROM event"):
        with pytest.raises(sqlite3.IntegrityError, match="never"), study.writing() as connection:
            connection.execute(change)
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), study.writing() as connection:
        connection.execute(
            "INSERT INTO event (at, annotator, item, kind, ticket, body) VALUES ('', 9, 9, 'vote', '', '')"
        )


def test_every_item_is_judged_by_as_many_as_were_asked_for(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 30, overlap=3)
    crowd = people(study, *(f"P{n}" for n in range(7)))
    draw, active = random.Random(1), list(crowd)
    while active:
        person = draw.choice(active)
        if next_item(study, person) is None:
            active.remove(person)
        else:
            say(study, person, 0, 1)
    counts = Counter(item for _, item, _ in in_force(study))
    assert len(counts) == 30 and set(counts.values()) == {3}
    assert len({(a, i) for a, i, _ in in_force(study)}) == 90


def test_items_that_others_began_come_first(study: Study) -> None:
    ann, bob, cay = people(study, "Ann", "Bob", "Cay")
    assert [say(study, ann, 0, 1).item.id for _ in range(2)] == [1, 2]
    assert [say(study, bob, 0, 1).item.id for _ in range(3)] == [1, 2, 3]
    assert shown(study, cay).item.id == 3


def test_what_is_left_unanswered_goes_to_others_and_is_no_loss(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 1, overlap=1, lease=100.0)
    ann, bob = people(study, "Ann", "Bob")
    left = next_item(study, ann, at=1000.0)
    assert left is not None and next_item(study, bob, at=1050.0) is None
    late = next_item(study, bob, at=1101.0)
    assert late is not None and late.item == left.item
    assert record(study, ann, left.ticket, Vote(((0,), (1,)), 1), at=1200.0) == "stored"
    assert record(study, bob, late.ticket, Vote(((0,), (1,)), 1), at=1200.0) == "stored"
    assert len(in_force(study)) == 2


def test_a_skipped_item_goes_to_another(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 1, overlap=1)
    ann, bob = people(study, "Ann", "Bob")
    seen = shown(study, ann)
    assert next_item(study, bob) is None
    record(study, ann, seen.ticket, Vote(skipped="unclear"))
    assert next_item(study, ann) is None and say(study, bob, 0, 1).item == seen.item
    assert undo(study, ann)  # the place is taken; a vote of hers counts all the same
    assert say(study, ann, 1, 0).item == seen.item and len(in_force(study)) == 2


def test_gold_items_come_to_everybody_at_places_nobody_can_guess(tmp_path: Path) -> None:
    golden = [new_item(100 + n, gold=((1,), (0,))) for n in range(3)]
    study = new_study(tmp_path / "s.db", 30, gold=golden, overlap=2, gold_every=5)
    places = []
    for person in people(study, "Ann", "Bob"):
        seen = [say(study, person, 0, 1).item for _ in range(25)]
        places.append([n for n, item in enumerate(seen) if item.gold])
        assert len(places[-1]) == 3 and [n // 5 for n in places[-1]] == [0, 1, 2]
    assert places[0] != places[1]


def test_sides_are_drawn_for_each_person_and_item() -> None:
    orders = Counter(order_shown("seed", person, item, 3) for person in range(20) for item in range(300))
    assert len(orders) == 6 and max(orders.values()) < 1.15 * min(orders.values())
    assert order_shown("seed", 1, 2, 4) == order_shown("seed", 1, 2, 4)
    assert len({order_shown(seed, 1, 2, 9) for seed in "abc"}) == 3


STATE = (
    "SELECT annotator, item, CASE state WHEN 'pending' THEN 'lapsed' ELSE state END, ticket, shown, event"
    " FROM assignment ORDER BY 1, 2"
)


def test_all_that_is_derived_follows_from_the_events(tmp_path: Path) -> None:
    golden = [new_item(100 + n, gold=((1,), (0,))) for n in range(4)]
    study = new_study(tmp_path / "s.db", 12, 3, overlap=2, gold=golden)
    crowd, draw = people(study, "Ann", "Bob", "Cay"), random.Random(5)
    for _ in range(120):
        person = draw.choice(crowd)
        found = next_item(study, person)
        if found is None or draw.random() < 0.25:
            undo(study, person)
        elif draw.random() < 0.2:
            record(study, person, found.ticket, Vote(skipped="unclear"))
        elif draw.random() < 0.9:
            record(study, person, found.ticket, Vote(tuple((k,) for k in draw.sample(range(found.item.count), 2))))
    before = [tuple(row) for row in study.connection.execute(STATE)]
    votes = "SELECT item, votes FROM queue ORDER BY item"
    counted = [tuple(row) for row in study.connection.execute(votes)]
    said = in_force(study)
    with study.writing() as connection:
        rebuild(connection)
    assert [tuple(row) for row in study.connection.execute(STATE)] == before
    assert [tuple(row) for row in study.connection.execute(votes)] == counted
    assert in_force(study) == said
    while any(next_item(study, p) for p in crowd):  # and it can be gone on with, to the end
        for person in crowd:
            if found := next_item(study, person):
                record(study, person, found.ticket, Vote(tuple((k,) for k in range(found.item.count))))
    short = "SELECT votes + (SELECT count(*) FROM assignment a WHERE a.item = queue.item AND state = 'skipped')"
    left = [row[0] for row in study.connection.execute(short + " FROM queue WHERE votes < 2")]
    assert set(left) <= {3}  # nobody is left who did not skip it


def test_fifty_people_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 40, overlap=5)
    crowd = people(study, *(f"P{n}" for n in range(50)))
    told: Counter[tuple[int, int]] = Counter()

    def work(person: object) -> None:
        while (found := next_item(study, person)) is not None:  # type: ignore[arg-type]
            record(study, person, found.ticket, Vote(((0,), (1,)), 1))  # type: ignore[arg-type]
            told[person.id, found.item.id] += 1  # type: ignore[attr-defined]

    threads = [threading.Thread(target=work, args=(person,)) for person in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter((a, i) for a, i, _ in in_force(study)) == told
    assert set(Counter(i for _, i in told).values()) == {5} and len(told) == 200


def test_connections_do_not_pile_up_with_threads(study: Study) -> None:
    (ann,) = people(study, "Ann")
    for _ in range(30):
        thread = threading.Thread(target=next_item, args=(study, ann))
        thread.start()
        thread.join()
    assert len(study._all) <= 2


def test_what_fails_within_a_transaction_leaves_nothing(study: Study) -> None:
    with pytest.raises(ZeroDivisionError), study.writing() as connection:
        connection.execute("INSERT INTO sampling (settings) VALUES ('x')")
        raise ZeroDivisionError
    assert not study.connection.in_transaction
    assert study.connection.execute("SELECT count(*) FROM sampling WHERE settings = 'x'").fetchone()[0] == 0


# -- people ----------------------------------------------------------------------------------------------------


def test_invitations_are_exchanged_for_sessions_and_stored_as_hashes(study: Study) -> None:
    ann, secret = invite(study, "  Ann   Lee ", lead=True)
    assert (ann.name, ann.lead) == ("Ann Lee", True) and invited(study, secret) == ann
    session = open_session(study, secret)
    assert session is not None and session_of(study, session) == ann
    again, other = invite(study, "Ann Lee")
    assert again == ann and other != secret
    assert invited(study, secret) is None and open_session(study, secret) is None
    assert session_of(study, session) == ann  # a new link ends no session
    raw = study.path.read_bytes() + study.path.with_name("s.db-wal").read_bytes()
    assert other.encode() not in raw and session.encode() not in raw
    close_session(study, session)
    assert session_of(study, session) is None and session_of(study, "") is None and session_of(study, "\ud800") is None


def test_invitations_end(study: Study) -> None:
    _, old = invite(study, "Ann", days=-1)
    assert invited(study, old) is None and open_session(study, old) is None and live_invitations(study) == 0
    _, secret = invite(study, "Ann")
    session = open_session(study, secret)
    assert live_invitations(study) == 1
    revoke(study, "Ann")
    assert session is not None and session_of(study, session) is None and live_invitations(study) == 0
    with pytest.raises(StudyError, match=r"'Bob'.*Ann"):
        revoke(study, "Bob")
    for name in ("", "  ", "x" * 81, "a\x00b"):
        with pytest.raises(StudyError, match="is not a name"):
            invite(study, name)


# -- files -----------------------------------------------------------------------------------------------------


def old_study(path: Path) -> Path:
    with sqlite3.connect(path) as connection:
        connection.executescript((Path(__file__).parent / "version1.sql").read_text("utf-8"))
        connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1;")
    connection.close()
    return path


def test_a_study_of_an_older_version_opens_with_all_its_votes(tmp_path: Path) -> None:
    path = old_study(tmp_path / "old.db")
    said = [(1, 1, Vote(((0,), (1,)), 2)), (2, 1, Vote(((1,), (0,)), 3)), (1, 2, Vote(((1,), (0,)), 1))]
    with Study(path, read_only=True) as study:  # read as it is
        assert export_rows(study).counts["votes used"] == 3
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0] == 1
    with Study(path) as study:
        assert study.settings.title == "An older study" and study.version == VERSION
        assert [v for v in in_force(study) if v[2].skipped is None] == said
        ann = next(p for p in (session for session in people(study, "Ann")) if p.id == 1)
        (bob,) = people(study, "Bob")
        assert shown(study, bob).ticket == "t6"  # what was on the page is there again
        record(study, bob, "t6", Vote(((0,), (1,)), 1))
        assert shown(study, ann).item.id == 3  # begun by another, so it goes before the gold item
        assert undo(study, ann) and shown(study, ann).item.id == 2


def test_a_failed_migration_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_study(tmp_path / "old.db")
    monkeypatch.setattr("prefopt.studies.database.rebuild", lambda connection: connection.execute("SELECT no"))
    with pytest.raises(StudyError, match="no such column: no"):
        Study(path)
    monkeypatch.undo()
    with Study(path) as study:
        assert len(in_force(study)) == 4


def test_files_that_are_no_study_are_refused_in_one_line(tmp_path: Path) -> None:
    new_study(tmp_path / "newer.db").close()
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE t (x)")
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("a,b\n1,2\n")
    (tmp_path / "folder").mkdir()
    damaged = new_study(tmp_path / "damaged.db", 200)
    damaged.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damaged.close()
    data = (tmp_path / "damaged.db").read_bytes()
    (tmp_path / "damaged.db").write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    expected = {
        "none.db": "no such study; make one with prefopt collect new",
        "folder": "is a folder",
        "empty.db": "is empty",
        "text.db": "is not an SQLite file",
        "other.db": "not a study",
        "newer.db": f"is a study of version 99, newer than {VERSION}; update prefopt",
        "damaged.db": "is damaged",
    }
    for name, said in expected.items():
        for read_only in (False, True):
            with pytest.raises(StudyError) as error:
                Study(tmp_path / name, read_only=read_only)
            assert str(error.value).startswith(f"{tmp_path / name}: ") and said in str(error.value)
            assert "\n" not in str(error.value)


def test_a_study_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_text("mine")
    with pytest.raises(StudyError, match="exists"):
        Study.create(tmp_path / "s.db", StudySettings())
    assert (tmp_path / "s.db").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db")
    (ann,) = people(study, "Ann")
    kept, seen = say(study, ann, 0, 1), shown(study, ann)
    pages = study.connection.execute("PRAGMA page_count").fetchone()[0]
    study.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StudyError, match=r"disk is full.*free some space"):
        for n in range(100):
            add_items(study, [new_item(1000 + n, prompt="x" * 5000 + str(n))])
    with pytest.raises(StudyError, match="the disk is full"):
        record(study, ann, seen.ticket, Vote(((0,), (1,)), rationale="y" * 4000))
    assert [v[1] for v in in_force(study)] == [kept.item.id]
    study.connection.execute("PRAGMA max_page_count = 100000")
    assert record(study, ann, seen.ticket, Vote(((0,), (1,)))) == "stored"


def test_a_backup_while_votes_come_in_is_whole(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", 300, overlap=1)
    (ann,) = people(study, "Ann")
    done = threading.Event()

    def work() -> None:
        while not done.is_set() and next_item(study, ann):
            say(study, ann, 0, 1)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for n in range(5):
            acknowledged = len(in_force(study))
            backup(study.path, tmp_path / f"copy{n}.db")
            with Study(tmp_path / f"copy{n}.db") as copy:
                assert acknowledged <= len(in_force(copy)) <= len(in_force(study))
    finally:
        done.set()
        worker.join()
    with pytest.raises(StudyError, match="exists"):
        backup(study.path, tmp_path / "copy0.db")
    with pytest.raises(StudyError, match="no such study"):
        backup(tmp_path / "none.db", tmp_path / "copy9.db")
    names = {path.name for path in tmp_path.iterdir()}
    assert not any(name.startswith(".") for name in names)


def test_the_same_item_is_added_once(study: Study) -> None:
    again = [new_item(0), new_item(77), new_item(0, gold=((0,), (1,)))]
    assert add_items(study, again) == (2, 1)
    odd = new_item(5)
    odd.row["prompt"][0]["content"] = "half \ud800"  # type: ignore[index]
    assert add_items(study, [odd]) == (1, 0)
    with study.reading() as connection:
        text = connection.execute("SELECT row FROM item ORDER BY id DESC LIMIT 1").fetchone()[0]
    assert json.loads(text) == odd.row
    with pytest.raises(StudyError, match="has 10 responses; an item has 2 to 9"):
        add_items(study, [new_item(200), new_item(201, 10)])
    assert study.connection.execute("SELECT count(*) FROM item").fetchone()[0] == 7  # all or none
