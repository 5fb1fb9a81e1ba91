"""Files: what is read, and the line that says what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from prefopt.data.comparisons import parse_comparisons, read_comparisons
from prefopt.data.files import text_rows
from prefopt.data.files.sources import read_rows
from prefopt.data.load import load_groups
from prefopt.data.validate import Problem, check, refuse
from prefopt.errors import ConfigError, DataError
from prefopt.records import Message, Response

SHAREGPT = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "yes"},
    "rejected": {"from": "gpt", "value": "no"},
}
TEXT = {"prompt": "q", "chosen": "yes", "rejected": "no"}
CHAT = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def write(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def test_layouts_give_the_same_comparison() -> None:
    (one,), (two,), (three,), (plain,) = (
        parse_comparisons([row], "f").comparisons
        for row in (SHAREGPT, CHAT, CHAT | {"chosen": "yes", "rejected": "no"}, TEXT)
    )
    assert one == two == three and one.prompt == (Message("user", "q"),) and not one.text
    assert [r.text for r in one.responses] == ["yes", "no"] and one.pairs == ((0, 1),)
    assert plain.text and plain.responses == one.responses
    (system,) = parse_comparisons([SHAREGPT | {"system": "be kind"}], "f").comparisons
    assert system.prompt == (Message("system", "be kind"), Message("user", "q"))
    turns = [*CHAT["chosen"], {"role": "user", "content": "more"}, {"role": "assistant", "content": "fine"}]
    (several,) = parse_comparisons([CHAT | {"chosen": turns}], "f").comparisons
    assert several.responses[0] == Response(
        (Message("assistant", "yes"), Message("user", "more"), Message("assistant", "fine"))
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise KeyError
    return dict(pairs)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    window=st.integers(1, 40),
    mark=st.sampled_from(["", "\ufeff", " \n\t"]),
    damage=st.none() | st.integers(0, 10_000),
)
def test_reading_in_windows_equals_reading_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
    window: int,
    mark: str,
    damage: int | None,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    if damage is not None:
        # Leave one character out. A list without its bracket is JSON lines, another matter.
        at = 1 + damage % (len(text) - 1)
        text = text[:at] + text[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "windows.json"
    path.write_text(mark + text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "WINDOW", window)
        try:
            expected = json.loads(mark.strip("\ufeff") + text, object_pairs_hook=unique)
        except KeyError:  # the damage made two keys one, and may have broken the text behind them
            with pytest.raises(DataError, match=r"windows\.json, row \d+: .*(twice|not JSON at line \d+, column \d+)"):
                list(read_rows(path))
        except json.JSONDecodeError as error:
            with pytest.raises(
                DataError, match=r"windows\.json(, row \d+)?: not JSON at line \d+, column \d+"
            ) as caught:
                list(read_rows(path))
            if f"({error.msg})" in str(caught.value):
                assert f"line {error.lineno}, column {error.colno} " in str(caught.value)
        else:
            if expected:
                assert list(read_rows(path)) == expected


def test_lines_may_hold_any_character_and_blank_lines(tmp_path: Path) -> None:
    rows = [TEXT | {"prompt": "a\u2028b\x85c\x0bd"}, TEXT | {"prompt": "你好 👍🏽"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = write(tmp_path, "\ufeff" + "\r\n\r\n".join(lines) + "\n", "rows.jsonl")
    assert list(read_rows(path)) == rows
    assert [c.row for c in read_comparisons(path).comparisons] == [1, 2]


ROW = json.dumps(TEXT)


UNUSABLE: list[tuple[str | bytes, str]] = [
    ("", "is empty"),
    (" \n ", "is empty"),
    ("[]", "is an empty list"),
    (f"{ROW}\n{ROW[:-3]}\n", "not JSON at line 2"),
    (f"{ROW}\nhello\n", "not JSON at line 2"),
    (f"[\n{ROW},\n  {{'a': 1}}]", "not JSON at line 3, column 4"),
    (f"[{ROW} {ROW}]", "a comma or the end of the list"),
    (f"[{ROW}]\n{ROW}", "line 2, column 1 (text after the end of the list)"),
    (f"[\n{ROW},\n{ROW[:-3]}", "line 3, column 1 (the file ends within a row; it may be cut off)"),
    (f"[{ROW}", "the list never ends"),
    (b"\xff\xfe{\x00", "not UTF-8 but UTF-16"),
    (ROW.encode() + b"\n\xe9\n", "not UTF-8 at line 2"),
    (b'[\n{"a": "\xe9"}]', "not UTF-8 at line 2 (byte 0xe9; it may be Latin-1"),
    (b"\x1f\x8b\x08", "is damaged or cut off"),
    (b"PAR1\x00", "is damaged or cut off"),
    ("[" * 100_000, "nested more than 100 deep"),
    (json.dumps([{"a": 1, "b": 2}]), "unknown layout: no row has all fields of a known layout; row 1 has a, b"),
    (json.dumps([{"prompt": "a", "rejected": "b"}]), "needs chosen as well"),
    ("[1, 2]", "row 1: unknown layout: it is a number"),
    (
        json.dumps([TEXT, TEXT, SHAREGPT]),
        "(preference-text: 2 from row 1; sharegpt-ranking: 1 from row 3)",
    ),
    (json.dumps([CHAT, TEXT]), "mixes layouts (preference-chat: 1 from row 1; preference-text: 1 from row 2)"),
]


def test_unusable_files_are_one_line_with_file_and_place(tmp_path: Path) -> None:
    for content, message in UNUSABLE:
        path = write(tmp_path, content)
        with pytest.raises(DataError) as caught:
            reading = read_comparisons(path)
            raise refuse(reading.problems, reading.count)
        said = str(caught.value)
        assert message in said and str(path) in said and "\n" not in said, message


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "absent.json", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=message) as caught:
            read_comparisons(path)
        assert str(path) in str(caught.value)


def change(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps(row | fields))  # type: ignore[no-any-return]


BAD = [
    (SHAREGPT, change(SHAREGPT, rejected=None), "missing field", "lacks rejected"),
    (SHAREGPT, {"conversations": []}, "missing field", "lacks chosen, rejected"),
    (SHAREGPT, [1], "not an object", "is a list"),
    (SHAREGPT, change(SHAREGPT, chosen={"from": "gpt"}), "missing field", "message of chosen lacks value"),
    (SHAREGPT, change(SHAREGPT, conversations=[{"from": "bot", "value": ""}]), "unknown role", "'bot'"),
    (SHAREGPT, change(SHAREGPT, conversations="q"), "wrong type", "conversations is text"),
    (SHAREGPT, change(SHAREGPT, conversations=[]), "empty prompt", "the prompt is empty"),
    (SHAREGPT, change(SHAREGPT, system=3), "wrong type", "system is a number"),
    (SHAREGPT, change(SHAREGPT, videos=["a.mp4"]), "field that cannot be used", "has videos"),
    (SHAREGPT, change(SHAREGPT, images=["a.png"]), "bad picture", "there is no such file"),
    (SHAREGPT, change(SHAREGPT, chosen=SHAREGPT["rejected"]), "identical responses", "the same"),
    (SHAREGPT, change(SHAREGPT, chosen={"from": "human", "value": "x"}), "response without an answer", "chosen"),
    (CHAT, change(CHAT, chosen=[]), "response without an answer", "chosen"),
    (CHAT, change(CHAT, chosen=[{"role": "assistant", "content": " \n"}]), "empty response", "chosen"),
    (CHAT, change(CHAT, chosen=[{"role": "assistant", "content": ["x"]}]), "wrong type", "content"),
    (CHAT, change(CHAT, prompt=[*CHAT["prompt"], *CHAT["chosen"]]), "prompt ends with an answer", "no answer"),
    (CHAT, change(CHAT, prompt=[{"role": "user", "content": "\ud83d"}]), "broken text", "surrogate"),
    (CHAT, change(CHAT, chosen=[{"role": "assistant", "content": "x", "tool_calls": [1]}]), "wrong type", "tool call"),
    (TEXT, change(TEXT, rejected=""), "empty response", "rejected"),
    (TEXT, change(TEXT, chosen=CHAT["chosen"]), "wrong type", "chosen should be text"),
    (TEXT, change(TEXT, chosen=7), "wrong type", "a number"),
]


def test_bad_rows_are_named_and_counted(tmp_path: Path) -> None:
    for good, bad, kind, what in BAD:
        path = write(tmp_path, "\n".join(json.dumps(row) for row in (good, bad, good)))
        reading = read_comparisons(path)
        problems = [p for c in reading for p in ([c] if isinstance(c, Problem) else check(c, "pairs"))]
        said = str(refuse(problems, reading.count))
        assert f"{path}, row 2: 1 of 3 rows cannot be used" in said and "--on-bad-row skip" in said, kind
        assert kind in said and what in said and "\n" not in said, (kind, what)


def test_bad_rows_are_refused_or_skipped_on_request(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join(json.dumps(row) for row in (CHAT, CHAT | {"chosen": []}, CHAT)))
    with pytest.raises(DataError, match="row 2: 1 of 3 rows cannot be used"):
        load_groups([path], small_tokenizer())
    misspelt: Any = "skp"
    with pytest.raises(DataError, match="row 2: 1 of 3 rows cannot be used"):
        load_groups([path], small_tokenizer(), on_bad_row=misspelt)
    data = load_groups([path], small_tokenizer(), on_bad_row="skip")
    assert (data.read, data.kept, data.refused) == (3, 2, 1) and data.groups.row_G.tolist() == [1, 3]
    assert any("row 2" in line and "response without an answer" in line for line in data.summary())


def test_rows_of_several_files_are_told_apart(tmp_path: Path) -> None:
    tie = TEXT | {"chosen": "no"}
    one = write(tmp_path, json.dumps([tie, TEXT, tie]), "one.json")
    two = write(tmp_path, json.dumps([tie, CHAT | {"prompt": "q", "chosen": "a", "rejected": "b"}]), "two.json")
    with pytest.raises(DataError, match=rf"3 of 5 rows .*: 3 \(rows {one}:1, {one}:3, {two}:1; the preferred"):
        load_groups([one, two], small_tokenizer())
    data = load_groups([one, two], small_tokenizer(), on_bad_row="skip")
    assert (data.read, data.kept, data.refused) == (5, 2, 3)
    with pytest.raises(ConfigError, match="twice"):
        load_groups([one, one], small_tokenizer())
    with pytest.raises(DataError, match="none of 1 rows can be used"):
        load_groups([write(tmp_path, json.dumps(tie))], small_tokenizer(), on_bad_row="skip")


def test_columns_that_nothing_reads_are_said() -> None:
    rows = parse_comparisons([TEXT | {"score": 1}, TEXT | {"id": "x"}], "f")
    assert rows.notes == ["f: columns not read: score, id"] and rows.comparisons[0].extra == {"score": 1}


@given(st.lists(st.text('[]{}"\\\nn\u00e9')), st.integers(97, 101), st.booleans())
def test_brackets_in_texts_are_no_nesting(texts: list[str], around: int, ascii: bool) -> None:
    value: Any = {"k]": [*texts, '"[{' * 60]}
    for _ in range(around - 2):
        value = [value]
    row = json.dumps([value, value], ensure_ascii=ascii)  # one deeper than ``around``
    if around < text_rows.DEPTH:
        assert text_rows.decode(row) == [value, value]
    else:
        with pytest.raises(RecursionError, match="nested more than 100 deep"):
            text_rows.decode(row)
