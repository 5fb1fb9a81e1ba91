"""The shortcuts of tests that train are taken, and no check is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import shortcuts
from prefopt.errors import ModelError
from prefopt.model import check
from prefopt.train import budget
from prefopt.train.step import Differentiator
from shortcuts import quick_runs
from train.small import dpo, pairs, write_model


def test_the_machine_is_not_measured() -> None:
    assert budget.matmul_peak(None, None) == 1e10  # type: ignore[arg-type]


def test_an_architecture_is_checked_once_and_another_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, checked = check.tiny_clone, []

    def clone(config: Any) -> Any:
        checked.append(config.rope_parameters["rope_theta"])
        return own(config)

    monkeypatch.setattr(check, "tiny_clone", clone)
    for n, base in enumerate((77.0, 77.0, 78.0, 77.0)):
        model = write_model(
            tmp_path / f"model{n}", seed=n, rope_parameters={"rope_type": "default", "rope_theta": base}
        )
        dpo(model, pairs(4), tmp_path / f"out{n}", max_steps=1)
    assert checked == [77.0, 78.0]


def test_one_that_fails_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 79.0})
    monkeypatch.setattr(check, "clone_difference", lambda *_, **__: 1.0)
    quick_runs(monkeypatch)
    for n in range(2):
        with pytest.raises(ModelError, match="differs from the model's own forward"):
            dpo(model, pairs(4), tmp_path / f"out{n}", max_steps=1)


def test_the_largest_batch_is_tried_once_and_with_another_objective_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    own = Differentiator.gradients

    def gradients(self: Differentiator, *given: Any, **more: Any) -> Any:
        passes.append(1)
        return own(self, *given, **more)

    monkeypatch.setattr(shortcuts, "_TRIED", {})
    monkeypatch.setattr(Differentiator, "gradients", gradients)
    counts = []
    lora = {"lora": True}
    for options in ({}, {}, {"token_budget": 40}, {"loss": "apo-down"}, lora, lora, {"dtype": "float64"}):
        passes.clear()
        dpo(model, pairs(4), tmp_path / f"out{len(counts)}", max_steps=1, **options)
        counts.append(len(passes))
    assert counts == [2, 1, 2, 2, 2, 1, 2]


def test_what_is_remembered_is_what_is_returned(tmp_path: Path) -> None:
    texts = [yaml.dump({"a": value}) for value in (1, True, 1.0, "1", 1, "true")]
    assert texts == ["a: 1\n", "a: true\n", "a: 1.0\n", "a: '1'\n", "a: 1\n", "a: 'true'\n"]
    for name in ("one", "two"):
        with (tmp_path / name).open("w") as file:
            yaml.dump({"a": 1}, file)
        assert (tmp_path / name).read_text() == "a: 1\n"
