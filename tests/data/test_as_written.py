"""Rows say what their authors said: no null of Arrow's, no column twice, reasoning in its field, turns whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from data.small import small_tokenizer
from prefopt.api.objects import names_or_rows
from prefopt.data.chat.render import INTO_FIELD, LEFT_INSIDE, TURNS_DROPPED, Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import open_comparisons, parse_comparisons, read_comparisons
from prefopt.data.files import columnar
from prefopt.data.files.sources import find_sources, read_rows
from prefopt.data.group import Group
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNEL = (
    "{% for m in messages %}{% if m.thinking %}<analysis>{{ m.thinking }}<end>{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
)
# Shows reasoning of its field in the very tags that the text has.
TAGGED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.thinking %}<think>\n{{ m.thinking }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
)

BLOCK = "<think>\nadd\n</think>\n\n"


def with_template(template: str) -> Any:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_nulls_that_arrow_fills_in_are_absent(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"tools": [{"name": "f", "properties": {"town": {"type": "string", "default": None, "enum": ["a", None]}}}]},
        {"tools": [{"name": "g", "properties": {"default": {"type": "number"}}}], "call": {"arguments": {"const": 1}}},
        {"tools": [], "call": {"arguments": {"a": 2, "json": '{"b": null}'}}},
    ]
    pq.write_table(pa.Table.from_pylist(rows, pa.Table.from_pylist(_all_keys(rows)).schema), tmp_path / "rows.parquet")
    first, second, third = rows_of(tmp_path / "rows.parquet")
    assert first["tools"][0]["properties"] == {"town": {"type": "string", "default": None, "enum": ["a", None]}}
    assert second["tools"][0]["properties"] == {"default": {"type": "number"}}
    assert second["call"] == {"arguments": {"const": 1}}
    assert third["call"] == {"arguments": {"a": 2, "json": '{"b": null}'}}
    assert first["call"] is None


def rows_of(path: Path) -> list[Any]:
    return list(read_rows(path))


def _all_keys(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in an order that shows every column to pyarrow, which looks at the first row's alone."""
    return [{"tools": [], "call": None, **row} for row in rows]


def test_a_column_given_to_one_field_is_not_read_as_another() -> None:
    row = {"input": "Name a colour", "chosen": "Green", "rejected": "Tree"}
    for layout in (None, "preference-text", "alpaca-ranking"):
        (found,) = parse_comparisons([row], "f", format=layout, columns=["prompt=input"])
        assert isinstance(found, Comparison)
        assert [m.content for m in found.prompt] == ["Name a colour"], layout


def test_reasoning_in_the_text_goes_into_the_field_of_the_template() -> None:
    asked = [Message("user", "2 + 2")]
    inline = Comparison.pair(asked, chosen="<think>\nadd\n</think>\n\n4", rejected="5", row=1)
    for template, said in ((CHANNEL, True), (TAGGED, False)):
        tokenizer = with_template(template)
        renderer = Renderer(tokenizer)
        text = tokenizer.decode(_sequences(renderer.render(inline).group)[0])
        assert ("<think>" in text) is not said and "add" in text
        assert (INTO_FIELD in renderer.warnings) is said


def test_the_oldest_turns_are_dropped_whole() -> None:
    old = [Message("user", "old " * 20), Message("assistant", "gone " * 20)]
    rest = [Message("system", "s"), Message("user", "new")]
    tokenizer = with_template(CHATML)
    short = Comparison.pair(rest, chosen="a", rejected="b", row=1)
    long = Comparison.pair([rest[0], *old, rest[1]], chosen="a", rejected="b", row=1)
    whole = Renderer(tokenizer).render(short).group
    limit = max(map(len, _sequences(whole)))
    renderer = Renderer(tokenizer, Rendering(max_length=limit))
    cut = renderer.render(long)
    assert cut.prompt_cut > 0 and TURNS_DROPPED in renderer.warnings
    assert _sequences(cut.group) == _sequences(whole)


def _sequences(group: Group) -> list[list[int]]:
    """The ids of each response behind its prompt."""
    return [[*group.prefix.tolist(), *c.ids.tolist()] for c in group.continuations]


def test_nulls_inside_of_maps_and_of_every_kind_of_list_are_absent() -> None:
    held = pa.struct([("a", pa.int64()), ("b", pa.int64()), ("default", pa.int64())])
    one, other = {"a": 1, "default": 2}, {"b": 2, "default": None}
    kinds = (pa.list_(held), pa.large_list(held), pa.list_(held, 2), pa.list_view(held), pa.large_list_view(held))
    for kind in kinds:
        array = pa.array([[one, other], None, [other, one]], kind)
        assert columnar._values(array[1:]) == [None, [other, one]], kind
    maps = pa.array([[("x", one)], [("y", other), ("z", None)], None, []], pa.map_(pa.string(), held))
    assert columnar._values(maps[1:]) == [{"y": other, "z": None}, None, {}]
    # The names of a map are its rows' own; what stands below them is a schema again.
    assert columnar._values(maps[1:2], "properties") == [{"y": other, "z": None}]
    assert columnar._values(maps[1:2], "arguments") == [{"y": {"b": 2}, "z": None}]
    with pytest.raises(ValueError, match="twice"):
        columnar._values(pa.array([[("x", one), ("x", one)]], pa.map_(pa.string(), held)))


def test_rows_of_a_dataset_and_of_its_folder_and_file_are_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "tools": [{"name": "f", "properties": {"town": {"type": "string"}}}], "n": None},
        {"prompt": "r", "tools": [{"name": "g", "properties": {"a": {"type": "number"}}}], "n": 1},
    ]
    data = datasets.Dataset.from_list(rows)
    assert data[0]["tools"][0]["properties"]["a"] is None  # as the library gives them
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    feather.write_feather(data.with_format("arrow")[:], tmp_path / "rows.feather")
    (saved,) = find_sources([tmp_path / "saved"])
    assert list(saved.rows()) == rows_of(tmp_path / "rows.parquet") == rows_of(tmp_path / "rows.feather") == rows
    assert names_or_rows(data) == (["rows given in Python"], rows)
    assert names_or_rows(data.select([1])) == (["rows given in Python"], rows[1:])


def test_nulls_that_an_author_wrote_stay(tmp_path: Path) -> None:
    row = {"tools": [{"name": "f", "properties": {"town": None}}], "call": {"arguments": {"a": None}}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert rows_of(tmp_path / "rows.jsonl") == [row]
    assert names_or_rows([row]) == (["rows given in Python"], [row])


def test_a_column_given_to_two_fields_is_refused(tmp_path: Path) -> None:
    row = {"q": "Name a colour", "chosen": "Green", "rejected": "Tree"}
    with pytest.raises(ConfigError, match="gives the column 'q' to both prompt and chosen; leave one out"):
        parse_comparisons([row], "f", columns=["prompt=q", "chosen=q"])
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"q": "x", "a": "y"}]))
    entry: dict[str, Any] = {"file_name": "rows.json", "columns": {"prompt": "q", "response": "q"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(DataError, match=r"dataset_info\.json .* gives the column 'q' to both prompt and response"):
        read_comparisons(path)
    entry["columns"]["response"] = "a"
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert len(read_comparisons(path).comparisons) == 1
    with pytest.raises(DataError, match="with --columns, gives the column 'q' to both"):
        open_comparisons(find_sources([path])[0], columns=["response=q"])


@pytest.mark.parametrize(
    ("answer", "shown", "said"),
    [
        (f"{BLOCK}<think>\nmore\n</think>\n\n4", "<analysis>add\n\nmore<end><assistant>4", INTO_FIELD),
        ("add\n</think>\n\n4", "<analysis>add<end><assistant>4", INTO_FIELD),  # sampled behind an opened block
        ("<think>\nadd", "<assistant><think>\nadd", LEFT_INSIDE),
        ("The tag </think> closes.", "<assistant>The tag </think> closes.", None),
    ],
)
def test_blocks_of_every_kind(answer: str, shown: str, said: str | None) -> None:
    renderer = Renderer(with_template(CHANNEL))
    asked = [Message("user", "2 + 2")]
    group = renderer.render(Comparison.pair(asked, chosen=answer, rejected="5", row=4)).group
    assert shown in renderer.tokenizer.decode(_sequences(group)[0])
    found = {key: renderer.warnings.get(key) for key in (INTO_FIELD, LEFT_INSIDE)}
    assert found == {key: [4] if key == said else None for key in (INTO_FIELD, LEFT_INSIDE)}


def test_what_a_model_is_asked_is_what_was_trained() -> None:
    """The history of a chat goes through the same step: what is sampled behind is how the trained text begins."""
    history = [Message("user", "2 + 2"), Message("assistant", f"{BLOCK}4"), Message("user", "3 + 3")]
    for template in (CHANNEL, TAGGED):
        renderer = Renderer(with_template(template + "{% if add_generation_prompt %}<assistant>{% endif %}"))
        group = renderer.render(Comparison.pair(history, chosen="6", rejected="7", row=1)).group
        (prompt,) = renderer.prompts([Comparison(tuple(history), (), (), 0)])
        assert not isinstance(prompt, Problem)
        assert _sequences(group)[0][: len(prompt)] == prompt.tolist()
        assert "add" in renderer.tokenizer.decode(prompt.tolist())
