"""Which layout rows have: from all of them, by precedence, or as a person or a dataset_info.json says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.comparisons import open_comparisons, parse_comparisons, read_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts import LAYOUTS, REPLACED, named_layout
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, Message

ROWS = {name: dict(layout.example) for name, layout in LAYOUTS.items()}
PAIR, TEXT = ROWS["sharegpt-ranking"], ROWS["preference-text"]


def layout_of(*rows: Any, **options: Any) -> str:
    return parse_comparisons(list(rows), "f", **options).layout


# Rows that have the fields of several layouts, and what is meant.
BOTH = [
    (TEXT | {"messages": ROWS["messages"]["messages"]}, "preference-text"),
    (ROWS["preference-chat"] | {"label": True, "completion": "x"}, "preference-chat"),
    (ROWS["canonical"] | {"chosen": "a", "rejected": "b"}, "preference-chat"),
    (ROWS["canonical"] | {"order": [0, 1, 2]}, "k-wise"),
    (ROWS["alpaca-ranking"] | {"output": "x"}, "alpaca-ranking"),
    (ROWS["kto"] | {"prompt": "x"}, "kto"),
    (ROWS["messages"] | {"prompt": "x", "text": "y"}, "messages"),
    (ROWS["completion-text"] | {"text": "y"}, "completion-text"),
    (ROWS["prompt-text"] | {"text": "y"}, "raw-text"),
    (ROWS["implicit-text"] | {"messages": []}, "messages-ranking"),
    (ROWS["question-answer"] | {"model": {"solution": "s", "is_correct": True}}, "solutions"),
    (ROWS["alpaca"] | {"completions": [{"response": "a", "score": 1}]}, "ultrafeedback"),
    (TEXT | {"chosen": [], "rejected": []}, "ultrafeedback-binarized"),
    (TEXT | {"prompt": []}, "preference-chat"),
]


def test_rows_that_fit_two_layouts_are_decided_by_precedence() -> None:
    for row, meant in BOTH:
        assert layout_of(row) == meant
        assert layout_of(dict(reversed(row.items()))) == meant


def test_null_counts_as_absent_and_order_of_rows_says_nothing() -> None:
    sparse = {**PAIR, "prompt": None, "messages": None, "label": None}
    assert layout_of(sparse, PAIR) == layout_of(PAIR, sparse) == "sharegpt-ranking"
    # A row that lacks a field is a bad row of its file, wherever it stands, though alone it would be something else.
    bad = {"conversations": PAIR["conversations"], "chosen": None, "rejected": None}
    assert layout_of(bad) == "sharegpt"
    for rows in ([bad, PAIR, PAIR], [PAIR, PAIR, bad]):
        reading = parse_comparisons(rows, "f")
        assert reading.layout == "sharegpt-ranking"
        (problem,) = reading.problems
        assert problem.kind == "missing field" and problem.what == "lacks chosen, rejected"
    lacking = parse_comparisons([ROWS["unpaired-text"], ROWS["completion-text"], ROWS["prompt-text"]], "f")
    assert [p.what for p in lacking.problems] == ["lacks label", "lacks completion, label"]


MIXED = [
    ("preference-text", "sharegpt-ranking"),
    ("preference-chat", "preference-text"),
    ("hh", "implicit-text"),
    ("kto", "unpaired-chat"),
    ("alpaca", "question-answer"),
]


def test_mixed_layouts_are_refused_with_the_rows() -> None:
    for one, other in MIXED:
        rows = [ROWS[one]] * 12 + [ROWS[other]]
        with pytest.raises(DataError) as caught:
            parse_comparisons(rows, "f")
        said = str(caught.value)
        assert f"f: mixes layouts ({one}: 12 from row 1; {other}: 1 from row 13)" in said
        assert "--format" in said and "\n" not in said
        reading = parse_comparisons(rows, "f", format=one)
        assert (reading.layout, reading.count, [p.row for p in reading.problems]) == (one, 13, [13])


UNKNOWN: list[tuple[list[Any], str]] = [
    ([], "f: holds no rows"),
    ([3], "row 1: unknown layout: it is a number"),
    ([{"a": 1}], "row 1 has a; prefopt data layouts lists them all"),
    ([{}], "has no fields"),
    ([{"prompt": "a", "rejected": "b"}], "preference-text needs chosen as well"),
    (
        [{"input": "q", "chosen": "a", "rejected": "b"}],
        "has input, chosen, rejected; alpaca-ranking needs instruct",
    ),
    ([{"prompt": "q", "answers": ["a"]}], "unknown layout"),
    ([{f"c{i}": i for i in range(30)}], "c19, ... (30 in all)"),
]


def test_rows_of_no_layout_are_one_line_that_says_what_is_near() -> None:
    for rows, message in UNKNOWN:
        with pytest.raises(DataError) as caught:
            parse_comparisons(rows, "f")
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_named_layout_is_taken_at_its_word() -> None:
    row = TEXT | {"instruction": "q"}
    assert layout_of(row) == "alpaca-ranking"
    assert layout_of(row, format="preference-text") == layout_of(row, format="Preference Text") == "preference-text"
    for gone, remedy in REPLACED.items():
        with pytest.raises(ConfigError, match=f"no layout {gone} any more; {re.escape(remedy)}"):
            named_layout(gone)
    assert all(any(name in remedy.split() for name in LAYOUTS) for remedy in REPLACED.values())
    with pytest.raises(ConfigError, match=r"'preference-txt' is not a layout; did you mean preference-text\?"):
        layout_of(row, format="preference-txt")
    with pytest.raises(DataError, match="hh needs chosen, rejected as well"):
        layout_of(ROWS["alpaca"], format="hh")


def test_columns_and_roles_by_another_name() -> None:
    row = {"q": "2 + 2?", "good": "4", "bad": "22", "prompt": "not this"}
    pairs = ["prompt=q", "chosen=good", "rejected=bad"]
    reading = parse_comparisons([row], "f", columns=pairs)
    (found,) = reading.comparisons
    assert reading.layout == "preference-text" and found.prompt[0].content == "2 + 2?"
    assert reading.notes == ["f: columns not read: prompt"] and found.extra == {}
    asked = parse_comparisons([row], "f", format="alpaca-ranking", columns=pairs)
    assert asked.comparisons[0].prompt == (Message("user", "2 + 2?"),) and not asked.comparisons[0].text
    # LLaMA-Factory's words; only the layouts that know them all are candidates.
    words = parse_comparisons([row | {"sys": "be kind"}], "f", columns=["prompt=q", "response=good", "system=sys"])
    assert words.layout == "alpaca" and words.comparisons[0].prompt[0] == Message("system", "be kind")
    talk = [{"who": "me", "says": "q"}, {"who": "it", "says": "a"}, {"who": "human", "says": "r"}]
    tags = ["messages=talk", "role_tag=who", "content_tag=says", "user_tag=me", "assistant_tag=it"]
    (turns,) = parse_comparisons([{"talk": talk[:2]}], "f", columns=tags).comparisons
    assert [m.role for m in (*turns.prompt, *turns.responses[0].messages)] == ["user", "assistant"]
    swapped = ["user_tag=assistant", "assistant_tag=user"]
    (turns,) = parse_comparisons([ROWS["messages"]], "f", columns=swapped).comparisons
    assert not turns.prompt and [m.role for m in turns.responses[0].messages] == ["assistant", "user"]
    calls = [{"from": "human", "value": "q"}, {"from": "fn", "value": '{"name": "f", "arguments": {}}'}]
    (turns,) = parse_comparisons([{"conversations": calls}], "f", columns=["function_tag=fn"]).comparisons
    assert turns.responses[0].messages[0].tool_calls[0].name == "f"


REFUSED: list[tuple[list[str], dict[str, Any], type[Exception], str]] = [
    (["prompt"], {}, ConfigError, "should be NAME=COLUMN"),
    (["promt=q"], {}, ConfigError, "knows no 'promt'; did you mean prompt?"),
    (["prompt=q", "prompt=r"], {}, ConfigError, "gives prompt twice"),
    (
        ["prompt=q"],
        {},
        DataError,
        "no row has the column q, --columns prompt=q; there are prompt, chosen, rejected",
    ),
    (["completions=chosen", "label=rejected"], {}, ConfigError, "no layout has completions and label together"),
    (["label=chosen"], {"format": "preference-text"}, ConfigError, "preference-text rows have no such column"),
]


def test_columns_that_cannot_be_meant_are_refused() -> None:
    for columns, options, error, message in REFUSED:
        with pytest.raises(error) as caught:
            layout_of(TEXT, columns=columns, **options)
        assert message in str(caught.value)


def registry(folder: Path, **entries: Any) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries), "utf-8")


def test_a_dataset_info_beside_the_file_says_how_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    talk = [{"role": "person", "content": "q"}, {"role": "bot", "content": "a"}]
    path.write_text(json.dumps([{"talk": talk, "good": True, "sys": "s", "text": "t"}]), "utf-8")
    assert read_comparisons(path).layout == "raw-text"
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "person", "assistant_tag": "bot"}
    columns = {"messages": "talk", "kto_tag": "good", "system": "sys", "images": "pictures"}
    mine = {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    registry(tmp_path, other={"file_name": "b.json"}, mine=mine)
    reading = read_comparisons(path)
    (found,) = reading.comparisons
    assert reading.layout == "kto" and found.labels == (True,)
    assert found.prompt == (Message("system", "s"), Message("user", "q"))
    assert reading.notes == [
        f"{path}: read as kto, by the entry mine of dataset_info.json beside it",
        f"{path}: columns not read: text",
    ]
    # What a person says goes before it.
    (source,) = find_sources([path])
    assert open_comparisons(source, format="raw-text").notes == [f"{path}: columns not read: talk, good, sys"]
    (problem,) = open_comparisons(source, columns=["user_tag=bot", "assistant_tag=person"]).comparisons
    assert problem.responses[0].messages == ()
    with pytest.raises(DataError, match="no row has the column nowhere"):
        open_comparisons(source, columns=["kto_tag=nowhere"])


def test_pictures_that_a_dataset_info_names_are_refused_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS["alpaca"] | {"pics": ["a.png"]}, ROWS["alpaca"] | {"pics": []}]), "utf-8")
    registry(tmp_path, mine={"file_name": "rows.json", "columns": {"images": "pics"}})
    assert [p.row for p in read_comparisons(path).problems] == [1]


ENTRIES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, ROWS["alpaca"], "alpaca"),
    ({"ranking": True}, ROWS["alpaca-ranking"], "alpaca-ranking"),
    ({"columns": {"kto_tag": "kto_tag"}}, ROWS["alpaca-kto"], "alpaca-kto"),
    ({"columns": {"prompt": "text"}}, ROWS["raw-text"], "raw-text"),
    ({"columns": {"prompt": "q", "response": "a"}}, {"q": "x", "a": "y"}, "alpaca"),
    ({"formatting": "sharegpt"}, ROWS["sharegpt"], "sharegpt"),
    ({"formatting": "openai", "columns": {"messages": "messages"}}, ROWS["messages"], "sharegpt"),
    ({"formatting": "sharegpt", "ranking": True}, PAIR, "sharegpt-ranking"),
]


def test_entries_of_dataset_info(tmp_path: Path) -> None:
    for entry, row, layout in ENTRIES:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row), "utf-8")
        registry(tmp_path, mine={"file_name": path.name, **entry})
        reading = read_comparisons(path)
        assert reading.layout == layout and not reading.problems


def test_dataset_infos_that_say_nothing_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TEXT), "utf-8")
    for text in ("{", "[]", '{"features": {}}', json.dumps({"a": {"file_name": "other.json"}}), "\udcff"):
        (tmp_path / "dataset_info.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert read_comparisons(path).notes == []
    (tmp_path / "dataset_info.json").write_text(f'{{"a": {{"file_name": "{path.name}",}}}}', "utf-8")
    with pytest.raises(DataError, match=r"dataset_info.json: is not JSON \(.*line 1.*names rows.jsonl.*--format"):
        read_comparisons(path)
    (source,) = find_sources([path])
    assert not open_comparisons(source, format="preference-text").problems
    registry(tmp_path, a={"file_name": path.name, "formatting": "sharegtp"})
    with pytest.raises(DataError, match=r"has the formatting 'sharegtp' \(entry a\).*one of alpaca, sharegpt, openai"):
        read_comparisons(path)
    registry(tmp_path, a={"file_name": path.name}, b={"file_name": path.name, "ranking": True})
    with pytest.raises(DataError, match="two entries for it, a and b; give --format"):
        read_comparisons(path)
    registry(tmp_path, a={"file_name": path.name, "formatting": "sharegpt"})
    with pytest.raises(DataError, match=r"needs conversations as well; read as sharegpt.*entry a.*--format"):
        read_comparisons(path)


def test_tables_of_text_write_labels_and_numbers_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nq,a,TRUE\nq,b,false\nq,c,2\nq,,true\n", "utf-8")
    reading = read_comparisons(path)
    assert [c.labels for c in reading.comparisons] == [(True,), (False,)]
    assert [(p.row, p.what) for p in reading.problems] == [
        (3, reading.problems[0].what),
        (4, "lacks completion"),
    ]
    assert "label is text, '2', not true or false" in reading.problems[0].what
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,9,1.5\nq,a,b,,\nq,a,b,x,1\n", "utf-8")
    reading = read_comparisons(path)
    assert [c.scores for c in reading.comparisons] == [(9.0, 1.5), None]
    assert [(p.row, p.what) for p in reading.problems] == [(3, "score_chosen is 'x', not a number")]
    path.write_text('prompt,responses,scores\nq,"[""a"", ""b""]","[1, 2]"\n', "utf-8")
    assert read_comparisons(path).comparisons[0].tiers == ((1,), (0,))
    assert parse_comparisons([ROWS["kto"] | {"label": "true"}], "f").comparisons[0].labels == (True,)


def test_rows_are_streamed_and_read_anew_by_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(TEXT), "{", json.dumps(TEXT | {"chosen": 3})]), "utf-8")
    reading = read_comparisons(path)
    for _ in range(2):
        found = list(reading)
        assert [type(x) for x in found] == [Comparison, Problem, Problem]
        assert [x.kind for x in found if isinstance(x, Problem)] == ["unreadable", "wrong type"]
        assert [x.row for x in found] == [1, 2, 3]
    assert (reading.count, reading.layout) == (3, "preference-text")
    path.write_text(json.dumps(TEXT), "utf-8")
    with pytest.raises(DataError, match="had 3 rows and now has 1"):
        list(reading)


def test_an_iterator_of_rows_is_read_once_and_kept() -> None:
    def rows() -> Iterator[object]:
        yield from [TEXT, TEXT]

    reading = parse_comparisons(rows(), "f")
    assert len(list(reading)) == len(list(reading)) == reading.count == 2


def test_keys_of_messages_that_nothing_reads_are_said_after_a_pass() -> None:
    message = {"role": "user", "content": "q", "time": 3, "id": None}
    reading = parse_comparisons([{"prompt": [message]}], "f")
    list(reading)
    list(reading)
    assert reading.notes == ["f: keys inside of columns not read: time"]
    assert parse_comparisons([ROWS["prompt-chat"]], "f").problems == []
