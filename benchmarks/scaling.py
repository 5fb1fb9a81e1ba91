"""What each collective moves, and what a step takes, on up to 512 GPUs: counted on one CPU, without any of them.

    python benchmarks/scaling.py [--models 8B 70B] [--worlds 8 64 512] [--json FILE]

One micro-batch goes forward and backward through prefopt's own scorer in shards, on tensors without contents and a
process group that sends nothing (PyTorch's FakeTensorMode and "fake" backend); every collective is counted with its
bytes. From those follow memory per rank and, with the speeds of links and processors stated in ``LINKS`` and
``SECONDS_PER_TOKEN``, the time of a step. Bytes are counted, speeds are assumed: nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.core.ranks import Ranks
from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.kernels.head_class import Head
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from prefopt.parallel.balance import balanced
from prefopt.parallel.shard import ShardedWeights, mesh_of
from prefopt.parallel.world import World

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
NODE = 8
"""GPUs of a node."""
MEMORY = 80e9
"""Bytes of a GPU."""
LINKS = {"node": 350e9, "fast": 300e9, "slow": 12e9}
"""Bytes per second of a node's collectives: inside it (NVLink), between nodes over 8 x 400 Gbit/s, over 100 Gbit/s."""
WEIGHTS = {"8B": 8.03e9, "70B": 70.6e9}
SECONDS_PER_WEIGHT = 6 / (0.45 * 989e12)
"""Forward and backward of one token on one H100 in bfloat16 at 45 % of its peak."""
CHECKPOINTED = {"70B"}
"""Models whose activations do not fit otherwise: their forward pass is done twice."""
TOKENS_PER_PAIR = 1200
TOKENS_AT_ONCE = 4096
"""The token budget: 36 GB of activations of the 8B model (prefopt.train.budget), 8 GB of the 70B one, checkpointed."""
SPREAD = 0.52
"""Standard deviation of the logarithm of a pair's tokens, as in the preference data that we measured."""


@dataclass(frozen=True)
class Counted:
    """One micro-batch on one rank: calls and bytes of each kind of collective, and bytes of its shards.

    The kinds are ``gather forward``, ``gather backward``, ``reduce-scatter`` and ``all-reduce``; the bytes are those of
    the larger side, before (N - 1) / N of them travel.
    """

    model: str
    world: int
    mode: str
    calls: dict[str, int]
    bytes: dict[str, int]
    shard_bytes: int
    """Float32 weights that a rank holds; its gradients and two moments take three times as much."""
    largest_gathered: int
    """The largest parameters in one collective, in the dtype of computation."""


KINDS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes of the larger side of each. ``phase``: forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name.startswith("c10d::"):
            kind = KINDS[name.removeprefix("c10d::")]  # another one is not in the model of a step
            most = max(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            if kind == "gather":
                kind += f" {self.phase}"
                self.largest = max(self.largest, most)
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.bytes[kind] = self.bytes.get(kind, 0) + most
        return function(*args, **(kwargs or {}))


@contextmanager
def fake_world(size: int, node: int = NODE) -> Iterator[World]:
    """Rank 0 of a world whose other ranks are not there."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(Ranks(0, size, 0, min(size, node)))
    finally:
        dist.destroy_process_group()


def count(name: str, size: int, mode: str) -> Counted:
    """Count one micro-batch of a model of :data:`MODELS`; ``mode``: full or hybrid."""
    found = count_shape(MODELS[name], size, hybrid=mode == "hybrid", checkpointing=name in CHECKPOINTED)
    return replace(found, model=name)


def count_shape(
    shape: dict[str, Any], size: int, *, hybrid: bool, checkpointing: bool = False, node: int = NODE
) -> Counted:
    """Count one micro-batch of a Llama of this shape in shards, in bfloat16, on nodes of ``node`` ranks."""
    config = AutoConfig.for_model("llama", **shape)
    random = np.random.default_rng(0)
    rows = [(random.integers(0, 50, 70), np.arange(70) >= 40) for _ in range(2)]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with fake_world(size, node) as world:
        mesh = mesh_of(world, torch.device("cpu"), hybrid=hybrid)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            if checkpointing:
                checkpoint_activations(model)
            scorer = Scorer(model, attention="loop", head=Head("fused"))
            weights = ShardedWeights(scorer, MasterWeights(model, torch.bfloat16), mesh, torch.bfloat16)
            held = sum(p.to_local().numel() * p.element_size() for p in weights.masters.values())
            batch = pack([Group.from_sequences(rows, row=0)], scorer.layout)
            scorer.train()
            with Collectives() as found:
                values = scorer(batch)
                found.phase = "backward"
                values.sum().backward()
    mode = "hybrid" if hybrid else "full"
    return Counted("", size, mode, found.calls, found.bytes, held, found.largest)


def _make_fake(model: torch.nn.Module) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, value in tensors.items():
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype)
                    tensors[key] = torch.nn.Parameter(made) if tensors is module._parameters else made


@cache
def adapter_bytes(name: str, rank: int = 16) -> int:
    """Bytes of float32 gradients that replicas of a LoRA adapter on all linear layers sum in a step."""
    config = AutoConfig.for_model("llama", **MODELS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        adapted = new_lora(model, rank=rank, alpha=2 * rank, dropout=0.0, targets=None)
    return sum(4 * p.numel() for p in adapted.parameters() if p.requires_grad)


@cache
def imbalance(pairs: int, ranks: int) -> float:
    """The largest rank's tokens over the average, batches drawn from a log-normal spread."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(100):
        costs = np.clip(random.lognormal(np.log(TOKENS_PER_PAIR) - SPREAD**2 / 2, SPREAD, pairs), 60, 8192).astype(int)
        loads = [int(costs[part].sum()) for part in balanced(costs, ranks)]
        found.append(max(loads) / (sum(loads) / ranks))
    return float(np.mean(found))


@dataclass(frozen=True)
class Step:
    """The time of a step and what part of it is work that one GPU would do as well."""

    model: str
    world: int
    mode: str
    link: str
    pairs: int
    seconds: float
    efficiency: float
    gigabytes: float
    """What :func:`held` gives."""


def step(counted: Counted | None, name: str, mode: str, world: int, pairs: int, link: str) -> Step:
    """The time of a step, optimistic: links and processors do not disturb one another, and what hides hides whole.

    Gathers hide behind the forward pass; gathers and reduce-scatters behind the backward pass; the sum over replicas of
    shards, once a step, behind the last backward pass. Replicas of an adapter sum after it. A ring moves (N - 1) / N of
    the bytes through each link, an all-reduce twice that; all GPUs of a node sum shards at once, through its one link.
    """
    again = name in CHECKPOINTED
    # Parts of forward and backward and nothing else: an adapter needs no gradients of the weights below it.
    forward, backward = 1 / 3, (1 if mode == "lora" else 2) / 3 + (1 / 3 if again else 0)
    per_rank = pairs * TOKENS_PER_PAIR / world
    ideal = per_rank * SECONDS_PER_WEIGHT * WEIGHTS[name] * (forward + backward)
    slowest = imbalance(pairs, world)
    rounds = math.ceil(slowest * per_rank / TOKENS_AT_ONCE)
    each = ideal * slowest / rounds / (forward + backward)
    between = LINKS[link if world > NODE else "node"]
    if mode == "lora":
        seconds = ideal * slowest + 2 * adapter_bytes(name) * (world - 1) / world / between
    else:
        assert counted is not None
        inner, speed = (min(world, NODE), LINKS["node"]) if mode == "hybrid" else (world, between)
        first, second, scattered = (
            counted.bytes[kind] * (inner - 1) / inner / speed
            for kind in ("gather forward", "gather backward", "reduce-scatter")
        )
        replicas = world // inner
        summed = 2 * counted.bytes.get("all-reduce", 0) * NODE * (replicas - 1) / replicas / between
        behind = max(each * backward, second + scattered)
        seconds = rounds * max(each * forward, first) + (rounds - 1) * behind + max(behind, summed)
    return Step(
        name, world, mode, link if world > NODE else "node", pairs, seconds, ideal / seconds, held(counted, name)
    )


def held(counted: Counted | None, name: str) -> float:
    """Gigabytes on a rank besides activations: weights, gradients, moments; in shards also the largest layer gathered
    and the float32 gradients of it that are reduced. ``counted`` is None for LoRA on replicas."""
    if counted is None:
        return (2 * WEIGHTS[name] + adapter_bytes(name) * 4.5) / 1e9
    return (counted.shard_bytes * 4 + counted.largest_gathered * 3) / 1e9


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts, steps = [], []
    print("model  GPUs  mode    GB of fp32 shards  GB held  gathers, GB        reduce-scatters  all-reduces")
    for name in given.models:
        for world in given.worlds:
            for mode in ("full", "hybrid") if world > NODE else ("full",):
                found = count(name, world, mode)
                counts.append(found)
                gathers = found.bytes["gather forward"] + found.bytes["gather backward"]
                calls = found.calls["gather forward"] + found.calls["gather backward"]
                print(
                    f"{name:5}  {world:4d}  {mode:6}  {found.shard_bytes / 1e9:17.2f}  {held(found, name):7.1f}"
                    f"  {calls:4d}, {gathers / 1e9:6.1f}"
                    f"       {found.calls['reduce-scatter']:4d}, {found.bytes['reduce-scatter'] / 1e9:6.1f}"
                    f"     {found.calls.get('all-reduce', 0):4d}, {found.bytes.get('all-reduce', 0) / 1e9:6.1f}",
                    flush=True,
                )
    every = (1, 2, 4, 8, 16, 32)
    heads = "".join(f"{n:>13}" for n in every)
    print("\nseconds of a step, and efficiency, by pairs per GPU")
    print(f"model  GPUs  mode    link {heads}   90 % from")
    for name in given.models:
        for world in given.worlds:
            for mode in ("full", "hybrid", "lora"):
                one = next((c for c in counts if (c.model, c.world, c.mode) == (name, world, mode)), None)
                if one is None and mode != "lora":
                    continue
                for link in ("fast", "slow") if world > NODE else ("fast",):
                    row = [step(one, name, mode, world, each * world, link) for each in every]
                    steps += row
                    title = f"{name:5}  {world:4d}  {mode:6}  {row[0].link:5}"
                    if row[0].gigabytes > MEMORY / 1e9:
                        print(f"{title}  {row[0].gigabytes:.0f} GB do not fit into {MEMORY / 1e9:.0f}")
                        continue
                    cells = "".join(f"{s.seconds:8.2f} {s.efficiency:4.0%}" for s in row)
                    good = next((str(n) for n, s in zip(every, row, strict=True) if s.efficiency >= 0.9), "more")
                    print(f"{title}{cells}   {good}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"counts": [*map(asdict, counts)], "steps": [*map(asdict, steps)]}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
