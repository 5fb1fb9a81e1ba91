"""The data of a run: sources mixed by weight, prompts held out, and every line about them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from prefopt.config.dpo import DpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.core.terminal import Reporter, StopRequest
from prefopt.data.sampler import BatchSampler
from prefopt.errors import ConfigError, Interrupted
from prefopt.train.data import TrainingData, load_data
from prefopt.train.run import ModelStart
from train.small import dpo, metrics, pairs, same_bits, steps, write_rows
from train.test_resume import stopped_at


def load(*files: str, stop: StopRequest | None = None, **options: Any) -> TrainingData:
    config = DpoConfig(model="m", data=list(files), output="o", **options)
    start = ModelStart("", small_tokenizer(), None, 64)
    return load_data(config, start, None, Reporter("plain"), stop or StopRequest())


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write_rows(tmp_path / "a.jsonl", pairs(20)), write_rows(tmp_path / "b.jsonl", pairs(14, seed=5))


def test_held_out_rows_never_enter_a_mixture(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    data = load(*files, data_weights=["2", "0.5"], eval_fraction=0.3, seed=1)
    sampler = BatchSampler(len(data.train), 4, seed=1, shuffle=True, shares=data.shares)
    taken = Counter(data.train[i] for epoch in range(2) for i in sampler.order(epoch).tolist())
    assert data.held_out and not set(taken) & set(data.held_out) and set(taken) <= set(data.train)
    source = data.groups.source_G
    one, other = ([i for i in data.train if source[i] == s] for s in range(2))
    assert [taken[i] for i in one] == [4] * len(one)
    half = round(len(other) / 2)
    assert sum(taken[i] for i in other) == 2 * half and {taken[i] for i in other} <= {1, 2}
    said = capsys.readouterr().out
    assert f"data: an epoch takes {2 * len(one) + half} rows: {2 * len(one)} of {len(one)} from {files[0]}, " in said
    assert f"{half} of {len(other)} from {files[1]}" in said


def test_a_weight_that_takes_nothing_is_refused(files: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"0\.03 selects none of the 14 rows of .*b\.jsonl.*at least 0\.071"):
        load(*files, data_weights=["1", "0.03"])


def test_a_prompt_on_both_sides_is_counted_and_said(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"chosen": "other"} for row in pairs(20)[3:6]] + pairs(2, seed=9)
    more = write_rows(tmp_path / "more.jsonl", rows)
    data = load(*files, eval_data=[more])
    assert "evaluation data: 3 prompts are also in the training data" in capsys.readouterr().out
    assert list(data.held_out) == [34, 35, 36, 37, 38] and list(data.train) == list(range(34))
    assert [data.groups[i].row for i in data.held_out] == [1, 2, 3, 4, 5]


def test_a_stop_while_data_are_read(files: tuple[str, str]) -> None:
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(Interrupted, match="nothing was trained"):
        load(*files, stop=stop)


def test_a_mixture_goes_on_to_the_same_bits(files: tuple[str, str], model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data_weights": ["0.5", "2"], "epochs": 3, "batch_size": 4}
    dpo(model, list(files), tmp_path / "whole", **options)
    assert len(steps(tmp_path / "whole")) == 3 * -(-(10 + 28) // 4)
    for step in (4, 13):
        stopped_at(step, model, list(files), tmp_path / "parts", resume=True, **options)
    dpo(model, list(files), tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    dpo(model, list(files), tmp_path / "plain", epochs=3, batch_size=4)
    assert metrics(tmp_path / "plain")[0] != metrics(tmp_path / "whole")[0]


def test_a_twentieth_is_held_out_from_400_prompts_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default and for preferences; the same rows as by the option, and fewer where a run reads few."""
    many, few = write_rows(tmp_path / "many.jsonl", pairs(1200)), write_rows(tmp_path / "few.jsonl", pairs(399))
    more = write_rows(tmp_path / "more.jsonl", pairs(3, seed=9))
    plain = load(many)
    said = capsys.readouterr().out
    assert f"{len(plain.held_out)} held out (the default; --eval-fraction 0 trains on all)" in said
    assert list(plain.held_out) == list(load(many, eval_fraction=0.05).held_out) and 40 < len(plain.held_out) < 80
    assert "--eval-fraction 0" not in capsys.readouterr().out
    tried = load(many, max_steps=4, batch_size=8)  # reads 32 rows
    told = "(the default, 5% of the 32 rows that are read, 20 prompts at least; --eval-fraction 0 trains on all)"
    assert told in capsys.readouterr().out
    assert 20 <= len(tried.held_out) <= 30 and set(tried.held_out) < set(plain.held_out)
    assert list(load(many, epochs=3, max_steps=400, batch_size=8).held_out) == list(plain.held_out)
    assert not load(many, eval_fraction=0.0).held_out and len(load(many, eval_data=[more]).held_out) == 3
    capsys.readouterr()
    assert not load(few).held_out
    assert "nothing is held out: 399 prompts are fewer than the 400" in capsys.readouterr().out
    assert load(few, eval_fraction=0.05).held_out
    for name, value in {"eval_every": 2, "early_stopping": 1, "eval_dtype": "float32", "samples": 4}.items():
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} needs held-out rows, and 399 prompts"):
            load(few, **{name: value})


def test_other_methods_hold_out_by_option_alone() -> None:
    needed: dict[str, Any] = {"model": "m", "data": ["d"], "output": "o"}
    assert (DpoConfig(**needed).eval_fraction, RewardConfig(**needed).eval_fraction) == (None, None)
    assert SftConfig(**needed).eval_fraction == 0.0 and not SftConfig(**needed).evaluates
    with pytest.raises(ConfigError, match="--samples 4 needs held-out prompts"):
        SftConfig(**needed, samples=4)
    assert DpoConfig(**needed, eval_fraction=0.0, samples=0).samples == 0
