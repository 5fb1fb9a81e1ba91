"""Weights in shards compute what whole ones do: values, gradients, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from model.vision import FAMILIES, groups_of, rows, write_folder
from parallel.ranks import on_ranks
from prefopt.core.ranks import Ranks
from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations, towers_of
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from prefopt.parallel import shard
from prefopt.parallel.gradients import clip_, grad_norm, sum_gradients
from prefopt.parallel.shard import ShardedWeights, choose, mesh_of
from prefopt.parallel.tensors import whole_of
from prefopt.parallel.world import World, open_world
from prefopt.train.optim import adamw

VOCABULARY = 97


def groups() -> list[Group]:
    random = np.random.default_rng(0)
    found = []
    for prefix, *lengths in ((11, 7, 13), (3, 17, 2), (1, 5, 8), (9, 4, 4)):
        start = random.integers(0, VOCABULARY, prefix)
        rows = [np.concatenate([start, random.integers(0, VOCABULARY, n)]) for n in lengths]
        found.append(Group.from_sequences([(ids, np.arange(len(ids)) >= prefix) for ids in rows], row=0))
    return found


def model(kind: str, *, tied: bool = False, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "jamba":
        shape |= {"num_experts": 1, "attn_layer_period": 3, "attn_layer_offset": 1}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, **shape
    )
    made: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if lora:
        made.requires_grad_(False)
        made = new_lora(made, rank=4, alpha=8, dropout=0.0, targets=None)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
    return made


def _steps(kind: str, options: dict[str, bool], dtype_name: str, sharded: bool, split: bool) -> dict[str, Any]:
    """Two steps on two groups a rank: log-probabilities, gradients and weights, whole."""
    world = open_world()
    dtype = getattr(torch, dtype_name)
    made = model(kind, tied=options.get("tied", False), lora=options.get("lora", False))
    if options.get("checkpointing"):
        checkpoint_activations(made)
    weights: Any = MasterWeights(made, dtype)
    scorer = Scorer(made)
    assert scorer.path == "shared"
    scorer.train()
    if options.get("compiled"):
        scorer.compile_layers(backend="eager")
    if sharded:
        weights = ShardedWeights(scorer, weights, mesh_of(world, torch.device("cpu"), hybrid=False), dtype)
        with scorer.attention_by(None):  # as while it is saved: what shares is then found by the classes of shards
            assert not any("forward" in vars(m) for m in made.modules()) or scorer.compiled is not None
    optimizer = adamw(weights.masters, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
    every = groups()
    mine = [every[world.rank :: world.size]] if split else [every[0::2], every[1::2]]
    found: dict[str, Any] = {"dtype": str(scorer.dtype), "norm": []}
    for _ in range(2):
        for part in mine:
            logp_M = scorer(pack(part, scorer.layout))
            found.setdefault("logp", []).append(logp_M.detach().numpy())
            (logp_M * torch.linspace(-1, 1, len(logp_M))).sum().backward()
        sum_gradients(world, weights.masters.values())
        found.setdefault("gradients", {n: whole_of(p.grad).numpy().copy() for n, p in weights.masters.items()})
        norm = float(grad_norm(weights.masters.values()))
        found["norm"].append(norm)
        clip_(weights.masters.values(), norm, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        weights.publish()
        weights.zero_grad()
    if scorer.compiled is not None:
        found["compiled"] = (scorer.compiled.failure, counters["stats"]["unique_graphs"])
    found["weights"] = {n: w.numpy().copy() for n, w in ((n, whole_of(w)) for n, w in weights.saved())}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3", {"tied": True, "checkpointing": True}),
        ("llama", {"lora": True}),
        pytest.param("mamba", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("jamba", {"checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_shards_are_the_master_weights_to_the_bit(kind: str, options: dict[str, bool], dtype: str) -> None:
    """One micro-batch a rank on two ranks against two micro-batches of one process."""
    alone = on_ranks(1, _steps, kind, options, dtype, False, False)[0]
    for sharded in (True, False):
        ranks = on_ranks(2, _steps, kind, options, dtype, sharded, True)
        for rank, found in enumerate(ranks):
            assert found["dtype"] == alone["dtype"]
            assert all(g is not None for g in found["gradients"].values())
            assert np.array_equal(found["logp"][0], alone["logp"][rank])
            for name, wanted in alone["gradients"].items():
                assert np.array_equal(found["gradients"][name], wanted), name
            np.testing.assert_allclose(found["norm"], alone["norm"], rtol=1e-6)
            for name, wanted in alone["weights"].items():
                gap = np.linalg.norm(found["weights"][name] - wanted) / np.linalg.norm(wanted)
                assert gap < 1e-6, (name, gap)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_in_shards(dtype: str) -> None:
    """Hooks that gather weights run outside of the graph, which is the same one on every rank and for every layer."""
    plain = on_ranks(1, _steps, "llama", {"checkpointing": True}, dtype, False, False)[0]
    options = {"compiled": True, "checkpointing": True}
    for found in on_ranks(2, _steps, "llama", options, dtype, True, True):
        assert found["compiled"] == (None, 1)
        for name, wanted in plain["gradients"].items():
            gap = np.linalg.norm(found["gradients"][name] - wanted) / np.linalg.norm(wanted)
            assert gap < (1e-5 if dtype == "float32" else 0.02), (name, gap)


def _around() -> dict[str, Any]:
    """Scores before and after other weights are loaded into the shards."""
    world = open_world()
    made = model("llama")
    other = {n: p.detach().clone() * 1.1 for n, p in made.named_parameters()}
    scorer = Scorer(made)
    weights = ShardedWeights(
        scorer, MasterWeights(made, torch.float32), mesh_of(world, torch.device("cpu"), hybrid=False), torch.float32
    )
    batch = pack(groups()[:2], scorer.layout)
    with torch.no_grad():
        before = scorer(batch)
        weights.load(other)
        moved = scorer(batch)
    biggest = max(p.to_local().numel() / p.numel() for p in weights.masters.values())
    return {"before": before, "moved": moved, "share": biggest}


def test_shards_are_loaded_from_whole_weights() -> None:
    one, two = on_ranks(3, _around)[:2]
    assert one["share"] < 0.5
    scorer = Scorer(model("llama"))
    with torch.no_grad():
        batch = pack(groups()[:2], scorer.layout)
        wanted = scorer(batch)
        for weight in scorer.model.parameters():
            weight.mul_(1.1)
        moved = scorer(batch)
    for found in (one, two):
        assert torch.equal(found["before"], wanted)
        assert torch.equal(found["moved"], moved)


@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 18), (torch.float32, 16)])
def test_auto_counts_every_weight_once(dtype: torch.dtype, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("llama")
    masters = MasterWeights(made, dtype).masters
    need = each * sum(p.numel() for p in made.parameters())
    world = World(Ranks(0, 4, 0, 2))
    monkeypatch.setattr(World, "smallest", lambda self, number: number)
    for room, wanted in ((need + 99, "none"), (need - 99, "hybrid"), (need / 2 - 99, "full")):
        memory = room / shard.ROOM * 2  # two processes share the memory of a machine
        monkeypatch.setattr(shard, "memory_of", lambda device, memory=memory: int(memory))
        assert choose("auto", world, made, masters, torch.device("cpu"))[0] == wanted, room
        more = choose("auto", world, made, masters, torch.device("cpu"), lambda: need)[0]
        assert more == ("hybrid" if wanted == "none" else "full")


def _with_pictures(folder: str, vision: str, sharded: bool, split: bool) -> dict[str, Any]:
    """Values and gradients of two groups, of which one has a picture, and how much of a tower this rank holds."""
    world = open_world()
    cpu, dtype = torch.device("cpu"), torch.float64
    made: Any = load_model(folder, dtype=dtype, device=cpu, pictures=True).train()
    if vision == "frozen":
        for tower in towers_of(made):
            tower.requires_grad_(False)
    if vision == "lora":
        made.requires_grad_(False)
        made = new_lora(made, rank=2, alpha=4, dropout=0.0, targets=None, towers=True)
        for n, p in enumerate(p for name, p in made.named_parameters() if "lora_" in name):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=dtype) / 20
    weights: Any = MasterWeights(made, dtype)
    scorer = Scorer(made, pictures=True)
    if sharded:
        weights = shard.shard(scorer, weights, world, dtype, hybrid=False)
    every = [group for group in groups_of(Path(folder), rows()) if len(group.pictures) != 2]
    found: dict[str, Any] = {"logp": []}
    for group in every[world.rank : 2 : world.size] if split else every[:2]:
        logp_M = scorer(pack([group], scorer.layout))
        found["logp"].append(logp_M.detach().numpy())
        (logp_M * torch.linspace(-1, 1, len(logp_M))).sum().backward()
    sum_gradients(world, weights.masters.values())
    given = {n: p.grad for n, p in weights.masters.items() if p.grad is not None}  # LLaVA passes over a tower's end
    found["gradients"] = {n: whole_of(grad).numpy().copy() for n, grad in given.items()}
    inside = {id(p) for tower in towers_of(causal_model(made)) for p in tower.parameters()}
    found["towers"] = {n for n, p in made.named_parameters() if id(p) in inside}
    found["held"] = {type(p).__name__ for n, p in made.named_parameters() if n in found["towers"]}
    return found


@pytest.mark.parametrize(
    ("family", "vision"),
    [
        ("qwen3_vl", "frozen"),
        ("qwen3_vl", "full"),
        *(pytest.param("qwen3_vl", v, marks=pytest.mark.slow) for v in ("lora",)),
        *(pytest.param(f, "full", marks=pytest.mark.slow) for f in FAMILIES if f != "qwen3_vl"),
    ],
)
def test_ranks_with_and_without_pictures(family: str, vision: str, tmp_path: Path) -> None:
    """The first rank alone has a picture. A frozen tower is whole on both, and runs on the first; one that trains is in
    shards, and both gather it. The result is that of one process."""
    folder = str(write_folder(family, tmp_path))
    alone = on_ranks(1, _with_pictures, folder, vision, False, False)[0]
    for rank, found in enumerate(on_ranks(2, _with_pictures, folder, vision, True, True)):
        assert found["held"] == {"Parameter" if vision == "frozen" else "DTensor"}
        np.testing.assert_array_equal(found["logp"][0], alone["logp"][rank])
        assert found["gradients"].keys() == alone["gradients"].keys()
        towers = [name for name in found["gradients"] if name in found["towers"]]
        assert bool(towers) == (vision != "frozen")
        assert not towers or max(abs(alone["gradients"][name]).max() for name in towers) > 1e-6
        for name, wanted in alone["gradients"].items():
            np.testing.assert_allclose(found["gradients"][name], wanted, rtol=1e-9, atol=1e-12, err_msg=name)
