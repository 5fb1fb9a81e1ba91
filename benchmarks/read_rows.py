"""Rows per second and peak memory of reading, per kind of file: one process each, over rows made up here.

    python benchmarks/read_rows.py --rows 1000000 --folder SCRATCH

A file is written once and kept in the folder. The first pass over it brings it into the file cache and is not counted.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from memory import peak_bytes

Row = dict[str, Any]


def text_rows(count: int) -> Iterator[Row]:
    """Small rows: three short texts."""
    for n in range(count):
        yield {"prompt": f"What is {n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "I do not know."}


def chat_rows(count: int) -> Iterator[Row]:
    """The same as conversations: three lists of messages."""
    for row in text_rows(count):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        yield {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


def write_lines(path: Path, rows: Iterator[Row]) -> None:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_list(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for n, row in enumerate(rows):
            file.write(("[\n" if n == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n")


def write_csv(path: Path, rows: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        for row in rows:
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()])


def write_columns(path: Path, rows: Iterator[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    while part := list(islice(rows, 10_000)):
        table = pa.Table.from_pylist(part)
        if writer is None:
            parquet = path.suffix == ".parquet"
            writer = pq.ParquetWriter(path, table.schema) if parquet else pa.ipc.new_stream(str(path), table.schema)
        writer.write_table(table)
    writer.close()


WRITERS: dict[str, Callable[[Path, Iterator[Row]], None]] = {
    ".jsonl": write_lines,
    ".jsonl.gz": write_lines,
    ".json": write_list,
    ".csv": write_csv,
    ".parquet": write_columns,
    ".arrow": write_columns,
}


def measure(path: Path) -> None:
    """Read a file twice and print what the second pass took, and the peak over the memory before."""
    from prefopt.data.files.sources import read_rows

    next(iter(read_rows(path)))  # what is imported on the way is not the file's
    before = peak_bytes()
    for _ in range(2):
        started, used = time.perf_counter(), time.process_time()
        count = sum(1 for _ in read_rows(path))
        wall, cpu = time.perf_counter() - started, time.process_time() - used
    size = path.stat().st_size
    print(
        f"{path.name:28} {size / 1e6:8.1f} MB {count / wall:12,.0f} rows/s ({count / cpu:,.0f} per CPU second), "
        f"peak {peak_bytes() / 1e6:.0f} MB, {(peak_bytes() - before) / 1e6:.0f} of it by reading",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made and kept")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.file:
        measure(given.file)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for rows in (text_rows, chat_rows):
        for ending, write in WRITERS.items():
            path = given.folder / f"{rows.__name__}-{given.rows}{ending}"
            if not path.exists():
                write(path, rows(given.rows))
            command = [sys.executable, __file__, "--folder", str(given.folder), "--file", str(path)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
