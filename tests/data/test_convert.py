"""Rows in another layout or another kind of file say what they said, or are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layouts.generated import comparisons
from data.tokenising import write
from prefopt.cli import main
from prefopt.data.comparisons import loose_columns, parse_comparisons, read_comparisons
from prefopt.data.files.sources import read_rows
from prefopt.data.files.write import RowFile
from prefopt.data.layouts import LAYOUTS, writable_layout
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.records import Comparison

EXTRAS = st.dictionaries(
    st.sampled_from(["id", "source", "meta"]),
    st.recursive(
        st.integers(-2, 3) | st.sampled_from([10**20, 0.5, True, "x", "", "\ud83d", None]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)

WRITTEN = sorted(x.name for x in LAYOUTS.values() if x.writer)


def plain(c: Comparison) -> tuple[Comparison, dict[str, object]]:
    """What a comparison says, and its further columns; a column that holds nothing is none."""
    return c, {name: value for name, value in c.extra.items() if value is not None}


def writes_and_reads(name: str, several: list[Comparison], folder: Path) -> None:
    layout, wanted = LAYOUTS[name], []
    paths = [folder / "rows.jsonl", folder / "rows.parquet"]
    rows = []
    for c in several:
        try:
            rows.append(layout.write(c))
        except DataError:
            continue
        wanted.append(plain(layout.arranged(c)))
    if not rows:
        return
    for path in paths:
        with RowFile(path, loose_columns(layout)) as file:
            for row in rows:
                file.write(row)
            file.finish()
        again = parse_comparisons(list(read_rows(path)), "f", format=name).comparisons
        assert [plain(c)[1] for c in again] == [extra for _, extra in wanted], path.name
        assert [said(c) for c in again] == [said(c) for c, _ in wanted], path.name


def said(c: Comparison) -> Any:
    return c.prompt, c.responses, c.tiers, c.text, c.scores, c.labels, c.votes, c.tools


@st.composite
def some(draw: st.DrawFn) -> list[Comparison]:
    found = draw(st.lists(comparisons(), min_size=1, max_size=3))
    for c in found:
        c.extra.update(draw(EXTRAS))
    return found


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["canonical"] * 3 + WRITTEN), several=some())
def test_rows_come_back_from_either_kind_of_file(
    name: str, several: list[Comparison], tmp_path_factory: pytest.TempPathFactory
) -> None:
    writes_and_reads(name, several, tmp_path_factory.mktemp("rows"))


def test_a_null_in_an_object_stays_one(tmp_path: Path) -> None:
    given: Any = [{"id": {"a": 0, "b": 0}}, {"id": {"a": 0, "b": None}}]
    rows = [{"prompt": "q", "responses": ["x", "y"], "tiers": [[0], [1]]} | extra for extra in given]
    found = parse_comparisons(rows, "f", format="canonical").comparisons
    writes_and_reads("canonical", found, tmp_path)


@pytest.mark.slow
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["canonical"] * 3 + WRITTEN), several=some())
def test_many_rows_come_back_from_either_kind_of_file(
    name: str, several: list[Comparison], tmp_path_factory: pytest.TempPathFactory
) -> None:
    writes_and_reads(name, several, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_layout_becomes_canonical_and_comes_back(name: str, ending: str, tmp_path: Path, capsys: Any) -> None:
    layout = LAYOUTS[name]
    source = write(tmp_path / "source.jsonl", [dict(layout.example)] * 2)
    canonical, back = tmp_path / f"canonical.{ending}", tmp_path / f"back.{ending}"
    assert main(["data", "convert", str(source), "--output", str(canonical)]) == 0, capsys.readouterr()
    again = read_comparisons(canonical)
    assert again.layout == "canonical"
    first = read_comparisons(source).comparisons
    assert [said(c) for c in again.comparisons] == [said(c) for c in first]
    assert [c.extra for c in again.comparisons] == [c.extra for c in first]
    assert main(["data", "convert", str(canonical), "--output", str(back), "--layout", name]) == 0, capsys.readouterr()
    reading = parse_comparisons(list(read_rows(back)), "f", format=name)
    assert [said(c) for c in reading.comparisons] == [said(layout.arranged(c)) for c in first]


def test_what_the_target_cannot_hold_is_refused_and_nothing_is_left(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b"], "tiers": [[0], [1]]}]
    rows += [{"prompt": "p", "responses": ["a", "b", "c"], "tiers": [[0], [1, 2]]}]
    source = write(tmp_path / "source.jsonl", rows)
    out = tmp_path / "out.jsonl"
    words = ["data", "convert", str(source), "--output", str(out), "--layout", "preference-text"]
    assert main(words) == 2
    complaint = capsys.readouterr().err
    assert "row 2" in complaint and "3 responses" in complaint and complaint.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["source.jsonl"]
    assert main([*words, "--on-bad-row", "skip"]) == 0
    assert "1 of 2 rows left out" in (said := capsys.readouterr().out) and "2 rows read, 1 written" in said
    assert [json.loads(line)["chosen"] for line in out.read_text().splitlines()] == ["a"]
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words[:4], str(source), "--overwrite"]) == 2 and "one of the files to read" in capsys.readouterr().err
    assert main([*words[:4], str(tmp_path / "x.csv")]) == 2 and ".parquet" in capsys.readouterr().err
    assert main([*words[:6], "--overwrite"[:0] or "preference-txt", "--overwrite"]) == 2
    assert "did you mean preference-text" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"out\.jsonl: cannot be written"), RowFile(tmp_path / "out.jsonl") as file:
        os.dup2(os.open("/dev/full", os.O_WRONLY), file._file.fileno())
        while True:
            file.write({"text": "x" * 100})
    assert not list(tmp_path.iterdir())


def test_a_table_has_plain_types_where_the_rows_have(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "id": i, "tags": {"k": [i]}} for i in range(3)]
    source = write(tmp_path / "source.jsonl", rows)
    out = tmp_path / "out.parquet"
    assert main(["data", "convert", str(source), "--output", str(out)]) == 0
    types = {f.name: str(f.type) for f in pq.read_schema(out)}
    assert types["id"] == "int64" and types["tags"] == "struct<k: list<element: int64>>"
    assert types["responses"] == "list<element: string>"


def test_layouts_that_are_only_read_become_canonical_and_are_refused_as_outputs(tmp_path: Path, capsys: Any) -> None:
    for layout in LAYOUTS.values():
        source = write(tmp_path / "source.jsonl", [dict(layout.example)] * 2)
        canonical = tmp_path / "canonical.jsonl"
        assert main(["data", "convert", str(source), str(canonical), "--overwrite"]) == 0, capsys.readouterr()
        expected = [said(c) for c in read_comparisons(source).comparisons]
        assert [said(c) for c in read_comparisons(canonical).comparisons] == expected, layout.name
        if layout.writer is None:
            with pytest.raises(ConfigError, match=f"--layout {layout.name}: .*canonical, .*preference-text.*messages"):
                writable_layout(layout.name)
    assert main(["data", "convert", str(canonical), str(tmp_path / "back.jsonl"), "--layout", "alpaca"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and all(name in complaint for name in WRITTEN)
