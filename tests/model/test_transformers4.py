"""Saved folders are read by transformers 4 as well, and by transformers 5 as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import prefopt
from data.small import small_tokenizer
from prefopt.model.save import transformers4_config, transformers_versions, write_transformers4_fields
from train.small import QUICK, write_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0}
PLAIN = {"rope_type": "default"}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}

# type in transformers, fields of its configuration, and what transformers 4 calls its rotary embeddings
OLDER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {"rope_parameters": PLAIN | {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
    "llama 3": (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "by layer": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": PLAIN | {"rope_theta": 1e4},
            }
        },
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
    "part of a head": (
        "phi",
        {"rope_parameters": PLAIN | {"rope_theta": 2e4, "partial_rotary_factor": 0.25}},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.25},
    ),
    "names of its own": (
        "gpt_neox",
        {"rope_parameters": PLAIN | {"rope_theta": 2e4, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    ),
    "long": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": LONG | {"rope_type": "longrope", "rope_theta": 1e4},
        },
        {"rope_theta": 1e4, "rope_scaling": LONG | {"type": "longrope"}},
    ),
    "experts": ("qwen3_moe", {"num_experts": 4, "rope_theta": 1e6}, {"rope_theta": 1e6, "num_experts": 4}),
    "none": ("gpt2", {}, {}),
}
NAMES = {"num_experts", "rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def document(kind: str, **fields: Any) -> dict[str, Any]:
    """What transformers 5 writes as config.json."""
    config = AutoConfig.for_model(kind, **{**SIZES, **fields})
    config.dtype = torch.bfloat16
    found: dict[str, Any] = json.loads(config.to_json_string())
    return found


@pytest.mark.parametrize("name", OLDER)
def test_fields_of_transformers_4(name: str) -> None:
    kind, fields, wanted = OLDER[name]
    before = document(kind, **fields)
    after = transformers4_config(before)
    assert after["torch_dtype"] == after["dtype"] == "bfloat16"
    assert {k: after[k] for k in after if k in NAMES or k in wanted} == wanted
    assert before.items() <= after.items()
    now, then = (AutoConfig.for_model(**d).to_dict() for d in (after, before))
    rope = now.get("rope_parameters") or {}
    assert {k: v for k, v in rope.items() if k != "type"} == (then.get("rope_parameters") or {})


def test_nested_text_model() -> None:
    """Multimodal checkpoints keep the language model's fields one level down."""
    text = {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "rope_theta": 3e5}
    config = AutoConfig.for_model("gemma3", text_config=text)
    config.dtype = config.get_text_config().dtype = torch.float32
    after = transformers4_config(json.loads(config.to_json_string()))
    assert after["text_config"]["rope_theta"] == 3e5
    assert after["text_config"]["rope_local_base_freq"] == 1e4
    assert after["text_config"]["torch_dtype"] == after["torch_dtype"] == "float32"


def test_what_version_4_cannot_hold_is_left_out_and_told(tmp_path: Path) -> None:
    before = document("gemma4_text", head_dim=8, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(transformers4_config(before)))
    assert transformers_versions(tmp_path).startswith("transformers 5:")
    (tmp_path / "config.json").write_text(json.dumps(transformers4_config(document("llama"))))
    assert "version 4" in transformers_versions(tmp_path)


@pytest.mark.parametrize(
    ("named", "kept"),
    [("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"), ("TokenizersBackend", "PreTrainedTokenizerFast")],
)
def test_class_of_the_tokenizer(named: str, kept: str, tmp_path: Path) -> None:
    source, saved = tmp_path / "in", tmp_path / "out"
    extra = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    small_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(source)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named} | extra))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(saved)
    write_transformers4_fields(saved, tokenizer)
    found = json.loads((saved / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == kept
    assert found["additional_special_tokens"] == extra["extra_special_tokens"]
    assert "extra_special_tokens" not in found
    again = AutoTokenizer.from_pretrained(saved)
    assert type(again) is type(tokenizer)
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == extra["extra_special_tokens"]
    assert again("<s>abc<|im_end|>")["input_ids"] == tokenizer("<s>abc<|im_end|>")["input_ids"]


def test_class_of_its_own_is_kept(tmp_path: Path) -> None:
    """Where transformers 5 falls back on its general class, the folder's own name of it stays."""
    source, out = Path(write_model(tmp_path / "m")), tmp_path / "out"
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2TokenizerFast"}))
    prefopt.dpo(str(source), [{"prompt": "a", "chosen": "b", "rejected": "c"}], output=out, max_steps=1, **QUICK)
    written = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert type(AutoTokenizer.from_pretrained(out)) is type(AutoTokenizer.from_pretrained(source))
    assert written in ("Qwen2TokenizerFast", "Qwen2Tokenizer")


TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", OLDER["llama 3"][1]),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 5e5}),
    "gemma2": ("gemma2", {"head_dim": 8, "rope_theta": 3e4}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 8, **OLDER["by layer"][1]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "rope_theta": 3e4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
    "phi": ("phi", OLDER["part of a head"][1]),
    "phi3": ("phi3", OLDER["long"][1]),
    "gpt_neox": ("gpt_neox", OLDER["names of its own"][1]),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
ASK = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": "What is 3 plus 3?"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1, :40].double().tolist()
        out = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1]:]
    found[folder] = {"ids": ids.tolist(), "dtype": str(model.dtype), "logits": logits, "text": tokenizer.decode(out)}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_4_gives_the_same(tmp_path: Path) -> None:
    """Logits and text to the end mark, by a Python that has transformers 4."""
    older = os.environ.get("PREFOPT_TRANSFORMERS_4")
    if not older:
        pytest.skip("PREFOPT_TRANSFORMERS_4 names no Python with transformers 4")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(8)
    ]
    tokenizer = small_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    folders = []
    for name, (kind, fields) in TRIED.items():
        torch.manual_seed(0)
        sizes = {**SIZES, "num_key_value_heads": 2} if kind not in ("gpt_neox", "gpt2") else SIZES
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **fields}))
        model.save_pretrained(tmp_path / "in" / name)
        tokenizer.save_pretrained(tmp_path / "in" / name)
        quick = {**QUICK, "learning_rate": 1e-2, "max_length": 128, "batch_size": 8}
        prefopt.sft(str(tmp_path / "in" / name), rows, output=tmp_path / name, epochs=40, **quick)
        folders.append(str(tmp_path / name))
    command = [older, "-c", ASK, *folders]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    old = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=clean).stdout)
    new = json.loads(
        subprocess.run([sys.executable, "-c", ASK, *folders], check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    assert old.pop("version").startswith("4.")
    assert new.pop("version").startswith("5.")
    for folder in folders:
        a, b = old[folder], new[folder]
        assert (a["ids"], a["dtype"]) == (b["ids"], b["dtype"]), folder
        torch.testing.assert_close(
            torch.tensor(a["logits"]), torch.tensor(b["logits"]), rtol=1e-4, atol=1e-4, msg=folder
        )
        assert a["text"] == b["text"], folder
        assert a["text"].endswith("<|im_end|>"), (folder, a["text"])
        assert a["text"].count("<|im_end|>") == 1
