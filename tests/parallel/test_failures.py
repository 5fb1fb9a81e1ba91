"""What goes wrong on some rank: one line, the same exit status everywhere, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.ranks import Failure, on_ranks, results, started
from parallel.test_runs import CASES, MACHINE, OPTIONS, prepared, same, train, weights
from prefopt.cli import main
from prefopt.core.ranks import ranks_in
from prefopt.train.tensor_file import TensorFile
from train.small import hold_up, pairs, write_rows

QUICK = ["--device", "cpu", "--dtype", "float32", "--progress", "none", "--max-length", "64", "--max-steps", "2"]


def _typed(words: list[str], folders: list[str] | None = None) -> tuple[int, str]:
    """A command on a rank, in the folder of its own, where there are such: exit status and standard error."""
    if folders:
        os.chdir(folders[int(os.environ["RANK"])])
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        status = main(words)
    return status, told.getvalue()


def refused(words: list[str], size: int = 2, folders: list[str] | None = None) -> str:
    """The one line that all ranks together say."""
    found = on_ranks(size, _typed, words, folders)
    assert [status for status, _ in found] == [2] * size, found
    lines = [line for _, text in found for line in text.splitlines()]
    assert len(lines) == 1, lines
    return lines[0]


def dpo(folder: Path, *more: str) -> list[str]:
    model, data = prepared(folder, "pairs")
    return ["dpo", "--model", model, "--data", data, "--output", str(folder / "out"), *QUICK, *more]


def test_what_processes_cannot_do_together_is_refused_in_one_line(tmp_path: Path) -> None:
    words = dpo(tmp_path)
    assert "--batch-size 1" in refused([*words, "--batch-size", "1"])
    assert "one process" in refused(["data", "check", str(tmp_path / "pairs.jsonl")])
    assert "hybrid" in refused([*words, "--shard", "hybrid", "--batch-size", "4"])
    assert "absent" in refused(["dpo", "--model", str(tmp_path / "absent"), *words[3:]])
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.txt").touch()
    assert str(tmp_path / "out") in refused([*words, "--batch-size", "4"])


def test_shards_need_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*dpo(tmp_path), "--shard", "full"]) == 2
    assert "prefopt launch" in capsys.readouterr().err


def test_ranks_that_see_other_files_or_options_are_told_apart(tmp_path: Path) -> None:
    model, _ = prepared(tmp_path, "pairs")
    folders = []
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        write_rows(folder / "data.jsonl", pairs(10, seed=rank))
        folders.append(str(folder))
    words = ["dpo", "--model", model, "--data", "data.jsonl", "--output", str(tmp_path / "out"), *QUICK]
    line = refused([*words, "--batch-size", "4"], folders=folders)
    assert "rank 1" in line and "data" in line
    assert not (tmp_path / "out" / "model.safetensors").exists()
    Path(folders[1], "data.jsonl").write_text("{}\n")
    line = refused([*words[:6], str(tmp_path / "other"), *QUICK, "--batch-size", "4"], folders=folders)
    assert "data.jsonl" in line and "row 1" in line


LONG = {**OPTIONS, **MACHINE, "max_steps": 40, "epochs": 20, "save_every": 1, "lora": True, "lora_dropout": 0.1}
SHARDS = ["none", "full"]


def _trains(
    model: str, data: str, output: str, options: dict[str, Any], held_up: tuple[str, ...] = ()
) -> tuple[int, str]:
    """``held_up``: files that never get written, see :func:`hold_up`."""
    if held_up:
        hold_up(*held_up)
    words = ["dpo", "--model", model, "--data", data, "--output", output]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return _typed(words)


def run(
    folder: Path, name: str, size: int, held_up: tuple[str, ...] = (), trains: Callable[..., Any] = _trains, **more: Any
) -> list[tuple[Any, Any]]:
    model, data = prepared(folder, "pairs")
    return started(size, trains, model, data, str(folder / name), {**LONG, **more}, held_up)


def trained(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('{"step"') if file.exists() else 0


def wait(processes: list[tuple[Any, Any]], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition() and all(process.is_alive() for process, _ in processes):
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("shard", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_they_resume_to_the_bit(shard: str, tmp_path: Path) -> None:
    whole = results(run(tmp_path, "whole", 2, shard=shard, max_steps=8))
    assert [status for status, _ in whole] == [0, 0], whole
    processes = run(tmp_path, "parts", 2, shard=shard, max_steps=8)
    wait(processes, lambda: trained(tmp_path / "parts") >= 2)
    os.kill(processes[1][0].pid, signal.SIGTERM)
    found = results(processes)
    assert [status for status, _ in found] == [143, 143], found
    assert sum(len(text.splitlines()) for _, text in found) == 1
    steps = trained(tmp_path / "parts")
    assert 2 <= steps < 8
    kept = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{steps:08d}"
    assert [s for s, _ in results(run(tmp_path, "parts", 2, shard=shard, max_steps=8, resume=True))] == [0, 0]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_killed_at_ten_moments_a_run_ends_with_the_same_bits(shard: str, tmp_path: Path) -> None:
    assert [s for s, _ in results(run(tmp_path, "whole", 3, shard=shard))] == [0, 0, 0]
    chance = random.Random(0)
    for _ in range(10):
        before = trained(tmp_path / "parts")
        processes = run(tmp_path, "parts", 3, shard=shard, resume=True)
        more = before + chance.randint(1, 4)
        wait(processes, lambda more=more: trained(tmp_path / "parts") >= more)
        time.sleep(chance.random() * 0.05)
        started_at = time.monotonic()
        victim = chance.randrange(3)
        processes[victim][0].kill()
        found = results(processes)
        assert time.monotonic() - started_at < 30
        told = [result for rank, result in enumerate(found) if rank != victim]
        assert all(result is not None and result[0] == 2 for result in told), found
    assert trained(tmp_path / "parts") > 0
    assert [s for s, _ in results(run(tmp_path, "parts", 3, shard=shard, resume=True))] == [0, 0, 0]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_it_writes_its_shard_leaves_the_checkpoint_before(
    victim: int, tmp_path: Path
) -> None:
    options = {"shard": "full", "max_steps": 6, "save_every": 2}
    assert [s for s, _ in results(run(tmp_path, "whole", 2, **options))] == [0, 0]
    file = f"optimizer-0000{victim + 1}-of-00002.safetensors"
    processes = run(tmp_path, "parts", 2, held_up=(".step-00000004.", file), **options)
    wait(processes, lambda: trained(tmp_path / "parts") > 4)  # training goes on
    processes[victim][0].kill()
    found = results(processes)
    assert found[1 - victim][0] == 2, found
    kept = sorted(p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert kept[-1] == "step-00000002"
    assert [s for s, _ in results(run(tmp_path, "parts", 2, resume=True, **options))] == [0, 0]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def _disk_full_on_rank_1(*arguments: Any) -> tuple[int, str]:
    write = TensorFile.write

    def full(file: TensorFile, path: Path) -> str:
        if ranks_in().rank == 1 and ".step-00000004." in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, path)

    TensorFile.write = full  # type: ignore[method-assign]
    return _trains(*arguments)


def test_a_disk_that_is_full_for_one_shard_ends_all_ranks_in_one_line(tmp_path: Path) -> None:
    options = {"shard": "full", "max_steps": 12, "save_every": 4}
    found = results(run(tmp_path, "out", 2, trains=_disk_full_on_rank_1, **options))
    assert [status for status, _ in found] == [2, 2], found
    (line,) = (line for _, text in found for line in text.splitlines())
    assert "step-00000004: cannot be written (No space left on device)" in line
    assert 4 <= trained(tmp_path / "out") <= 8 and not list((tmp_path / "out/checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_what_four_wrote_three_and_one_go_on_with(shard: str, tmp_path: Path) -> None:
    method, data, options = CASES["dpo"]
    model, file = prepared(tmp_path, data)
    options = {**options, "max_steps": 6, "save_every": 1}
    on_ranks(1, train, method, file, options, model, str(tmp_path / "one"))
    processes = started(4, train, method, file, {**options, "shard": shard}, model, str(tmp_path / "begun"))
    wait(processes, lambda: trained(tmp_path / "begun") >= 3)
    os.kill(processes[2][0].pid, signal.SIGTERM)
    found = results(processes)
    assert all(result.kind == "Interrupted" for result in found), found
    for size in (3, 1):
        shutil.copytree(tmp_path / "begun", tmp_path / f"on{size}")
        more = {"resume": True, **({"shard": shard} if size > 1 else {})}
        on_ranks(size, train, method, file, {**options, **more}, model, str(tmp_path / f"on{size}"))
        shutil.rmtree(tmp_path / f"on{size}" / "checkpoints")
        shutil.rmtree(tmp_path / "one" / "checkpoints", ignore_errors=True)
        same(tmp_path / "one", tmp_path / f"on{size}")


def test_a_checkpoint_without_a_shard_is_passed_over_by_all_ranks(tmp_path: Path) -> None:
    model, file = prepared(tmp_path, "pairs")
    options = {"max_steps": 4, "save_every": 1, "keep_last": 4, "shard": "full"}
    processes = started(2, train, "dpo", file, {**options, "epochs": 30, "max_steps": 60}, model, str(tmp_path / "out"))
    wait(processes, lambda: trained(tmp_path / "out") >= 3)
    os.kill(processes[0][0].pid, signal.SIGTERM)
    results(processes)
    newest = max((tmp_path / "out" / "checkpoints").glob("step-*"))
    (newest / "weights-00002-of-00002.safetensors").unlink()
    steps = trained(tmp_path / "out")
    found = on_ranks(
        2, train, "dpo", file, {**options, "epochs": 30, "max_steps": 60, "resume": True}, model, str(tmp_path / "out")
    )
    assert found[0]["loss"] == found[1]["loss"]
    assert trained(tmp_path / "out") == 60 > steps


@pytest.mark.parametrize("words", [["dpo", "--model", "absent/of/all", "--data", "d", "--output", "o"], ["runs"]])
def test_a_rank_that_no_store_knows_says_what_is_wrong(words: list[str], tmp_path: Path) -> None:
    """Of another launcher than torchrun, before the processes are connected; and of a stray variable."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment = {**os.environ, **(variables if words[0] == "dpo" else {"RANK": "1"})}
    told = subprocess.run([sys.executable, "-m", "prefopt", *words], env=environment, cwd=tmp_path, capture_output=True)
    assert told.returncode == 2
    assert told.stderr.count(b"\n") == 1 and b"error: " in told.stderr


def test_a_chain_is_refused_in_python_too() -> None:
    for found in on_ranks(2, _chain, failing=True):
        assert isinstance(found, Failure) and "one process" in found.message


def _chain() -> None:
    import prefopt

    prefopt.rlhf("m", "d.jsonl", output="o")
