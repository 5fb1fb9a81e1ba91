"""Quantised bases under adapters: values and gradients are those of the dequantised weights, and packing, casts and
processors change nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from model.architectures import build
from model.oracle import gradients, groups_of_every_kind, oracle_logprobs
from prefopt.errors import ConfigError, ModelError
from prefopt.model import quantised
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import weights_in
from prefopt.model.check import check_scoring
from prefopt.model.flops import FlopCount
from prefopt.model.load import load_config, load_model
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.quantised import bytes_held, check_packed, check_quantisable, dequantise, dequantised
from prefopt.model.save import save_weights
from prefopt.model.scorer import Scorer
from prefopt.model.supported import refuse_untrainable
from prefopt.reference.identity import identity_of_folder

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    quantised.installed_version("bitsandbytes") is None,
    reason='bitsandbytes is missing: pip install "prefopt[quantise]"',
)
FAMILIES = ["llama", "gpt2", "qwen3_moe", "mamba"]


def saved(place: Path, name: str = "llama", **changes: Any) -> str:
    build(name, torch.float32, **changes).save_pretrained(place)
    return str(place)


def loaded(folder: str, how: str | None, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype=dtype, device=CPU, quantise=how)


def adapted(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """With an adapter that does something, its weights not of one size."""
    model.requires_grad_(False)
    torch.manual_seed(5)
    wrapped: Any = new_lora(model, rank=3, alpha=6, dropout=0.0, targets=None)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    MasterWeights(wrapped, dtype)
    return wrapped


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_are_those_of_the_dequantised_weights(name: str, how: str, tmp_path: Path) -> None:
    folder, groups = saved(tmp_path, name), groups_of_every_kind()
    packed, plain = adapted(loaded(folder, how)), loaded(folder, how)
    before = copy.deepcopy(plain).state_dict()
    dequantise(plain, torch.float32)
    plain = adapted(plain)
    assert any(key.endswith(("absmax", "SCB")) for key in before)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    scorers = [Scorer(model, share=name != "mamba") for model in (packed, plain)]
    logp = [scorer(pack(groups, scorer.layout)) for scorer in scorers]
    assert FlopCount.of(packed) == FlopCount.of(plain)
    grads = [gradients(logp_M, scorer.model) for logp_M, scorer in zip(logp, scorers, strict=True)]
    torch.testing.assert_close(logp[0], logp[1], rtol=1e-4, atol=1e-4)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 3
    for weight, grad in grads[0].items():
        assert float((grad - grads[1][weight]).norm()) < 1e-4 * float(grads[1][weight].norm()) + 1e-5, weight
    scorers[0].detach_hook()
    with torch.no_grad():  # by the class's own forward, one sequence per call
        torch.testing.assert_close(logp[0].detach(), oracle_logprobs(packed, groups), rtol=1e-4, atol=1e-4)
    # And it is quantised: far from the weights in the file.
    file = adapted(loaded(folder, None))
    with torch.no_grad():
        assert float((oracle_logprobs(file, groups[:2]) - oracle_logprobs(packed, groups[:2])).abs().max()) > 1e-3


@needs_bitsandbytes
def test_what_no_adapter_can_be_on_is_not_quantised(tmp_path: Path) -> None:
    moe, recurrent = loaded(saved(tmp_path / "moe", "qwen3_moe"), "nf4"), loaded(saved(tmp_path / "m", "mamba"), "nf4")
    packed = {n for n, m in moe.named_modules() if quantised.is_packed(m)}
    assert packed == {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qkvo"}
    # Mamba reads these weights without calling the layers: packed numbers would be taken for weights.
    packed = {n.rpartition(".")[2] for n, m in recurrent.named_modules() if quantised.is_packed(m)}
    assert packed and not packed & {"dt_proj", "out_proj", "conv1d", "lm_head"}


@needs_bitsandbytes
def test_bytes_are_a_quarter_and_weights_are_counted_as_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, hidden_size=256, intermediate_size=512)
    for how, bits in (("nf4", 4.2), ("int8", 8.2)):  # 8 bits and a little for 64 weights; 32 bits for an output
        layer = loaded(folder, how, torch.bfloat16).model.layers[0].mlp.up_proj
        assert weights_in(layer.weight) == 256 * 512
        assert 8 * bytes_held(layer) < bits * 256 * 512 + 8 * 1200  # 16 numbers of the code, and a description
        assert dequantised(layer).shape == (512, 256)


@needs_bitsandbytes
def test_8_bit_layers_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path) -> None:
    """bitsandbytes' own layers round inputs to 8 bits, and take out every column where an input is large."""
    layer = loaded(saved(tmp_path), "int8").model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    x[1, 2, 5] = 50.0
    alone, together = layer(x[:1]), layer(x)[:1]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, x[:1] @ dequantised(layer).T, rtol=1e-5, atol=1e-5)
    theirs = type(layer).__mro__[1].forward(layer, x)[:1]
    assert float((theirs - alone).abs().max()) > 1e-3


def test_the_gradient_of_an_8_bit_product() -> None:
    """In float64, so that rounding hides nothing: this part needs no library."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (5, 7), dtype=torch.int8, generator=random)
    scale = torch.rand(5, dtype=torch.float64, generator=random)
    x = torch.randn(2, 3, 7, dtype=torch.float64, generator=random, requires_grad=True)
    product = quantised._Int8Product.apply
    assert torch.equal(product(x, weight, scale), x @ weight.double().T * scale)
    assert torch.autograd.gradcheck(lambda y: product(y, weight, scale), (x,))


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_gradient_that_is_lost_is_found_at_load(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(saved(tmp_path, hidden_size=512), how, torch.bfloat16)
    check_packed(model, torch.bfloat16)
    layers = [m for m in model.modules() if quantised.is_packed(m)]
    if how == "nf4":  # it would repack itself for a kernel without a backward pass, where the processor has bfloat16
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    forward = type(layers[0]).forward
    for broken in (lambda y: y.detach(), lambda y: y + (y - y.detach())):  # no gradient; twice the gradient
        monkeypatch.setattr(type(layers[0]), "forward", lambda self, x, broken=broken: broken(forward(self, x)))
        with pytest.raises(ModelError, match=r"q_proj \(\w+\): the gradient through its packed weights is wrong"):
            check_scoring(Scorer(model), groups_of_every_kind()[:3])


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["nf4", "nf4 as bfloat16", "int8"])
def test_a_checkpoint_that_is_quantised_already(how: str, tmp_path: Path) -> None:
    """Also with its 4 bits stored as another type, for FSDP: a cast of the packed numbers would be another model."""
    fields: dict[str, Any] = {**quantised.SETTINGS[how.split()[0]]}
    if how == "nf4 as bfloat16":
        fields["bnb_4bit_quant_storage"] = torch.bfloat16
    source = saved(tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**fields), dtype=torch.float32, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path / "packed")
    folder = str(tmp_path / "packed")
    model = loaded(folder, None)
    layer = model.model.layers[0].mlp.up_proj
    weight = dequantised(layer)
    torch.testing.assert_close(weight, dequantised(theirs.model.layers[0].mlp.up_proj), rtol=0, atol=0)
    MasterWeights(model.requires_grad_(False), torch.float32)
    assert torch.equal(dequantised(layer), weight)
    refuse_untrainable("MODEL", load_config(folder), adapter=True)
    with pytest.raises(ModelError, match="its weights cannot train: add --lora, or give the model"):
        refuse_untrainable("MODEL", load_config(folder))
    with pytest.raises(ConfigError, match=r"is quantised already \(bitsandbytes, .*leave --quantise out"):
        loaded(folder, "nf4")
    check_scoring(Scorer(adapted(model)), groups_of_every_kind()[:3])
    larger = json.loads((tmp_path / "packed/config.json").read_text()) | {"intermediate_size": 2_000_000}
    (tmp_path / "packed/config.json").write_text(json.dumps(larger))
    with pytest.raises(ModelError, match=r"the weights hold .* they do not belong together"):
        loaded(folder, None)


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed, its scales, and dequantised: blocks with a scale each, as DeepSeek gives its models."""
    rows, columns = (n // 16 for n in weight.shape)
    blocks = weight.reshape(rows, 16, columns, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return packed.reshape(weight.shape), scale, (packed.float() * scale[:, None, :, None]).reshape(weight.shape)


def whole_numbers(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of 8 bits with a scale for each output, as llm-compressor writes them."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    packed = (weight / scale).round().to(torch.int8)
    return packed, scale, packed.float() * scale


EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": EIGHT_BITS}},
}


@pytest.mark.parametrize(
    ("fields", "pack", "scales"),
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8, "weight_scale_inv"),
        (COMPRESSED, whole_numbers, "weight_scale"),
    ],
)
def test_what_has_no_backward_pass_is_unquantised_as_it_is_loaded(
    fields: dict[str, Any], pack: Any, scales: str, tmp_path: Path
) -> None:
    if fields is COMPRESSED:
        pytest.importorskip("compressed_tensors")
    folder = saved(tmp_path, hidden_size=32, intermediate_size=64)
    weights = load_file(tmp_path / "model.safetensors")
    expected = dict(weights)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        weights[name], weights[name.replace("weight", scales)], expected[name] = pack(weights[name])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))
    refuse_untrainable("MODEL", load_config(folder))
    model = loaded(folder, None)
    assert not quantised.is_quantised(model) and all(p.requires_grad for p in model.parameters())
    state = dict(model.state_dict())
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    save_weights(tmp_path / "out", model, state, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of a model are not those of the same model in fewer bits, nor by another version of the library."""
    folder = saved(tmp_path)
    plain = identity_of_folder(folder)
    assert plain == identity_of_folder(folder, quantise="none")
    found = set()
    for version in ("0.50.2", "0.51.0"):
        monkeypatch.setattr(quantised, "installed_version", lambda name, version=version: version)
        found |= {identity_of_folder(folder, quantise=how).digest for how in ("nf4", "int8")}
    assert len(found) == 4 and plain.digest not in found


@pytest.mark.parametrize(
    ("device", "dtype", "version", "said"),
    [
        ("mps", torch.float32, "0.50", "--quantise nf4: bitsandbytes has no mps; take --device cuda or cpu"),
        ("cpu", torch.float64, "0.50", "--quantise nf4 computes in float32 or bfloat16: leave --dtype float64 out"),
        ("cpu", torch.float32, None, "--quantise nf4: bitsandbytes is not installed: pip install .*; --quantise none"),
        (
            "cpu",
            torch.float32,
            "0.49.0",
            "bitsandbytes is installed as 0.49.0, and must be 0.50.2 or newer: pip install",
        ),
    ],
)
def test_what_cannot_be_quantised_is_one_line(
    device: str, dtype: torch.dtype, version: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "installed_version", lambda name: version)
    config = load_config(saved(tmp_path))
    check_quantisable("none", config, "MODEL", torch.device(device), dtype)
    with pytest.raises(ConfigError, match=said):
        check_quantisable("nf4", config, "MODEL", torch.device(device), dtype)
