"""The memory that is counted without contents is the memory that torch's allocator gives out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import build
from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.memory import Blueprint, LiveBytes
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer
from prefopt.model.scorer import PackedModel, Scorer
from train.small import tiny_llama

WIDE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "max_position_embeddings": 512}
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "deep": (WIDE, (6, 40, 40)),
    "large vocabulary": ({**WIDE, "num_hidden_layers": 2, "vocab_size": 4001, "tie_word_embeddings": True}, (2, 9, 90)),
    "long": ({**WIDE, "num_hidden_layers": 3, "num_attention_heads": 8}, (1, 300, 150)),
}
WAYS = {
    "full": {},
    "checkpointed": {"checkpointed": True},
    "lora": {"lora": True},
    "lora, checkpointed": {"lora": True, "checkpointed": True},
}
DTYPES = [torch.float32, torch.bfloat16]


def groups_of(count: int, prompt: int, response: int) -> list[Group]:
    rng = np.random.default_rng(0)
    found = []
    for row in range(count):
        start = rng.integers(0, 90, prompt)
        many = [np.concatenate([start, rng.integers(0, 90, response)]) for _ in range(2)]
        found.append(Group.from_sequences([(ids, np.arange(len(ids)) >= prompt) for ids in many], row=row))
    return found


def scorer_of(
    changes: dict[str, Any], dtype: torch.dtype, *, lora: bool = False, checkpointed: bool = False, device: str = "cpu"
) -> tuple[Scorer, MasterWeights]:
    model: Any = tiny_llama(**changes).to(device)
    if lora:
        model = new_lora(model.requires_grad_(False), rank=4, alpha=8, dropout=0.0, targets=None)
    weights = MasterWeights(model, dtype)
    scorer = Scorer(model)
    if checkpointed:
        checkpoint_activations(model)
    scorer.train()
    return scorer, weights


def peak_of_allocator(scorer: PackedModel, groups: list[Group]) -> int:
    """The most bytes that torch's allocator holds in a pass, by its own events; gradients are there already."""
    from torch.profiler import ProfilerActivity, profile

    batch = pack(groups, scorer.layout)
    scorer(batch).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        scorer(batch).sum().backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize(
    ("shape", "way", "dtype"),
    [
        pytest.param(shape, way, dtype, marks=() if dtype == torch.bfloat16 else pytest.mark.slow)
        for shape, way in (
            *(("deep", way) for way in WAYS),
            ("large vocabulary", "full"),
            ("long", "full"),
            ("long", "lora, checkpointed"),
        )
        for dtype in DTYPES
    ],
)
def test_a_pass_takes_what_was_counted(shape: str, way: str, dtype: torch.dtype) -> None:
    changes, sizes = SHAPES[shape]
    scorer, _ = scorer_of(changes, dtype, **WAYS[way])
    groups = groups_of(*sizes)
    counted = Blueprint.of(scorer).count(groups)
    assert counted.peak == pytest.approx(peak_of_allocator(scorer, groups), rel=0.1)
    assert 0 < counted.kept < counted.peak and counted.head <= counted.workspace


def test_layers_of_several_kinds_are_counted_each_for_itself() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
    )
    torch.manual_seed(0)
    scorer = Scorer(Gemma3ForCausalLM(config).eval())
    MasterWeights(scorer.model, torch.float32)
    blueprint = Blueprint.of(scorer.train())
    assert len(blueprint.depth) == 8 and max(blueprint.depth) == 3, "two layers of each kind stand for eight"
    groups = groups_of(3, 20, 30)
    assert blueprint.count(groups).peak == pytest.approx(peak_of_allocator(scorer, groups), rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon", "lfm2"])
def test_other_architectures_are_counted(name: str) -> None:
    """Among them one that scores each response separately and one without attention in every layer."""
    scorer = Scorer(build(name, torch.float32).eval())
    MasterWeights(scorer.model, torch.float32)
    groups = groups_of(2, 40, 30)
    counted = Blueprint.of(scorer.train()).count(groups)
    assert counted.peak == pytest.approx(peak_of_allocator(scorer, groups), rel=0.1)


def test_several_passes_of_many_layers_are_not_counted_as_one() -> None:
    """What a copy of two layers keeps of the second pass is not multiplied by the depth: it is estimated instead."""
    scorer = Scorer(tiny_llama(num_hidden_layers=6), share=False)
    MasterWeights(scorer.model, torch.float32)
    blueprint = Blueprint.of(scorer.train())
    with pytest.raises(ValueError, match="several passes"):
        blueprint.count(groups_of(2, 40, 30))
    one = groups_of(1, 40, 30)[0]
    alone = Group.from_sequences([one.sequence(0)], row=0, pairs=())
    assert blueprint.count([alone]).peak == pytest.approx(peak_of_allocator(scorer, [alone]), rel=0.1)


def test_adapters_on_experts_are_counted() -> None:
    """PEFT switches autocasting off around their weights, which torch refuses for tensors without contents."""
    model: Any = new_lora(
        build("mixtral", torch.bfloat16).requires_grad_(False), rank=4, alpha=8, dropout=0.0, targets=None
    )
    assert any("experts" in name for name, weight in model.named_parameters() if weight.requires_grad)
    scorer, autocast = Scorer(model), torch.autocast
    MasterWeights(model, torch.bfloat16)
    groups = groups_of(2, 40, 30)
    counted = Blueprint.of(scorer.train()).count(groups)
    assert counted.peak == pytest.approx(peak_of_allocator(scorer, groups), rel=0.1)
    assert torch.autocast is autocast


def test_a_reward_model_is_counted() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=99, num_labels=1, pad_token_id=98, num_attention_heads=4, **WIDE)
    scorer = ScalarScorer(LlamaForSequenceClassification(config).eval())
    MasterWeights(scorer.model, torch.float32)
    groups = groups_of(4, 20, 30)
    counted = Blueprint.of(scorer.train()).count(groups)
    assert counted.peak == pytest.approx(peak_of_allocator(scorer, groups), rel=0.1)


def test_counting_leaves_model_gradients_and_random_numbers_alone() -> None:
    scorer, weights = scorer_of(WIDE, torch.bfloat16)
    before, state = {n: m.clone() for n, m in weights.saved()}, torch.get_rng_state()
    Blueprint.of(scorer, kind="cuda").count(groups_of(2, 5, 5))
    assert torch.equal(torch.get_rng_state(), state) and scorer.kernel == "flash-cpu"
    assert all(torch.equal(before[n], m) and m.grad is None for n, m in weights.masters.items())
    assert all(not p.is_meta for p in scorer.parameters())


def test_kernels_of_a_gpu_are_counted_without_one() -> None:
    """Variable-length attention gathers keys for a moment, and keeps none of what it has gathered."""
    scorer, _ = scorer_of(WIDE, torch.bfloat16)
    groups = groups_of(6, 40, 40)
    here, there = (Blueprint.of(scorer, kind=kind).count(groups) for kind in ("cpu", "cuda"))
    tokens, keys = 6 * 120, 6 * (80 + 80)  # a prompt's keys are gathered for each of its responses
    config: Any = scorer.model.config
    width = 2 * config.num_key_value_heads * config.head_dim * 2  # bytes of a token's keys and values
    gathered = config.num_hidden_layers * width * (keys - tokens)
    assert 0 < there.kept - here.kept < 0.2 * gathered, "the plan of the row alone"


def test_shards_gather_two_layers_what_is_in_none_and_gradients() -> None:
    scorer, _ = scorer_of(WIDE, torch.bfloat16)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in scorer.model.model.layers]  # type: ignore
    outside = sum(p.numel() for p in scorer.parameters()) - sum(layers)
    gathered = 2 * (2 * layers[0] + outside) + (2 + 4) * max(layers[0], outside)
    assert len(set(layers)) == 1 and Blueprint.of(scorer).gathered() == gathered


def test_live_bytes_are_those_of_new_memory() -> None:
    old = torch.zeros(10)
    with LiveBytes("cpu") as live:
        old.add_(1)
        part = old[2:5]
        made = [torch.zeros(8), part + 1]
        live.mark("made")
        made.pop()
        more = torch.ones(100)
        del more
        live.mark("dropped")
    assert live.marks == {"made": (32 + 12, 32 + 12), "dropped": (32, 32 + 400)}
    with LiveBytes("cpu") as live:
        held = torch.zeros(8)
        live.mark_next("then")
        del held  # as a caller lets go of a layer's input
        torch.zeros(2)
    assert live.marks == {"then": (0, 32)}


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_pass_takes_what_was_counted_on_a_gpu(way: str) -> None:
    changes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    changes |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048}
    scorer, _ = scorer_of(changes, torch.bfloat16, device="cuda", **WAYS[way])
    groups = groups_of(6, 300, 300)
    counted = Blueprint.of(scorer).count(groups)
    batch = pack(groups, scorer.layout).to(torch.device("cuda"))
    scorer(batch).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scorer(batch).sum().backward()
    assert counted.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
