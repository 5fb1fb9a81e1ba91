"""What truncation keeps, on sequences of every shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.chat.template import Rendering
from prefopt.data.chat.truncate import KEEP_PROMPT, truncate
from prefopt.data.group import Group
from prefopt.errors import ConfigError

BOS = 1


@st.composite
def groups(draw: st.DrawFn) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """K sequences of one prompt, whose last tokens may belong to one response only, and whose mask may have gaps."""
    bos = [BOS] if draw(st.booleans()) else []
    shared = [*bos, *range(10, 10 + draw(st.integers(0, 400)))]
    whole = []
    for k in range(draw(st.integers(1, 3))):
        own = [1000 + k] * draw(st.integers(0, 3))
        answer = draw(st.integers(2, 300))
        gap = draw(st.integers(0, answer - 2))
        mask = [i < 2 or i > gap for i in range(answer)]
        ids = [*shared, *own, *range(2000 + 300 * k, 2000 + 300 * k + answer)]
        whole.append((np.array(ids), np.array([False] * (len(shared) + len(own)) + mask)))
    return whole


@given(groups(), st.integers(10, 600))
def test_invariants(whole: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], max_length: int) -> None:
    result = truncate(whole, max_length, bos=BOS)
    keep = min(KEEP_PROMPT, max_length // 2)
    longest = max(len(ids) for ids, _ in whole)
    assert (result.prompt == 0 and not any(result.responses)) == (longest <= max_length)
    prompts = [int(np.argmax(mask)) for _, mask in whole]
    start = int(whole[0][0][0] == BOS)
    for (ids, mask), (new, new_mask), lost, prompt in zip(
        whole, result.sequences, result.responses, prompts, strict=True
    ):
        assert len(new) == len(new_mask) <= max_length and new_mask.any()
        # The same tokens go from the left for all, BOS stays, and the rest is as it was, mask and all.
        left = np.delete(np.arange(len(ids)), np.s_[start : start + result.prompt])
        left = left[: len(left) - lost]
        assert np.array_equal(new, ids[left]) and np.array_equal(new_mask, mask[left])
        assert int(np.argmax(new_mask)) >= min(prompt, keep)
        if lost:
            # An answer is touched only when the prompt has nothing more to give.
            shared = next((i for i in range(min(prompts)) if len({int(w[0][i]) for w in whole}) > 1), min(prompts))
            assert min(prompts) - result.prompt <= keep or result.prompt == max(shared - start, 0)
            assert new_mask[-1]
    before, after = Group.from_sequences(whole, 1, ()), Group.from_sequences(result.sequences, 1, ())
    assert len(after.prefix) == len(before.prefix) - result.prompt


def test_no_room_for_a_response() -> None:
    sequences = [([9, 9, 9, 9, k, 3], [0, 0, 0, 0, 1, 1]) for k in (1, 2)]
    assert truncate(sequences, 2).prompt == 3
    apart = [([k, 9, 9, 9, 5, 3], [0, 0, 0, 0, 1, 1]) for k in (1, 2)]
    with pytest.raises(ValueError, match="no room"):
        truncate(apart, 4)
    with pytest.raises(ConfigError, match="--max-length 1 "):
        Rendering(max_length=1)


def test_a_cut_answer_does_not_end_like_a_finished_one() -> None:
    # 3 ends a turn. The answer spells it out in its middle, and twice just where it is cut.
    ids, trained = [1, 7, 7, 5, 3, 5, 3, 3, 5, 5, 3], [0, 0, 0] + [1] * 8
    for max_length, kept in ((11, 8), (10, 7), (8, 3), (7, 3), (6, 3), (5, 3), (4, 1)):
        ((cut, mask),) = truncate([(ids, trained)], max_length, ends=(3,)).sequences
        assert cut[mask].tolist() == ids[3 : 3 + kept], max_length
    # A turn that is finished keeps its end, whatever is cut behind it.
    ids, trained = [1, 7, 5, 3, 7, 7, 5, 5, 3], [0, 0, 1, 1, 0, 0, 1, 1, 1]
    for max_length in (4, 5, 6):
        ((cut, mask),) = truncate([(ids, trained)], max_length, ends=(3,)).sequences
        assert cut[mask].tolist() == [5, 3]
