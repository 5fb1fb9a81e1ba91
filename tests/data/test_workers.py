"""Tokenising in several processes gives what one gives, in flat memory, and ends at once when it has to."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.small import small_tokenizer
from data.tokenising import TEMPLATE, chat_rows, contents, start, wait_for, write
from prefopt.core.cache_folder import tokens_folder
from prefopt.core.terminal import Reporter
from prefopt.data import load
from prefopt.data import workers as prepare
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.data.workers import CannotStart, Chunk, Preparer, Workers, chunks
from prefopt.errors import DataError, Interrupted, ModelError
from prefopt.records import Comparison

BAD = {**chat_rows(1)[0], "chosen": chat_rows(1)[0]["rejected"]}
ROWS = [row for n, row in enumerate(chat_rows(150)) for row in ([row, BAD] if n % 7 == 3 else [row])]


def test_neither_processes_nor_chunks_reach_the_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [*ROWS, {**BAD, "chosen": [{"role": "assistant", "content": "<|im_end|> written out"}]}]
    rendering = Rendering(70, chat_template=TEMPLATE)

    def made(**how: Any) -> dict[str, Any]:
        reading = parse_comparisons(rows, "rows")
        return contents(load_groups([reading], small_tokenizer(), rendering, on_bad_row="skip", **how))

    expected = made()
    assert len(expected["problems"]) == 21 and any("1 row" in note for note in expected["notes"])
    for rows_per_chunk, characters in ((1, 10**9), (7, 10**9), (1000, 500)):
        monkeypatch.setattr(prepare, "CHUNK_ROWS", rows_per_chunk)
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", characters)
        assert made() == expected
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 11)
    monkeypatch.setattr(load, "PARALLEL_ROWS", 20)
    monkeypatch.setattr(Preparer, "__call__", lambda *_: pytest.fail("made in this process"))
    assert made(workers=3) == expected


def test_a_tokenizer_that_cannot_travel_is_used_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = small_tokenizer()
    tokenizer.note = lambda: None  # nothing that pickle knows
    with pytest.raises(CannotStart, match="cannot be pickled"):
        Workers(tokenizer, Rendering(), "pairs", 2)
    monkeypatch.setattr(load, "PARALLEL_ROWS", 20)
    data = load_groups([parse_comparisons(ROWS, "rows")], tokenizer, on_bad_row="skip", workers=2)
    assert data.kept == 150 and "rows is tokenised by one process: the tokenizer cannot be pickled" in caplog.text


def test_what_is_wrong_over_there_is_said_here() -> None:
    nowhere = small_tokenizer(bos_token="<s>")
    rows = chunks(parse_comparisons([{"prompt": "p", "chosen": "a", "rejected": "b"}], "rows"))
    with pytest.raises(ModelError, match="no EOS"), Workers(nowhere, Rendering(), "pairs", 1) as workers:
        list(workers.map(rows))


def test_a_process_that_ends_by_itself_is_one_line() -> None:
    with Workers(small_tokenizer(), Rendering(), "pairs", 2, file="rows.jsonl") as workers:
        for worker in workers._workers:
            worker.process.kill()
        with pytest.raises(DataError) as caught:
            list(workers.map(chunks(parse_comparisons(ROWS, "rows"))))
    said = str(caught.value)
    assert said.startswith("rows.jsonl: a process that tokenises was ended by signal 9") and "\n" not in said


def test_leaving_ends_the_processes_at_once() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Interrupted("stopped", signal.SIGINT)

    with Workers(small_tokenizer(), Rendering(), "pairs", 2) as workers:
        processes = [psutil.Process(worker.process.pid) for worker in workers._workers]
        started = time.monotonic()
        with pytest.raises(Interrupted), workers:
            list(workers.map(([c] for c in parse_comparisons(ROWS * 20, "rows")), stop))
        assert time.monotonic() - started < 2
    assert not any(process.is_running() for process in processes)


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No more rows are alive at once than a few chunks hold, however many there are."""
    alive: list[int] = []
    prepared = Preparer.__call__

    def counted(self: Preparer, rows: Any) -> Chunk:
        gc.collect()
        alive.append(sum(type(x) is Comparison for x in gc.get_objects()))
        return prepared(self, rows)

    monkeypatch.setattr(Preparer, "__call__", counted)
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 50)
    file = write(tmp_path / "rows.jsonl", chat_rows(1000))
    gc.collect()
    before = sum(type(x) is Comparison for x in gc.get_objects())
    assert load_groups([file], small_tokenizer()).kept == 1000
    assert len(alive) == 20 and max(alive) - before <= 100


@pytest.mark.slow
def test_peak_memory_is_that_of_a_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 64)

    def peak(count: int) -> int:
        file = write(tmp_path / f"{count}.jsonl", chat_rows(count))
        gc.collect()
        gc.freeze()  # in a process with many objects, of other tests, cycles are collected more rarely
        tracemalloc.start()
        try:
            assert load_groups([file], small_tokenizer(), workers=1).kept == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            gc.unfreeze()

    peak(200)  # what is imported and compiled once
    few, many = peak(400), peak(3000)
    # Offsets, 8 bytes each, three for a group and its pairs; the rest is mapped. A row held would be a thousand bytes.
    assert many - few < 2600 * 40 + 100_000, (few, many)


@pytest.mark.slow
def test_interrupted_it_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(4000))
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(file, seconds=0.001, workers=2)
        tree = psutil.Process(process.pid)
        wait_for(lambda p=tree: len(p.children()) == 2 and any(tokens_folder().glob("*.building")), process)
        time.sleep(1.0)
        workers = tree.children()
        process.send_signal(number)
        started = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 3 and err.startswith("Interrupted") and time.monotonic() - started < 5, err
        assert not any(worker.is_running() for worker in workers)
        assert not [p for p in tokens_folder().iterdir() if p.is_dir()]


@pytest.mark.slow
def test_killed_its_processes_leave_by_themselves(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(4000))
    process = start(file, workers=2)
    tree = psutil.Process(process.pid)
    wait_for(lambda: len(tree.children()) == 2, process)
    time.sleep(0.5)
    workers = tree.children()
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2 and not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Workers do not import the main module again."""
    file = write(tmp_path / "rows.jsonl", chat_rows(60))
    script = tmp_path / "script.py"
    script.write_text(
        "from data.small import small_tokenizer\n"
        "from prefopt.data import load\n"
        "load.PARALLEL_ROWS = 20\n"
        f"print('kept', load.load_groups([{str(file)!r}], small_tokenizer(), workers=2).kept)\n",
        "utf-8",
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "kept 60\n", "")


def test_progress_is_told_where_there_is_much_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(30))
    load_groups([file], small_tokenizer(), reporter=Reporter("plain"))
    assert "tokenising" not in capsys.readouterr().out
    monkeypatch.setattr(load, "PARALLEL_ROWS", 20)
    load_groups([file], small_tokenizer(), max_length=30, workers=1, reporter=Reporter("plain"))
    assert f"tokenising {file}: 30/30 rows" in capsys.readouterr().out
