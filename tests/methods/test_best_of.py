"""Best-of-N keeps the best, and what it keeps is distributed as it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefopt
from methods import small_world as world
from prefopt.errors import ConfigError, RunError

QUICK: dict[str, Any] = {"max_new_tokens": 3, "device": "cpu", "dtype": "float64", "progress": "none"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


@pytest.fixture
def _word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--reward best_of_reward:score``: the small world's."""
    (tmp_path / "best_of_reward.py").write_text("from methods.small_world import reward as score\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_word")
def test_every_sample_is_the_best_of_its_draws(small: str) -> None:
    rows = [{"prompt": "abc"}, {"prompt": "ab"}]
    every = prefopt.sample(small, rows, num=12, **QUICK).rows
    best = prefopt.sample(small, rows, num=3, best_of=4, reward="best_of_reward:score", **QUICK).rows
    for all_drawn, kept in zip(every, best, strict=True):
        scores = np.array(world.reward([], all_drawn["responses"])).reshape(3, 4)
        where = scores.argmax(1) + np.arange(3) * 4
        assert kept["responses"] == [all_drawn["responses"][k] for k in where]
        assert kept["rewards"] == scores.max(1).tolist()


@pytest.mark.usefixtures("_word")
def test_a_reward_that_is_no_number_is_named(small: str, tmp_path: Path) -> None:
    (tmp_path / "best_of_broken.py").write_text("def score(prompts, responses):\n    return [None] * len(prompts)\n")
    with pytest.raises(RunError, match="gave None for a response to 'abc'"):
        prefopt.sample(small, [{"prompt": "abc"}], best_of=2, reward="best_of_broken:score", **QUICK)


@pytest.mark.parametrize("options", [{"best_of": 2}, {"reward": "length"}])
def test_one_without_the_other_is_refused(options: dict[str, Any], small: str) -> None:
    with pytest.raises(ConfigError, match="go together"):
        prefopt.sample(small, [{"prompt": "abc"}], **QUICK, **options)
