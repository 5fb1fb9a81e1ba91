"""``--overwrite``: what it replaces, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from prefopt.config.dpo import DpoConfig
from prefopt.errors import ConfigError, DataError, RunError
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
    with pytest.raises(ConfigError, match="--resume continues the run that --overwrite would replace"):
        DpoConfig(model=model, data=[data], output=str(out), overwrite=True, resume=True)
