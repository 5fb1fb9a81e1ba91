"""What a model folder holds comes out again: names, shapes and bytes, for every family of architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model.architectures import HYBRIDS, SEPARATE, SHARED
from prefopt.errors import ModelError
from prefopt.model import save
from prefopt.model.adapter import nesting_of
from prefopt.model.checkpoint import WeightFiles, describe_untouched, origin_of
from prefopt.model.load import load_model
from prefopt.model.save import save_weights

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 20, 30, 40, 5, 6, 7, 50]])
_BASE = SHARED["llama"][1]
_WIDE: dict[str, Any] = {  # what one or another mixture, latent or linear attention asks for
    **SHARED["latent attention"][1],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_PLAIN = """apertus arcee biogpt bitnet codegen cohere2 cwm diffllama doge ernie4_5 exaone4 falcon_h1 falcon_mamba
    gemma glm glm4 gpt_bigcode gptj granitemoe granitemoeshared helium internlm3 jamba jetmoe minimax
    ministral3 modernbert-decoder mpt nanochat nemotron olmo olmo3 olmo_hybrid persimmon phi phimoe
    recurrent_gemma seed_oss stablelm starcoder2 vaultgemma xglm""".split()
_MIXED = """afmoe deepseek_v2 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite hunyuan_v1_dense hunyuan_v1_moe hy_v3
    flex_olmo longcat_flash minimax_m2 olmoe mimo_v2_flash nemotron_h qwen2_moe qwen3_5_moe_text qwen3_next
    solar_open youtu""".split()
_VISION = {"hidden_size": 16, "depth": 2, "num_heads": 4, "intermediate_size": 32, "out_hidden_size": 32}
_TEXT = {**_BASE, **{k: v for k, v in HYBRIDS["qwen3.5"][1].items() if k not in _BASE}}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAMA4 = SEPARATE["llama4"][1]
_LLAMA4_VISION = {
    **{k: v for k, v in _SIGLIP.items() if k != "intermediate_size"},
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
# name: (type, fields); the class of the first three loads a part of what the folder's own class has
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5", {"text_config": _TEXT, "vision_config": _VISION}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": {**_TEXT, **_WIDE}, "vision_config": _VISION}),
    "llama4": ("llama4", {"text_config": _LLAMA4, "vision_config": _LLAMA4_VISION}),
    "gemma3 whole": (
        "gemma3",
        {"text_config": {**SHARED["gemma3"][1]}, "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    ),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: given[:2] for name, given in (SHARED | HYBRIDS | SEPARATE).items()},
    **{name: (name, _BASE) for name in _PLAIN if name not in SHARED},
    **{name: (name, _WIDE) for name in _MIXED},
    **MULTIMODAL,
}
SOME = ["llama", "qwen3_moe", "gpt2", "qwen3_5", "latent attention", "gpt_oss"]


def build(name: str, **changes: Any) -> Any:
    """A random model of the class that a folder of the family names."""
    kind, fields = FAMILIES[name]
    config = AutoConfig.for_model(kind, **{**fields, **changes})
    torch.manual_seed(0)
    if name in MULTIMODAL:
        return getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration")(config)
    return AutoModelForCausalLM.from_config(config)


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put tensors into a folder's file, and give all that is there now."""
    file = folder / "model.safetensors"
    whole = {**load_file(file), **tensors}
    save_file(whole, file, {"format": "pt"})
    return whole


def saved_again(folder: Path, out: Path, change: float = 0.0) -> Any:
    """Load, change every weight a little, save; gives the model."""
    model: Any = load_model(str(folder), dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(change)
    save_weights(out, model, dict(model.state_dict()), torch.float32)
    return model


def test_there_are_enough_families() -> None:
    assert len({kind for kind, _ in FAMILIES.values()}) >= 60


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_in_are_keys_out(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "in")
    extra = {"mtp.fc.weight": torch.randn(3, 5).bfloat16(), "vision_tower.w": torch.arange(7)}
    before = add(tmp_path / "in", extra)
    saved_again(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())
    named = json.loads((tmp_path / "in" / "config.json").read_text())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == named["architectures"] and said["model_type"] == named["model_type"]
    cls = getattr(transformers, said["architectures"][0])
    _, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {n.removeprefix("model.") for n in info["unexpected_keys"]} <= set(extra)


@pytest.mark.parametrize("name", ["qwen3_5", "llama4", "llama", "qwen3_moe"])
def test_what_is_trained_is_what_the_named_class_computes(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "in")
    model = saved_again(tmp_path / "in", tmp_path / "out", change=0.01).eval()
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    plain = getattr(transformers, said["architectures"][0]).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", SOME)
def test_several_files_in_and_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(name).save_pretrained(tmp_path / "in", max_shard_size="20kB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    monkeypatch.setattr(save, "SHARD_BYTES", 30_000)
    saved_again(tmp_path / "in", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    before, after = (WeightFiles.read(tmp_path / f) for f in ("in", "out"))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(t.read(n), after.tensors[n].read(n)) for n, t in before.tensors.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(stored.nbytes for stored in after.tensors.values())


def test_a_tied_head_stands_where_it_stood(tmp_path: Path) -> None:
    for there in (False, True):
        folder, out = tmp_path / f"in{there}", tmp_path / f"out{there}"
        build("llama", tie_word_embeddings=True).save_pretrained(folder)
        if there:
            add(
                folder, {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()}
            )
        saved_again(folder, out, change=0.5)
        after = load_file(out / "model.safetensors")
        assert ("lm_head.weight" in after) == there
        assert not there or torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_names_without_the_prefix_of_the_base_model_stay_so(tmp_path: Path) -> None:
    for name in ("gpt2", "qwen3_moe"):
        folder = tmp_path / name
        model = build(name, tie_word_embeddings=True)
        model.save_pretrained(folder)
        prefix = f"{model.base_model_prefix}."
        bare = {n.removeprefix(prefix): t for n, t in load_file(folder / "model.safetensors").items()}
        if name == "gpt2":
            bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
        model = saved_again(folder, tmp_path / "out" / name, change=0.5)
        after = load_file(tmp_path / "out" / name / "model.safetensors")
        assert after.keys() == bare.keys()
        assert describe_untouched(origin_of(model)) is None  # type: ignore[arg-type]  # a mask is no news
        changed = {n for n in bare if not torch.equal(after[n], bare[n])}
        assert changed == set(bare) - {"h.0.attn.bias"}


def test_weights_in_bfloat16_are_trained_in_float32_and_the_rest_stays(tmp_path: Path) -> None:
    build("qwen3_5").bfloat16().save_pretrained(tmp_path / "in")
    saved_again(tmp_path / "in", tmp_path / "out")
    kinds = {"visual" in n: t.dtype for n, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert kinds == {True: torch.bfloat16, False: torch.float32}
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == said["text_config"]["dtype"] == "float32"


def test_side_files_go_along_and_code_does_not(tmp_path: Path) -> None:
    build("qwen3_5").save_pretrained(tmp_path / "in")
    for name in ("preprocessor_config.json", "LICENSE", "modeling.py", "weights.bin", "run.json"):
        (tmp_path / "in" / name).write_text("{}")
    saved_again(tmp_path / "in", tmp_path / "out")
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("preprocessor_config.json", "LICENSE"),
    }


def test_what_is_left_over_is_told_by_kind(tmp_path: Path) -> None:
    build("latent attention", num_nextn_predict_layers=1).save_pretrained(tmp_path / "in")
    more = {
        "model.layers.2.eh_proj.weight": torch.zeros(32, 64),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(4, 4),
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "audio_tower.w": torch.zeros(2),
        "adapter.w": torch.zeros(2),
    }
    add(tmp_path / "in", more)
    model = load_model(str(tmp_path / "in"), dtype=torch.float32, device=CPU)
    origin = origin_of(model)
    assert origin is not None and set(origin.untouched) == set(more)
    assert describe_untouched(origin) == (
        "audio tower (1 tensor, 8 bytes), layers for multi-token prediction (2 tensors, 8.3 kB), value head (1 tensor,"
        " 128 bytes), tensors that the architecture has no place for (1 tensor, 8 bytes, the first is adapter.w)"
    )


def test_a_configuration_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    for name in ("llama", "qwen3_moe", "gpt2"):
        build(name).save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        said = json.loads(file.read_text())
        said |= {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
        file.write_text(json.dumps(said))
        with pytest.raises(ModelError, match=r"config.json ends at .*\.0, .* later layers \(\d+ tensors, .* kB\)"):
            load_model(str(tmp_path / name), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_a_model_whose_folder_is_gone_is_saved(name: str, tmp_path: Path) -> None:
    """A cache may have been emptied while the run went on."""
    build(name).save_pretrained(tmp_path / "in")
    model: Any = load_model(str(tmp_path / "in"), dtype=torch.float32, device=CPU)
    saved_again(tmp_path / "in", tmp_path / "expected")
    shutil.rmtree(tmp_path / "in")
    save_weights(tmp_path / "out", model, dict(model.state_dict()), torch.float32)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert nesting_of(model) is None
