"""Folders with trained scalar heads, of whatever class they name: no head is drawn anew, no reward model mistaken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.architectures import build
from model.oracle import groups_of_every_kind
from model.test_scalar import padding_tokenizer
from prefopt.errors import ModelError
from prefopt.model.adapter import new_lora
from prefopt.model.checkpoint import origin_of
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.save import save_weights
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, scalar_from

HERE: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def reward_model(
    folder: Path, *, tied: bool = False, architectures: list[str] | None = None, name: str = "score"
) -> str:
    """A reward model's folder that names other classes, and its head by another name."""
    model = scalar_from(build("llama", torch.float32, tie_word_embeddings=tied), padding_tokenizer(), seed=5)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"] = tensors.pop("score.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    if architectures != said["architectures"]:
        for field in ("architectures", "num_labels", "id2label", "label2id"):
            said.pop(field, None)
        said |= {"architectures": architectures} if architectures else {}
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


def rewards(folder: str) -> torch.Tensor:
    groups = [g for g in groups_of_every_kind() if len(g.prefix)]
    scorer = ScalarScorer(load_scalar(folder, **HERE, tokenizer=padding_tokenizer(), seed=77))
    with torch.no_grad():
        found: torch.Tensor = scorer(pack(groups, scorer.layout))
    return found


@pytest.mark.parametrize("architectures", [None, ["RewardModel"], ["LlamaForCausalLM"]], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", ["score", "value_head"])
def test_a_reward_model_is_one_whatever_class_it_names(
    name: str, tied: bool, architectures: list[str] | None, tmp_path: Path
) -> None:
    expected = rewards(reward_model(tmp_path / "own", tied=tied, architectures=["LlamaForSequenceClassification"]))
    folder = reward_model(tmp_path / "other", tied=tied, architectures=architectures, name=name)
    assert has_scalar_head(folder)
    assert torch.equal(rewards(folder), expected)
    with pytest.raises(
        ModelError, match=rf"holds the head of a reward model \({name}.weight; config.json names .*--rew"
    ):
        load_model(folder, **HERE)
    model: Any = load_scalar(folder, **HERE, tokenizer=padding_tokenizer())
    save_weights(tmp_path / "out", model, dict(model.state_dict()), torch.float32)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "score.weight" in after and "value_head.weight" not in after
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    assert torch.equal(rewards(str(tmp_path / "out")), expected)


@pytest.mark.parametrize("beside", [False, True], ids=["in the file", "in a file of its own"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_value_head_beside_a_language_model_is_kept_and_read(tied: bool, beside: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    build("llama", torch.float32, tie_word_embeddings=tied).save_pretrained(folder)
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([0.75])}
    file = folder / ("value_head.safetensors" if beside else "model.safetensors")
    save_file({**(load_file(file) if file.exists() else {}), **head}, file, {"format": "pt"})
    model: Any = load_model(str(folder), **HERE)
    save_weights(tmp_path / "out", model, dict(model.state_dict()), torch.float32)
    after = load_file(tmp_path / "out" / "model.safetensors")
    after |= load_file(tmp_path / "out" / "value_head.safetensors") if beside else {}
    assert all(torch.equal(after[n], t) for n, t in head.items())
    scalar: Any = load_scalar(str(folder), **HERE, tokenizer=padding_tokenizer())
    ids = torch.tensor([[3, 20, 30, 40]])
    with torch.no_grad():
        last = model.model(input_ids=ids).last_hidden_state[0, -1]
        expected = head["v_head.summary.weight"][0] @ last + 0.75
        torch.testing.assert_close(scalar(input_ids=ids).logits[0, 0] - ScalarScorer(scalar).shift, expected)
    origin = origin_of(scalar)
    assert origin is not None and not origin.untouched


def test_a_head_of_another_shape_is_refused_and_not_drawn_anew(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    build("llama", torch.float32).save_pretrained(folder)
    for head, said in (
        (
            {"v_head.0.weight": torch.zeros(8, 32), "v_head.2.weight": torch.zeros(1, 8)},
            "v_head.2.weight beside v_head.0",
        ),
        ({"v_head.summary.weight": torch.zeros(2, 32)}, r"v_head.summary.weight \[2, 32\]"),
        (
            {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(2)},
            r"v_head.summary.bias \[2\]",
        ),
    ):
        save_file(head, folder / "value_head.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=f"not linear from 32 numbers to one .{said}"):
            load_scalar(str(folder), **HERE, tokenizer=padding_tokenizer())


def test_a_head_that_cannot_be_read_is_not_drawn_anew(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    build("llama", torch.float32).save_pretrained(folder)
    (folder / "value_head.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"value_head\.safetensors: this scalar head cannot be read"):
        load_scalar(str(folder), **HERE, tokenizer=padding_tokenizer())


def test_a_head_beside_an_adapter_is_read(tmp_path: Path) -> None:
    """As LLaMA-Factory writes reward models by LoRA: PEFT's task is that of the language model."""
    build("llama", torch.float32).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    policy: Any = new_lora(load_model(str(tmp_path / "base"), **HERE), rank=2, alpha=4, dropout=0.0, targets=None)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    policy.eval().save_pretrained(tmp_path / "rm", save_embedding_layers=False)
    assert not has_scalar_head(str(tmp_path / "rm"))
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.tensor([0.75])}
    save_file(head, tmp_path / "rm" / "value_head.safetensors", {"format": "pt"})
    assert has_scalar_head(str(tmp_path / "rm"))
    scalar: Any = load_scalar(str(tmp_path / "rm"), **HERE, tokenizer=padding_tokenizer())
    ids = torch.tensor([[3, 20, 30, 40]])
    with torch.no_grad():
        last = policy(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = head["v_head.summary.weight"][0] @ last + 0.75
        found = scalar(input_ids=ids).logits[0, 0] - ScalarScorer(scalar).shift
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
