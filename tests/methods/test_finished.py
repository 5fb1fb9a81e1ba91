"""The last moments of a run: killed in any of them, its model is there, or can be made from its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_ppo import ppo
from prefopt.core.files import remove_leftovers, replace_file
from prefopt.errors import RunError
from prefopt.runs.folder import RunFolder
from train.small import dpo, pairs, weights, write_rows

Train = Callable[..., Any]


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture(params=["ppo", "dpo"])
def train(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> Train:
    """A short run of either loop, into the folder it is given."""
    if request.param == "ppo":
        start = world.write_world(tmp_path / "m")
        return lambda output, **more: ppo(start, output, **more)
    data = write_rows(tmp_path / "data.jsonl", pairs(8))
    return lambda output, **more: dpo(model, data, output, batch_size=4, learning_rate=1e-2, **more)


def dead_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def train_but_killed_before_it_is_noted(train: Train, output: Path) -> None:
    """A run whose model is written, and which does not say so."""
    remember = RunFolder.remember

    def killed(self: RunFolder, **values: Any) -> None:
        if values.get("status") == "finished":
            raise Killed
        remember(self, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "remember", killed)
        with pytest.raises(Killed):
            train(output)


def test_killed_before_it_is_noted_as_finished_a_run_goes_on(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train_but_killed_before_it_is_noted(train, output)
    assert list(output.glob("checkpoints/step-*"))
    before, lines = weights(output), (output / "metrics.jsonl").read_text()
    train(output, resume=True)
    assert (output / "metrics.jsonl").read_text() == lines  # no step was made again
    after = weights(output)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (output / "checkpoints").exists()


def test_killed_while_its_checkpoints_go_a_run_is_finished(train: Train, tmp_path: Path) -> None:
    output, rmtree = tmp_path / "out", shutil.rmtree

    def killed(path: Path, **how: Any) -> None:
        if Path(path).name.startswith(".checkpoints."):  # renamed aside first, so that half of it is no checkpoint
            raise Killed
        rmtree(path, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            train(output)
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert not (output / "checkpoints").exists() and list(output.glob(".checkpoints.*"))
    gone = dead_process()
    next(output.glob(".checkpoints.*")).rename(output / f".checkpoints.{gone}")
    (output / f".run.json.{gone}").write_text("{")
    with pytest.raises(RunError, match="is finished; to train further"):
        train(output, resume=True)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_what_a_kill_left_aside_is_gone_after_the_next_start(train: Train, tmp_path: Path) -> None:
    output, gone = tmp_path / "out", dead_process()
    train_but_killed_before_it_is_noted(train, output)
    (output / f".run.json.{gone}").write_text("{")
    (output / "checkpoints" / f".step-00000001.{gone}").mkdir()
    train(output, resume=True)
    assert not [path.name for path in output.rglob(".*")] and not (output / "checkpoints").exists()


def test_what_another_process_left_beside_a_file_goes_when_it_is_written_again(tmp_path: Path) -> None:
    path, gone = tmp_path / "page[1].html", dead_process()
    old, fresh = tmp_path / f".page[1].html.{gone}", tmp_path / f".page[1].html.{gone}-journal"
    other, alive = tmp_path / f".other.html.{gone}", tmp_path / f".page[1].html.{os.getppid()}"
    for left in (old, fresh, other, alive):
        left.write_text("half")
    for left in (old, other, alive):
        os.utime(left, (0, 0))
    replace_file(path, b"whole")
    # On a disk of several machines the process of a fresh one may live elsewhere.
    assert not old.exists() and fresh.exists() and other.exists() and alive.exists()
    remove_leftovers(tmp_path)  # by whoever holds the folder
    assert not fresh.exists() and not other.exists() and alive.exists() and path.read_bytes() == b"whole"
