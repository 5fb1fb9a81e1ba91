"""Mixtures: how often each row is taken is exact, and every order is a function of seed and epoch alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefopt.config.dpo import DpoConfig
from prefopt.data.sampler import BatchSampler, Share
from prefopt.errors import ConfigError

mixtures = st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1, 1.5, 2, 2.25])), min_size=1)


def shares(mixture: list[tuple[int, float]]) -> list[Share]:
    """Sources whose rows alternate in no particular way."""
    total = sum(n for n, _ in mixture)
    order = np.random.default_rng(0).permutation(total)
    ends = np.cumsum([n for n, _ in mixture])
    return [Share(np.sort(order[e - n : e]), w) for (n, w), e in zip(mixture, ends, strict=True)]


@settings(max_examples=80)
@given(mixtures, st.integers(0, 5), st.integers(1, 7), st.booleans())
def test_each_source_is_taken_as_often_as_its_weight_says(
    mixture: list[tuple[int, float]], seed: int, batch_size: int, shuffle: bool
) -> None:
    assume(sum(round(w * n) for n, w in mixture))
    total = sum(n for n, _ in mixture)
    sampler = BatchSampler(total, batch_size, seed=seed, shuffle=shuffle, shares=shares(mixture))
    epochs = 6
    assert sampler.epoch_size == sum(round(w * n) for n, w in mixture)
    taken: Counter[int] = Counter()
    for epoch in range(epochs):
        order = sampler.order(epoch)
        counts = Counter(order.tolist())
        assert len(order) == sampler.epoch_size
        taken += counts
        for share in sampler.shares:
            here = [counts[g] for g in share.groups.tolist()]
            assert sum(here) == round(share.weight * len(here))
            assert max(here) - min(here) <= 1
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        assert np.concatenate([sampler.batch(step) for step in steps]).tolist() == order.tolist()
    for share in sampler.shares:
        all_epochs = [taken[g] for g in share.groups.tolist()]
        assert max(all_epochs) - min(all_epochs) <= 1
    # Any step can be rebuilt by a sampler that never saw the others.
    last = epochs * sampler.steps_per_epoch - 1
    again = BatchSampler(total, batch_size, seed=seed, shuffle=shuffle, shares=shares(mixture))
    assert again.batch(last).tolist() == sampler.batch(last).tolist()


def test_a_half_is_another_half_each_epoch_and_all_of_it_in_two() -> None:
    sampler = BatchSampler(100, 10, seed=3, shares=[Share(np.arange(100), 0.5)])
    one, other, third = (set(sampler.order(epoch).tolist()) for epoch in range(3))
    assert len(one) == len(other) == 50 and one | other == set(range(100)) == other | third
    assert one != {*range(50)} and one != set(BatchSampler(100, 10, seed=4, shares=sampler.shares).order(0).tolist())


def test_weights_of_one_change_nothing() -> None:
    plain = BatchSampler(30, 4, seed=5)
    weighted = BatchSampler(30, 4, seed=5, shares=[Share(np.arange(20), 1.0), Share(np.arange(20, 30), 1.0)])
    assert weighted.steps_per_epoch == plain.steps_per_epoch == 8
    assert all(weighted.batch(step).tolist() == plain.batch(step).tolist() for step in range(17))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (["1"], "--data-weights has 1 numbers and --data 2 names: give one number for each name"),
        (["1", "x"], "--data-weights x: the weight of b must be a number above 0"),
        (["0", "1"], "--data-weights 0: the weight of a must be"),
        (["1", "inf"], "--data-weights inf: the weight of b must be"),
    ],
)
def test_weights_that_are_none(weights: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DpoConfig(model="m", data=["a", "b"], output="o", data_weights=weights)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert DpoConfig(model="m", data=["a", "b"], output="o", data_weights=["2", "1e-1"]).weights == [2.0, 0.1]
