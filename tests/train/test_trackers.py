"""Trackers are told what metrics.jsonl holds, once, under one id; TensorBoard for real, the others by stand-ins."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefopt
from prefopt.errors import ConfigError, RunError
from prefopt.runs import callbacks
from prefopt.runs.callbacks import RunInfo, Tracking
from prefopt.runs.folder import RunFolder
from train.small import CLOCKS, dpo, evaluations, pairs, same_bits, steps

ROWS = pairs(12)
OPTIONS: dict[str, Any] = {"eval_fraction": 0.3, "eval_every": 2, "save_every": 2, "epochs": 2, "batch_size": 3}
STAND_INS = ("wandb", "trackio", "mlflow")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The three modules, empty."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_ins")))
    for name in STAND_INS:
        sys.modules.pop(name, None)
    yield {name: importlib.import_module(name) for name in STAND_INS}
    for name in STAND_INS:
        sys.modules.pop(name, None)


class Fall(prefopt.Callback):
    """Breaks off a run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: RunInfo, step: int, metrics: Any) -> None:
        if step == self.step:
            raise OSError("no more")


def expected(output: Path) -> list[dict[str, Any]]:
    """What trackers should have been told, from the run's own lines, without what the clock decides."""
    evaluated = {line["step"]: line for line in evaluations(output)}
    rows = []
    for line in steps(output):
        told = {f"train/{k}": v for k, v in line.items() if k != "step"}
        more = evaluated.get(line["step"], {})
        rows.append(told | {f"eval/{k.removeprefix('eval_')}": v for k, v in more.items() if k != "step"})
    return rows


def rows_of(told: list[tuple[int, dict[str, float]]]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for step, values in told:
        row = rows.setdefault(step, {})
        assert not row.keys() & values.keys(), f"step {step} is told twice"
        row.update({k: v for k, v in values.items() if k.partition("/")[2] not in CLOCKS})
    assert list(rows) == list(range(1, len(rows) + 1))
    return list(rows.values())


def test_a_resumed_run_continues_its_curves(stand_ins: dict[str, Any], model: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RunError, match="callback Fall failed"):
        dpo(model, ROWS, output, track=list(STAND_INS), track_project="films", callbacks=[Fall(3)], **OPTIONS)
    kept = json.loads((output / "run.json").read_text())["tracking"]
    assert set(kept) == set(STAND_INS)
    dpo(model, ROWS, output, track=list(STAND_INS), track_project="films", resume=True, **OPTIONS)
    for name, module in stand_ins.items():
        (run,) = module.runs.values()
        assert run.id == kept[name] and run.project == "films"
        assert run.config["beta"] == 0.1 and run.config["batch_size"] == 3
        assert rows_of(run.told) == expected(output)
    assert [module.runs[kept[n]].ends for n, module in stand_ins.items()] == [[1, 0], [0, 0], ["FAILED", "FINISHED"]]
    dpo(model, ROWS, tmp_path / "plain", **OPTIONS)
    assert same_bits(output, tmp_path / "plain")


def test_a_killed_run_tells_no_step_twice(stand_ins: dict[str, Any], tmp_path: Path) -> None:
    """Its last checkpoint is of step 3, its last word of step 5."""
    folder = RunFolder(tmp_path, {}, resume=False, dry=True)
    for first, last, status in ((0, 5, None), (3, 8, "trained")):
        tracking = Tracking([*STAND_INS, "tensorboard"], "p", folder)
        run = RunInfo(output=tmp_path, options={"beta": 1.0}, model=None, steps=8, step=first)
        tracking.on_start(run)
        for step in range(first + 1, last + 1):
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
            tracking.on_step(run, step, {"loss": 1 / step})
        if status is None:  # what a kill leaves of a line
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 99')
        else:
            tracking.on_end(run, status)
    whole = [{"train/loss": 1 / step} for step in range(1, 9)]
    for name, module in stand_ins.items():
        assert rows_of(module.runs[folder.record["tracking"][name]].told) == whole, name
    assert scalars(tmp_path)["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 9)]


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags: list[str] = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_the_lines_of_the_run(model: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RunError, match="callback Fall failed"):
        dpo(model, ROWS, output, track=["tensorboard"], callbacks=[Fall(3)], **OPTIONS)
    dpo(model, ROWS, output, track=["tensorboard"], resume=True, **OPTIONS)
    found = scalars(output)
    for prefix, lines in (("train/", steps(output)), ("eval/", evaluations(output))):
        for name in lines[0]:
            if name != "step":
                curve = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
                assert found[prefix + name.removeprefix("eval_")] == curve, name


def test_without_being_asked_no_tracker_is_touched(stand_ins: dict[str, Any], model: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "out", **OPTIONS)
    assert not any(module.runs for module in stand_ins.values())
    assert "tracking" not in json.loads((tmp_path / "out" / "run.json").read_text())
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_one_that_cannot_begin_stops_the_run_before_its_first_step(
    stand_ins: dict[str, Any], model: str, tmp_path: Path
) -> None:
    stand_ins["wandb"].fails.append("init")
    with pytest.raises(RunError, match=r"^--track wandb .*\(RuntimeError: no key: log in with wandb login\)"):
        dpo(model, ROWS, tmp_path / "out", track=["mlflow", "wandb"], **OPTIONS)
    assert not steps(tmp_path / "out")
    assert [run.ends for run in stand_ins["mlflow"].runs.values()] == [["FAILED"]]


def test_one_that_fails_later_is_left_out_and_the_run_goes_on(
    stand_ins: dict[str, Any], model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand_ins["wandb"].fails.append("log")
    with caplog.at_level(logging.WARNING):
        dpo(model, ROWS, tmp_path / "out", track=["wandb", "mlflow"], **OPTIONS)
    assert caplog.text.count("--track wandb failed and is dropped (ConnectionError: no route)") == 1
    (run,) = stand_ins["mlflow"].runs.values()
    assert rows_of(run.told) == expected(tmp_path / "out")


def test_what_is_not_installed_is_said_before_anything_runs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--track wandb: .* run pip install wandb"):
        dpo(model, ROWS, tmp_path / "out", track=["wandb"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"track": ["tensorbord"]}, "--track tensorbord: it must be one of .*; did you mean tensorboard"),
        ({"track_project": "x"}, "--track-project does nothing without"),
        ({"track_project": "x", "track": ["tensorboard"]}, "--track-project does nothing without"),
    ],
)
def test_what_cannot_be_tracked_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo("m", "d", tmp_path / "out", **options)
