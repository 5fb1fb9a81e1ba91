"""Held-out losses of a run in bfloat16: in float32 where rounding would hide what was learned."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prefopt
from data.small import small_tokenizer
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.errors import ConfigError, RunError
from prefopt.model.precision import MasterWeights, bytes_in_float32, freeze_and_cast, in_float32
from prefopt.runs.callbacks import CallbackFailed
from prefopt.train import held_out
from prefopt.train.held_out import Rounding
from prefopt.train.reference import ReferencePlan
from prefopt.train.step import Differentiator
from train.flat import response_logprobs
from train.small import dpo, evaluations, pairs, tiny_llama, write_rows

EXTRA: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": True, "lora_rank": 4}, "kto": {"loss": "kto"}}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def log_ratios(policy: str | Path, reference: str, rows: list[dict[str, str]], base: str | None = None) -> np.ndarray:
    """Log-ratios [pairs, 2] by transformers alone, in float32; ``base``: of an adapter in ``policy``, and the
    reference, both rounded to bfloat16 as a run loads them."""
    groups = load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64).groups
    models = []
    for name in (policy, reference):
        model = AutoModelForCausalLM.from_pretrained(base or name, dtype=torch.float32)
        if base is not None:
            model = model.to(torch.bfloat16).float()
            if name == policy:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what peft calls in transformers
                    model = PeftModel.from_pretrained(model, str(policy)).float()
        models.append(model.eval())
    with torch.no_grad():
        found = [response_logprobs(models[0], g) - response_logprobs(models[1], g) for g in groups]
    return torch.stack(found).numpy()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_slow_run_is_evaluated_in_float32_to_the_digit(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 1e-6 nothing but rounding is seen in bfloat16; the float32 loss is that of the masters, by another library."""
    rows, other = pairs(16), pairs(24, seed=4)
    options: dict[str, Any] = {"learning_rate": 1e-5 if kind == "lora" else 1e-6, "dtype": "bfloat16", "epochs": 2}
    options |= {"eval_data": [write_rows(tmp_path / "eval.jsonl", other)], "progress": "plain", **EXTRA[kind]}
    dpo(model, rows, tmp_path / "auto", **options)
    said = capsys.readouterr().out
    assert said.count("held out: evaluated in float32: bfloat16 rounds log-ratios by") == 1
    assert record(tmp_path / "auto")["eval_dtype"] == "float32"
    ratios = log_ratios(tmp_path / "auto", model, other, model if kind == "lora" else None)
    margin = torch.from_numpy(0.1 * (ratios[:, 0] - ratios[:, 1])).double()
    last = evaluations(tmp_path / "auto")[-1]
    assert last["eval_loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margin).mean()), abs=2e-7)
    assert last["eval_rewards/accuracies"] == pytest.approx(float((margin > 0).double().mean()))
    assert 0 < margin.abs().max() < 0.01, "the run is slow"

    dpo(model, rows, tmp_path / "run", **options, eval_dtype="run")
    assert "held out: evaluated" not in capsys.readouterr().out
    narrow = evaluations(tmp_path / "run")[-1]
    off = [abs(line["eval_rewards/margins"] - float(margin.mean())) for line in (last, narrow)]
    assert off[1] > 100 * off[0] and off[1] > 0.1 * float(margin.mean()), "bfloat16 is far off"
    # Evaluations change nothing of the training.
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("auto", "run"))
    assert all(torch.equal(one[n], two[n]) for n in one) and one.keys() == two.keys()


def test_a_fast_run_stays_in_its_dtype(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"learning_rate": 3e-3, "dtype": "bfloat16", "eval_fraction": 0.3, "progress": "plain"}
    dpo(model, pairs(40), tmp_path / "auto", **options)
    assert "held out: evaluated in bfloat16: bfloat16 rounds" in capsys.readouterr().out
    dpo(model, pairs(40), tmp_path / "run", **options, eval_dtype="run")
    one, two = ([line["eval_loss"] for line in evaluations(tmp_path / n)] for n in ("auto", "run"))
    assert one == two
    dpo(model, pairs(40), tmp_path / "wide", **options, eval_dtype="float32")
    (wide,) = (line["eval_loss"] for line in evaluations(tmp_path / "wide"))
    assert wide != one[0] and wide == pytest.approx(one[0], abs=0.02)


def test_mismatched_responses_are_compared_in_float32_too(model: str, tmp_path: Path) -> None:
    """KTO: the loss of the finished model, measured again by a run in float32 that does not move."""
    options: dict[str, Any] = {"loss": "kto", "eval_data": [write_rows(tmp_path / "eval.jsonl", pairs(24, seed=4))]}
    dpo(model, pairs(16), tmp_path / "out", **options, dtype="bfloat16", learning_rate=1e-6)
    assert record(tmp_path / "out")["eval_dtype"] == "float32"
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "reference": model}
    dpo(str(tmp_path / "out"), pairs(16), tmp_path / "again", **options, **still)
    one, two = (evaluations(tmp_path / n)[-1] for n in ("out", "again"))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-7) and one["eval_kl"] == pytest.approx(
        two["eval_kl"], abs=1e-6
    )


def test_a_resumed_run_keeps_its_choice(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first evaluation chose is not measured again, and losses before and after a stop are comparable."""
    options: dict[str, Any] = {"learning_rate": 1e-6, "dtype": "bfloat16", "eval_fraction": 0.3, "epochs": 3}
    dpo(model, pairs(16), tmp_path / "whole", **options)

    class Fails(prefopt.Callback):
        def on_evaluation(self, run: Any, step: int, metrics: Any) -> None:
            raise ValueError("stopped")

    with pytest.raises(CallbackFailed):
        dpo(model, pairs(16), tmp_path / "out", **options, save_every=1, callbacks=[Fails()])
    monkeypatch.setattr(held_out.HeldOutPrecision, "measure", lambda *_: pytest.fail("measured again"))
    dpo(model, pairs(16), tmp_path / "out", **options, save_every=1, resume=True)
    one, two = ([line["eval_loss"] for line in evaluations(tmp_path / n)] for n in ("whole", "out"))
    assert one[-1] == two[-1]


def test_no_memory_for_float32_keeps_the_run_alive(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Rounding:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(held_out.HeldOutPrecision, "measure", fail)
    options: dict[str, Any] = {"learning_rate": 1e-6, "dtype": "bfloat16", "eval_fraction": 0.3, "progress": "plain"}
    dpo(model, pairs(16), tmp_path / "out", **options)
    assert "held out: evaluated in bfloat16: float32 does not fit into memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eval_dtype": "float32", "eval_fraction": 0.0}, "--eval-dtype float32 needs rows to evaluate on"),
        ({"eval_dtype": "float32"}, "--eval-dtype needs held-out rows, and 20 prompts are fewer than the 400"),
        (
            {"eval_dtype": "float32", "eval_fraction": 0.3, "ref_model_sync_steps": 2},
            "--eval-dtype float32: the reference is scored with every batch; leave it out",
        ),
    ],
)
def test_float32_that_cannot_be_had_is_refused(options: dict[str, Any], said: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        dpo(model, pairs(20), tmp_path / "out", dtype="bfloat16", **options)


def test_a_model_is_as_it_was_after_it_computed_in_float32() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)  # one frozen weight, tied to none
    weights = MasterWeights(model, torch.bfloat16)
    model.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    with in_float32(weights):
        assert {p.dtype for p in model.parameters()} == {torch.float32} and model.scale.dtype == torch.float32
        name = "model.layers.0.mlp.up_proj.weight"
        assert model.get_parameter(name).data_ptr() == weights.masters[name].data_ptr(), "masters are not copied"
        assert not torch.is_grad_enabled()
    for n, t in model.state_dict().items():
        assert (t.data_ptr(), t.dtype) == (before[n][0], before[n][1].dtype) and torch.equal(t, before[n][1])
    out = model(input_ids=torch.arange(5)[None]).logits.sum()
    out.backward()
    assert weights.masters[name].grad is not None, "the hooks still collect gradients"
    frozen = freeze_and_cast(tiny_llama(), torch.bfloat16)
    with pytest.raises(KeyError), in_float32(MasterWeights(frozen, torch.bfloat16)):
        raise KeyError
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}


def test_rounding_matters_beyond_a_tenth_of_the_spread() -> None:
    assert Rounding(0.011, 0.1).matters and not Rounding(0.009, 0.1).matters and Rounding(1e-9, 0.0).matters
    # A tenth turns the sign of about 3 % of margins.
    rng = np.random.Generator(np.random.PCG64(0))
    truth = rng.normal(0, 1, 200_000)
    turned = np.mean(np.sign(truth) != np.sign(truth + rng.normal(0, held_out.NEGLIGIBLE, len(truth))))
    assert turned == pytest.approx(np.arctan(0.1) / np.pi, abs=0.002)


SLOW: dict[str, Any] = {"learning_rate": 1e-6, "dtype": "bfloat16", "eval_fraction": 0.3, "progress": "plain"}
FALLS_BACK = "held out: evaluated in bfloat16: float32 does not fit into memory"


def test_copies_that_do_not_fit_are_never_made(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under an adapter all of the model's weights are copied; there is no room for them before the first step."""
    options = {**SLOW, **EXTRA["lora"]}
    dpo(model, pairs(16), tmp_path / "run", **options, eval_dtype="run")
    monkeypatch.setattr(held_out, "free_memory", lambda device: 1000)
    monkeypatch.setattr(held_out, "in_float32", lambda *_: pytest.fail("copied"))
    capsys.readouterr()
    dpo(model, pairs(16), tmp_path / "auto", **options)
    assert capsys.readouterr().out.count(FALLS_BACK) == 1 and record(tmp_path / "auto")["eval_dtype"] == "run"
    one, two = ([line["eval_loss"] for line in evaluations(tmp_path / n)] for n in ("run", "auto"))
    assert one == two
    with pytest.raises(ConfigError, match="--eval-dtype float32: held-out losses in float32 do not fit into memory"):
        dpo(model, pairs(16), tmp_path / "wide", **options, eval_dtype="float32")


def test_weights_with_masters_beside_them_need_no_copies() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    weights = MasterWeights(model, torch.bfloat16)
    model.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    masters = {master.data_ptr() for master in weights.masters.values()}
    before = bytes_in_float32(weights)
    with in_float32(weights):
        tensors = {id(t): t for t in (*model.parameters(), model.scale)}.values()
        assert before == sum(t.nbytes for t in tensors if t.data_ptr() not in masters) > 0
    trained = sum(master.numel() for master in weights.masters.values())
    # As if masters were on the host and the model on a GPU.
    weights.masters = {n: torch.nn.Parameter(m.to("meta")) for n, m in weights.masters.items()}
    assert bytes_in_float32(weights) == before + 4 * trained


@pytest.mark.parametrize("told", [False, True], ids=["raw", "after the smallest batch"])
def test_a_reference_that_runs_out_of_memory_in_float32_keeps_the_run_alive(
    told: bool, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cause: list[Exception] = [torch.OutOfMemoryError("out of memory")]

    def fail(*_: Any) -> None:
        if told:
            raise RunError("scoring the reference: one group does not fit") from cause[0]
        raise cause[0]

    monkeypatch.setattr(ReferencePlan, "held_out_values", fail)
    dpo(model, pairs(16), tmp_path / "out", **SLOW)
    assert FALLS_BACK in capsys.readouterr().out and record(tmp_path / "out")["eval_dtype"] == "run"
    with pytest.raises(ConfigError, match="--eval-dtype float32: held-out losses in float32 do not fit into memory"):
        dpo(model, pairs(16), tmp_path / "wide", **SLOW, eval_dtype="float32")
    cause[0] = RuntimeError("anything else")
    with pytest.raises(RunError if told else RuntimeError, match=r"one group|anything"):
        dpo(model, pairs(16), tmp_path / "other", **SLOW)


def fits_in_float32(monkeypatch: pytest.MonkeyPatch, most: Callable[[], int]) -> list[int]:
    """Evaluations in float32 run out of memory beyond ``most`` tokens at once; the numbers that were tried."""
    evaluate, tried = Differentiator.evaluate, list[int]()

    def limited(self: Differentiator, batch: Any, tokens: int) -> Any:
        if next(self.scorer.model.parameters()).dtype == torch.float32:
            tried.append(tokens)
            if tokens > most():
                raise torch.OutOfMemoryError("out of memory")
        return evaluate(self, batch, tokens)

    monkeypatch.setattr(Differentiator, "evaluate", limited)
    return tried


def test_an_evaluation_in_float32_takes_fewer_tokens_where_memory_is_short(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SLOW, "token_budget": 1024, "epochs": 2, "eval_dtype": "float32"}
    dpo(model, pairs(40), tmp_path / "whole", **options)
    tried = fits_in_float32(monkeypatch, lambda: 200)
    dpo(model, pairs(40), tmp_path / "out", **options)
    assert tried == [512, 256, 128, 128], "half the budget of training, then halves, and the second evaluation knows"
    one, two = ([line["eval_loss"] for line in evaluations(tmp_path / n)] for n in ("whole", "out"))
    assert one == pytest.approx(two, abs=1e-6) and len(one) == 2


def test_a_first_evaluation_without_room_for_float32_is_in_the_dtype_of_the_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later one is refused: its loss would not be comparable with those before."""
    options = {**SLOW, "epochs": 2}
    dpo(model, pairs(16), tmp_path / "run", **options, eval_dtype="run")
    with monkeypatch.context() as patch:
        tried = fits_in_float32(patch, lambda: 0)
        dpo(model, pairs(16), tmp_path / "auto", **options)
    assert len(tried) > 1 and FALLS_BACK in capsys.readouterr().out
    assert record(tmp_path / "auto")["eval_dtype"] == "run"
    one, two = ([line["eval_loss"] for line in evaluations(tmp_path / n)] for n in ("run", "auto"))
    assert one == two and len(one) == 2
    found = fits_in_float32(monkeypatch, lambda: 0 if len(found) > 1 else 10**9)
    with pytest.raises(RunError, match="held-out losses in float32 do not fit into memory; give --eval-dtype run"):
        dpo(model, pairs(16), tmp_path / "later", **options)
    assert len(evaluations(tmp_path / "later")) == 1
