"""Details of PPO that decide whether it works, where no other test shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_ppo import ROWS, kept_rollouts, metrics, ppo, same_bits, stopped
from prefopt.config.ppo import PpoConfig
from prefopt.errors import RunError
from prefopt.model.scalar import scalar_from
from prefopt.model.scorer import Scorer
from prefopt.rl.critic import Critic

GUIDE = Path(__file__).parents[2] / "docs/guide/ppo.md"


def test_defaults_are_those_that_made_it_work() -> None:
    """Huang et al. 2024 (arXiv 2403.17031), and Ziegler et al. 2019 for the controller."""
    options: dict[str, Any] = {"model": "m", "prompts": ["p"], "reward": "length", "output": "o"}
    found = PpoConfig(**options)
    wanted = {
        "learning_rate": "auto",
        "published_rate": 3e-6,
        "schedule": "linear",
        "warmup": 0.0,
        "adam_epsilon": 1e-5,
        "weight_decay": 0.0,
    }
    wanted |= {"gamma": 1.0, "gae_lambda": 0.95, "clip": 0.2, "value_clip": 0.2, "value_coefficient": 0.1}
    wanted |= {"ppo_epochs": 4, "minibatches": 1, "whiten_advantages": True, "whiten_rewards": False, "beta": 0.05}
    assert {name: getattr(found, name) for name in wanted} == wanted
    adaptive = PpoConfig(**options, kl_target=6.0)
    assert (adaptive.beta, adaptive.kl_horizon) == (0.15, 10_000)


def test_dropout_is_off_in_every_model(tmp_path: Path) -> None:
    """Attention would refuse it, and ratios would not be 1 before any weight has moved."""
    for name, model in {"m": world.model(), "reward": scalar_from(world.model(seed=7), world.tokenizer())}.items():
        model.config.attention_dropout = 0.5
        model.save_pretrained(tmp_path / name)
        world.tokenizer().save_pretrained(tmp_path / name)
    ppo(str(tmp_path / "m"), tmp_path / "out", reward=str(tmp_path / "reward"), max_steps=1)
    assert metrics(tmp_path / "out")[0]["val/sampler_gap_max"] < 1e-6


def test_a_prompt_that_comes_again_is_answered_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_rollouts(monkeypatch)
    options: dict[str, Any] = {"algorithm": "rloo", "num": 16, "learning_rate": 1e-12, "epochs": 2}
    ppo(world.write_world(tmp_path / "m"), tmp_path / "out", [{"prompt": "ab"}], **options)
    first, second = ([tuple(c.ids.tolist()) for c in r.groups[0].continuations] for r in kept)
    assert first != second and len(set(first)) > 4


def test_values_are_those_before_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses to a prompt begin at one state: a value that saw the first token would differ."""
    kept = kept_rollouts(monkeypatch)
    ppo(world.write_world(tmp_path / "m"), tmp_path / "out", num=6, max_steps=1)
    rollouts = kept[0]
    assert rollouts.value_M is not None
    first = rollouts.length_N.cumsum(0) - rollouts.length_N
    value_N = rollouts.value_M[first]
    for prompt in rollouts.group_N.unique():
        torch.testing.assert_close(value_N[rollouts.group_N == prompt].std(), torch.tensor(0.0).double())
    assert value_N.std() > 1e-3


def test_metrics_are_those_of_the_guide(tmp_path: Path) -> None:
    table = re.findall(r"^\| (`[a-z].*?) \|", GUIDE.read_text("utf-8").partition("\n## Metrics\n")[2], re.M)
    told = {name for cell in table for name in re.findall(r"`(\S+?)`", cell)}
    file = tmp_path / "kept.jsonl"
    file.write_text('{"text": "abc"}\n')
    ppo(world.write_world(tmp_path / "m"), tmp_path / "out", max_steps=1, ptx_data=[str(file)])

    logged = set(json.loads((tmp_path / "out/metrics.jsonl").read_text()))
    assert told <= logged
    assert {name for name in logged if "/" in name} == {name for name in told if "/" in name}


def test_a_prompt_that_is_too_long_is_a_bad_row_like_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = world.write_world(tmp_path / "m")
    rows = [{"prompt": "abcdefabcdefab"}, *ROWS]
    ppo(start, tmp_path / "out", rows=rows, on_bad_row="skip", progress="plain")
    said = capsys.readouterr().out
    assert "prompts: 9 read, 8 kept, 1 refused" in said and "prompt too long: 1 (row 1; has 14 tokens" in said
    assert [line["episode"] for line in metrics(tmp_path / "out")] == [8, 16]


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_checkpointing_saves_less_of_actor_and_critic_and_ends_with_the_same_bits(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, int] = {}

    def counted(name: str, forward: Any) -> Any:
        """``forward``, with the bytes counted that it keeps for the backward pass."""

        def pack(x: torch.Tensor) -> torch.Tensor:
            saved[name] += x.numel() * x.element_size()
            return x

        def wrapped(*given: Any, **named: Any) -> Any:
            saved.setdefault(name, 0)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                return forward(*given, **named)

        return wrapped

    start = world.write_world(tmp_path / "m")
    monkeypatch.setattr(Scorer, "forward", counted("actor", Scorer.forward))
    monkeypatch.setattr(Critic, "values", counted("critic", Critic.values))
    ppo(start, tmp_path / "plain", lora=lora, critic="actor")
    plain = dict(saved)
    saved.clear()
    ppo(start, tmp_path / "less", lora=lora, critic="actor", gradient_checkpointing=True)
    assert saved["actor"] < 0.7 * plain["actor"] and saved["critic"] < 0.7 * plain["critic"]
    assert same_bits(tmp_path / "plain", tmp_path / "less")


def test_a_reward_whose_code_changed_is_noticed_at_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, start = tmp_path / "reward_that_changes.py", world.write_world(tmp_path / "m")
    code = "def size(prompts, responses):\n    return [len(r) * 1.0 for r in responses]\n"
    file.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"reward": "reward_that_changes:size", "save_every": 1}
    stopped(3, start, tmp_path / "out", **options)
    file.write_text(code.replace("1.0", "2.0"))
    with pytest.raises(RunError, match="the code of --reward reward_that_changes:size changed since"):
        ppo(start, tmp_path / "out", resume=True, **options)
    file.write_text(code)
    ppo(start, tmp_path / "out", resume=True, **options)
