"""Compiled layers: one graph for all packed rows, equal to the layers as they are in values and gradients."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from model.architectures import build
from model.oracle import Draw, Gradients, assert_same, assert_same_gradients, gradients
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import checkpoint_activations, layers_of
from prefopt.model.kernels import shared
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.scorer import Scorer


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def packed(scorer: Scorer, seed: int) -> PackedBatch:
    """Rows of one to three groups, of other lengths for every seed."""
    draw = Draw(seed)
    groups = [draw.group(3 + seed % 17, 4 + seed % 11, *([2 + seed % 5] * (1 + seed % 3)))]
    groups += [draw.group(2 + seed % 7, 3, 9 - seed % 6) for _ in range(seed % 3)]
    return pack(groups, scorer.layout)


def scored(scorer: Scorer, batch: PackedBatch) -> tuple[torch.Tensor, Gradients]:
    found = scorer(batch)
    assert isinstance(found, torch.Tensor)
    return found.detach(), gradients(found, scorer.model)


def compare(scorer: Scorer, backend: str, *, batches: int, rtol: float) -> None:
    """Values and gradients of every batch before and after the layers are compiled; graphs are made once."""
    rows = [packed(scorer, seed) for seed in range(batches)]
    wanted = [scored(scorer, row) for row in rows]
    assert "compiled" in scorer.compile_layers(backend=backend)
    for row, (values, slopes) in zip(rows, wanted, strict=True):
        found = scored(scorer, row)
        assert_same(found[0], values, rtol)
        assert_same_gradients(found[1], slopes, rtol)
    assert scorer.compiled is not None
    assert scorer.compiled.failure is None
    assert not counters["graph_break"]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_one_graph_for_every_packed_row_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build("llama", torch.float32).train())
    compare(scorer, "eager", batches=12, rtol=1e-6)
    assert graphs() == 1
    lengths = set()
    for seed in range(12, 212):
        batch = packed(scorer, seed)
        lengths.add((batch.tokens, len(batch.passes[0].segments)))
        scorer(batch)
    assert len(lengths) > 60
    assert graphs() == 1
    with torch.no_grad():
        scorer(packed(scorer, 3))
        scorer(packed(scorer, 4))
    assert graphs() == 2, "without gradients a second one"
    calls: list[Any] = []
    monkeypatch.setattr(shared, "_planned", lambda *given: calls.append(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scorer(packed(scorer, 5))
    assert calls, "attention is reached through its operator"


def lora(model: Any) -> Any:
    return new_lora(model.requires_grad_(False), rank=2, alpha=4, dropout=0.0, targets=["all-linear"], task="CAUSAL_LM")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointing_with_an_adapter_through_aot_autograd() -> None:
    """Recomputed activations, symbolic shapes, and a frozen model with weights that train."""
    model = lora(build("llama", torch.float32))
    checkpoint_activations(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    compare(Scorer(model.train()), "aot_eager", batches=4, rtol=1e-5)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the compiler itself
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_generated_code_gives_the_same(name: str) -> None:
    """By inductor, on the CPU; soft-caps, sinks, windows and experts too. Two types of layers are two graphs."""
    scorer = Scorer(build(name, torch.float32).train())
    compare(scorer, "inductor", batches=6, rtol=2e-5)
    assert graphs() <= 2
    for seed in range(6, 206):
        scorer(packed(scorer, seed))
    assert graphs() <= 2


def test_names_weights_and_copies_stay_as_they_are() -> None:
    model = build("llama", torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, classes = [n for n, _ in model.named_modules()], [type(m) for m in model.modules()]
    scorer = Scorer(model)
    scorer.compile_layers(backend="eager")
    batch = packed(scorer, 1)
    first = scorer(batch)
    assert [n for n, _ in model.named_modules()] == modules
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(0.5)
    other = Scorer(twin)
    other.compiled = scorer.compiled
    assert not torch.allclose(other(batch), first), "a copy computes with its own weights"
    assert torch.equal(scorer(batch), first)

    scorer.release()
    assert all("forward" not in vars(layer) for layer in layers_of(model))
    assert scorer.compiled is None


def test_other_passes_are_not_compiled() -> None:
    """Such as sampling, or the model's own attention."""
    scorer = Scorer(build("llama", torch.float32))
    scorer.compile_layers(backend="eager")
    with scorer.attention_by(None):
        scorer.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert graphs() == 0


def failing(how: str) -> Callable[..., Any]:
    """A backend whose compilation fails, at once or in the backward pass."""

    def at_once(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    if how == "forward":
        return at_once
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=at_once)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_compiler_that_fails_costs_one_line(how: str, caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(build("llama", torch.float32).train())
    rows = [packed(scorer, seed) for seed in range(3)]
    wanted = [scored(scorer, row) for row in rows]
    scorer.compile_layers(backend=failing(how))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        found = [scored(scorer, row) for row in rows]
    for (a, b), (c, d) in zip(found, wanted, strict=True):
        assert_same(a, c, 1e-6)
        assert_same_gradients(b, d, 1e-6)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("prefopt")]
    assert len(lines) == 1
    assert lines[0].startswith("layers are not compiled: torch.compile fails for LlamaDecoderLayer (")
    assert "no compiler here" in lines[0]
    assert "\n" not in lines[0]


def test_models_that_cannot_share_are_not_compiled() -> None:
    scorer = Scorer(build("bloom", torch.float32))
    assert scorer.compile_layers().startswith(
        "layers are not compiled: each response is scored separately, since Bloom"
    )
    assert scorer.compiled is None
