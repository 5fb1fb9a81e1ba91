"""Model folders, good and bad."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub import Hub, prefopt
from model.architectures import build
from model.oracle import groups_of_every_kind, oracle_logprobs
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import vocabulary_size
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.precision import disable_dropout, resolve_device, resolve_dtype
from prefopt.model.scorer import Scorer
from train.small import pairs, write_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def message(name: Path | str, **options: str) -> str:
    """The one line that a person gets."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name), dtype=torch.float32, device=CPU, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert str(name) in line or options
    return line


def test_a_saved_model_comes_back(saved: Path) -> None:
    groups = groups_of_every_kind()[:3]
    model = load_model(str(saved), dtype=torch.float32, device=CPU)
    scorer = Scorer(model)
    with torch.no_grad():
        found = scorer(pack(groups, scorer.layout))
        torch.testing.assert_close(found, oracle_logprobs(build("llama", torch.float32), groups), rtol=1e-5, atol=1e-5)
    assert vocabulary_size(model) == 97


def test_mixtures_of_experts_load_in_float64(tmp_path: Path) -> None:
    build("qwen3_moe", torch.float32).save_pretrained(tmp_path)
    scorer = Scorer(load_model(str(tmp_path), dtype=torch.float64, device=CPU))
    assert scorer(pack(groups_of_every_kind()[:2], scorer.layout)).dtype == torch.float64


def test_missing_folder(tmp_path: Path) -> None:
    assert message(tmp_path / "nothing").endswith("no such folder")
    assert "no such folder here, and the Hub cannot be asked (HF_HUB_OFFLINE is set)" in message("nobody/nothing")


def test_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in message(folder)


def test_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json" in message(folder)


def test_configuration_of_no_known_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in message(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no .safetensors file in this folder; the weights are missing" in message(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "convert its .bin files" in message(folder)


@pytest.mark.parametrize("size", [0, 4, 200, 20_000])
def test_truncated_weights(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    assert file.stat().st_size > size
    with file.open("r+b") as f:
        f.truncate(size)
    assert "damaged" in message(folder)


def test_weights_that_are_not_all_there(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = message(folder)
    assert "2 weights are missing" in line
    assert "model.layers.1.mlp.up_proj.weight" in line


def test_weights_of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight is [7], config.json wants [32]" in message(folder)


def test_code_of_its_own_is_not_run(folder: Path) -> None:
    mark = folder / "ran"
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"llama"', '"foreign"').replace("{", '{"auto_map": {"AutoConfig": "code.Config"},', 1)
    )
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')")
    assert "code" in message(folder)
    assert not mark.exists()


def test_adapters_come_back_trainable_and_without_dropout(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = new_lora(
        load_model(str(saved), dtype=torch.float32, device=CPU), rank=2, alpha=4, dropout=0.5, targets=None
    )
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    policy.save_pretrained(tmp_path)
    back = load_model(str(saved), dtype=torch.float32, device=CPU, adapter=str(tmp_path))
    assert [n for n, p in back.named_parameters() if p.requires_grad]
    policy.eval()
    back.train()
    groups = groups_of_every_kind()[:3]
    with torch.no_grad():
        scorer = Scorer(back)
        found = scorer(pack(groups, scorer.layout))
        torch.testing.assert_close(found, oracle_logprobs(policy, groups), rtol=1e-5, atol=1e-5)


def test_folder_that_holds_no_adapter(saved: Path, tmp_path: Path) -> None:
    assert "no adapter_config.json" in message(saved, adapter=str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_is_silenced_in_a_model_that_was_built_with_it(name: str) -> None:
    rates = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": ("attention_dropout",)}[name]
    model = build(name, silent=False, **dict.fromkeys(rates, 0.3))
    groups = groups_of_every_kind()[:2]
    model.train()
    with torch.no_grad():
        assert not torch.equal(oracle_logprobs(model, groups), oracle_logprobs(model, groups))
        disable_dropout(model)
        scorer = Scorer(model)
        batch = pack(groups, scorer.layout)
        assert torch.equal(scorer(batch), scorer(batch))


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda"):
            resolve_device("cuda")
    with pytest.raises(ConfigError, match="--device nonsense"):
        resolve_device("nonsense")
    assert resolve_dtype("float64", CPU) == torch.float64
    for variable, taken in [("bfloat16", torch.bfloat16), ("float32", torch.float32)]:
        monkeypatch.setenv("PREFOPT_DTYPE", variable)
        assert resolve_dtype("auto", CPU) == taken and resolve_dtype("float64", CPU) == torch.float64
    monkeypatch.setenv("PREFOPT_DTYPE", "bf16")
    with pytest.raises(ConfigError, match="PREFOPT_DTYPE is 'bf16'"):
        resolve_dtype("auto", CPU)
    monkeypatch.delenv("PREFOPT_DTYPE")
    for native, taken in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert resolve_dtype("auto", CPU) == taken


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()], ids=repr
)
def test_a_model_that_is_too_large_names_the_remedy(
    error: Exception, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    assert message(saved).endswith(": does not fit into the memory; give --quantise nf4 or a smaller model")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/gated", "org/gated: is gated: ask for access at https://huggingface.co/org/gated, then log in with: hf"),
        ("org/none", "org/none: no such folder here, and none on the Hub; check the spelling"),
    ],
)
def test_what_is_gated_or_missing_names_the_remedy(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.jsonl", pairs(2))
    with Hub(gated={"org/gated"}).served() as hub:
        done = prefopt(hub, monkeypatch, "dpo", "--model", name, "--data", data, "--output", str(tmp_path / "o"))
    assert done.status == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert hub.asked and not any("harness" in line for line in hub.asked)


def test_without_a_network_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "d.jsonl", pairs(2))
    words = ["dpo", "--model", "org/x", "--data", data, "--output", str(tmp_path / "o")]
    done = prefopt(Hub(url="http://127.0.0.1:9"), monkeypatch, *words, offline=True)
    assert "org/x: no such folder here, and the Hub cannot be asked (HF_HUB_OFFLINE is set)" in done.err
    assert done.err.count("\n") == 1
