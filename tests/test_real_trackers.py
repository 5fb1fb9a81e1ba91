"""The adapters against the trackers themselves, where they are installed: curves once each, also across a resume."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.runs.callbacks import RunInfo, Tracking
from prefopt.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def track(name: str, output: Path) -> str:
    """Steps 1 to 5, a kill, and 4 to 8 from the checkpoint of step 3; returns the run's id."""
    folder = RunFolder(output, {}, resume=False, dry=True)
    for first, last in ((0, 5), (3, 8)):
        tracking = Tracking([name], "films", folder)
        run = RunInfo(output=output, options={"beta": 0.1, "data": ["a", "b"]}, model=None, steps=8, step=first)
        tracking.on_start(run)
        for step in range(first + 1, last + 1):
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            tracking.on_step(run, step, {"loss": 1 / step, "rewards/chosen": 1.0})
        tracking.on_end(run, "trained" if last == 8 else "interrupted")
        assert list(tracking._running) == [name], "it did not fail on the way"
    found: str = folder.record["tracking"][name]
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that all of them keep their files in, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / "out").mkdir()
    return tmp_path


WHOLE = [(step, pytest.approx(1 / step)) for step in range(1, 9)]


def test_mlflow(place: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(track("mlflow", place / "out"))
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == WHOLE
    assert run.data.params["beta"] == "0.1" and run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "films"


def test_trackio(place: Path) -> None:
    pytest.importorskip("trackio")
    name = track("trackio", place / "out")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    rows = storage.get_logs("films", name)
    assert sorted((row["step"], row["train/loss"]) for row in rows) == WHOLE


def test_wandb(place: Path) -> None:
    pytest.importorskip("wandb")
    run = track("wandb", place / "out")
    files = sorted((place / "out" / "wandb").glob(f"offline-run-*/run-{run}.wandb"))
    assert len(files) == 2, "two processes, one id"
    assert all(b"films" in path.read_bytes() for path in files)
    assert not list((place / "out" / "wandb").rglob("*.py")), "no code is kept"
