"""The identity changes with whatever changes a log-probability, and with nothing that cannot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.architectures import build
from prefopt.core import cache_folder
from prefopt.core.cache_folder import file_hashes
from prefopt.errors import ModelError
from prefopt.model import scorer as scorer_module
from prefopt.model.scorer import Scorer
from prefopt.reference.cache import Identity
from prefopt.reference.identity import identity_of_folder, identity_of_model, space_of

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "transformers_version": "5.0.0",
    "dtype": "float32",
    "eos_token_id": 2,
    "text_config": {"hidden_size": 8, "use_cache": True},
}
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": False, "lora_dropout": 0.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder in two shards."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    for n in (1, 2):
        tensors = {f"layer.{n}": rng.normal(size=(4, 4)).astype(np.float32)}
        safetensors.numpy.save_file(tensors, path / f"model-{n}.safetensors")
    index = {"weight_map": {"layer.2": "model-2.safetensors", "layer.1": "model-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    safetensors.numpy.save_file({"lora_A": np.ones((2, 4), np.float32)}, path / "adapter_model.safetensors")
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path, position: int) -> None:
    """Change one bit in place: same path, inode and size."""
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        bit = file.read(1)[0] ^ 1
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        file.write(bytes([bit]))


def let_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that files come to rest at once, so that their hashes are remembered."""
    monkeypatch.setattr(cache_folder, "RACY_SECONDS", -1.0)


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []
    real = cache_folder._hash
    monkeypatch.setattr(cache_folder, "_hash", lambda path, error: (hashed.append(path), real(path, error))[1])
    return hashed


def test_irrelevant_changes_keep_the_identity(folder: Path, adapter: Path, root: Path, tmp_path: Path) -> None:
    before = identity_of_folder(folder, adapter=adapter, root=root)
    edit(
        folder / "config.json",
        transformers_version="6.1",
        dtype="bfloat16",
        eos_token_id=[2, 7],
        text_config={"use_cache": False, "hidden_size": 8},
    )
    index = {"weight_map": {"layer.1": "model-1.safetensors", "layer.2": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(adapter / "adapter_config.json", lora_dropout=0.1, target_modules=["v_proj", "q_proj"])
    (folder / "tokenizer.json").write_text("{}")
    (folder / "unused.safetensors").write_bytes(b"not named in the index")
    elsewhere = shutil.copytree(folder, tmp_path / "renamed")
    after = identity_of_folder(elsewhere, adapter=adapter, root=root)
    assert after == before and after.digest == before.digest
    assert after.name != before.name


def test_every_relevant_change_gives_another_identity(folder: Path, adapter: Path, root: Path) -> None:
    def identity(**options: Any) -> Identity:
        return identity_of_folder(folder, root=root, **options)

    seen = {identity().digest}

    def is_new(**options: Any) -> None:
        digest = identity(**options).digest
        assert digest not in seen
        seen.add(digest)

    flip(folder / "model-2.safetensors", -1)
    is_new()
    flip(folder / "model-1.safetensors", -64)
    is_new()
    edit(folder / "config.json", rope_parameters={"rope_theta": 10000.5, "rope_type": "default"})
    is_new()
    edit(folder / "config.json", text_config={"hidden_size": 9})
    is_new()
    edit(folder / "config.json", a_key_nobody_has_heard_of=1)
    is_new()
    edit(folder / "config.json", architectures=["OtherForCausalLM"])
    is_new()
    edit(folder / "config.json", quantization_config={"bits": 4})
    is_new()
    is_new(adapter=adapter)
    edit(adapter / "adapter_config.json", lora_alpha=32)
    is_new(adapter=adapter)
    edit(adapter / "adapter_config.json", rank_pattern={"q_proj": 4})
    is_new(adapter=adapter)
    edit(adapter / "adapter_config.json", target_modules=["q_proj"])
    is_new(adapter=adapter)
    flip(adapter / "adapter_model.safetensors", -1)
    is_new(adapter=adapter)


def test_hashes_are_remembered_until_the_file_changes_even_under_the_same_times(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    hashed = count_hashing(monkeypatch)
    first = identity_of_folder(folder, root=root)
    assert len(hashed) == 2
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert identity_of_folder(link, root=root) == first and len(hashed) == 2

    shard = folder / "model-1.safetensors"
    stat = shard.stat()
    time.sleep(0.02)  # one tick of the file system's clock
    flip(shard, -1)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (shard.stat().st_ino, shard.stat().st_size, shard.stat().st_mtime_ns) == (
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
    )
    second = identity_of_folder(folder, root=root)
    assert second != first and hashed[2:] == [shard.resolve()]

    (root / "hashes.json").write_bytes(b'{"files": {"' + bytes(9))
    assert identity_of_folder(folder, root=root) == second


def test_a_file_just_written_is_hashed_again(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = count_hashing(monkeypatch)
    shard = folder / "model-1.safetensors"
    file_hashes([shard], root)
    file_hashes([shard], root)
    assert hashed == [shard.resolve()] * 2, "a fresh file must not be remembered: it may change within its clock's tick"
    # the clock of the file cannot be moved, so move the one it is compared with
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + int(60e9))
    file_hashes([shard], root)
    file_hashes([shard], root)
    assert len(hashed) == 3


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rest(monkeypatch)
    shard = folder / "model-1.safetensors"
    real = cache_folder.hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        digest = real(file, name)
        time.sleep(0.02)
        flip(shard, -1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(cache_folder.hashlib, "file_digest", slow)
        old = file_hashes([shard], root)
    assert file_hashes([shard], root) != old


def test_many_writers_lose_nothing(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_rest(monkeypatch)
    files = [tmp_path / f"{n}.safetensors" for n in range(12)]
    for n, file in enumerate(files):
        file.write_bytes(bytes([n]))
    threads = [threading.Thread(target=file_hashes, args=([file], root)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((root / "hashes.json").read_text())["files"]) == len(files)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "model-2.safetensors missing"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").rename(f / "pytorch_model.bin"), "pickle"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "is an adapter"),
        (shutil.rmtree, "no such model folder"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_in_one_line(folder: Path, root: Path, spoil: Any, says: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=says) as caught:
        identity_of_folder(folder, root=root)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_models_in_memory() -> None:
    def model(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **(sizes | changes)))

    base = identity_of_model(model())
    assert identity_of_model(model(use_cache=False)) == base
    assert identity_of_model(model(rms_norm_eps=1e-5)) != base
    assert identity_of_model(model().to(torch.bfloat16)) != base
    changed = model()
    with torch.no_grad():
        changed.model.norm.weight.view(torch.int32)[3] ^= 1
    assert identity_of_model(changed) != base
    with torch.device("meta"), pytest.raises(ModelError, match="no data"):
        identity_of_model(model())


WHOSE = Identity("weights", "config")


def test_values_of_float32_on_a_cpu_are_found_where_they_were() -> None:
    space = space_of(WHOSE, Scorer(build("llama", torch.float32)), torch.device("cpu"))
    parts = [WHOSE.digest, "float32", "shared", "flash-cpu", "cpu", 1]
    assert space.id == hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def test_narrow_types_have_a_version_of_their_own() -> None:
    space = space_of(WHOSE, Scorer(build("llama", torch.bfloat16)), torch.device("cpu"))
    assert (space.dtype, space.scorer_version) == ("bfloat16", 2)


def test_on_cuda_the_gpu_and_the_kernel_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, device = Scorer(build("llama", torch.float32)), torch.device("cuda")
    monkeypatch.setattr(scorer_module, "kernel_for", lambda *_: "varlen")
    ids = set()
    for gpu in ("NVIDIA H100", "NVIDIA A100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, gpu=gpu: gpu)
        for flash in (None, "FA3"):
            monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda flash=flash: flash)
            ids.add(space_of(WHOSE, scorer, device).id)
    assert len(ids) == 4
