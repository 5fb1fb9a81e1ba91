"""The loop against a flat one, and what must not change its result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.small import small_tokenizer
from model.architectures import Float64Throughout, with_exact_rotary
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.data.sampler import BatchSampler
from prefopt.errors import RunError
from prefopt.model.packing import pack
from prefopt.train import budget
from prefopt.train.optim import Schedule
from train.flat import flat_dpo
from train.small import dpo, pairs, steps, tiny_llama, weights

ROWS = pairs(7)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    """Every weight within ``rtol`` of the largest."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=rtol * float(value.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("schedule", "label_smoothing", "max_grad_norm"),
    [("linear", 0.0, 1.0), ("cosine", 0.15, 1e9), ("constant", 0.0, 0.05)],
)
@pytest.mark.parametrize("token_budget", [1, 60, 100_000])
def test_the_loop_does_what_a_flat_one_does(
    schedule: str, label_smoothing: float, max_grad_norm: float, token_budget: int, tmp_path: Path
) -> None:
    """Seven pairs in batches of three: the last batch of an epoch has one pair, its micro-batches have uneven sizes."""
    options: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 3,
        "seed": 3,
        "beta": 0.3,
        "label_smoothing": label_smoothing,
        "learning_rate": 2e-3,
        "schedule": schedule,
        "warmup": 0.4,
        "weight_decay": 0.1,
        "max_grad_norm": max_grad_norm,
    }
    model = with_exact_rotary(tiny_llama().double())
    expected = copy.deepcopy(model)
    groups = load_groups([parse_comparisons(ROWS, "data")], small_tokenizer(), max_length=64).groups
    with Float64Throughout():
        model.set_attn_implementation("eager")
        told = flat_dpo(expected, groups, betas=(0.8, 0.95), epsilon=1e-7, **options)
        dpo(
            model,
            ROWS,
            tmp_path / "out",
            tokenizer=small_tokenizer(),
            dtype="float64",
            token_budget=token_budget,
            adam_beta1=0.8,
            adam_beta2=0.95,
            adam_epsilon=1e-7,
            **options,
        )
    start = dict(tiny_llama().double().named_parameters())
    found = dict(model.named_parameters())
    for name, value in expected.named_parameters():
        moved = float((value - start[name]).detach().norm())
        assert moved > 0
        assert float((found[name] - value).detach().norm()) < 1e-7 * moved, name
    lines = steps(tmp_path / "out")
    assert len(lines) == len(told) == 6
    for line, flat in zip(lines, told, strict=True):
        for name, value in flat.items():
            assert line[name] == pytest.approx(value, rel=1e-8), name


@pytest.mark.parametrize("options", [{"token_budget": 1}, {"gradient_checkpointing": True}, {"attention": "loop"}])
def test_what_only_costs_time_or_memory_changes_nothing(options: dict[str, Any], model: str, tmp_path: Path) -> None:
    plain = {"dtype": "float64", "epochs": 2, "eval_fraction": 0.3}
    dpo(model, ROWS, tmp_path / "plain", **plain)
    dpo(model, ROWS, tmp_path / "other", **plain, **options)
    assert_same_weights(weights(tmp_path / "other"), weights(tmp_path / "plain"), 1e-6)
    for line, expected in zip(steps(tmp_path / "other"), steps(tmp_path / "plain"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert line["lengths/chosen"] == expected["lengths/chosen"]


def test_where_memory_ends_the_step_is_repeated_in_smaller_parts(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"dtype": "float64", "batch_size": 7, "epochs": 3, "lora": True, "lora_dropout": 0.0}
    dpo(model, ROWS, tmp_path / "plain", **options)
    largest, sizes = 100, []

    try_largest = budget.try_largest

    def tried(*given: Any) -> Any:  # the trial before the first step fits: memory ends later
        found = try_largest(*given)
        monkeypatch.setattr("prefopt.train.batch.pack", limited)
        return found

    def limited(groups: Any, layout: Any) -> Any:
        sizes.append(sum(g.tokens for g in groups))
        if sizes[-1] > largest:
            raise torch.OutOfMemoryError("no more")
        return pack(groups, layout)

    monkeypatch.setattr(budget, "try_largest", tried)
    dpo(model, ROWS, tmp_path / "tight", **options, save_every=1, progress="plain")
    assert "out of memory: step 1 is repeated with" in capsys.readouterr().out
    tried = [size for size in sizes if size > largest]
    assert tried and sizes.index(tried[-1]) < 7, "the smaller budget is kept for the steps that follow"
    assert_same_weights(weights(tmp_path / "tight"), weights(tmp_path / "plain"), 1e-6)
    assert len(steps(tmp_path / "tight")) == 3

    largest = 1
    monkeypatch.setattr("prefopt.train.batch.pack", pack)
    with pytest.raises(RunError, match=r"step 1: one group of \d+ tokens does not fit"):
        dpo(model, ROWS, tmp_path / "hopeless", **options)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = BatchSampler(10, 4, seed=1)
    epochs = [np.concatenate([sampler.batch(3 * e + i) for i in range(3)]).tolist() for e in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(sampler.batch(i)) for i in range(4)] == [4, 4, 2, 4]
    assert sampler.batch(5).tolist() == BatchSampler(10, 4, seed=1).batch(5).tolist()
    assert BatchSampler(10, 10, seed=2).batch(0).tolist() != BatchSampler(10, 10, seed=1).batch(0).tolist()
    assert BatchSampler(10, 4, seed=1, shuffle=False).batch(4).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_the_schedule_rises_and_falls_and_no_step_is_wasted(kind: str, expected: list[float]) -> None:
    assert [Schedule(kind, 2.0, 6, 2)(t) / 2 for t in range(6)] == pytest.approx(expected)
    assert [Schedule(kind, 1.0, 1, 0)(0), Schedule(kind, 1.0, 1, 1)(0)] == [1.0, 0.5]
