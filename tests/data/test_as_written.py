"""Rows say what their authors said: no null of Arrow's, no column twice, reasoning in its field, turns whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.small import small_tokenizer
from prefopt.data.formats import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.read import read_rows
from prefopt.data.render import INTO_FIELD, TURNS_DROPPED, Renderer
from prefopt.data.rendering import Rendering
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
    (found,) = parse_comparisons([row], "f", columns=["prompt=input"])
    assert isinstance(found, Comparison)
    assert "".join(m.content for m in found.prompt) == "Name a colour"


def test_reasoning_in_the_text_goes_into_the_field_of_the_template() -> None:
    asked = [Message("user", "2 + 2")]
    inline = Comparison.pair(asked, chosen="<think>\nadd\n</think>\n\n4", rejected="5", row=1)
    for template, said in ((CHANNEL, True), (TAGGED, False)):
        tokenizer = with_template(template)
        renderer = Renderer(tokenizer)
        text = tokenizer.decode(_sequences(renderer.render(inline).group)[0])
        assert ("<think>" in text) is not said and "add" in text
        assert (INTO_FIELD in renderer.findings) is said


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
    assert cut.prompt_cut > 0 and TURNS_DROPPED in renderer.findings
    assert _sequences(cut.group) == _sequences(whole)


def _sequences(group: Group) -> list[list[int]]:
    """The ids of each response behind its prompt."""
    return [[*group.prefix.tolist(), *c.ids.tolist()] for c in group.continuations]
