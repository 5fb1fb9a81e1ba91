"""Runs on quantised bases: the reference, resuming, the record beside an adapter, merging, reward models and PPO."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import prefopt
from data.small import small_tokenizer
from methods import small_world as world
from prefopt.cli import main
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.sample import ChatConfig, SampleConfig
from prefopt.core.model_folder import quantisation_on_record, read_adapter
from prefopt.core.plugins import installed_version
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.load import load_groups
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.evaluate.score import response_logprobs
from prefopt.generate.model_io import SampledModel
from prefopt.model import quantised
from prefopt.model.load import load_model
from prefopt.model.merge import merge_adapter
from prefopt.model.quantised import is_quantised
from prefopt.model.scalar import load_scalar
from prefopt.reference.identity import identity_of_folder
from prefopt.train.reference import choose_reference
from train.small import dpo, pairs, quick, same_bits, steps, write_rows
from train.test_resume import stopped_at

CPU = torch.device("cpu")
ROWS = pairs(12)
NF4: dict[str, Any] = {"lora": True, "quantise": "nf4", "batch_size": 4, "learning_rate": 1e-2, "token_budget": 60}
needs_bitsandbytes = pytest.mark.skipif(
    installed_version("bitsandbytes") is None, reason='bitsandbytes is missing: pip install "prefopt[quantise]"'
)


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a finished run."""
    output = tmp_path_factory.mktemp("runs") / "nf4"
    dpo(model, ROWS, output, epochs=2, **NF4)
    return output


@needs_bitsandbytes
def test_the_reference_is_the_base_with_the_adapter_off(model: str, capsys: Any, tmp_path: Path) -> None:
    """Its values are those of the quantised base: the first loss is ln 2. They are no values of the unquantised one."""
    dpo(model, ROWS, tmp_path / "nf4", **NF4, progress="plain")
    lines = capsys.readouterr().out
    assert "quantised (bitsandbytes, 4 bits): 15,360 of 32,160 weights" in lines
    assert abs(steps(tmp_path / "nf4")[0]["loss"] - math.log(2)) < 1e-5
    dpo(model, ROWS, tmp_path / "plain", **NF4 | {"quantise": None}, progress="plain")
    dpo(model, ROWS, tmp_path / "again", **NF4, progress="plain")
    lines = capsys.readouterr().out.split("done in")
    assert "24 responses scored" in lines[0] and "all 24 responses from the cache" in lines[1]
    other = DpoConfig(model="another", data=["rows"], output="o", reference=model, **NF4)
    assert choose_reference(other).identity == identity_of_folder(model, quantise="nf4")


@needs_bitsandbytes
@pytest.mark.parametrize(
    "more", [{"dtype": "float32"}, {"dtype": "bfloat16", "quantise": "int8", "gradient_checkpointing": True}]
)
def test_a_stopped_run_goes_on_to_the_same_bits(more: dict[str, Any], model: str, tmp_path: Path) -> None:
    options = NF4 | {"lora_dropout": 0.1, "epochs": 1} | more
    dpo(model, ROWS, tmp_path / "whole", **options)
    stopped_at(2, model, ROWS, tmp_path / "parts", **options)
    with pytest.raises(RunError, match="--quantise was"):
        dpo(model, ROWS, tmp_path / "parts", resume=True, **options | {"quantise": "none"})
    dpo(model, ROWS, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


@needs_bitsandbytes
def test_an_adapter_goes_on_its_base_as_it_was_trained(trained: Path, model: str, capsys: Any, tmp_path: Path) -> None:
    assert read_adapter(trained)["base_model_name_or_path"] == model
    assert quantisation_on_record(trained) == "nf4"
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        found = [
            load_model(folder, dtype=torch.float32, device=CPU, adapter=adapter, quantise=how)(input_ids=ids).logits
            for folder, adapter, how in (
                (str(trained), None, None),
                (model, str(trained), "nf4"),
                (model, str(trained), "none"),
            )
        ]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-2)
    as_trained, plain = (
        SampledModel(str(trained), quantise=how, device="cpu", dtype="float32") for how in (None, "none")
    )
    assert as_trained.note is not None and as_trained.note.endswith("the base is quantised to nf4, as in training")
    assert as_trained.identity().digest != plain.identity().digest
    assert is_quantised(as_trained.scorer.model) and not is_quantised(plain.scorer.model)

    dpo(str(trained), ROWS, tmp_path / "more", batch_size=4, max_steps=1, learning_rate=1e-3, progress="plain")
    assert "the base is quantised to nf4, as in training" in capsys.readouterr().out
    assert quantisation_on_record(tmp_path / "more") == "nf4"
    assert abs(steps(tmp_path / "more")[0]["loss"] - math.log(2)) < 1e-5


@needs_bitsandbytes
def test_implicit_rewards_are_of_the_quantised_pair(trained: Path, tmp_path: Path) -> None:
    """Model and reference alike: the adapter's own effect is scored, not that of quantising."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:4])
    found = []
    for how in ([], ["--quantise", "nf4"], ["--quantise", "none"]):
        output = tmp_path / f"{len(found)}.jsonl"
        options = ["--device", "cpu", "--dtype", "float32", "--max-length", "64", "--output", str(output)]
        assert main(["score", rows, "--reward", "implicit", "--model", str(trained), *options, *how]) == 0
        found.append([json.loads(line)["scores"] for line in output.read_text().splitlines()])
    assert found[0] == found[1] != found[2]
    scorers = [
        SampledModel(name, quantise="nf4", device="cpu", dtype="float32").scorer
        for name in (str(trained), read_adapter(trained)["base_model_name_or_path"])
    ]
    groups = load_groups([parse_comparisons(ROWS[:4], "data")], small_tokenizer(), max_length=64, kind="pairs").groups
    policy, reference = (response_logprobs(scorer, groups, 1000) for scorer in scorers)
    assert np.ravel(found[0]) == pytest.approx(0.1 * (policy - reference), abs=1e-4)


@needs_bitsandbytes
def test_merging_goes_into_the_plain_base_and_says_how_far_it_is(
    trained: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = merge_adapter(str(trained), tmp_path / "merged", dtype=torch.float32, device=CPU)
    ids = torch.randint(len(small_tokenizer()), (3, 24), generator=torch.Generator().manual_seed(0))

    def logp(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(input_ids=ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])

    merged = logp(load_model(str(tmp_path / "merged"), dtype=torch.float32, device=CPU))
    quantised_one = logp(load_model(str(trained), dtype=torch.float32, device=CPU))
    distance = float((merged - quantised_one).square().mean().sqrt())
    assert report.quantised is not None and f" {distance:.2g} nats per token from that model" in report.quantised
    assert report.quantised in report.lines()
    monkeypatch.setattr(quantised, "installed_version", lambda name: None)
    report = merge_adapter(str(trained), tmp_path / "without", dtype=torch.float32, device=CPU)
    assert report.quantised is not None and "cannot be measured here" in report.quantised


@needs_bitsandbytes
def test_a_reward_model_gives_the_rewards_of_its_training(model: str, tmp_path: Path) -> None:
    """It is saved whole, on the dequantised weights."""
    output = tmp_path / "reward"
    before = load_scalar(model, dtype=torch.float32, device=CPU, tokenizer=small_tokenizer(), quantise="nf4")
    assert is_quantised(before) and not quantised.is_packed(before.score)
    options = {**quick(model), **NF4, "max_steps": 3, "epochs": 9, "eval_fraction": 0.3}
    result = prefopt.reward(model, ROWS, output=output, **options)
    assert result is not None and result.held_out_loss is not None
    saved = AutoModelForSequenceClassification.from_pretrained(output)
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert not hasattr(saved.config, "quantization_config")
    again = prefopt.reward(
        str(output), ROWS, output=tmp_path / "again", **options | {"learning_rate": 1e-12, "quantise": None}
    )
    assert again is not None and again.held_out_loss is not None
    assert abs(again.held_out_loss - result.held_out_loss) < 1e-4


@needs_bitsandbytes
def test_ppo_with_actor_and_critic_on_quantised_bases(tmp_path: Path, capsys: Any) -> None:
    base = world.write_world(tmp_path / "world")
    result = prefopt.ppo(
        base,
        [{"prompt": a + b} for a in "abcd" for b in "ef"],
        output=tmp_path / "ppo",
        **{"reward": world.reward, "critic": "actor", "num": 2, "max_new_tokens": 3, "batch_size": 4, "max_steps": 2},
        **{"lora": True, "quantise": "nf4", "device": "cpu", "dtype": "float32", "progress": "plain", "max_kl": 1e6},
    )
    assert result is not None
    assert "quantised (bitsandbytes, 4 bits)" in capsys.readouterr().out
    first = json.loads((tmp_path / "ppo/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["objective/kl"]) < 1e-5 and first["val/sampler_gap"] < 1e-4
    assert quantisation_on_record(tmp_path / "ppo") == "nf4"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantise": "nf4"}, "without an adapter all train: add --lora, or leave --quantise out"),
        ({"quantise": "int8", "lora": True, "shard": "full"}, "--shard full cuts weights into parts"),
        ({"quantise": "nf4", "lora": True, "dtype": "float64"}, "computes in float32 or bfloat16"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], said: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        dpo(model, ROWS, tmp_path / "o", **options)


def test_ppo_refuses_weights_that_are_packed_and_cut_by_its_options_alone() -> None:
    asked: dict[str, Any] = {"model": "m", "prompts": "p", "reward": "length", "output": "o", "lora": True}
    with pytest.raises(ConfigError, match="--shard full cuts weights into parts, which --quantise nf4 packs"):
        PpoConfig(**asked, quantise="nf4", shard="full")
    assert PpoConfig(**asked, quantise="nf4").quantises and PpoConfig(**asked, shard="full").shard == "full"


def test_without_its_library_a_run_is_refused_before_data_are_read(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "installed_version", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed: pip install --upgrade bitsandbytes"):
        dpo(model, str(tmp_path / "absent.jsonl"), tmp_path / "o", **NF4)
    with pytest.raises(ConfigError, match="vllm, which loads the model itself"):
        SampleConfig(model=model, prompts=["p"], engine="vllm", quantise="nf4")
    with pytest.raises(ConfigError, match="--quantise does nothing without --model"):
        ChatConfig(url="http://localhost:8000/v1", quantise="nf4")


@needs_bitsandbytes
def test_a_packed_checkpoint_trains_under_an_adapter_alone(model: str, tmp_path: Path) -> None:
    packed = load_model(model, dtype=torch.float32, device=CPU, quantise="nf4")
    packed.save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    small_tokenizer().save_pretrained(tmp_path / "packed")
    folder = str(tmp_path / "packed")
    with pytest.raises(ModelError, match="its weights cannot train: add --lora"):
        dpo(folder, ROWS, tmp_path / "full")
    dpo(folder, ROWS, tmp_path / "adapter", max_steps=2, **NF4 | {"quantise": None})
    assert abs(steps(tmp_path / "adapter")[0]["loss"] - math.log(2)) < 1e-5
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ModelError, match="its weights cannot train: add --lora"):
        prefopt.ppo(
            folder, rows, output=tmp_path / "ppo", reward="length", device="cpu", max_new_tokens=3, progress="none"
        )
