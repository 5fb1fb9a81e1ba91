"""Checkpoints that a thread writes: the same files, in the same order, and errors that are told."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefopt.errors import Interrupted, RunError
from prefopt.train import checkpoint, tensor_file
from prefopt.train.checkpoint import Checkpoint
from prefopt.train.saver import Saver
from prefopt.train.tensor_file import HostCopies, TensorFile
from prefopt.train.trainer import Trainer
from train.small import doubtful_pairs, dpo, pairs, same_bits, start, steps, words, write_rows
from train.test_resume import stop_after

WRITE = TensorFile.write


def tensors() -> dict[str, torch.Tensor]:
    """Of many types and shapes, among them none that is contiguous, a scalar and an empty one."""
    torch.manual_seed(0)
    return {
        "b": torch.randn(7, 5).T,
        "a": torch.randn(3, 1, 4),
        "wide": torch.randn(11, dtype=torch.float64),
        "half": torch.randn(5, 3).bfloat16(),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_a_file_is_the_one_that_the_library_writes(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK", 32)  # tensors lie across several pieces of memory
    for shards, metadata in (((), None), (("a", "b"), {"shards": '["a", "b"]'})):
        kept = tensors()
        save_file({name: t.contiguous() for name, t in kept.items()}, tmp_path / "library", metadata)
        file = TensorFile.of(kept, shards)
        if copied:
            assert HostCopies().take([file]) is not None
            for tensor in kept.values():
                tensor.zero_()  # as the next update does
        digest = file.write(tmp_path / "ours")
        written = (tmp_path / "ours").read_bytes()
        assert written == (tmp_path / "library").read_bytes()
        assert digest == hashlib.sha256(written).hexdigest()
        assert not file.data, "memory of copies is let go"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_a_gpu_are_pinned_and_their_memory_is_used_again(tmp_path: Path) -> None:
    copies, kept = HostCopies(), tensors()
    save_file({name: t.contiguous() for name, t in kept.items()}, tmp_path / "library")
    places = []
    for _ in range(2):
        moved = {name: t.cuda() for name, t in kept.items()}
        file = TensorFile.of(moved)
        held = copies.take([file])
        assert held is not None and all(piece.is_pinned() for piece in file.data)
        places.append(file.data[0].data_ptr())
        for tensor in moved.values():
            tensor.zero_()
        with held:
            file.write(tmp_path / "ours")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert places[0] == places[1]


def found(step: int, value: float, best: int | None = None) -> Checkpoint:
    state = {"step": step, "progress": {"done": 0, "best_step": best}}
    return Checkpoint({"w": torch.full((4,), value)}, {"0.m": torch.full((4,), -value)}, state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gate:
    """Holds up every file that a thread writes until it is opened; files of the main thread pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()

        def write(file: TensorFile, path: Path) -> str:
            if threading.current_thread() is not threading.main_thread():
                assert self.open.wait(60)
            return WRITE(file, path)

        monkeypatch.setattr(TensorFile, "write", write)


def test_training_goes_on_while_a_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, there = Gate(monkeypatch), Saver(tmp_path), []
    state = found(1, 1.0)
    saver.save(state, keep_last=1, wait=False, then=there.append)
    state.weights["w"].fill_(9.0)
    state.state["progress"]["best_step"] = None
    assert not saver.written and not saver.due and not there
    assert [name.startswith(".step-00000001.") for name in names(tmp_path)] == [True]
    gate.open.set()
    saver.settle()
    assert there == [tmp_path / "step-00000001"] and not saver.due
    kept = checkpoint.at(tmp_path, 1)
    assert kept.weights["w"].tolist() == [1.0] * 4 and kept.optimizer["0.m"].tolist() == [-1.0] * 4


def test_the_next_one_waits_and_best_weights_come_before_the_checkpoint_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def write(file: TensorFile, path: Path) -> str:
        order.append("thread" if threading.current_thread() is not threading.main_thread() else "main")
        time.sleep(0.02)
        order.append(path.name)
        return WRITE(file, path)

    monkeypatch.setattr(TensorFile, "write", write)
    saver = Saver(tmp_path)
    for step in (1, 2):
        saver.save_best(step, [("w", torch.full((4,), float(step)))])
        assert not any(f"step-0000000{step}" in name for name in names(tmp_path))
        saver.save(found(step, step, best=step), keep_last=1, wait=False, then=lambda path: order.append(path.name))
    saver.settle()
    files = [".best.safetensors", "weights.safetensors", "optimizer.safetensors"]
    assert [name for name in order if name != "thread"] == [*files, "step-00000001", *files, "step-00000002"]
    assert names(tmp_path) == ["best-00000002.safetensors", "step-00000002"]


def test_without_room_for_a_copy_it_is_written_at_once_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "host_room", lambda: 10)
    said: list[str] = []
    saver = Saver(tmp_path, say=said.append)
    for step in (1, 2):
        there: list[Path] = []
        saver.save(found(step, 1.0), keep_last=2, wait=False, then=there.append)
        assert there == [tmp_path / f"step-0000000{step}"]
    assert len(said) == 1 and "no room in memory for a copy" in said[0]


def full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on there is no room for files of a name."""

    def write(file: TensorFile, path: Path) -> str:
        if path.name == name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return WRITE(file, path)

    monkeypatch.setattr(TensorFile, "write", write)


@pytest.mark.parametrize(
    ("name", "said"),
    [("optimizer.safetensors", "step-00000002: "), (".best.safetensors", r"best-00000002\.safetensors: ")],
)
def test_a_full_disk_is_told_and_what_was_there_is_kept(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path)
    saver.save(found(1, 1.0), keep_last=1)
    full(name, monkeypatch)
    saver.save_best(2, [("w", torch.ones(4))])
    saver.save(found(2, 2.0, best=2), keep_last=1, wait=False)
    with pytest.raises(RunError, match=rf"{said}cannot be written \(No space left on device\); free some space"):
        saver.settle()
    assert [path.name for path, _ in checkpoint.whole(tmp_path)] == ["step-00000001"]
    monkeypatch.undo()
    saver.save(found(3, 3.0), keep_last=1)
    assert not [name for name in names(tmp_path) if name.startswith(".step")]


ROWS = pairs(13)
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 4, "save_every": 2, "keep_last": 9, "weight_decay": 0.1}


def going_on(output: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A thread writes a file once one more step was made. Returns the steps that were made before."""
    waited: list[int] = []

    def write(file: TensorFile, path: Path) -> str:
        if threading.current_thread() is not threading.main_thread():
            begun, deadline = len(steps(output)), time.monotonic() + 60
            while len(steps(output)) <= begun:
                assert time.monotonic() < deadline, "training waits for its checkpoint"
                time.sleep(0.001)
            waited.append(begun)
        return WRITE(file, path)

    monkeypatch.setattr(TensorFile, "write", write)
    return waited


def test_checkpoints_of_a_run_are_the_same_bytes_whoever_writes_them(model: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopies, "take", lambda *given, **more: None)
        dpo(model, ROWS, tmp_path / "waiting", **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        waited = going_on(tmp_path / "going", patch)
        dpo(model, ROWS, tmp_path / "going", **{**OPTIONS, "save_every": 4})  # two files a checkpoint, a step each
    assert waited == [4, 5, 8, 9]
    assert same_bits(tmp_path / "waiting", tmp_path / "going")
    for name in ("weights", "optimizer"):
        for step in (4, 8):
            path = f"checkpoints/step-{step:08d}/{name}.safetensors"
            assert (tmp_path / "waiting" / path).read_bytes() == (tmp_path / "going" / path).read_bytes()


def test_a_stop_waits_for_what_is_on_its_way(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, keep = Gate(monkeypatch), Trainer.keep

    def slowly(self: Trainer, **how: Any) -> None:
        if self.stop.signal is not None:
            threading.Timer(0.1, gate.open.set).start()
        keep(self, **how)

    stop_after(3, monkeypatch)
    monkeypatch.setattr(Trainer, "keep", slowly)
    with pytest.raises(Interrupted):
        dpo(model, ROWS, tmp_path / "out", **OPTIONS)
    assert names(tmp_path / "out/checkpoints") == ["step-00000002", "step-00000003"]


def test_a_disk_that_is_full_ends_the_run_at_a_later_step(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full("optimizer.safetensors", patch)
        with pytest.raises(RunError, match=r"checkpoints/step-00000002: cannot be written \(No space left"):
            dpo(model, ROWS, tmp_path / "out", **OPTIONS)
    assert 2 <= len(steps(tmp_path / "out")) <= 4 and not names(tmp_path / "out/checkpoints")
    dpo(model, ROWS, tmp_path / "out", resume=True, **OPTIONS)
    dpo(model, ROWS, tmp_path / "whole", **OPTIONS)
    assert same_bits(tmp_path / "out", tmp_path / "whole")


def test_another_error_waits_for_the_checkpoint_on_its_way(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, refuse = Gate(monkeypatch), Trainer._refuse_nonsense

    def fails(self: Trainer, step: int, *given: Any) -> None:
        if step == 2:
            threading.Timer(0.1, gate.open.set).start()
            raise RunError("something else")
        refuse(self, step, *given)

    monkeypatch.setattr(Trainer, "_refuse_nonsense", fails)
    with pytest.raises(RunError, match=r"^something else$"):
        dpo(model, ROWS, tmp_path / "out", **OPTIONS)
    assert names(tmp_path / "out/checkpoints") == ["step-00000002"]


def wait(process: Any, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "manifest.json", "best"])
def test_killed_while_the_thread_writes_the_one_before_is_used(file: str, model: str, tmp_path: Path) -> None:
    """``file``: the one that is not there yet when the process is killed."""
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    held_out = write_rows(tmp_path / "held-out.jsonl", doubtful_pairs(10, seed=3))
    options: dict[str, Any] = {"epochs": 5, "batch_size": 4, "save_every": 3, "progress": "plain"}
    options |= {"eval_data": held_out, "eval_every": 3}
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    process = start(words(model, data, whole, **options), log)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    held_up = (".best.safetensors",) if file == "best" else (".step-00000006.", file)
    process = start(words(model, data, parts, **options), log, held_up=held_up)
    told = parts / "metrics.jsonl"
    try:
        wait(process, lambda: told.exists() and len(steps(parts)) > (3 if file == "best" else 6))  # training goes on
    finally:
        process.kill()
        process.join()
    kept = [path.name for path, _ in checkpoint.whole(parts / "checkpoints")]
    assert kept == ([] if file == "best" else ["step-00000003"])
    process = start(words(model, data, parts, **options, resume=True), log)
    process.join(240)
    assert process.exitcode == 0, log.read_text()
    assert same_bits(parts, whole)
    assert not [name for name in names(parts / "checkpoints") if name.startswith(".step")]
    assert load_file(parts / "model.safetensors")
