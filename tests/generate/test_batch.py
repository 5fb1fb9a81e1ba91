"""Rows of a batch: prompts take the place of samples that have ended, and no sample shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import VOCABULARY, Float64Throughout, build
from prefopt.generate import batch as sample_batch
from prefopt.generate.batch import Job, Queue, SampleBatch
from prefopt.generate.decode import SlotDecoder
from prefopt.generate.sampler import Sample, SamplingParams, choose, key_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.scorer import Scorer

STOP = (7, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(21, VOCABULARY, n).tolist() for n in lengths]


RAGGED = prompts(3, 9, 1, 30, 9, 4, 3, 12, 2, 6, 5, 17, 8, 1)


def by_own_forward(scorer: Scorer, prompt: list[int], number: int, params: SamplingParams) -> tuple[list[int], bool]:
    """A sample by the class's own forward pass on the whole sequence for each token."""
    ids: list[int] = []
    key = torch.tensor([key_of(params.seed, prompt, 0, number)])
    with torch.no_grad(), scorer.attention_by(None):
        while len(ids) < params.max_new_tokens:
            logits = scorer.model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[:, -1]
            ids.append(int(choose(logits.double(), params, key, len(ids)).token_n))
            if ids[-1] in params.stop:
                return ids, True
    return ids, False


# Plain, sliding windows, sinks, soft-caps, grouped heads with a scaled head, latent attention; then hybrids and ALiBi,
# whose own cache holds prompts of one length.
KINDS = ["llama", "mistral", "gpt_oss", "gemma2", "granite", "latent attention", "qwen3.5", "mamba", "bloom"]


@pytest.mark.parametrize("name", KINDS)
def test_samples_are_those_of_the_models_own_forward_token_by_token(name: str) -> None:
    scorer = Scorer(build(name))
    params = SamplingParams(14, STOP, 2, temperature=0.9)
    with Float64Throughout():
        found = TransformersSampler(scorer, rows=6).sample(RAGGED[:8], 2, params)
        expected = [[by_own_forward(scorer, prompt, k, params) for k in range(2)] for prompt in RAGGED[:8]]
    assert [[(s.ids.tolist(), s.finished) for s in many] for many in found] == expected
    assert {s.finished for many in found for s in many} == {True, False}


def plain(found: list[list[Sample]]) -> list[list[list[int]]]:
    return [[s.ids.tolist() for s in many] for many in found]


def test_rows_stay_full_and_a_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build("llama"))
    params = SamplingParams(24, STOP)
    alone = plain(TransformersSampler(scorer, rows=1).sample(RAGGED, 4, params))
    encoded: list[list[int]] = []
    sizes: list[int] = []
    fill, step = SlotDecoder._fill, SlotDecoder.step

    def filled(self: SlotDecoder, given: Any, rows: Any) -> torch.Tensor:
        encoded.extend(list(p) for p in given)
        return fill(self, given, rows)

    def stepped(self: SlotDecoder, token_n: torch.Tensor) -> torch.Tensor:
        sizes.append(len(token_n))
        return step(self, token_n)

    monkeypatch.setattr(SlotDecoder, "_fill", filled)
    monkeypatch.setattr(SlotDecoder, "step", stepped)
    found = TransformersSampler(scorer, rows=16).sample(RAGGED, 4, params)
    assert plain(found) == alone
    drawn = sum(s.tokens for many in found for s in many)
    assert len(encoded) == len(RAGGED), "samples of a prompt start together"
    # Batches of four prompts that wait for their longest sample make more steps.
    order = sorted(range(len(RAGGED)), key=lambda i: -len(RAGGED[i]))
    batches = [order[n : n + 4] for n in range(0, len(order), 4)]
    waiting = sum(max(s.tokens for i in some for s in found[i]) for some in batches)
    assert len(sizes) < 0.8 * waiting and drawn > 0.7 * sum(sizes), (len(sizes), waiting, drawn, sum(sizes))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("read_every", [3, pytest.param(8, marks=pytest.mark.slow), 100])
def test_the_host_may_look_at_tokens_late(name: str, read_every: int) -> None:
    """Rows that have ended draw on for nothing; none goes beyond its context."""
    scorer = Scorer(build(name))
    given = [*RAGGED, *prompts(110, 124)]
    params = SamplingParams(20, STOP, 3, top_p=0.9)
    told: list[tuple[int, int]] = []
    at_once = TransformersSampler(scorer, rows=7).sample(given, 3, params)
    late = TransformersSampler(scorer, rows=7, read_every=read_every)
    found = late.sample(given, 3, params, progress=lambda *n: told.append(n))
    assert plain(found) == plain(at_once)
    ended, drawn = (sum(x) for x in zip(*told, strict=True))
    assert ended == 3 * len(given) and drawn == sum(s.tokens for many in found for s in many)


def test_after_memory_ran_out_only_samples_under_way_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build("llama"))
    params = SamplingParams(24, STOP)
    expected = plain(TransformersSampler(scorer, rows=8).sample(RAGGED, 4, params))
    told: list[tuple[int, int]] = []

    def limited(z: torch.Tensor, *rest: Any) -> Any:
        if len(z) > 6 and sum(ended for ended, _ in told) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return choose(z, *rest)

    monkeypatch.setattr(sample_batch, "choose", limited)
    sampler = TransformersSampler(scorer, rows=8)
    found = sampler.sample(RAGGED, 4, params, progress=lambda *n: told.append(n))
    assert plain(found) == expected and sampler.rows == 4
    assert all(ended >= 0 for ended, _ in told) and any(drawn < 0 for _, drawn in told)
    assert sum(drawn for _, drawn in told) == sum(s.tokens for many in found for s in many)


@pytest.mark.parametrize("where", ["keep", "join", "index_copy", "_new_rows", "replace"])
def test_no_sample_is_lost_where_memory_runs_out_as_rows_are_refilled(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refill takes jobs from the queue before it copies the cache and runs the model; any of its steps may fail."""
    scorer = Scorer(build("llama"))
    params = SamplingParams(24, STOP)
    expected = plain(TransformersSampler(scorer, rows=8).sample(RAGGED, 4, params))
    owner: Any = {"index_copy": torch.Tensor, "_new_rows": SampleBatch, "replace": sample_batch._Rows}.get(
        where, SlotDecoder
    )
    step, failed, told = getattr(owner, where), list[int](), list[tuple[int, int]]()

    def short(self: Any, *given: Any) -> Any:
        if refilling and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *given)

    refill, refilling = SampleBatch._start_in, list[int]()

    def watched(self: SampleBatch, *given: Any) -> torch.Tensor:
        refilling.append(1)
        try:
            return refill(self, *given)
        finally:
            refilling.clear()

    monkeypatch.setattr(SampleBatch, "_start_in", watched)
    monkeypatch.setattr(owner, where, short)
    sampler = TransformersSampler(scorer, rows=8)
    found = sampler.sample(RAGGED, 4, params, progress=lambda *n: told.append(n))
    assert failed and sampler.rows == 4
    assert plain(found) == expected
    ended, drawn = (sum(x) for x in zip(*told, strict=True))
    assert ended == 4 * len(RAGGED) and drawn == sum(s.tokens for many in found for s in many)


def test_a_queue_keeps_kinds_apart_and_samples_of_a_prompt_together() -> None:
    queue = Queue([Job(0, 0, 4), Job(1, 0, 4), Job(2, 0, 4)], lambda prompt: prompt // 2)
    assert queue.take(5, 16) == [Job(0, 0, 4)], "one of four would start alone"
    assert queue.take(16, 16) == [Job(1, 0, 4)], "the next is of another kind"
    queue.give_back([Job(1, 3, 1)])
    assert queue.take(8, 8) == [Job(1, 3, 1)] and queue.take(3, 8) == [Job(2, 0, 3)]
    assert queue.take(9, 9) == [Job(2, 3, 1)] and not queue and queue.take(9, 9) == []
