"""Models that are read in shards are those that are loaded whole and then cut, to the bit, and take less memory."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from data.small import small_tokenizer
from parallel.ranks import on_ranks
from parallel.test_failures import _typed, dpo
from parallel.test_runs import FILES, prepared, same, train
from parallel.test_shard import groups
from prefopt.config.dpo import DpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.model.adapter import new_lora
from prefopt.model.checkpoint import StoredTensor
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer
from prefopt.parallel import shard
from prefopt.parallel.tensors import is_sharded, local_of, whole_of
from prefopt.parallel.world import ALONE, World, open_world
from prefopt.reference.blocks import block_files, read_sealed
from prefopt.train.policy import Policy, ScalarPolicy, Trained
from train.small import tiny_llama, write_model, write_rows

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def write_other(folder: Path, kind: str, **changes: Any) -> str:
    torch.manual_seed(0)
    fields = {"vocab_size": len(small_tokenizer()), "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **{**fields, **SHAPE, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def llama(folder: Path) -> str:
    return write_model(folder)


def several_files(folder: Path) -> str:
    tiny_llama().save_pretrained(folder, max_shard_size="20kB")
    small_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return str(folder)


def tied(folder: Path) -> str:
    return write_other(folder, "qwen3", tie_word_embeddings=True)


def tied_twice(folder: Path) -> str:
    """A tied head that the file holds by itself, too."""
    tied(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def soft_capped(folder: Path) -> str:
    return write_other(folder, "gemma2", final_logit_softcapping=7.0)


def experts(folder: Path) -> str:
    """Experts that are fused as they are loaded, and a router that is kept in float32."""
    return write_other(folder, "ernie4_5_moe", **EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=0)


def mixtral(folder: Path) -> str:
    return write_other(folder, "mixtral", **EXPERTS, sliding_window=None)


def adapter(folder: Path, model: str) -> str:
    """An adapter with tokens that its model has not."""
    made = tiny_llama()
    made.resize_token_embeddings(made.config.vocab_size + 3, mean_resizing=False)
    torch.manual_seed(1)
    wrapped: Any = new_lora(made.requires_grad_(False), rank=2, alpha=4, dropout=0.0, targets=None)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    wrapped.peft_config["default"].base_model_name_or_path = model
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    return str(folder)


LORA = {"lora": True, "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0}
CASES: dict[str, tuple[Callable[[Path], str], dict[str, Any]]] = {
    "llama": (llama, {}),
    "several files": (several_files, {}),
    "bfloat16": (llama, {"dtype": "bfloat16"}),
    "tied": (tied, {"gradient_checkpointing": True}),
    "tied twice": (tied_twice, {"dtype": "bfloat16"}),
    "soft-capped": (soft_capped, {}),
    "lora": (llama, LORA),
    "lora on the head": (llama, {**LORA, "lora_targets": ["lm_head", "q_proj"], "dtype": "bfloat16"}),
    "adapter": (llama, {"named": True}),
    "experts": (experts, {"dtype": "bfloat16"}),
    "experts, lora": (experts, LORA),
    "reward": (llama, {"reward": True}),
    "reward of experts": (mixtral, {"reward": True}),
    "reward, lora": (llama, {"reward": True, **LORA}),
}


def policy_of(source: str, options: dict[str, Any], world: World) -> Trained[Any]:
    options = dict(options)
    reward = options.pop("reward", False)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    filled = {"shard": "full", "data": ["none"], "output": "none", "learning_rate": 1e-3, **options}
    given = (source, dtype, torch.device("cpu"), None)
    if reward:
        return ScalarPolicy(RewardConfig(model=source, **filled), *given, small_tokenizer(), world)
    return Policy(DpoConfig(model=source, **filled), *given, world)


def _policies(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a policy is that was read in shards (True), and one that was loaded whole and cut (False)."""
    world = open_world()
    found: dict[str, Any] = {}
    for early in (True, False):
        policy = policy_of(source, options, world if early else ALONE)
        read = policy.sharded
        batch = pack(groups()[world.rank : world.rank + 2], policy.scorer.layout)
        with torch.no_grad():
            before = policy.scorer(batch)
        policy.make_trainable(world)
        policy.scorer.train()
        logp = policy.scorer(batch)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        masters, model = policy.masters, policy.scorer.model
        gradients = {n: whole_of(p.grad).numpy().copy() for n, p in masters.masters.items() if p.grad is not None}
        found[str(early)] = {
            "read": read,
            "line": policy.reading,
            "before": before.numpy(),
            "logp": logp.detach().numpy(),
            "masters": {n: whole_of(w).numpy().copy() for n, w in masters.saved()},
            "frozen": {n: whole_of(p.detach()).float().numpy() for n, p in model.named_parameters()},
            "gradients": gradients,
            "dtypes": {n: str(p.dtype) for n, p in model.named_parameters()},
            "buffers": {n: b.float().numpy().copy() for n, b in model.named_buffers()},
            "head": str(getattr(policy.scorer, "head", None)),
            "generation": str(getattr(model, "generation_config", None)),
            "tied": len(list(model.named_parameters())),
            "whole": [n for n, p in model.named_parameters() if not is_sharded(p)],
        }
    return found


QUICK = ["several files", "tied twice", "lora on the head", "adapter", "experts", "reward, lora"]


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_read_in_shards_is_loaded_whole_and_cut(case: str, tmp_path: Path) -> None:
    write, options = CASES[case]
    options, source = dict(options), write(tmp_path / "base")
    if options.pop("named", False):
        options |= {"adapter": adapter(tmp_path / "adapter", source), "lora": True}
    for both in on_ranks(2, _policies, source, options):
        read, cut = both["True"], both["False"]
        assert read["read"] and not cut["read"]
        assert ("the first process held" in read["line"]) == (write in (experts, mixtral)), read["line"]
        for name in ("dtypes", "head", "generation", "tied", "whole"):
            assert read[name] == cut[name], name
        for name in ("masters", "frozen", "gradients", "buffers"):
            assert read[name].keys() == cut[name].keys() and read[name], name
            for key, wanted in cut[name].items():
                assert np.array_equal(read[name][key], wanted, equal_nan=False), (name, key)
        for name in ("before", "logp"):  # before: without the adapter that is to be trained
            assert np.array_equal(read[name], cut[name]), name
    assert len(both["True"]["gradients"]) >= 2


def _kept(source: str) -> dict[str, tuple[str, bool, Any]]:
    LlamaForCausalLM._keep_in_fp32_modules_strict = {"o_proj"}
    policy = policy_of(source, {"dtype": "bfloat16"}, open_world())
    own = policy.scorer.model.named_parameters()
    return {n: (str(p.dtype), is_sharded(p), local_of(p.detach()).float().numpy()) for n, p in own}


def test_weights_that_a_class_keeps_in_float32_are_read_whole(tmp_path: Path) -> None:
    source = llama(tmp_path / "base")
    wanted = dict(tiny_llama().named_parameters())
    for found in on_ranks(2, _kept, source):
        for name, (dtype, cut, local) in found.items():
            assert dtype == "torch.float32"
            assert cut == ("o_proj" not in name)
            if not cut:
                assert np.array_equal(local, wanted[name].detach().numpy())


MEGABYTES = 2**20


def _peak(source: str, small: str, early: bool) -> tuple[int, int]:
    """Bytes that this process's memory grows by, at most, while a model is loaded and cut; and those of its shards."""
    world = open_world()
    policy_of(small, {}, world if early else ALONE).make_trainable(world)  # imports what loading needs

    def memory(name: str) -> int:
        found = re.search(rf"^{name}:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)
        assert found is not None
        return 1024 * int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    policy = policy_of(source, {}, world if early else ALONE)
    policy.make_trainable(world)
    mine = sum(local_of(p).numel() * p.element_size() for p in policy.scorer.model.parameters())
    return memory("VmHWM") - before, mine


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read in /proc")
def test_no_process_holds_the_whole_model_while_it_is_read(tmp_path: Path) -> None:
    source = write_other(tmp_path / "base", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    held = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert held > 180 * MEGABYTES
    small = llama(tmp_path / "small")
    for peak, mine in on_ranks(2, _peak, source, small, True):
        assert mine < 0.51 * held
        assert peak < 0.65 * held, peak / held
    assert all(peak > 1.2 * held for peak, _ in on_ranks(2, _peak, source, small, False))


def _filled(options: dict[str, Any], model: str, data: str, output: str, cache: str) -> bool:
    os.environ["PREFOPT_CACHE"] = cache
    return train("dpo", data, {"max_steps": 1, **options}, model, output) is not None


def values_in(cache: Path) -> dict[str, dict[bytes, tuple[float, bytes]]]:
    """The cached values of each space, by response."""
    found: dict[str, dict[bytes, tuple[float, bytes]]] = {}
    for space in (cache / "reference").iterdir():
        for path in block_files(space):
            block = read_sealed(path, space.name)
            tokens = np.split(block.get("token_values", np.zeros(0)), np.cumsum(block["counts"])[:-1])
            for key, total, part in zip(block["keys"], block["sums"], tokens, strict=False):
                found.setdefault(space.name, {})[key.tobytes()] = (float(total), part.tobytes())
    return found


REFERENCES: dict[str, dict[str, Any]] = {
    "start": {},
    "start of an adapter": {**LORA, "dtype": "bfloat16"},
    "tokens": {"loss": "ld_dpo"},
    "other": {"reference": "OTHER"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in ("start", "other") else ()) for c in REFERENCES]
)
def test_the_cache_is_filled_in_shards_as_by_one_process(case: str, tmp_path: Path) -> None:
    model, file = prepared(tmp_path, "pairs")
    options = dict(REFERENCES[case])
    if "reference" in options:
        options["reference"] = several_files(tmp_path / "other")
    train_on(1, options, model, file, tmp_path)
    train_on(3, {**options, "shard": "full"}, model, file, tmp_path)
    one, three = values_in(tmp_path / "cache1"), values_in(tmp_path / "cache3")
    assert one and one == three


@pytest.mark.slow
def test_distributions_of_another_reference_are_compared_in_shards(tmp_path: Path) -> None:
    model, file = prepared(tmp_path, "pairs")
    options = {"loss": "tdpo", "reference": several_files(tmp_path / "other"), "max_steps": 2}
    train_on(1, options, model, file, tmp_path)
    train_on(2, {**options, "shard": "full"}, model, file, tmp_path)
    same(tmp_path / "run1", tmp_path / "run2")


def train_on(size: int, options: dict[str, Any], model: str, data: str, folder: Path) -> None:
    """A run with a cache of its own."""
    on_ranks(size, _filled, options, model, data, str(folder / f"run{size}"), str(folder / f"cache{size}"))


@pytest.mark.slow
def test_a_class_that_scores_each_response_apart_trains_in_shards(tmp_path: Path) -> None:
    """Ranks then have different numbers of passes, and each communicates."""
    model = write_other(tmp_path / "base", "stablelm")
    assert Scorer(AutoModelForCausalLM.from_pretrained(model)).path == "separate"
    write_rows(tmp_path / "ranked.jsonl", FILES["ranked"]())
    options = {"loss": "plackett_luce", "max_steps": 2, "token_budget": 60}
    data = str(tmp_path / "ranked.jsonl")
    train_on(1, options, model, data, tmp_path)
    train_on(2, {**options, "shard": "full"}, model, data, tmp_path)
    assert values_in(tmp_path / "cache1") == values_in(tmp_path / "cache2")
    same(tmp_path / "run1", tmp_path / "run2")


def _chosen(source: str, room: float) -> tuple[str, str | None, str]:
    world = open_world()
    shard.memory_of = lambda device: int(room / shard.ROOM * world.size)  # type: ignore[assignment]
    policy = policy_of(source, {"shard": "auto"}, world)
    early = policy.shards
    return early, policy.reading, policy.make_trainable(world)


def test_auto_decides_by_sizes_before_it_reads(tmp_path: Path) -> None:
    source = llama(tmp_path / "base")
    need = 16 * sum(p.numel() for p in tiny_llama().parameters())
    for room, wanted in ((need + 99, "none"), (need - 99, "full")):
        for early, line, told in on_ranks(2, _chosen, source, room):
            assert early == wanted
            assert (line is None) == (wanted == "none")
            assert ("every process has all weights" if wanted == "none" else "(full)") in told


def test_a_file_that_went_away_is_one_line(tmp_path: Path) -> None:
    lines = on_ranks(2, _gone, dpo(tmp_path, "--shard", "full", "--batch-size", "4"))
    assert [status for status, _ in lines] == [2, 2]
    told = [line for _, text in lines for line in text.splitlines()]
    assert len(told) == 1 and "embed_tokens" in told[0] and "restore the model" in told[0]


def _gone(words: list[str]) -> tuple[int, str]:
    """The file disappears for one rank after its header was read."""
    own = StoredTensor.read

    def read(self: StoredTensor, name: str, rows: slice | None = None) -> torch.Tensor:
        if rows is not None and rows.stop > 1 and os.environ["RANK"] == "1":
            return own(StoredTensor(self.file.with_name("gone"), self.dtype, self.shape), name, rows)
        return own(self, name, rows)

    StoredTensor.read = read  # type: ignore[method-assign]
    return _typed(words)
