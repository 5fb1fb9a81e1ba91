"""Drawing tokens: the right distribution, and the same token whatever stands beside it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prefopt.errors import ConfigError
from prefopt.generate.sampler import SamplingParams, choose, gumbel, key_of, uniform

DRAWS = 200_000


def keys(n: int) -> torch.Tensor:
    return torch.tensor([key_of(0, [5], 0, k) for k in range(n)])


def filtered(z: torch.Tensor, settings: SamplingParams) -> torch.Tensor:
    """The distribution that transformers would draw from."""
    nothing = torch.zeros(len(z), 1, dtype=torch.long)
    if settings.temperature != 1:
        z = TemperatureLogitsWarper(settings.temperature)(nothing, z)
    if settings.top_k is not None:
        z = TopKLogitsWarper(settings.top_k)(nothing, z)
    if settings.top_p < 1:
        z = TopPLogitsWarper(settings.top_p)(nothing, z)
    return torch.log_softmax(z, -1)


SETTINGS = [
    SamplingParams(9),
    SamplingParams(9, temperature=0.7),
    SamplingParams(9, temperature=1.5, top_p=0.8),
    SamplingParams(9, top_k=3),
    SamplingParams(9, top_k=1),
    SamplingParams(9, top_k=9, top_p=0.5),
    SamplingParams(9, top_k=1000, top_p=0.999),
    SamplingParams(9, top_p=1e-9),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("vocabulary", [2, 13, 1000])
def test_frequencies_and_log_probabilities_are_those_of_the_filtered_softmax(
    settings: SamplingParams, vocabulary: int
) -> None:
    z = 2 * torch.randn(1, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(vocabulary))
    if settings.top_k is not None and settings.top_k > vocabulary:
        settings = SamplingParams(9, top_k=vocabulary, top_p=settings.top_p)
    expected = filtered(z.clone(), settings)[0]
    found = choose(z.expand(DRAWS // 10, -1).clone(), settings, keys(DRAWS // 10), 3)
    torch.testing.assert_close(found.sampling_logp_n, expected[found.token_n], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.logp_n, torch.log_softmax(z, -1)[0, found.token_n], rtol=0, atol=1e-12)
    count = torch.bincount(found.token_n, minlength=vocabulary).numpy()
    p = expected.exp().numpy()
    assert not count[p == 0].any()
    # Pearson's statistic over the tokens that are common enough, the rest as one: far from its mean means wrong.
    common = p * len(found.token_n) >= 10
    cells = [(count[common], p[common]), (count[~common].sum(keepdims=True), p[~common].sum(keepdims=True))]
    n, q = (np.concatenate(x) for x in zip(*cells, strict=True))
    n, q = n[q > 0], q[q > 0] * len(found.token_n)
    assert ((n - q) ** 2 / q).sum() < len(n) + 6 * math.sqrt(2 * len(n))


def test_far_nuclei_are_found_beyond_the_tokens_sorted_first() -> None:
    z = torch.linspace(0, 0.1, 5000, dtype=torch.float64)[torch.randperm(5000, generator=torch.Generator())][None]
    sharp = torch.zeros(1, 5000, dtype=torch.float64)
    sharp[0, 7] = 20
    both = torch.cat([z, sharp]).repeat(500, 1)
    settings = SamplingParams(9, top_p=0.9)
    found = choose(both.clone(), settings, keys(1000), 0)
    expected = filtered(both, settings).gather(1, found.token_n[:, None])[:, 0]
    torch.testing.assert_close(found.sampling_logp_n, expected, rtol=0, atol=1e-10)
    assert set(found.token_n[1::2].tolist()) == {7} and len(set(found.token_n[::2].tolist())) > 400


def test_greedy_takes_the_likeliest_and_counts_as_certain() -> None:
    z = torch.randn(50, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = choose(z.clone(), SamplingParams(9, temperature=0), keys(50), 0)
    assert torch.equal(found.token_n, z.argmax(-1)) and not found.sampling_logp_n.any()
    torch.testing.assert_close(found.logp_n, torch.log_softmax(z, -1).amax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_comes_before_its_time(temperature: float) -> None:
    z = torch.zeros(2000, 10, dtype=torch.float64)
    z[:, [2, 3]] = 3.0
    settings = SamplingParams(9, stop=(2, 3), min_new_tokens=5, temperature=temperature)
    early, late = (choose(z.clone(), settings, keys(2000), step) for step in (4, 5))
    assert not torch.isin(early.token_n, torch.tensor([2, 3])).any() and (late.token_n == 2).any()
    if temperature:
        torch.testing.assert_close(early.sampling_logp_n, torch.full((2000,), -math.log(8), dtype=torch.float64))


def test_a_token_is_the_same_in_any_batch_and_with_rounding_of_another_kernel() -> None:
    """Only near ties may turn over: with noise of 1e-6, about one draw in a million."""
    z = 3 * torch.randn(4000, 8192, generator=torch.Generator().manual_seed(2))
    noisy = z + 1e-6 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    settings, key_n = SamplingParams(9), keys(4000)
    whole = choose(z.clone(), settings, key_n, 7)
    some = torch.randperm(4000, generator=torch.Generator().manual_seed(4))[:100]
    part = choose(z[some].clone(), settings, key_n[some], 7)
    assert torch.equal(part.token_n, whole.token_n[some])
    assert (choose(noisy, settings, key_n, 7).token_n != whole.token_n).sum() <= 1
    assert (choose(z, settings, key_n, 8).token_n != whole.token_n).float().mean() > 0.9


def test_noise_is_a_function_of_its_place() -> None:
    some, counter = keys(300), torch.arange(200)
    u = uniform(some, 4, counter)
    assert torch.equal(uniform(some[5:7], 4, counter[3:9]), u[5:7, 3:9])
    assert torch.equal(uniform(some, 4, counter.expand(300, -1)), u)
    assert ((u > 0) & (u < 1)).all() and u.unique().numel() == u.numel()
    many = torch.cat([uniform(some, step, counter).flatten() for step in range(8)])
    assert abs(float(many.mean()) - 0.5) < 5 / math.sqrt(12 * len(many))
    assert abs(float((many[1:] * many[:-1]).mean()) - 0.25) < 5 * 0.2205 / math.sqrt(len(many))
    g = gumbel(some, 4, counter)
    assert abs(float(g.mean()) - 0.5772) < 5 * 1.2825 / math.sqrt(g.numel())
    names = {key_of(seed, p, s, k) for seed in (0, 1) for p in ([1, 2], [2, 1], [1]) for s in (0, 1) for k in (0, 1)}
    assert len(names) == 24


def test_parameters_out_of_range_are_refused() -> None:
    wrong = [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", 0), ("min_new_tokens", 10)]
    for name, value in [*wrong, ("max_new_tokens", 0)]:
        with pytest.raises(ConfigError, match=name):
            SamplingParams(**{"max_new_tokens": 9, name: value})  # type: ignore[arg-type]
