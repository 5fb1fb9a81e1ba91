"""Every kind of file gives the rows that were written, or one line; none is held whole."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.data.files import columnar, text_rows
from prefopt.data.files.sources import read_rows
from prefopt.errors import DataError

Row = dict[str, Any]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("chosen", MESSAGES),
        ("score", pa.float64()),
        ("count", pa.int64()),
        ("flag", pa.bool_()),
        ("order", pa.list_(pa.int64())),
    ]
)


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def as_json(rows: list[Row]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[Row]) -> bytes:
    held = io.BytesIO()
    pq.write_table(table(rows), held, row_group_size=3)
    return held.getvalue()


def as_arrow(new: Callable[..., Any]) -> Callable[[list[Row]], bytes]:
    def write(rows: list[Row]) -> bytes:
        held = io.BytesIO()
        with new(held, SCHEMA) as writer:
            writer.write_table(table(rows), max_chunksize=2)
        return held.getvalue()

    return write


def as_csv(delimiter: str, quoting: Any = csv.QUOTE_ALL) -> Callable[[list[Row]], bytes]:
    def write(rows: list[Row]) -> bytes:
        held = io.StringIO(newline="")
        writer = csv.writer(held, delimiter=delimiter, quoting=quoting)
        writer.writerow(["prompt", "chosen", "order"])
        for row in rows:
            cells = (json.dumps(row[name], ensure_ascii=False) for name in ("chosen", "order"))
            writer.writerow([row["prompt"], *cells])
        return held.getvalue().encode()

    return write


JSON_LIKE = {".json": as_json, ".jsonl": as_lines}
BINARY = {".parquet": as_parquet, ".arrow": as_arrow(pa.ipc.new_stream), ".feather": as_arrow(pa.ipc.new_file)}
SEPARATED = {".csv": as_csv(","), ".tsv": as_csv("\t")}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),  # type: ignore[no-any-return]
}

text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text}), max_size=3
)
rows_of_all_types = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": text.map(lambda t: "q" + t),
            "chosen": messages,
            "score": st.none() | st.floats(allow_nan=False),
            "count": st.integers(-(2**63), 2**63 - 1) | st.none(),
            "flag": st.booleans() | st.none(),
            "order": st.lists(st.integers(0, 9), max_size=3),
        }
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_all_types, packed=st.sampled_from(sorted(PACKED)), mark=st.booleans())
def test_rows_come_back_from_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], packed: str, mark: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()

    def read(name: str, data: bytes) -> list[object]:
        path = folder / name
        path.write_bytes(data)
        return list(read_rows(path))

    for ending, write in (JSON_LIKE | SEPARATED).items():
        data = write(rows)
        found = read(f"rows{ending}{packed}", PACKED[packed](b"\xef\xbb\xbf" + data if mark else data))
        texts_only = ending in SEPARATED
        assert found == [{k: row[k] for k in ("prompt", "chosen", "order")} if texts_only else row for row in rows]
    for ending, write in BINARY.items():
        assert read(f"rows{ending}", write(rows)) == rows
    # The contents decide, not the name.
    assert read("rows.json", as_parquet(rows)) == read("rows.parquet", as_lines(rows)) == rows
    assert read("rows.csv", as_json(rows)) == read("rows", as_lines(rows)) == rows


SAMPLE = [
    {
        "prompt": f"Frage {n}, «warum»?\nZeile",
        "chosen": [{"role": "assistant", "content": f"Weil {n} größer ist."}],
        "score": n / 3,
        "count": None if n % 3 else n,
        "flag": n % 2 == 0,
        "order": [n, 1],
    }
    for n in range(30)
]


def damage(data: bytes, chance: random.Random) -> bytes:
    """Cut off, or with some bytes changed."""
    if chance.random() < 0.3:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        changed[at] = chance.choice([0, 255, chance.randrange(256), changed[at] ^ 1 << chance.randrange(8)])
    return bytes(changed)


def survives(folder: Path, ending: str, packed: str, cases: int) -> None:
    chance = random.Random(f"{ending}{packed}")
    data = PACKED[packed]((JSON_LIKE | SEPARATED | BINARY)[ending](SAMPLE))
    path = folder / f"rows{ending}{packed}"
    outcomes = set()
    for _ in range(cases):
        path.write_bytes(damage(data, chance))
        for keep_going in (False, True):
            try:
                rows = list(read_rows(path, keep_going=keep_going))
            except DataError as error:
                said = str(error)
                assert said.startswith(str(path)) and "\n" not in said
                outcomes.add("refused")
            else:
                assert keep_going or not any(isinstance(row, DataError) for row in rows)
                outcomes.add("read")
    assert "refused" in outcomes


KINDS = [(e, p) for e in JSON_LIKE | SEPARATED for p in PACKED] + [(e, "") for e in BINARY]


@pytest.mark.parametrize(("ending", "packed"), KINDS)
def test_damaged_files_give_rows_or_one_line(tmp_path: Path, ending: str, packed: str) -> None:
    survives(tmp_path, ending, packed, 25)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "packed"), KINDS)
def test_damaged_files_give_rows_or_one_line_always(tmp_path: Path, ending: str, packed: str) -> None:
    survives(tmp_path, ending, packed, 2000)


@pytest.mark.parametrize("packed", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("ending", sorted(JSON_LIKE))
def test_a_file_that_was_cut_off_gives_the_rows_before(tmp_path: Path, ending: str, packed: str) -> None:
    chance = random.Random(1)  # so that there is something to compress
    rows: list[Row] = [{"prompt": chance.randbytes(300).hex()} for _ in range(3000)]
    path = tmp_path / f"rows{ending}{packed}"
    data = PACKED[packed](JSON_LIKE[ending](rows))
    path.write_bytes(data[: len(data) * 2 // 3])
    read = []
    with pytest.raises(DataError, match="damaged or cut off after row") as caught:
        for row in read_rows(path):
            read.append(row)
    assert read == rows[: len(read)] and len(read) > 500 and f"after row {len(read)} " in str(caught.value)


class Counted(io.FileIO):
    """A file that knows how much of it was read."""

    taken = 0

    def readinto(self, buffer: Any, /) -> int:
        got = super().readinto(buffer)
        Counted.taken += got or 0
        return got or 0


@pytest.mark.parametrize("ending", [*JSON_LIKE, *SEPARATED])
def test_text_is_read_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    rows = [row | {"prompt": "long " * 2000} for row in SAMPLE * 20]
    path = tmp_path / f"rows{ending}"
    path.write_bytes((JSON_LIKE | SEPARATED)[ending](rows))
    size = path.stat().st_size
    assert size > 5_000_000
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Counted(self)))
    monkeypatch.setattr(text_rows, "_structured_columns", lambda content, header: [])
    Counted.taken = 0
    given_rows = read_rows(path)
    assert next(given_rows) is not None and Counted.taken < size / 3
    for _ in range(300):
        next(given_rows)
    assert size / 3 < Counted.taken < size * 0.8


@pytest.mark.parametrize("ending", sorted(BINARY))
def test_batches_are_made_as_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    made: list[int] = []
    rows_of = columnar._rows

    def counted(array: Any, key: str = "") -> list[Any]:
        if "prompt" in [field.name for field in array.type]:
            made.append(len(array))
        return rows_of(array, key)

    path = tmp_path / f"rows{ending}"
    path.write_bytes(BINARY[ending](SAMPLE * 20))
    monkeypatch.setattr(columnar, "BATCH_ROWS", 50)
    with monkeypatch.context() as patch:
        patch.setattr(columnar, "_rows", counted)
        rows = read_rows(path)
        next(rows)
        assert 0 < max(made) <= 50
        first = len(made)
        assert len(list(rows)) == 599 and len(made) > 5 * first
    # Large rows make small batches.
    big = pa.table({"prompt": ["x" * 1_000_000] * 20})
    pq.write_table(big, tmp_path / "big.parquet")
    made.clear()
    monkeypatch.setattr(columnar, "_rows", counted)
    assert [len(row["prompt"]) for row in read_rows(tmp_path / "big.parquet")] == [1_000_000] * 20  # type: ignore[index]
    assert max(made) <= 5


@pytest.mark.parametrize("ending", sorted(JSON_LIKE | SEPARATED | BINARY))
def test_a_response_of_a_million_characters(tmp_path: Path, ending: str) -> None:
    answer = [{"role": "assistant", "content": 'so "long"\n, é\t' * 80_000}]
    rows = [row | {"chosen": answer} for row in SAMPLE[:2]]
    path = tmp_path / f"rows{ending}"
    path.write_bytes((JSON_LIKE | SEPARATED | BINARY)[ending](rows))
    assert [row["chosen"] for row in read_rows(path)] == [answer] * 2  # type: ignore[index]


def read_text(folder: Path, content: str, name: str = "rows.csv", **options: Any) -> list[Any]:
    path = folder / name
    path.write_text(content, "utf-8", newline="")
    return list(read_rows(path, **options))


def test_cells_are_text(tmp_path: Path) -> None:
    assert read_text(tmp_path, "prompt,chosen\n123,true\n,nan\n") == [
        {"prompt": "123", "chosen": "true"},
        {"prompt": "", "chosen": "nan"},
    ]
    # Line ends of other systems, blank lines, an index without a name, separators of other spreadsheets.
    assert read_text(tmp_path, "a,b\r\r1,2\r") == [{"a": "1", "b": "2"}]
    assert read_text(tmp_path, ",a\n0,x\n\n1,y\n") == [{"column 1": "0", "a": "x"}, {"column 1": "1", "a": "y"}]
    assert read_text(tmp_path, 'a;b\n"x;y";2\n') == [{"a": "x;y", "b": "2"}]
    assert read_text(tmp_path, "a, b\n1, 2\n", "rows.tsv") == [{"a, b": "1, 2"}]
    assert read_text(tmp_path, "a,b\n1,2\n", "rows.tsv.csv") == [{"a": "1", "b": "2"}]


def test_cells_are_decoded_where_a_whole_column_is_json(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "it's [1]"}]

    def rows(*cells: str, **options: Any) -> list[Any]:
        held = io.StringIO(newline="")
        csv.writer(held).writerows([["prompt", "x"], *(["q", cell] for cell in cells)])
        found = read_text(tmp_path, held.getvalue(), **options)
        return [row if isinstance(row, DataError) else row["x"] for row in found]

    assert rows(json.dumps(chat), "", repr(chat)) == [chat, "", chat]
    assert rows('{"from": "gpt", "value": "a"}') == [{"from": "gpt", "value": "a"}]
    assert rows('["a", "b"]', " [1]\n") == [["a", "b"], [1]]
    # An answer may be JSON. It stays text where others are text, and where it is no list and no message.
    assert rows("[1, 2]", "The list is empty.") == ["[1, 2]", "The list is empty."]
    assert rows('{"answer": 3}', '{"answer": 4}') == ['{"answer": 3}', '{"answer": 4}']
    assert rows("[INST] hi [/INST]", "[1]") == ["[INST] hi [/INST]", "[1]"]
    assert rows("[" * 5000 + "]" * 5000, "[{1: set()}]") == ["[" * 5000 + "]" * 5000, "[{1: set()}]"]
    # A list of messages that was cut off is no text.
    cut = json.dumps(chat)[:-9]
    with pytest.raises(DataError, match=r"row 2: the cell of column 'x' at line 3 is not JSON \("):
        rows(json.dumps(chat), cut)
    one, two, three = rows(json.dumps(chat), cut, json.dumps(chat), keep_going=True)
    assert one == three == chat and isinstance(two, DataError) and two.row == 2
    with pytest.raises(DataError, match="occurs twice"):
        rows(json.dumps(chat), '[{"role": "user", "role": "user", "content": "a"}]')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "row 2: too few cells at line 3: 1, where the first line names 2 columns"),
        ('a,b\n"x\ny",2\n3,4,5\n', "row 2: too many cells at line 4: 3, where"),
        ('a,b\n1,2\n"x\ny,2\n', "a quote that opens in the row at line 3 is never closed"),
        ('a,b\n1,"x"y\n', "not CSV at line 2"),
        ("a,b\n", "names its columns and holds no rows"),
        ("a,a\n1,2\n", "two columns are named 'a'"),
        (f"q,{'an answer ' * 40}\n1,2\n", "the first line should name the columns"),
    ],
)
def test_tables_that_cannot_be_read_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_text(tmp_path, content)
    assert message in str(caught.value) and str(tmp_path / "rows.csv") in str(caught.value)


def test_a_cell_that_never_ends_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "ROW_BYTES", 1000)
    with pytest.raises(DataError, match=r"the row at line 2 is longer than .* is a quote never closed"):
        read_text(tmp_path, 'a,b\n1,"' + "x\n" * 1000)


def test_reading_goes_on_after_a_bad_row_where_that_is_safe(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"a": 1}\n{"a": 1\n\n{"a": "\xe9"}\n{"a": 1, "a": 2}\n' + b"[" * 200 + b"]" * 200 + b'\n{"a": 3}'
    )
    found = list(read_rows(path, keep_going=True))
    assert [row.row if isinstance(row, DataError) else row for row in found] == [{"a": 1}, 2, 3, 4, 5, {"a": 3}]
    said = [str(row) for row in found if isinstance(row, DataError)]
    for line, words in zip(said, ("line 2 (", "Latin-1", "the key 'a' occurs twice", "nested more"), strict=True):
        assert words in line and str(path) in line
    path.write_text('[{"a": {"b": 1, "b": 2}}, {"a": 3}, ' + "[" * 200 + "]" * 200 + ', {"a": 4}]')
    found = list(read_rows(path, keep_going=True))
    assert [row.row if isinstance(row, DataError) else row for row in found] == [1, {"a": 3}, 3, {"a": 4}]
    with pytest.raises(DataError, match=r"row 1: not readable at line 1, column 2 \(the key 'b' occurs twice"):
        list(read_rows(path))
    found = read_text(tmp_path, "a,b\n1\n1,2\n", keep_going=True)
    assert isinstance(found[0], DataError) and found[0].row == 1 and found[1:] == [{"a": "1", "b": "2"}]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": NaN, "b": [Infinity, 1e999, -Infinity]}')
    infinite = float("inf")
    assert list(read_rows(path)) == [{"a": None, "b": [infinite, infinite, -infinite]}]
    pq.write_table(pa.table({"a": [float("nan"), 1.0], "b": [[float("nan")], []]}), path)
    assert list(read_rows(path)) == [{"a": None, "b": [None]}, {"a": 1.0, "b": []}]


def test_what_json_cannot_hold_becomes_text_or_number(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9)
    held = {
        "when": [when],
        "day": [when.date()],
        "took": [datetime.timedelta(seconds=90)],
        "price": [decimal.Decimal("2.50")],
        "whole": [decimal.Decimal("3.00")],
        "bytes": ["é".encode()],
        "image": [{"bytes": b"\xff\xd8", "path": None}],
        "kind": pa.array(["x"]).dictionary_encode(),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "large": pa.array([["a"]], pa.large_list(pa.large_string())),
        "none": pa.array([None]),
        "gap": pa.array([None], pa.list_(pa.string())),
        "hole": pa.array([None], pa.struct([("a", pa.string())])),
        "fixed": pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
    }
    expected = {
        "when": "2024-05-06T07:08:09",
        "day": "2024-05-06",
        "took": 90.0,
        "price": 2.5,
        "whole": 3,
        "bytes": "é",
        "image": {"bytes": "/9g="},  # the path that it lacks is absent
        "kind": "x",
        "map": {"k": 1},
        "large": ["a"],
        "none": None,
        "gap": None,
        "hole": None,
        "fixed": [1, 2],
    }
    pq.write_table(pa.table(held), tmp_path / "rows.parquet")
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), pa.table(held).schema) as writer:
        writer.write_table(pa.table(held))
    for name in ("rows.parquet", "rows.arrow"):
        assert list(read_rows(tmp_path / name)) == [expected]
        json.dumps(expected)


def present(value: Any) -> Any:
    """Without the keys that objects lack, to which Arrow gives null."""
    if isinstance(value, dict):
        return {key: present(inner) for key, inner in value.items() if inner is not None}
    return [present(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("cut", [0, 1, 5, 17])
def test_nested_values_of_slices_are_those_of_their_rows(cut: int) -> None:
    kind = pa.list_(pa.struct([("a", pa.list_(pa.string())), ("b", pa.struct([("c", pa.int64())]))]))
    chance = random.Random(3)

    def value(depth: int = 0) -> Iterator[Any]:
        while True:
            if chance.random() < 0.3:
                yield None
            else:
                inner = {"a": [None, "x", "é"][: chance.randrange(4)], "b": {"c": chance.randrange(9)}}
                yield [inner, None, inner | {"b": None}, inner | {"a": None}][: chance.randrange(5)]

    source = value()
    array = pa.array([next(source) for _ in range(60)], kind)
    assert columnar._values(array[cut:41]) == present(array[cut:41].to_pylist())
    struct = pa.StructArray.from_arrays([array, pa.array(range(60))], ["x", "y"])
    assert columnar._values(struct[cut:41]) == present(struct[cut:41].to_pylist())
    assert columnar._rows(struct[cut:41]) == [
        {"x": present(row["x"]), "y": row["y"]} for row in struct[cut:41].to_pylist()
    ]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(DataError, match="two columns are named 'a'"):
        list(read_rows(tmp_path / "rows.arrow"))
    pq.write_table(table([]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(tmp_path / "rows.parquet"))
