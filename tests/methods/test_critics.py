"""What a critic starts from, and what it learns at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from methods import small_world as world
from methods.test_ppo import QUICK, ROWS, metrics, ppo
from prefopt.errors import ConfigError, Diverged
from prefopt.model.merge import merge_adapter
from prefopt.rl.critic import Critic
from prefopt.rl.objective import rollout_metrics
from prefopt.rl.rollouts import Rollouts
from train.small import weights


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


def test_with_an_adapter_the_critic_starts_from_the_model_with_it(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values as of the merged model, and other ones than of the base alone."""
    values: list[torch.Tensor] = []

    def noted(rollouts: Rollouts, *given: object) -> dict[str, float]:
        assert rollouts.value_M is not None
        values.append(rollouts.value_M)
        return rollout_metrics(rollouts, *given)  # type: ignore[arg-type]

    ppo(start, tmp_path / "adapter", lora=True, learning_rate=1e-2)
    cpu = torch.device("cpu")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", model=start, dtype=torch.float32, device=cpu)
    monkeypatch.setattr("prefopt.rl.ppo.rollout_metrics", noted)
    models = {start: {"adapter": str(tmp_path / "adapter")}, str(tmp_path / "merged"): {"lora": True}}
    for name, options in models.items():
        ppo(name, tmp_path / f"on{len(values)}", rows=ROWS[:4], critic="actor", max_steps=1, num=8, **options)
    own, merged = values
    assert own.shape == merged.shape and float((own - merged).abs().max()) < 1e-4 < 0.1 < float(own.std())


def test_a_critic_of_a_model_given_in_python_is_a_head_unless_another_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"reward": world.reward, **QUICK, "max_steps": 1, "tokenizer": world.tokenizer()}
    with pytest.raises(ConfigError, match=r"critic actor: .*critic head"):
        prefopt.ppo(world.model(), ROWS, output=tmp_path / "a", critic="actor", **options)
    prefopt.ppo(world.model(), ROWS, output=tmp_path / "b", **{**options, "progress": "plain"})
    assert "critic: a head on the actor's layers" in capsys.readouterr().out


def test_a_head_learns_at_the_learning_rate_of_the_critic(start: str, tmp_path: Path) -> None:
    rates = {"none": {}, "same": {"critic_learning_rate": 1e-3}, "none of it": {"critic_learning_rate": 1e-12}}
    for name, given in rates.items():
        ppo(start, tmp_path / name, critic="head", learning_rate=1e-3, **given)
    plain, same, still = (weights(tmp_path / name) for name in rates)
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert any(not torch.equal(plain[name], still[name]) for name in plain)
    lost = [metrics(tmp_path / name)[-1]["loss/value_avg"] for name in rates]
    assert lost[0] == lost[1] != lost[2]


def test_values_that_are_no_numbers_are_named(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Critic.values

    def lost(self: Critic, *given: Any) -> torch.Tensor:
        return values(self, *given) * torch.nan

    monkeypatch.setattr(Critic, "values", lost)
    with pytest.raises(Diverged, match=r"advantages are not finite, with scores from .* the critic's values from nan"):
        ppo(start, tmp_path / "out")
