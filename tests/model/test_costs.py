"""What passes through a model is counted, token for token."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from model.architectures import build
from prefopt.data.group import Group
from prefopt.generate.sampler import SamplingParams
from prefopt.generate.transformers_sampler import MAX_ROWS, TransformersSampler
from prefopt.model.check import check_scoring
from prefopt.model.costs import MEMORY_ERRORS, combine_costs, count_costs, halved, out_of_memory, uncounted
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer
from prefopt.reference.in_memory import SwappedWeights
from train.small import tiny_llama


def groups() -> list[Group]:
    """Prompts of 3 tokens, answers of 2 and 4."""
    trained = np.arange(7) >= 3
    whole = [np.array([5, 6, 7, *range(10 + n, 14 + n)]) for n in range(2)]
    return [Group.from_sequences([(whole[0], trained), (whole[1][:5], trained[:5])], row=n) for n in range(2)]


def test_passes_and_tokens_are_counted_by_what_they_are_for() -> None:
    scorer = Scorer(tiny_llama())
    size = sum(p.numel() * 4 for p in scorer.model.parameters())
    batch = pack(groups(), scorer.layout)
    with count_costs() as costs:
        with torch.no_grad():
            scorer(batch)
        with count_costs() as inner:
            scorer(batch).sum().backward()
            with uncounted():
                scorer(batch)
    assert batch.tokens == 2 * (3 + 4 + 2), "the prompt once"
    assert (costs.forward_passes, costs.scored_tokens, costs.trained_tokens) == (2, 18, 18)
    assert (inner.forward_passes, inner.scored_tokens, inner.trained_tokens) == (1, 0, 18)
    assert (costs.models, costs.model_bytes) == (1, size)
    scorer(batch)
    assert costs.forward_passes == 2, "what comes after is nobody's"


def test_what_is_drawn_is_counted_and_the_prompt_once_for_its_samples() -> None:
    sampler = TransformersSampler(Scorer(tiny_llama()))
    with count_costs() as costs:
        drawn = sampler.sample([[5, 6, 7, 8], [9]], 3, SamplingParams(6, stop=(1,)))
    lengths = [s.tokens for many in drawn for s in many]
    assert costs.generated_tokens == sum(lengths)
    # All but the last token of each sample goes through the model, and of rows that have ended some more.
    assert 3 + 1 + 1 + sum(lengths) - len(lengths) <= costs.decoded_tokens <= 3 + 2 + 6 * 5
    assert costs.scored_tokens == costs.trained_tokens == 0


def test_models_count_while_they_are_there_and_the_twin_of_the_load_check_does_not() -> None:
    one, batch = Scorer(tiny_llama()), groups()
    size = sum(p.numel() * 4 for p in one.model.parameters())
    with count_costs() as costs:
        check_scoring(one, batch)
        assert costs.models == 1 and costs.scored_tokens > 0 == costs.trained_tokens
        for seed in (1, 2):
            other = Scorer(tiny_llama(seed))
            other(pack(batch, other.layout))
            del other
            gc.collect()
        assert (costs.models, costs.model_bytes) == (2, 2 * size), "never three at once"
        more = Scorer(tiny_llama(3))
        more(pack(batch, more.layout))
        held = SwappedWeights(MasterWeights(one.model, torch.float32))
        assert (costs.models, costs.model_bytes) == (3, 3 * size)
        del held


def test_parts_add_up_and_memory_is_the_largest() -> None:
    parts = [{"seconds": 2.0, "models": 4, "model_bytes": 9}, {"seconds": 1.0, "models": 1, "trained_tokens": 5}]
    assert combine_costs(parts) == {"seconds": 3.0, "models": 4, "model_bytes": 9, "trained_tokens": 5}
    assert combine_costs([]) == {}


def test_a_cache_that_cannot_be_estimated_does_not_end_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(config: object) -> list[object]:
        raise ValueError("head_dim differs by layer")

    sampler = TransformersSampler(Scorer(build("llama", torch.float32)))
    assert sampler.estimate_rows(10**9) == 1
    monkeypatch.setattr("prefopt.generate.transformers_sampler.attention_shapes", raising)
    assert sampler.estimate_rows(10**9) == MAX_ROWS["cpu"]


def test_out_of_memory_is_recognised() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        MemoryError(),
    ):
        assert out_of_memory(error), error
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")):
        assert not out_of_memory(error), error


def test_what_an_error_holds_is_free_before_the_work_is_repeated() -> None:
    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []

    def forward() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise MemoryError

    try:
        forward()
    except MEMORY_ERRORS as error:
        assert held[0]() is not None
        assert halved(error, 8, 1, "too large", torch.device("cpu")) == 4
        assert held[0]() is None
