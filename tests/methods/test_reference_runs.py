"""What a run takes as its reference, what it scores and what it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from data.small import small_tokenizer
from prefopt.core.cache_folder import cache_root
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.errors import ModelError, RunError
from prefopt.reference.blocks import read_sealed, write_sealed
from prefopt.reference.cache import FillReport
from prefopt.train.reference import ReferenceRun
from shortcuts import quick_runs_in
from train.flat import response_logprobs
from train.small import Row, dpo, pairs, steps, write_model, write_rows

# peft asks an old name of transformers; here it is called directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = pairs(10)
ONCE: dict[str, Any] = {"batch_size": 256}  # one step that reads every row


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[FillReport]:
    """What each run's reference cost."""
    found: list[FillReport] = []
    values = ReferenceRun.values

    def noted(self: ReferenceRun, *arguments: Any) -> Any:
        result = values(self, *arguments)
        found.append(result[1])
        return result

    monkeypatch.setattr(ReferenceRun, "values", noted)
    return found


def logprobs(model: torch.nn.Module, rows: list[Row]) -> torch.Tensor:
    """Log-probabilities [rows, 2] of chosen and rejected by transformers alone."""
    groups = load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64).groups
    with torch.no_grad():
        return torch.stack([response_logprobs(model, g).double() for g in groups])


def first_rewards(output: Path) -> list[float]:
    """Mean rewards of the first step: beta times the log-ratio before any weight moved."""
    first = steps(output)[0]
    return [first["rewards/chosen"], first["rewards/rejected"]]


def test_nothing_is_scored_twice(model: str, tmp_path: Path, reports: list[FillReport]) -> None:
    rows = pairs(200)
    write_rows(tmp_path / "data.jsonl", rows)
    same: list[dict[str, Any]] = [
        {},
        {},
        {"beta": 0.7, "seed": 3, "label_smoothing": 0.1},
        {"learning_rate": 1e-5, "shuffle": False, "batch_size": 7, "schedule": "cosine", "token_budget": 500},
        {"eval_fraction": 0.3, "gradient_checkpointing": True},
        {"lora": True, "lora_rank": 2},
        {"lora": True, "lora_rank": 5, "lora_alpha": 1, "lora_dropout": 0.1, "reference": model},
    ]
    for n, options in enumerate(same):
        dpo(model, tmp_path / "data.jsonl", tmp_path / f"out{n}", **{**ONCE, **options})
    assert [(r.scored_responses, r.forward_calls > 0) for r in reports] == [(400, True)] + 6 * [(0, False)]

    rows[100:100] = pairs(2, seed=8)  # one per cent more
    write_rows(tmp_path / "data.jsonl", rows)
    dpo(model, tmp_path / "data.jsonl", tmp_path / "more", **ONCE)
    assert (reports[-1].scored_responses, reports[-1].reused_responses) == (4, 400)
    dpo(model, rows[50:150], tmp_path / "rows", **ONCE)
    assert reports[-1].scored_responses == 0


@pytest.mark.parametrize(
    "loss", ["kto", "ld_dpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("dpo", "dpo,nll"))]
)
def test_a_few_steps_score_what_they_read(
    loss: str, model: str, tmp_path: Path, reports: list[FillReport], capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of the steps and those held out; more steps score the rest, and the numbers are those of a whole run."""
    rows, held = pairs(30), write_rows(tmp_path / "held.jsonl", pairs(6, seed=1))
    options = {
        "loss": loss,
        "batch_size": 4,
        "eval_data": [held],
        "schedule": "constant",
        "warmup": 0.0,
        "progress": "plain",
    }
    each = 2 * (2 if loss == "kto" else 1)  # KTO compares with as many responses to other prompts
    dpo(model, rows, tmp_path / "two", max_steps=2, **options)
    said = capsys.readouterr().out
    assert [r.scored_responses for r in reports] == [each * (8 + 6)]
    assert "reference: 14 of 36 rows are read in 2 steps and evaluations; no others are scored" in said.replace(
        "pairs are", "rows are"
    )
    dpo(model, rows, tmp_path / "five", max_steps=5, **options)
    assert (reports[-1].scored_responses, reports[-1].reused_responses) == (each * 12, each * 14)
    assert "reference: 26 of 36" in capsys.readouterr().out
    dpo(model, rows, tmp_path / "whole", **options)
    assert (reports[-1].scored_responses, reports[-1].reused_responses) == (each * 10, each * 26)
    assert "are read in" not in capsys.readouterr().out
    whole = steps(tmp_path / "whole")
    for few in ("two", "five"):
        assert all(a == b for a, b in zip(steps(tmp_path / few), whole, strict=False))


def test_an_epoch_of_steps_is_no_short_run(model: str, tmp_path: Path, reports: list[FillReport]) -> None:
    dpo(model, ROWS, tmp_path / "out", max_steps=3, epochs=2)
    assert reports[-1].scored_responses == 20, "batches of 4, 4 and 2"


def test_overwritten_weights_are_another_model(tmp_path: Path, reports: list[FillReport]) -> None:
    for seed, scored in ((0, 20), (1, 20), (0, 0)):
        model = write_model(tmp_path / "model", seed=seed)
        dpo(model, ROWS, tmp_path / f"out{len(reports)}", **ONCE)
        assert reports[-1].scored_responses == scored
        assert steps(tmp_path / f"out{len(reports) - 1}")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_what_decides_the_values_is_never_shared(model: str, tmp_path: Path, reports: list[FillReport]) -> None:
    for n, options in enumerate(({}, {"dtype": "float64"}, {"attention": "loop"}, {"max_length": 20})):
        dpo(model, ROWS, tmp_path / f"out{n}", **{**ONCE, **options})
        assert reports[-1].scored_responses == 20 or options.get("max_length")
    assert 0 < reports[-1].scored_responses < 20  # only what the truncation changed


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that has learnt something."""
    folder = tmp_path_factory.mktemp("adapter")
    with quick_runs_in(folder):
        dpo(model, ROWS, folder / "adapter", lora=True, lora_rank=4, learning_rate=0.03, epochs=2)
    return str(folder / "adapter")


def expected_rewards(policy: torch.nn.Module, reference: torch.nn.Module, beta: float) -> list[float]:
    ratio: list[float] = (beta * (logprobs(policy, ROWS) - logprobs(reference, ROWS))).mean(0).tolist()
    assert min(map(abs, ratio)) > 1e-3, "the two models must differ for this to mean anything"
    return ratio


def test_another_model_as_reference(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other", seed=1)
    dpo(model, ROWS, tmp_path / "out", reference=other, batch_size=10, beta=0.2, progress="plain")
    policy, reference = (AutoModelForCausalLM.from_pretrained(m) for m in (model, other))
    assert first_rewards(tmp_path / "out") == pytest.approx(expected_rewards(policy, reference, 0.2), rel=1e-4)
    out = capsys.readouterr().out
    assert f"reference: {other}, " in out and "ln 2" not in out


def test_an_adapter_to_go_on_with_is_its_own_reference(
    model: str, adapter: str, tmp_path: Path, reports: list[FillReport], capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(model, ROWS, tmp_path / "base", **ONCE)
    dpo(model, ROWS, tmp_path / "out", adapter=adapter, batch_size=10, progress="plain")
    assert [r.scored_responses for r in reports] == [20, 20]  # the base's values are not the adapter's
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert f"reference: {model} with adapter {adapter} (the model as it is before training)" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(model)
    start = logprobs(PeftModel.from_pretrained(base, adapter), ROWS).mean(0).tolist()
    first = steps(tmp_path / "out")[0]
    assert [first["logps/chosen"], first["logps/rejected"]] == pytest.approx(start, rel=1e-5)


def test_the_base_as_reference_of_an_adapter_to_go_on_with(model: str, adapter: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "out", adapter=adapter, reference=model, batch_size=10)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected = expected_rewards(policy, AutoModelForCausalLM.from_pretrained(model), 0.1)
    assert first_rewards(tmp_path / "out") == pytest.approx(expected, rel=1e-4)


def test_an_adapter_on_the_reference(model: str, adapter: str, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected = expected_rewards(policy, reference, 0.1)
    for n, options in enumerate(({"lora": True}, {"reference": model})):
        dpo(model, ROWS, tmp_path / f"out{n}", reference_adapter=adapter, batch_size=10, **options)
        assert first_rewards(tmp_path / f"out{n}") == pytest.approx(expected, rel=1e-4)


def test_a_new_adapters_reference_is_the_base(
    model: str, tmp_path: Path, reports: list[FillReport], capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(model, ROWS, tmp_path / "out", lora=True, learning_rate=0.02, epochs=4, progress="plain")
    assert f"reference: {model} (the model as it is before training), " in capsys.readouterr().out
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # The base was left alone: its values serve a full fine-tuning.
    dpo(model, ROWS, tmp_path / "full", **ONCE)
    assert [r.scored_responses for r in reports] == [20, 0]


def test_values_that_are_not_this_models_stop_the_run(model: str, tmp_path: Path) -> None:
    dpo(model, ROWS, tmp_path / "before", **ONCE)
    (block,) = cache_root().glob("reference/*/block-*.safetensors")
    space = block.parent.name
    arrays = read_sealed(block, space)
    arrays["sums"] = arrays["sums"] + np.linspace(0, 1, len(arrays["sums"]))
    write_sealed(block, arrays, space)  # with a checksum that fits
    start = Path(model, "model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"step 1: the loss is .* ln 2 = 0\.693147 .* prefopt cache clear"):
        dpo(model, ROWS, tmp_path / "out", batch_size=10)
    assert not (tmp_path / "out/model.safetensors").exists() and Path(model, "model.safetensors").read_bytes() == start


def test_damaged_values_are_scored_again(
    model: str, tmp_path: Path, reports: list[FillReport], caplog: pytest.LogCaptureFixture
) -> None:
    dpo(model, ROWS, tmp_path / "before", **ONCE)
    (block,) = cache_root().glob("reference/*/block-*.safetensors")
    data = bytearray(block.read_bytes())
    data[-3] ^= 1
    block.write_bytes(data)
    dpo(model, ROWS, tmp_path / "out", **ONCE)
    assert [r.scored_responses for r in reports] == [20, 20] and "is damaged" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 100}, "the model's vocabulary has 100"),
        ({"max_position_embeddings": 12}, "context is 12 tokens"),
    ],
)
def test_a_reference_that_cannot_take_the_data_is_refused(
    changes: dict[str, int], said: str, model: str, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", **changes)
    with pytest.raises(ModelError, match=f"--reference .*{said}"):
        dpo(model, ROWS, tmp_path / "out", reference=other)


def test_scoring_ahead_keeps_to_the_token_budget(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.train import reference

    sizes: list[int] = []
    pack = reference.pack
    monkeypatch.setattr(reference, "pack", lambda g, layout: sizes.append(sum(x.tokens for x in g)) or pack(g, layout))
    dpo(model, ROWS, tmp_path / "out", token_budget=30, **ONCE)
    assert 60 < max(sizes) <= 4 * 30  # forward alone takes a fraction of the memory


def test_where_memory_ends_the_reference_is_scored_in_smaller_batches(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: list[FillReport]
) -> None:
    from prefopt.train import budget, reference

    monkeypatch.setattr(budget, "free_memory", lambda device: 8 << 30)  # whatever else runs on the machine
    sizes = []
    pack = reference.pack

    def limited(groups: Any, layout: Any) -> Any:
        sizes.append(sum(g.tokens for g in groups))
        if sizes[-1] > 90:
            raise torch.OutOfMemoryError("no more")
        return pack(groups, layout)

    monkeypatch.setattr(reference, "pack", limited)
    dpo(model, ROWS, tmp_path / "out", **ONCE)
    assert max(sizes) > 90 and sum(s for s in sizes if s <= 90) >= sum(s for s in sizes if s > 90) / len(sizes)
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(RunError, match=r"scoring the reference: one group of \d+ tokens"):
        dpo(model, [pairs(1)[0] | {"prompt": "k" * 120}], tmp_path / "big", max_length=128, **ONCE)
