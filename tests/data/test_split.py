"""Held-out prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.sampler import split_by_prompt
from prefopt.data.table import KEY
from prefopt.errors import ConfigError, DataError

keys = st.lists(st.binary(max_size=2).map(lambda k: k + b"."), min_size=2, max_size=60).filter(
    lambda k: len(set(k)) > 1
)


@given(keys, st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_no_prompt_on_both_sides_and_none_lost(names: list[bytes], fraction: float, seed: int) -> None:
    train, held = split_by_prompt(np.array(names, KEY), fraction, seed)
    assert train and held and sorted(train + held) == list(range(len(names)))
    assert not {names[i] for i in train} & {names[i] for i in held}


def test_appended_rows_move_no_other_and_the_fraction_holds() -> None:
    names = [str(i).encode() for i in range(2000)]
    train, held = split_by_prompt(np.array(names, KEY), 0.1, seed=1)
    assert 150 <= len(held) <= 250
    more_train, more_held = split_by_prompt(np.array([*names, *(b"new%d" % i for i in range(500))], KEY), 0.1, seed=1)
    assert more_train[: len(train)] == train and more_held[: len(held)] == held


def test_the_least_number_is_held_out_and_splits_stay_nested() -> None:
    keys = np.array([str(i).encode() for i in range(400)], KEY)
    for seed in range(20):  # 20 are expected, and by chance as few as ten
        bare = split_by_prompt(keys, 0.05, seed)[1]
        held = split_by_prompt(keys, 0.05, seed, least=20)[1]
        assert len(held) == max(20, len(bare)) and set(bare) <= set(held) <= set(split_by_prompt(keys, 0.2, seed)[1])
    train, held = split_by_prompt(keys[:3], 0.05, seed, least=20)
    assert (len(train), len(held)) == (1, 2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_fractions_that_leave_a_side_empty(fraction: float) -> None:
    with pytest.raises(ConfigError, match="--eval-fraction"):
        split_by_prompt(np.array([b"a", b"b"], KEY), fraction, seed=0)
    with pytest.raises(DataError, match="the same prompt"):
        split_by_prompt(np.array([b"a", b"a"], KEY), 0.5, seed=0)
