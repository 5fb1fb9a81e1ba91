"""Which weights a new adapter reaches: all that multiply, of every family; plain PEFT loads what is saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from model.families import FAMILIES
from model.test_families import built
from prefopt.errors import ConfigError
from prefopt.model.adapter import add_adapter, new_lora, peft_warnings_off
from prefopt.model.lora_targets import lora_targets, weight_matrices

QUICK = [
    "llama",
    "gpt2",
    "mixtral",  # fused experts that PEFT knows
    "qwen2_moe",  # and shared ones, whose names PEFT takes for those of experts
    "deepseek_v3",  # and dense layers of the same names
    "gpt_oss",  # fused experts that PEFT does not know
    "jetmoe",
    "mamba",  # a layer that PEFT refuses
    "nemotron_h",
    "deepseek_v4",  # a linear layer in groups
    "recurrent_gemma",
    "gemma3n_text",
]
# No adapter: what PEFT refuses, what is read without being called, what no gradient goes through.
_INDEXER = {"wq_b", "wk", "weights_proj"}
WITHOUT = {
    "mamba": {"out_proj", "dt_proj"},
    "falcon_mamba": {"out_proj", "dt_proj"},
    "mamba2": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "jamba": {"dt_proj"},
    "dbrx": {"w1", "v1", "w2"},
    "axk2": _INDEXER,
    "deepseek_v32": _INDEXER,
    "glm_moe_dsa": _INDEXER,
}
# Reading renames Laguna's shared_expert to shared_experts, and with it the s of an adapter that has the new name.
NOT_READ = {"laguna"}


def trained(model: torch.nn.Module) -> set[str]:
    """Names of the weights that have an adapter, as they are in the model without it."""
    found = set()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
            found.add(f"{plain}.{getattr(module, 'parameter_name', 'weight')}")
    return found


def adapted(model: torch.nn.Module, targets: list[str] | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"rank": 2, "alpha": 4, "dropout": 0.0, **changes}
    wrapped: Any = new_lora(model, targets=targets, **options).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return wrapped


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES])
def test_every_matrix_has_an_adapter_that_moves_and_that_plain_peft_loads(family: str, tmp_path: Path) -> None:
    """Independent of how kinds are told: names of the model's own parameters with two axes or more."""
    model = built(family, torch.float64)
    ends = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    wanted = set()
    for name, weight in model.named_parameters():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        multiplies = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) or "expert" in name
        multiplies = multiplies or (family in ("gpt2", "openai-gpt") and weight.ndim == 2)
        if weight.ndim < 2 or id(weight) in ends | embeddings or not multiplies or leaf in WITHOUT.get(family, ()):
            continue
        moe = any("experts" in n for n, _ in model.named_modules())
        if name.endswith("bias") or (moe and re.search(r"router|\.gate\.|shared_expert_gate", name)):
            continue
        wanted.add(name)
    policy = adapted(model)
    assert wanted - trained(policy) == set()
    assert not any(re.search(r"router\b|lm_head|embed_tokens\.", name) for name in trained(policy) - wanted)

    out = logits(policy)
    out.square().mean().backward()
    still = [n for n, p in policy.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [n for n in still if "compressor" not in n] == [], "of sequences longer than these"
    if family in NOT_READ:
        return
    with peft_warnings_off():
        policy.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(built(family, torch.float64), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(logits(plain), out)
        assert torch.equal(logits(add_adapter(built(family, torch.float64), str(tmp_path)).eval()), out)


@pytest.mark.parametrize(
    ("family", "targets", "found"),
    [
        ("gpt_oss", ["experts"], {"experts.down_proj", "experts.gate_up_proj"}),
        ("gpt_oss", ["experts.gate_up_proj", "q_proj"], {"experts.gate_up_proj", "q_proj.weight"}),
        ("gpt_oss", ["router"], {"router.weight"}),
        ("mixtral", ["router", "experts.down_proj"], {"gate.weight", "experts.down_proj"}),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], {"experts.gate_up_proj", "experts.down_proj"}),
        ("deepseek_v3", ["mlp"], {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ("llama", ["mlp", "lm_head"], {"gate_proj.weight", "up_proj.weight", "down_proj.weight", "lm_head.weight"}),
    ],
)
def test_kinds_and_fused_weights_can_be_named(family: str, targets: list[str], found: set[str]) -> None:
    policy = adapted(built(family, torch.float64, tie_word_embeddings=False), targets)
    there = trained(policy)
    assert all(any(f".{name}".endswith(f".{end}") for end in found) for name in there)
    assert all(any(f".{name}".endswith(f".{end}") for name in there) for end in found)


def test_a_name_of_nothing_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--lora-targets expert: .*experts.*experts\.gate_up_proj.*q_proj"):
        adapted(built("gpt_oss", torch.float64), ["expert"])
    with pytest.raises(ConfigError, match=r"--lora-targets out_proj: an adapter would change nothing"):
        adapted(built("mamba", torch.float64), ["out_proj"])


def test_the_run_is_told_the_share_of_each_kind() -> None:
    words = adapted(built("deepseek_v3", torch.float64)).prefopt_targets
    assert words.startswith("100 % of attention, mlp, experts, shared-experts; none of router")
    words = adapted(built("mamba", torch.float64)).prefopt_targets
    share = float(words.split(" %")[0])
    there = weight_matrices(built("mamba", torch.float64))
    mixers = [m for m in there if m.kind == "mixer"]
    left = sum(m.numel for m in mixers if m.module.endswith(("out_proj", "dt_proj")))
    assert share == pytest.approx(100 * (1 - left / sum(m.numel for m in mixers)), abs=0.1)


def test_dropout_is_on_the_layers_that_can_have_it() -> None:
    policy = adapted(built("gpt_oss", torch.float64), dropout=0.25)
    rates = {type(m).__name__: m.lora_dropout["default"] for m in policy.modules() if hasattr(m, "lora_dropout")}
    assert rates["Linear"].p == 0.25
    assert isinstance(rates["ParamWrapper"], torch.nn.Identity)
    assert "no dropout on fused weights" in policy.prefopt_targets


def test_of_quantised_layers_that_are_not_linear_the_names_are_for_peft_to_find() -> None:
    model = built("llama", torch.float32)
    model.model.layers[0].register_buffer("qweight", torch.zeros(1))
    found = lora_targets(model, ["attention_that_is_packed"])
    assert (found.modules, found.parameters) == (["attention_that_is_packed"], None)
