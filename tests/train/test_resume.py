"""Stopped, damaged or changed: a run goes on to the very same end, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefopt
from prefopt.cli import main
from prefopt.core.terminal import StopRequest
from prefopt.errors import Interrupted, RunError
from prefopt.runs.folder import RunFolder
from prefopt.runs.metrics import Metrics
from train.small import doubtful_pairs, dpo, evaluations, pairs, same_bits, steps, words, write_model, write_rows

ROWS = pairs(13)
FULL: dict[str, Any] = {"epochs": 3, "batch_size": 4, "eval_fraction": 0.25, "eval_every": 2, "weight_decay": 0.1}
LORA: dict[str, Any] = {"epochs": 2, "batch_size": 3, "lora": True, "lora_dropout": 0.2, "learning_rate": 1e-2}


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    write = Metrics.write

    def wrapped(self: Metrics, values: Any) -> None:
        write(self, values)
        if values["step"] == step and "loss" in values:
            signal.raise_signal(number)

    monkeypatch.setattr(Metrics, "write", wrapped)


def stopped_at(step: int, *arguments: Any, **options: Any) -> None:
    """A run that is stopped after ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Interrupted):
            dpo(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        pytest.param(FULL, 1, marks=pytest.mark.slow),
        (FULL, 4),
        (LORA, 3),
        pytest.param(LORA | {"dtype": "float64"}, 6, marks=pytest.mark.slow),
        pytest.param(FULL | {"dtype": "bfloat16"}, 2, marks=pytest.mark.slow),
        (FULL | {"loss": "bco:1,nll:0.1", "token_budget": 60}, 3),  # running states, two passes
        pytest.param(LORA | {"loss": "beta_dpo", "token_budget": 60}, 3, marks=pytest.mark.slow),
        pytest.param(FULL | {"loss": "kto", "token_budget": 60}, 2, marks=pytest.mark.slow),
        (
            FULL | {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.4, "dtype": "bfloat16"},
            3,
        ),  # a reference that moves
        pytest.param(LORA | {"ref_model_sync_steps": 2, "loss": "tdpo"}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(options: dict[str, Any], step: int, model: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "whole", **options)
    stopped_at(step, model, ROWS, tmp_path / "parts", **options)
    assert [p.name for p in (tmp_path / "parts/checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    assert not list((tmp_path / "parts").glob("*model.safetensors"))
    stopped_at(step + 1, model, ROWS, tmp_path / "parts", resume=True, **options)
    dpo(model, ROWS, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts/run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_command_with_a_checkpoint(number: int, status: int, model: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs(40))
    command = words(model, data, tmp_path / "parts", batch_size=2, epochs=20, progress="plain")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    told = tmp_path / "parts/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.startswith("prefopt: stopped after step ") and err.count("\n") == 1 and "--resume" in err
    (saved,) = (tmp_path / "parts/checkpoints").iterdir()
    done = int(saved.name.removeprefix("step-"))
    assert f"checkpoint: {saved}" in out and 3 < done < 400
    assert [line["step"] for line in steps(tmp_path / "parts")] == list(range(1, done + 1))

    with pytest.MonkeyPatch.context() as patch:  # far enough beyond the stop, and no further
        stop_after(done + 5, patch)
        assert main([*command, "--resume"]) == 143
    with pytest.MonkeyPatch.context() as patch:
        stop_after(done + 5, patch)
        command[command.index(f"--output={tmp_path / 'parts'}")] = f"--output={tmp_path / 'whole'}"
        assert main(command) == 143
    files = [tmp_path / name / f"checkpoints/step-{done + 5:08d}" for name in ("whole", "parts")]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")


@pytest.mark.parametrize("late", range(4))
def test_a_signal_at_any_moment_leaves_a_checkpoint(
    late: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes between two of the trainer's looks at it."""
    looks: list[int] = []

    def look(self: StopRequest) -> int | None:
        if "asked" not in vars(self) and (tmp_path / "out/metrics.jsonl").exists():
            looks.append(1)
            if len(looks) > late:
                vars(self)["asked"] = signal.SIGTERM
        return vars(self).get("asked")

    def put(self: StopRequest, number: int | None) -> None:
        if number is not None:
            vars(self)["asked"] = number

    monkeypatch.setattr(StopRequest, "signal", property(look, put), raising=False)
    with pytest.raises(Interrupted, match="stopped after step"):
        dpo(model, ROWS, tmp_path / "out", epochs=4, save_every=1000)
    (saved,) = (tmp_path / "out/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == len(steps(tmp_path / "out"))


def test_a_run_stopped_while_it_scores_keeps_what_it_scored(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefopt.train import reference

    data = write_rows(tmp_path / "data.jsonl", ROWS)
    arguments = words(model, data, tmp_path / "parts", token_budget=8, progress="plain")
    calls: list[int] = []
    pack = reference.pack

    def stopping(groups: Any, layout: Any) -> Any:
        calls.append(len(groups))
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return pack(groups, layout)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "pack", stopping)
        assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    kept = 2 * sum(calls)
    assert len(calls) == 4 and f"{26 - kept} responses scored" in capsys.readouterr().out
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "another"))
    dpo(model, data, tmp_path / "whole", token_budget=8)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a byte of the weights": lambda folder: flip(folder / "weights.safetensors"),
    "a byte of the state": lambda folder: flip(folder / "state.json"),
    "a truncated optimiser": lambda folder: os.truncate(folder / "optimizer.safetensors", 1000),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "no weights": lambda folder: (folder / "weights.safetensors").unlink(),
}


@pytest.fixture(scope="module")
def five_steps(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and the same stopped at its fifth step, with checkpoints of the last three."""
    folder = tmp_path_factory.mktemp("five")
    options = FULL | {"save_every": 1, "keep_last": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        dpo(model, ROWS, folder / "whole", **options)
        stopped_at(5, model, ROWS, folder / "parts", **options)
    return folder


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_behind_a_damaged_checkpoint_the_one_before_it_is_used(
    damage: Callable[[Path], None], model: str, five_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "parts"
    shutil.copytree(five_steps / "parts", output)
    damage(output / "checkpoints/step-00000005")
    dpo(model, ROWS, output, resume=True, **FULL, save_every=1, keep_last=3)
    assert "step-00000005 is damaged" in caplog.text and "step-00000004" not in caplog.text
    assert same_bits(output, five_steps / "whole")


def test_damaged_checkpoints_do_not_count_as_kept(model: str, tmp_path: Path) -> None:
    options = {"epochs": 4, "save_every": 3, "keep_last": 2}
    stopped_at(9, model, ROWS, tmp_path / "out", **options)
    checkpoints = tmp_path / "out/checkpoints"
    flip(checkpoints / "step-00000009/weights.safetensors")
    more = options | {"save_every": 1, "keep_last": 1}
    stopped_at(7, model, ROWS, tmp_path / "out", resume=True, **more)
    assert [p.name for p in checkpoints.glob("step-*")] == ["step-00000007"]
    flip(checkpoints / "step-00000007/weights.safetensors")
    dpo(model, ROWS, tmp_path / "whole", epochs=4)
    dpo(model, ROWS, tmp_path / "out", resume=True, **more)  # nothing is left: from the start
    assert same_bits(tmp_path / "out", tmp_path / "whole")


def test_resume_with_nothing_to_resume_starts(model: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "whole")
    half = tmp_path / "half"
    half.mkdir()
    (half / ".run.json.4711").write_text('{"status": "st')  # all that a killed process left
    for output in (tmp_path / "new", half):
        dpo(model, ROWS, output, resume=True)
        assert same_bits(output, tmp_path / "whole")


def test_the_best_weights_and_patience_survive_a_stop(model: str, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", doubtful_pairs(10, seed=3))
    options: dict[str, Any] = {
        "eval_data": [held_out],
        "eval_every": 1,
        "early_stopping": 3,
        "learning_rate": 3e-3,
        "epochs": 10,
        "schedule": "constant",
    }
    whole = dpo(model, ROWS, tmp_path / "whole", **options)
    assert whole.best_step is not None and 1 < whole.best_step == whole.steps - 3 and whole.steps < 40
    # After the best evaluation, in the middle of the patience, with best weights that a later step must not replace.
    stopped_at(whole.steps - 1, model, ROWS, tmp_path / "parts", **options)
    parts = dpo(model, ROWS, tmp_path / "parts", resume=True, **options)
    assert (parts.best_step, parts.held_out_loss, parts.steps) == (whole.best_step, whole.held_out_loss, whole.steps)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    assert len(evaluations(tmp_path / "parts")) == whole.steps


CHANGED = {
    "beta": ({"beta": 0.2}, "--beta was 0.1 and is 0.2"),
    "two": ({"seed": 1, "learning_rate": 1e-4}, "--learning-rate was 0.001 and is 0.0001, --seed was 0 and is 1"),
    "threads": ({"threads": 1}, "--threads was None and is 1"),
    "lora": ({"lora": True, "learning_rate": 1e-3}, "--lora was False and is True, --lora-rank was None and is 16, .*"),
}


@pytest.fixture(scope="module")
def begun(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped, with its data beside it."""
    folder = tmp_path_factory.mktemp("begun")
    write_rows(folder / "data.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        stopped_at(2, model, folder / "data.jsonl", folder / "out")
    return folder


@pytest.mark.parametrize(("options", "said"), CHANGED.values(), ids=CHANGED.keys())
def test_changed_options_are_refused_by_name(options: dict[str, Any], said: str, model: str, begun: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in begun.rglob("out/**/*"))
    with pytest.raises(RunError, match=f"same run, but {said}; "):
        dpo(model, begun / "data.jsonl", begun / "out", resume=True, **options)
    with pytest.raises(RunError, match=r"unfinished run.*--resume"):
        dpo(model, begun / "data.jsonl", begun / "out", **options)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in begun.rglob("out/**/*"))


def test_checkpointed_activations_may_change(begun: Path) -> None:
    options = json.loads((begun / "out" / "run.json").read_text())["options"]
    assert options["gradient_checkpointing"] == "auto"
    folder = RunFolder(begun / "out", {**options, "gradient_checkpointing": True}, resume=True)
    assert folder.record["status"] == "resumed"


def test_options_of_a_run_of_an_earlier_version_are_refused_by_their_new_names(model: str, tmp_path: Path) -> None:
    stopped_at(1, model, ROWS, tmp_path / "out", ref_model_sync_steps=2)
    path = tmp_path / "out/run.json"
    text = path.read_text().replace("ref_model_sync_steps", "reference_every")
    path.write_text(text.replace("ref_model_mixup_alpha", "reference_mix"))
    with pytest.raises(RunError, match=r"--ref-model-sync-steps was 2 and is None, --ref-model-mixup-alpha was 0\.6"):
        dpo(model, ROWS, tmp_path / "out", resume=True)


def test_changed_data_are_refused(model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    for changed in (ROWS[:-1], [*ROWS, *pairs(1, seed=9)], ROWS[::-1]):
        write_rows(data, ROWS)
        output = tmp_path / f"out-{len(changed)}-{changed[0]['prompt'][0]}"
        stopped_at(1, model, data, output)
        write_rows(data, changed)
        with pytest.raises(RunError, match="--resume: the data changed"):
            dpo(model, data, output, resume=True)


def test_a_changed_reference_is_refused(tmp_path: Path) -> None:
    model, other = write_model(tmp_path / "m"), write_model(tmp_path / "other", seed=1)
    stopped_at(1, model, ROWS, tmp_path / "self")
    stopped_at(1, model, ROWS, tmp_path / "named", reference=other)
    write_model(tmp_path / "other", seed=2)
    dpo(model, ROWS, tmp_path / "self", resume=True)
    with pytest.raises(RunError, match="--resume: the reference model changed"):
        dpo(model, ROWS, tmp_path / "named", reference=other, resume=True)
    stopped_at(1, model, ROWS, tmp_path / "again")
    write_model(tmp_path / "m", seed=2)
    with pytest.raises(RunError, match="--resume: the reference model changed"):
        dpo(model, ROWS, tmp_path / "again", resume=True)


def test_a_record_that_cannot_be_read_is_told(model: str, tmp_path: Path) -> None:
    stopped_at(1, model, ROWS, tmp_path / "out")
    (tmp_path / "out/run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read"):
        prefopt.dpo(model, ROWS, output=tmp_path / "out", resume=True)
