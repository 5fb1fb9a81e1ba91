"""``--overwrite``: what it replaces, and what it leaves alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from prefopt.config.distil import DistilConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.runs.folder import RunFolder
from prefopt.runs.history import read_history
from train.small import dpo, pairs, write_model, write_rows


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, str, Path]:
    """A model, its data, and a folder with a run and what came to lie in it."""
    model, data, out = write_model(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", pairs(6)), tmp_path / "out"
    dpo(model, data, out, max_steps=3, save_every=1)
    (out / "notes").mkdir()
    (out / "notes" / "old.txt").touch()
    return model, data, out


def test_the_new_run_stands_alone(place: tuple[str, str, Path]) -> None:
    model, data, out = place
    dpo(model, data, out, max_steps=1, overwrite=True)
    assert read_history(out).step == 1 and read_history(out).status == "finished"
    assert not (out / "notes").exists() and not (out / "checkpoints").exists()
    assert (out / "model.safetensors").exists()


def test_what_fails_before_training_leaves_the_old_run(place: tuple[str, str, Path], tmp_path: Path) -> None:
    model, _, out = place
    rows = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError):
        dpo(model, rows, out, overwrite=True)
    assert read_history(out).step == 2 and (out / "notes" / "old.txt").exists()


def test_what_is_no_run_or_in_use_is_not_replaced(place: tuple[str, str, Path], tmp_path: Path) -> None:
    model, data, out = place
    with FileLock(out / ".lock"), pytest.raises(RunError, match="in use by another process"):
        dpo(model, data, out, overwrite=True)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(RunError, match="is not empty and holds no run of prefopt"):
        dpo(model, data, other, overwrite=True)
    assert (other / "cat.jpg").exists()


def test_other_runs_below_the_folder_are_not_removed(place: tuple[str, str, Path]) -> None:
    model, data, out = place
    below = out / "notes" / "second"
    folder = RunFolder(out, {}, resume=False, overwrite=True)
    dpo(model, data, below, max_steps=1)  # begun while the other gets ready
    with pytest.raises(RunError, match=f"--output {out} holds other runs, such as {below}; name another folder"):
        folder.take()
    with pytest.raises(RunError, match=f"holds other runs, such as {below}"):
        dpo(model, data, out, overwrite=True)
    assert read_history(out).step == 2 and read_history(below).status == "finished"


def test_what_the_run_reads_is_not_removed(place: tuple[str, str, Path], tmp_path: Path) -> None:
    model, data, out = place
    (tmp_path / "link").symlink_to(out)
    for options in (
        {"model": str(out), "data": [data]},
        {"model": str(tmp_path / "link"), "data": [data]},
        {"model": model, "data": [data, str(out / "notes" / "old.txt")]},
        {"model": model, "data": [data], "reference": str(out)},
    ):
        with pytest.raises(ConfigError, match=r"--overwrite would remove .* which --(model|data|reference) reads"):
            DpoConfig(**options, output=str(out), overwrite=True)  # type: ignore[arg-type]
    DpoConfig(model=model, data=[data], output=str(out), overwrite=True)
    DpoConfig(model=model, data=[str(tmp_path / "*.jsonl")], output=str(out), overwrite=True)
    with pytest.raises(ConfigError, match="--resume continues the run that --overwrite would replace"):
        DpoConfig(model=model, data=[data], output=str(out), overwrite=True, resume=True)


def test_names_are_read_as_their_readers_read_them(
    place: tuple[str, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder, a glob, the options of a data set, and an adapter on the model in the folder."""
    model, data, out = place
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(out / "notes" / "pairs.jsonl", pairs(2))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(out)}))
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../out"}))
    there: dict[str, Any] = {"model": model, "data": [data]}
    for flag, options in (
        ("model", {"model": "~/out"}),
        ("data", {"data": ["~/out/notes/pairs.jsonl"]}),
        ("data", {"data": [str(out / "notes" / "*.jsonl")]}),
        ("data", {"data": [data, str(tmp_path / "*" / "notes" / "pairs.jsonl")]}),
        ("eval-data", {"eval_data": ["~/o[tu]*/**/*.jsonl"]}),
        ("data", {"data": [f"{out / 'notes'},split=train"]}),
        ("model", {"model": str(adapter)}),
        ("adapter", {"adapter": "~/beside"}),
        ("reference-adapter", {"reference": model, "reference_adapter": str(adapter)}),
    ):
        with pytest.raises(ConfigError, match=rf"--overwrite would remove .*, which --{flag} reads"):
            DpoConfig(**there | options, output=str(out), overwrite=True)
    with pytest.raises(ConfigError, match="which --teacher reads"):
        DistilConfig(**there, teacher="~/adapter", output=str(out), overwrite=True)
    with pytest.raises(ConfigError, match="which --reward reads"):
        PpoConfig(model=model, prompts=[data], reward="~/out", output=str(out), overwrite=True)


def test_a_run_waits_for_who_looks_whether_its_folder_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {}, resume=False)
    probe = FileLock(tmp_path / ".lock", thread_local=False)
    probe.acquire()
    release = threading.Timer(0.1, probe.release)
    release.start()
    folder.take()
    release.join()
    assert folder.taken
    folder.leave()
