"""Quantised checkpoints are told from config.json: refused for full training, and never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.architectures import build
from prefopt.core.plugins import installed_version
from prefopt.errors import ModelError
from prefopt.model.load import load_config, load_model
from prefopt.model.save import save_weights
from prefopt.model.supported import ADAPTED, PACKAGES, UNPACKED, refuse_untrainable

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    "bitsandbytes without a name": ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
    "quark": ({"quant_method": "quark"}, "quark"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    "eetq": ({"quant_method": "eetq"}, "eetq"),
    "aqlm": ({"quant_method": "aqlm"}, "aqlm"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
    "unheard of": ({"quant_method": "unheard-of", "bits": 2}, "unheard-of, 2 bits"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama", torch.float32).save_pretrained(folder)
    return folder


def quantised(plain: Path, at: Path, fields: dict[str, Any]) -> str:
    at.mkdir()
    for file in plain.iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    return str(at)


@pytest.mark.parametrize("method", METHODS)
def test_one_line_for_who_trains(plain: Path, tmp_path: Path, method: str) -> None:
    fields, words = METHODS[method]
    folder = quantised(plain, tmp_path / "quantised", fields)
    remedy = "give the model it was quantised from"
    adapted = method.split()[0] in ADAPTED
    with pytest.raises(ModelError) as trained:
        refuse_untrainable("MODEL", load_config(folder))
    what = "its weights cannot train: add --lora, or" if adapted else "PEFT has no adapters for that;"
    assert str(trained.value) == f"MODEL is quantised ({words}); {what} {remedy}"
    if not adapted:
        with pytest.raises(ModelError, match="PEFT has no adapters for that"):
            refuse_untrainable("MODEL", load_config(folder), adapter=True)
    elif method.split()[0] not in UNPACKED:
        refuse_untrainable("MODEL", load_config(folder), adapter=True)
        with pytest.raises(ModelError, match=r"reward model is saved with its adapter merged, .* it was"):
            refuse_untrainable("MODEL", load_config(folder), adapter=True, merged=True)
    else:
        refuse_untrainable("MODEL", load_config(folder), adapter=True, merged=True)


@pytest.mark.parametrize("method", [*METHODS, "compressed-tensors"])
def test_one_line_where_its_library_is_missing(plain: Path, tmp_path: Path, method: str) -> None:
    fields = METHODS[method][0] if method in METHODS else {"quant_method": method, "config_groups": {}}
    if any(map(installed_version, PACKAGES.get(fields.get("quant_method", "bitsandbytes"), "").split())):
        pytest.skip(f"a library for {method} is installed here")
    folder = quantised(plain, tmp_path / "quantised", fields)
    with pytest.raises(ModelError) as loaded:
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    line = str(loaded.value)
    assert line.startswith(f"{folder} is quantised ")
    assert line.endswith("give the model it was quantised from")
    assert "\n" not in line


def test_the_package_that_is_missing_is_named(plain: Path, tmp_path: Path) -> None:
    from transformers.utils import is_gptqmodel_available

    if is_gptqmodel_available():
        pytest.skip("gptqmodel is installed here")
    folder = quantised(plain, tmp_path / "awq", METHODS["awq"][0])
    with pytest.raises(ModelError, match="not installed: pip install gptqmodel, or give"):
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_an_unknown_method_is_not_skipped(plain: Path, tmp_path: Path) -> None:
    folder = quantised(plain, tmp_path / "odd", METHODS["unheard of"][0])
    with pytest.raises(ModelError, match="unheard-of"):
        load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_packed_experts_of_gpt_oss_are_unquantised(tmp_path: Path) -> None:
    """As OpenAI gives gpt-oss: blocks of 4 bits and their exponents instead of the experts' matrices."""
    from safetensors.torch import load_file, save_file

    model = build("gpt_oss", torch.float32, hidden_size=32, intermediate_size=32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [n for n in weights if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = weights.pop(name).transpose(1, 2).shape
        weights[f"{name}_blocks"] = torch.full((experts, rows, columns // 32, 16), 0x2A, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 126, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse_untrainable("MODEL", load_config(str(tmp_path)))
    loaded: Any = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    experts = loaded.model.layers[0].mlp.experts.gate_up_proj
    # 0xA is -1.0 and 0x2 is 1.0 of the 4-bit numbers; an exponent of 126 halves them.
    assert set(experts.detach().flatten().tolist()) == {-0.5, 0.5}
    assert experts.requires_grad

    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(0.25)
    save_weights(tmp_path / "out", loaded, dict(loaded.state_dict()), torch.float32)
    assert not any(name.endswith(("_blocks", "_scales")) for name in load_file(tmp_path / "out" / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in loaded.state_dict().items())
