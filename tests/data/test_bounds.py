"""Files made to take all time or all memory: rows have a longest length, and nothing takes quadratic time."""

from __future__ import annotations

import bz2
import decimal
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.files import columnar, content, text_rows
from prefopt.data.files.sources import raw_lines, read_rows
from prefopt.errors import DataError

ROW = {"prompt": "q", "chosen": "yes", "rejected": "no"}
LONG = ROW | {"chosen": "y" * 200_000}


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 100 kB at most, and windows of a kilobyte."""
    for module in (content, text_rows, columnar):
        monkeypatch.setattr(module, "ROW_BYTES", 100_000)
    monkeypatch.setattr(text_rows, "WINDOW", 1000)


def lines(path: Path, opened: Callable[..., Any] = open) -> None:
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in (ROW, LONG, ROW))


def zstd_file(path: Path, _: str) -> Any:
    return pa.CompressedOutputStream(str(path), "zstd")


def zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in (ROW, LONG, ROW)).encode())


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist([ROW, LONG, ROW])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def separated(sign: str) -> Callable[[Path], None]:
    rows = [list(ROW), *(list(row.values()) for row in (ROW, LONG, ROW))]
    return lambda path: path.write_text("".join(sign.join(row) + "\n" for row in rows)) and None


FILES: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": lines,
    "rows.jsonl.gz": lambda path: lines(path, gzip.open),
    "rows.jsonl.xz": lambda path: lines(path, lzma.open),
    "rows.jsonl.zst": zstd,
    "rows.json": lambda path: path.write_text(json.dumps([ROW, LONG, ROW])) and None,
    "rows.csv": separated(","),
    "rows.tsv": separated("\t"),
    "quoted.csv": lambda path: path.write_text('a,b\n1,2\n"' + "x\n" * 90_000 + '",3\n') and None,
    "cells.csv": lambda path: path.write_text("a,b\n1,2\n" + ('"' + "x\n" * 30_000 + '",') * 4 + "\n") and None,
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist([ROW, LONG, ROW]), path),
    "nested.parquet": lambda path: pq.write_table(
        pa.Table.from_pylist([{"chosen": [{"content": row["chosen"]}]} for row in (ROW, LONG)]), path
    ),
    "rows.arrow": arrow,
}


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(("name", "make"), FILES.items(), ids=FILES.keys())
def test_a_row_has_a_longest_length_in_every_kind_of_file(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    given = []
    with pytest.raises(DataError) as caught:
        for row in read_rows(tmp_path / name):
            given.append(row)
    assert len(given) == 1 and "is longer than" in str(caught.value) and name in str(caught.value)
    assert "row 2" in str(caught.value) or "line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "opened"),
    [("a.jsonl.gz", gzip.open), ("a.jsonl.bz2", bz2.open), ("a.jsonl.xz", lzma.open), ("a.jsonl.zst", zstd_file)],
)
def test_what_unpacks_to_thousands_of_times_its_size_is_refused(
    name: str, opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "UNPACKED", 1 << 20)
    path, row = tmp_path / name, json.dumps(ROW).encode() + b"\n"
    with opened(path, "wb") as file:
        file.write(row + b"\n" * (1 << 22))
    with pytest.raises(DataError, match=r"comes to more than 250 times its size .*, unpack it first"):
        list(read_rows(path))
    with opened(path, "wb") as file:
        file.write(row * 15_000)  # of repeats, but of no more than a file may hold
    assert sum(1 for _ in read_rows(path)) == 15_000


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_arrow_is_refused_before_it_is_unpacked(
    new: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, table: pa.Table) -> Path:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as file:
            file.write_table(table, max_chunksize=2)
        return path

    monkeypatch.setattr(content, "UNPACKED", 1 << 16)
    long = ["x" * (1 << 22)]
    for name, column in (("plain", pa.array(long)), ("shared", pa.array(long).dictionary_encode())):
        path = write(tmp_path / f"{name}.arrow", pa.table({"prompt": column}))
        before = pa.total_allocated_bytes()
        with pytest.raises(DataError, match=r"comes to more than 250 times its size .*, unpack it first"):
            list(read_rows(path))
        assert pa.total_allocated_bytes() - before < 1 << 20
    rows = [{"prompt": f"{n}", "chosen": [{"role": "user", "content": "x"}], "kind": "a"} for n in range(5)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(2, "kind", table["kind"].dictionary_encode())
    assert list(read_rows(write(tmp_path / "rows.arrow", table))) == rows


@pytest.mark.usefixtures("_short")
def test_lines_after_a_long_one_are_read(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl")
    first, long, last = read_rows(tmp_path / "rows.jsonl", keep_going=True)
    assert first == last == ROW and isinstance(long, DataError)
    raw = raw_lines(tmp_path / "rows.jsonl")
    assert raw is not None and len(list(raw)) == 3


def test_a_row_just_short_enough_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    size = (tmp_path / "rows.jsonl").stat().st_size
    for longest, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(content, "ROW_BYTES", longest)
        (row,) = read_rows(tmp_path / "rows.jsonl", keep_going=True)
        assert (row == ROW) is fits


def test_many_names_take_linear_time(tmp_path: Path) -> None:
    names = [f"column {n}" for n in range(50_000)]
    keys = [f'"{name}": 1' for name in [*names, names[-1]]]
    start = time.process_time()
    (tmp_path / "wide.csv").write_text(f"{','.join(names)}\n{','.join('1' for _ in names)}\n")
    (row,) = read_rows(tmp_path / "wide.csv")
    assert row == dict.fromkeys(names, "1")
    (tmp_path / "twice.csv").write_text(f"{','.join([*names, names[-1]])}\n1\n")
    with pytest.raises(DataError, match="two columns are named 'column 49999'"):
        list(read_rows(tmp_path / "twice.csv"))
    (tmp_path / "twice.jsonl").write_text(f"{{{', '.join(keys)}}}\n")
    with pytest.raises(DataError, match="the key 'column 49999' occurs twice"):
        list(read_rows(tmp_path / "twice.jsonl"))
    assert time.process_time() - start < 10  # it was minutes


def test_texts_that_rows_share_are_not_held_a_thousand_times(tmp_path: Path) -> None:
    """A file of kilobytes, whose rows all point to one text of a megabyte."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), ["x" * (1 << 20)])
    pq.write_table(pa.table({"prompt": shared}), tmp_path / "rows.parquet")
    asked: list[int] = []
    with pq.ParquetFile(tmp_path / "rows.parquet") as file:
        meta = file.metadata
        size = sum(meta.row_group(at).total_byte_size for at in range(meta.num_row_groups))
        asked.append(columnar._rows_of_repeats(size, meta.num_rows))
    assert asked[0] <= 128 and (tmp_path / "rows.parquet").stat().st_size < 200_000
    assert columnar._rows_of_repeats(1 << 30, 1 << 20) == columnar.BATCH_ROWS  # a kilobyte a row is ordinary


def test_a_text_that_rows_of_a_dictionary_share_is_in_memory_once(tmp_path: Path) -> None:
    places = pa.array([*[0] * 100, 1, None], pa.int32())
    table = pa.table({"prompt": pa.DictionaryArray.from_arrays(places, ["x" * 30_000_000, "y"])})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    lengths = [len(row["prompt"] or "") for row in read_rows(tmp_path / "rows.arrow")]  # type: ignore[index]
    assert lengths == [30_000_000] * 100 + [1, 0]


@pytest.mark.parametrize("scale", [-3, -30, 5])
def test_decimals_of_any_scale_are_numbers_or_one_line(scale: int, tmp_path: Path) -> None:
    field = pa.array([decimal.Decimal(12).scaleb(-scale)], pa.decimal128(30, scale))
    table = pa.table({"prompt": ["q"], "score": field})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    (row,) = read_rows(tmp_path / "rows.arrow")
    assert row == {"prompt": "q", "score": pytest.approx(12 * 10.0**-scale)}


def test_a_decimal_that_no_number_holds_is_text() -> None:
    assert columnar._plain(decimal.Decimal("1E+2000000")) == "1E+2000000"
    assert columnar._plain(decimal.Decimal("NaN")) == "NaN"


@pytest.mark.parametrize(
    "error", [decimal.InvalidOperation(), ArithmeticError("x"), KeyError("x"), AssertionError("x")]
)
def test_what_the_library_raises_is_a_damaged_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its class: on reading a batch, and on making values of it."""
    pq.write_table(pa.table({"prompt": ["q"]}), tmp_path / "rows.parquet")

    def fail(*_: object) -> None:
        raise error

    def batches() -> Any:
        raise error
        yield

    with pytest.raises(DataError, match="is damaged or cut off"):
        list(columnar.table_rows(batches, "rows"))
    monkeypatch.setattr(columnar, "_values", fail)
    with pytest.raises(DataError, match="is damaged or cut off"):
        list(read_rows(tmp_path / "rows.parquet"))
