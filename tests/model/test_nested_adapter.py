"""Adapters of the language model in a checkpoint with a vision tower: for the class that its config.json names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from model.test_checkpoint import CPU, IDS, MULTIMODAL, build
from prefopt.core.model_folder import read_adapter
from prefopt.model.adapter import add_adapter, nesting_of, new_lora, peft_warnings_off, write_nested
from prefopt.model.load import load_model
from prefopt.model.lora_targets import tower_weights


def trained(folder: Path, targets: list[str] | None = None) -> Any:
    """The folder's language model with an adapter that does something."""
    torch.manual_seed(0)
    policy: Any = new_lora(
        load_model(str(folder), dtype=torch.float32, device=CPU), rank=2, alpha=4, dropout=0.0, targets=targets
    )
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return policy.eval()


def save(policy: Any, out: Path) -> None:
    """As a run saves."""
    with peft_warnings_off():
        policy.save_pretrained(out, save_embedding_layers=False)
    nesting = nesting_of(policy.get_base_model())
    if nesting is not None:
        write_nested(out, policy, nesting)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("targets", [None, ["all-linear", "lm_head"]])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_class_that_config_json_names_takes_the_adapter(
    name: str, targets: list[str] | None, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    build(name, tie_word_embeddings=False).save_pretrained(base)
    policy = trained(base, targets)
    expected = logits(policy)
    with policy.disable_adapter():
        assert not torch.allclose(logits(policy), expected, atol=1e-3)
    save(policy, out)
    keys = load_file(out / "adapter_model.safetensors")
    assert not any(re.search("vision|visual|multi_modal", key) for key in keys)

    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    with peft_warnings_off():
        whole = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), out).eval()
    torch.testing.assert_close(logits(whole), expected)
    assert {n for n, _ in whole.named_parameters() if "lora_" in n} == {
        re.sub(r"(lora_[AB])\.", r"\1.default.", key) for key in keys
    }

    again = add_adapter(load_model(str(base), dtype=torch.float32, device=CPU), str(out)).eval()
    torch.testing.assert_close(logits(again), expected)
    save(again, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == keys.keys()


def test_an_adapter_with_the_names_of_the_language_model_is_read_as_before(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    build("qwen3_5").save_pretrained(base)
    policy = trained(base)
    with peft_warnings_off():
        policy.save_pretrained(out)
    assert any(
        key.startswith("base_model.model.model.layers.0") for key in load_file(out / "adapter_model.safetensors")
    )
    again = add_adapter(load_model(str(base), dtype=torch.float32, device=CPU), str(out)).eval()
    torch.testing.assert_close(logits(again), logits(policy))


def test_what_an_adapter_has_on_a_tower_is_counted_and_left_out(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "adapter"
    build("qwen3_5").save_pretrained(base)
    policy = trained(base)
    save(policy, out)
    file = out / "adapter_model.safetensors"
    place = "base_model.model.model.visual.blocks.0.attn.qkv"
    tower = {f"{place}.lora_A.weight": torch.ones(2, 16), f"{place}.lora_B.weight": torch.ones(48, 2)}
    save_file({**load_file(file), **tower}, file)
    assert isinstance(read_adapter(out)["target_modules"], list)
    with pytest.warns(UserWarning, match=r"2 tensors of the adapter are on layers that text does not reach"):
        again = add_adapter(load_model(str(base), dtype=torch.float32, device=CPU), str(out)).eval()
    torch.testing.assert_close(logits(again), logits(policy))


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_a_tower_has_no_adapter_and_counts_as_untrained(targets: list[str] | None, tmp_path: Path) -> None:
    build("gemma3 whole").save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), dtype=torch.float32, device=CPU)
    outside = [p for n, p in model.named_parameters() if re.search("vision_tower|multi_modal_projector", n)]
    assert outside
    assert tower_weights(model) == sum(p.numel() for p in outside)
    policy: Any = new_lora(model, rank=2, alpha=4, dropout=0.0, targets=targets)
    assert "none of tower" in policy.prefopt_targets or targets
    assert not any("lora_" in n for n, _ in policy.named_parameters() if re.search("vision_tower|projector", n))
    policy(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in policy.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("named", ["pipeline", "set_seed", "NoSuchClass", "GemmaTokenizer"])
def test_a_class_that_is_none_of_a_model_is_not_called(named: str, tmp_path: Path) -> None:
    """config.json is a stranger's, and the adapter is saved when the run is over: it must not be lost then."""
    base = tmp_path / "base"
    build("qwen3_5").save_pretrained(base)
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**said, "architectures": [named]}))
    save(trained(base), tmp_path / "adapter")
    assert any("model.layers.0" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_a_tower_that_cannot_be_built_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build("qwen3_5").save_pretrained(tmp_path / "base")
    policy = trained(tmp_path / "base")

    def lacking(self: Any, config: Any) -> None:
        raise ImportError("timm is not installed")

    monkeypatch.setattr("transformers.Qwen3_5ForConditionalGeneration.__init__", lacking)
    save(policy, tmp_path / "adapter")
    assert "Qwen3_5ForConditionalGeneration cannot be built (timm is not installed)" in caplog.text
