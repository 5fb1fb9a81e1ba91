"""A run that is stopped between two updates of a step: its checkpoint, beside that of the step before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_last_good import AWAY, ran_away
from methods.test_ppo import ppo, same_bits, stopped
from prefopt.errors import RunError
from prefopt.train import checkpoint
from prefopt.train.checkpoint import Checkpoint
from prefopt.train.saver import Saver
from train.test_resume import flip

OPTIONS: dict[str, Any] = {"epochs": 2, "minibatches": 2, "ppo_epochs": 2}  # four steps of four updates


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


@pytest.fixture(scope="module")
def whole(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    ppo(small, output, save_every=1, keep_last=9, **OPTIONS)
    return output


def names(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_it_stands_beside_the_weights_of_the_step_and_goes_with_the_next(
    small: str, whole: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "save_every": 1, "keep_last": 1}
    stopped(6, small, tmp_path / "out", **options)
    assert names(tmp_path / "out") == ["step-00000001", "step-00000001-0002"]
    stopped(1, small, tmp_path / "out", resume=True, **options)
    assert names(tmp_path / "out") == ["step-00000001", "step-00000001-0003"]
    kept, made = (checkpoint.at(output / "checkpoints", 1).weights for output in (tmp_path / "out", whole))
    assert kept.keys() == made.keys() and all(torch.equal(kept[name], made[name]) for name in kept)
    ppo(small, tmp_path / "out", resume=True, **options)
    assert same_bits(tmp_path / "out", whole) and names(tmp_path / "out") == ["step-00000004"]


def test_behind_a_damaged_one_the_step_is_done_again(small: str, whole: Path, tmp_path: Path) -> None:
    stopped(6, small, tmp_path / "out", **OPTIONS)
    flip(tmp_path / "out/checkpoints/step-00000001-0002/weights.safetensors")
    ppo(small, tmp_path / "out", resume=True, **OPTIONS)
    assert same_bits(tmp_path / "out", whole)


def test_weights_that_were_measured_stay_good(small: str, tmp_path: Path) -> None:
    options = {"save_every": 1, "ppo_epochs": 2, "minibatches": 1}
    said = ran_away(small, tmp_path / "whole", **options)
    good = int(re.search(r"after step (\d+), are a model", said)[1])  # type: ignore[index]
    stopped(2 * good + 1, small, tmp_path / "out", **{**AWAY, **options})
    assert names(tmp_path / "out")[-1] == f"step-{good:08d}-0001"
    again = ran_away(small, tmp_path / "out", resume=True, **options)
    assert again == said.replace(str(tmp_path / "whole"), str(tmp_path / "out"))


def save(folder: Path, value: float, done: int = 0) -> None:
    state = {"step": 3, "progress": {"done": done}}
    Saver(folder).save(Checkpoint({"w": torch.tensor([value])}, {}, state), keep_last=2)


def test_a_process_that_is_killed_while_it_replaces_one_leaves_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1.0)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target.name == "step-00000003":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2.0)
    (found,) = checkpoint.whole(tmp_path)
    assert float(found[1].weights["w"]) == 1.0
    save(tmp_path, 3.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert float(checkpoint.at(tmp_path, 3).weights["w"]) == 3.0


def test_weights_from_within_a_step_are_not_taken_for_those_of_the_step(tmp_path: Path) -> None:
    """As versions before wrote them."""
    save(tmp_path, 1.0, done=2)
    (tmp_path / "step-00000003-0002").rename(tmp_path / "step-00000003")
    with pytest.raises(RunError, match=r"step-00000003 cannot be read \(an earlier version wrote weights from within"):
        checkpoint.at(tmp_path, 3)
    assert len(list(checkpoint.whole(tmp_path))) == 1
