"""Callbacks see what happens, may stop a run, and cannot spoil it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefopt
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.runs.callbacks import HOOKS
from shortcuts import quick_runs_in
from train.small import dpo, evaluations, metrics, pairs, same_bits, steps

ROWS = pairs(12)
OPTIONS: dict[str, Any] = {"eval_fraction": 0.3, "eval_every": 2, "save_every": 2, "epochs": 2, "batch_size": 3}


class Watch(prefopt.Callback):
    """Writes down every call; ``act`` may do more."""

    def __init__(self, act: Callable[..., None] = lambda *_: None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.act = act

    def __getattribute__(self, name: str) -> Any:
        if name not in HOOKS:
            return super().__getattribute__(name)

        def hook(run: Any, *arguments: Any) -> None:
            self.calls.append((name, run.step, *arguments))
            self.act(name, run, *arguments)

        return hook

    def of(self, hook: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == hook]


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of all rows that nobody watches."""
    folder = tmp_path_factory.mktemp("plain")
    with quick_runs_in(folder):
        dpo(model, ROWS, folder / "out", **OPTIONS)
    return folder / "out"


def test_hooks_are_called_with_what_the_run_wrote(model: str, plain: Path, tmp_path: Path) -> None:
    about: list[Any] = []
    watch = Watch(lambda name, run, *_: about.append(run))
    output = tmp_path / "out"
    dpo(model, ROWS, output, callbacks=[watch], **OPTIONS)
    assert about[0].options["beta"] == 0.1 and about[0].output == output and about[0].steps == len(steps(output))
    assert watch.calls[0] == ("on_start", 0) and watch.calls[-1] == ("on_end", about[0].steps, "trained")
    for hook, prefix, lines in (("on_step", "", steps(output)), ("on_evaluation", "eval_", evaluations(output))):
        told = [
            {"step": step} | {prefix + k: v for k, v in given.items()}
            for now, step, given in watch.of(hook)
            if now == step
        ]
        assert [{k: line.get(k) for k in wanted} for line, wanted in zip(told, lines, strict=True)] == lines
    saved = watch.of("on_checkpoint")
    assert [step for _, step, _ in saved] == [2, 4, 6]
    assert saved[-1][2] == output / "checkpoints" / "step-00000006" and saved[-1][2].is_dir()
    named = [(call[0], call[2]) for call in watch.calls if len(call) > 2]
    assert [hook for hook, step in named if step == 2] == ["on_step", "on_evaluation", "on_checkpoint"]
    assert same_bits(output, plain), "watching changes nothing"


def test_a_callback_ends_training_and_the_model_is_saved_and_evaluated(model: str, tmp_path: Path) -> None:
    watch = Watch(lambda name, run, *_: run.stop() if (name, run.step) == ("on_step", 3) else None)
    result = dpo(model, ROWS, tmp_path / "out", callbacks=[watch], **OPTIONS)
    assert result.steps == 3 and (tmp_path / "out" / "model.safetensors").exists()
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [2, 3]
    assert [step for _, step, _ in watch.of("on_evaluation")] == [2, 3]
    assert watch.of("on_end") == [(3, "trained")]


def test_a_callback_asks_for_checkpoints(model: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "save_every": 6, "keep_last": 9}
    watch = Watch(lambda name, run, *_: run.save() if name == "on_step" and run.step in (1, 4, 6) else None)
    dpo(model, ROWS, tmp_path / "out", callbacks=[watch], **options)
    assert sorted(p.name[-1] for p in (tmp_path / "out/checkpoints").glob("step-*")) == ["1", "4", "6"]
    dpo(model, ROWS, tmp_path / "plain", **options)
    assert same_bits(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_evaluation", "on_checkpoint", "on_end"])
def test_one_that_raises_stops_the_run_in_a_line_and_everything_is_kept(
    hook: str, model: str, plain: Path, tmp_path: Path
) -> None:
    def fail(name: str, run: Any, *_: Any) -> None:
        if name == hook and (run.step >= 3 or hook == "on_start"):
            raise KeyError("no such thing")

    class Sampler(Watch):
        pass

    other = Watch()
    with pytest.raises(RunError, match=rf"callback Sampler failed in {hook} at step \d+ \(KeyError: 'no such thing'\)"):
        dpo(model, ROWS, tmp_path / "out", callbacks=[Sampler(fail), other], **OPTIONS)
    assert [call[-1] for call in other.of("on_end")] == ["trained" if hook == "on_end" else "failed"]
    dpo(model, ROWS, tmp_path / "out", resume=True, **OPTIONS)
    assert same_bits(tmp_path / "out", plain)


def test_what_failed_first_is_what_is_told(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_at_end(name: str, *_: Any) -> None:
        if name == "on_end":
            raise ValueError("second")

    monkeypatch.setattr("prefopt.train.trainer.Trainer._refuse_nonsense", _refuse)
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match=r"^first$"):
        dpo(model, ROWS, tmp_path / "out", callbacks=[Watch(fail_at_end)])
    assert "callback Watch failed in on_end" in caplog.text


def _refuse(*_: Any) -> None:
    raise RunError("first")


def test_an_interruption_is_told_as_one(model: str, tmp_path: Path) -> None:
    def ask(name: str, run: Any, *_: Any) -> None:
        if name == "on_step" and run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    watch = Watch(ask)
    with pytest.raises(Interrupted):
        dpo(model, ROWS, tmp_path / "out", callbacks=[watch], **OPTIONS)
    assert watch.of("on_end")[0][1] == "interrupted"
    resumed = Watch()
    dpo(model, ROWS, tmp_path / "out", callbacks=[resumed], resume=True, **OPTIONS)
    assert resumed.of("on_start")[0][0] == watch.of("on_end")[0][0] == 3
    assert len(metrics(tmp_path / "out")) == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [([prefopt.Callback], r"Callback is a class; give an object"), ([print], "has none of on_start")],
)
def test_what_is_no_callback_is_refused(given: list[Any], message: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dpo(model, ROWS, tmp_path / "out", callbacks=given)
    assert not (tmp_path / "out").exists()
