"""Steps of the sampler through compiled layers: the same tokens, and one graph for all steps and numbers of rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from model.architectures import VOCABULARY, build
from prefopt.generate.batch import SampleBatch
from prefopt.generate.packed_linear import packed_linears
from prefopt.generate.sampler import Sample, SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.scorer import Scorer

STOP = tuple(range(7, 21))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
"""Of a model whose linear layers are large enough to be packed."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def prompts(seed: int) -> list[list[int]]:
    """Of other numbers and lengths for every seed; more than the rows of a batch."""
    draw = np.random.default_rng(seed)
    return [draw.integers(21, VOCABULARY, n).tolist() for n in draw.integers(1, 30, 8 + seed)]


def drawn(found: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.ids.tolist() for sample in many] for many in found]


def compare(scorer: Scorer, backend: str, rounds: int, atol: float) -> None:
    """Samples before and after the layers are compiled."""
    given = [(prompts(seed), SamplingParams(12 + 3 * seed, STOP, 2, seed=seed)) for seed in range(rounds)]
    sampler = TransformersSampler(scorer, rows=7)
    wanted = [sampler.sample(some, 2, params) for some, params in given]
    scorer.compile_layers(backend=backend)
    for (some, params), before in zip(given, wanted, strict=True):
        found = sampler.sample(some, 2, params)
        assert drawn(found) == drawn(before)
        for many, others in zip(found, before, strict=True):
            for sample, other in zip(many, others, strict=True):
                np.testing.assert_allclose(sample.logps, other.logps, rtol=0, atol=atol)
    assert scorer.compiled is not None and scorer.compiled.step_failure is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", 1),
        pytest.param("gemma2", 2, marks=pytest.mark.slow),
        pytest.param("mistral", 1, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_steps_rows_and_calls(name: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end, are refilled and removed, and slots grow. Layers with windows and without are a graph each."""
    sizes = set[tuple[int, int]]()
    advance = SampleBatch.advance

    def watched(self: SampleBatch) -> tuple[int, int]:
        sizes.add((len(self.rows.living), self.decoder.slots.length if self.rows.step_R.any() else 0))
        return advance(self)

    monkeypatch.setattr(SampleBatch, "advance", watched)
    compare(Scorer(build(name)), "eager", rounds=2, atol=1e-6)
    assert len({rows for rows, _ in sizes}) > 3 and len({length for _, length in sizes}) > 20
    assert graphs() == expected and not counters["graph_break"]


@pytest.mark.slow
def test_packed_layers_share_the_graph_from_call_to_call() -> None:
    """Float32, whose products are packed anew in every call; also two models of one class."""
    scorer = Scorer(build("llama", torch.float32, **WIDE))
    with packed_linears(scorer.model) as number:
        assert number >= 4
    compare(scorer, "eager", rounds=2, atol=1e-5)
    other = Scorer(build("llama", torch.float32, **WIDE))
    compare(other, "eager", rounds=1, atol=1e-5)
    assert graphs() == 1


def test_a_compiler_that_fails_costs_no_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Scorer(build("llama"))
    sampler, params = TransformersSampler(scorer, rows=7), SamplingParams(9, STOP)
    wanted = drawn(sampler.sample(prompts(0), 2, params))

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "broken", broken)
    scorer.compile_layers(backend="broken")
    with caplog.at_level(logging.WARNING, "prefopt"):
        assert drawn(sampler.sample(prompts(0), 2, params)) == wanted
    assert [r.message.count("steps of the sampler are not compiled") for r in caplog.records] == [1]
    assert scorer.compiled is not None and scorer.compiled.failure is None, "scoring is compiled by a graph of its own"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the compiler itself
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generated_code_draws_the_same(name: str) -> None:
    """By inductor, on the CPU: windows and soft-caps too."""
    compare(Scorer(build(name)), "inductor", rounds=2, atol=1e-6)
    assert graphs() <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the compiler itself
def test_generated_code_calls_packed_products() -> None:
    """By inductor: packed layers are one opaque operator in its graph."""
    scorer = Scorer(build("llama", torch.float32, **WIDE))
    with packed_linears(scorer.model) as number:
        assert number >= 4
    compare(scorer, "inductor", rounds=2, atol=1e-5)
    assert graphs() == 1
