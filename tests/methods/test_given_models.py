"""Models given in Python: what names the reference, what is refused, and what is not lost when they cannot be saved."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.model.adapter import add_adapter, new_lora
from prefopt.reference.identity import identity_of_model
from train.small import dpo, metrics, pairs, tiny_llama, write_model

ROWS = pairs(9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(model: Any) -> Any:
    return new_lora(model, rank=2, alpha=2, dropout=0.0, targets=None)


def test_a_reference_named_is_the_folder_and_not_the_object_of_that_name(folder: str, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.name_or_path == folder
    dpo(model, ROWS, tmp_path / "out", tokenizer=tokenizer, reference=folder, max_steps=1)
    assert abs(metrics(tmp_path / "out")[0]["loss"] - math.log(2)) > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "somewhere"}, "adapter is for a model named"),
        ({"reference_adapter": "somewhere", "lora": True}, "give reference"),
        ({"device": "mps"}, "move it with model.to"),
    ],
)
def test_options_that_would_do_nothing_to_an_object(
    options: dict[str, Any], said: str, folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        dpo(load(folder), ROWS, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(folder), **options)


def test_lora_on_an_object_that_has_an_adapter(folder: str, tmp_path: Path) -> None:
    model = adapted(load(folder))
    with pytest.raises(ConfigError, match="lora adds an adapter"):
        dpo(model, ROWS, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(folder), lora=True)


def test_a_generation_config_that_cannot_be_saved_is_mended(folder: str, tmp_path: Path) -> None:
    model = load(folder)
    model.generation_config.temperature = 0.5  # without do_sample: loads, but save_pretrained refuses it
    dpo(model, ROWS, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(folder), max_steps=1)
    saved = load(str(tmp_path / "out"))
    assert saved.generation_config.do_sample is True and saved.generation_config.temperature == 0.5


def test_the_identity_of_an_object_knows_its_active_adapter(folder: str) -> None:
    model = adapted(load(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        model.add_adapter("other", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    first = identity_of_model(model).digest
    model.set_adapter("other")
    assert identity_of_model(model).digest != first
    model.set_adapter("default")
    assert identity_of_model(model).digest == first
    with model.disable_adapter():
        assert identity_of_model(model).digest != first


def test_a_pickled_adapter_is_not_opened(tmp_path: Path) -> None:
    adapted(tiny_llama()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"not to be read")
    with pytest.raises(ModelError, match="pickled weights are not opened"):
        add_adapter(tiny_llama(), str(tmp_path))


def test_a_folder_in_use_by_another_process(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(RunError, match="in use by another process"):
        dpo(Path(folder), ROWS, out, max_steps=1)
    dpo(Path(folder), ROWS, out, max_steps=1)
    assert not (out / ".lock").exists()
    assert not (out / "checkpoints").exists()  # nothing asked for them, and the model is there
