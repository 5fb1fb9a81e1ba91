"""Folders of strangers: what they name is not opened, what they ask for is not built, and one line says so."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.small import small_tokenizer
from model.architectures import build
from prefopt.core.model_folder import vet_folder
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ModelError
from prefopt.model.adapter import add_adapter, new_lora
from prefopt.model.kernels.head_class import head_of
from prefopt.model.load import load_config, load_model, local_folder, new_model
from prefopt.model.save import copy_side_files, end_tokens
from prefopt.model.scorer import Scorer
from prefopt.model.supported import safe_attention
from prefopt.reference.identity import identity_of_folder

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


class Bomb:
    """What a pickle can do when it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PREFOPT_BOMB"],)


def change(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path, name: str) -> None:
    """The weights by way of an index, in which one is said to lie in a file of this name."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    where[sorted(weights)[0]] = name
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(ask: Callable[[], object]) -> str:
    """The one line, which comes at once."""
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        ask()
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    return str(caught.value)


def load(folder: Path, **options: Any) -> torch.nn.Module:
    return load_model(str(folder), dtype=torch.float32, device=CPU, **options)


@pytest.mark.parametrize(
    "name",
    [
        "evil.bin",
        "../evil.safetensors",
        "/tmp/evil.safetensors",
        "sub/evil.safetensors",
        "..",
        "evil.pt",
        "a\\b.safetensors",
    ],
)
def test_an_index_names_weight_files_of_its_folder(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_BOMB", str(tmp_path / "ran"))
    target = Path(os.path.normpath(folder / name))
    if name != ".." and tmp_path in target.parents:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(pickle.dumps(Bomb()))
    shard(folder, name)
    for ask in (load, load_config, local_folder, identity_of_folder, load_tokenizer):
        (folder / "tokenizer.json").write_text("{}")
        line = refused(lambda ask=ask: ask(folder))  # type: ignore[misc]
        assert "model.safetensors.index.json" in line and "weights must be *.safetensors files in the folder" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../evil.safetensors", "evil.bin", "/evil", 7, ["x"]])
def test_a_configuration_names_weight_files_of_its_folder(name: Any, folder: Path) -> None:
    change(folder, transformers_weights=name)
    assert "transformers_weights" in refused(lambda: load(folder))


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """In the Hub's cache every file is a link to one that is named by its contents."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard(folder, "model-00001-of-00002.safetensors")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    assert load(folder) is not None


def test_a_weight_file_that_is_a_pipe_is_not_waited_for(folder: Path) -> None:
    shard(folder, "pipe.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    assert "is no file" in refused(lambda: load(folder))


@pytest.mark.parametrize(
    "asked", ["org/kernel", "org/kernel@v1:f", "flash_attention_2", "flash_attention_3", {"": "o/k"}]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_is_never_fetched(asked: Any, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel would be fetched")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetched)
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    change(folder, **{key: asked})
    assert safe_attention(str(folder)) == {"attn_implementation": "eager"}
    model: Any = load(folder)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_attention_heads": 10**10}, "num_attention_heads is"),
        ({"hidden_size": 10**12}, ""),
        ({"vocab_size": 10**12}, "config.json wants"),
        ({"intermediate_size": 10**8}, "config.json wants"),
        ({"head_dim": 10**8}, "config.json wants"),
        ({"hidden_act": "no_such"}, "hidden_act 'no_such'; transformers"),
        ({"rope_parameters": {"rope_type": "no_such", "rope_theta": 1e4}}, "no_such"),
        ({"rope_scaling": {"rope_type": "no_such"}}, "no_such"),
        ({"rope_parameters": 5}, ""),
        ({"hidden_size": "wide"}, ""),
        ({"layer_types": ["no_such"] * 3}, ""),
        ({"architectures": 5}, None),
        ({"model_type": ["llama"]}, ""),
        ({"dtype": "no_such"}, ""),
        ({"quantization_config": {"quant_method": "no_such"}}, None),
        ({"quantization_config": {"quant_method": "mxfp4"}, "vocab_size": 10**10}, "config.json wants"),
        ({"num_nextn_predict_layers": "two"}, None),
    ],
)
def test_a_configuration_that_fits_no_weights(changes: dict[str, Any], said: str | None, folder: Path) -> None:
    change(folder, **changes)
    if said is None:  # it is read or refused; either way nothing else is raised
        try:
            load(folder)
        except ModelError as error:
            assert "\n" not in str(error)
        return
    assert said in refused(lambda: load(folder)), refused(lambda: load(folder))


@pytest.mark.parametrize("junk", ["damaged", "boasting"])
def test_files_that_are_not_loaded_say_nothing_of_the_size(junk: str, folder: Path) -> None:
    change(folder, vocab_size=10**10)
    header = b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4) if junk == "boasting" else b"xx"
    (folder / "other.safetensors").write_bytes(data)
    assert "config.json wants" in refused(lambda: load(folder))


def test_what_a_link_leads_to_is_not_copied_on(folder: Path, tmp_path: Path) -> None:
    """But for links of the Hub's cache, and links to a file of the same name."""
    secret, blob = tmp_path / "id_rsa", tmp_path / f"{7:064x}"
    for path in (secret, blob, tmp_path / "NOTICE"):
        path.write_text("text")
    for name, target in (("LICENSE", secret), ("LICENSE.txt", blob), ("NOTICE", tmp_path / "NOTICE")):
        (folder / name).symlink_to(target)
    (folder / "preprocessor_config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    copy_side_files(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"LICENSE.txt", "NOTICE", "preprocessor_config.json"}


def test_a_configuration_without_weights_is_bounded_by_the_memory(tmp_path: Path) -> None:
    build("llama", torch.float32).config.save_pretrained(tmp_path)
    tokenizer = small_tokenizer()
    assert new_model(str(tmp_path), tokenizer, seed=0, fitted=True) is not None
    change(tmp_path, num_hidden_layers=10**9)
    assert "num_hidden_layers is" in refused(lambda: new_model(str(tmp_path), tokenizer, seed=0, fitted=True))
    change(tmp_path, num_hidden_layers=2, intermediate_size=10**12)
    assert "are free" in refused(lambda: new_model(str(tmp_path), tokenizer, seed=0, fitted=True))


def test_a_configuration_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)
    assert "config.json" in refused(lambda: load(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**9}, "r is 1,000,000,000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "q_proj is"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication is"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"peft_type": "XLORA", "hidden_size": 32, "adapters": {"0": "org/other"}}, "adapters names code or weights"),
        ({"peft_type": "SHADOW", "shadow_model": "org/other"}, "shadow_model names code or weights"),
        ({"trainable_token_indices": [10**9]}, "trains token 1,000,000,000"),
        ({"peft_type": "NO_SUCH"}, ""),
        ({"peft_type": 5}, ""),
        ({"target_modules": 7}, ""),
    ],
)
def test_an_adapter_of_a_stranger(changes: dict[str, Any], said: str, folder: Path, tmp_path: Path) -> None:
    made: Any = new_lora(load(folder), rank=2, alpha=4, dropout=0.0, targets=None)
    made.save_pretrained(tmp_path / "adapter")
    assert add_adapter(load(folder), str(tmp_path / "adapter")) is not None
    change(tmp_path / "adapter", "adapter_config.json", **changes)
    assert said in refused(lambda: add_adapter(load(folder), str(tmp_path / "adapter")))


@pytest.mark.parametrize("said", ['{"eos_token_id": {"a": 1}}', '{"eos_token_id": [null]}', "[" * 100_000, "7", ""])
def test_end_tokens_of_a_stranger(said: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(said)
    assert not end_tokens(tmp_path)


@pytest.mark.parametrize("cap", ["wide", [30.0]])
def test_a_soft_cap_of_a_stranger(cap: Any, folder: Path) -> None:
    change(folder, final_logit_softcapping=cap)
    model: Any = load(folder)
    assert head_of(model).softcap is None


def test_what_layers_cannot_compute_with_is_one_line(folder: Path) -> None:
    change(folder, sliding_window="wide")
    assert "cannot compute two tokens" in refused(lambda: Scorer(load(folder)))


def test_bounds_do_not_bite_real_sizes(tmp_path: Path) -> None:
    """Many layers and experts in small, and one matrix that is a model's whole width."""
    for name, changes in {"llama": {"num_hidden_layers": 40}, "qwen3_moe": {"num_experts": 64}}.items():
        config = build(name, torch.float32).config
        for key, value in changes.items():
            setattr(config, key, value)
        if name == "llama":
            config.layer_types = None
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        vet_folder(tmp_path / name)
        assert load(tmp_path / name) is not None
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "llama" / "other.safetensors")
    vet_folder(tmp_path / "llama")
