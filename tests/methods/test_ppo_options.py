"""Every option of PPO does something: runs with and without it end with other weights, or leave another trace.

Options that other verbs share, and whose effect is shown there, are named in ``SHOWN_ELSEWHERE``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from methods import small_world as world
from methods.test_ppo import ppo
from prefopt.config.ppo import PpoConfig
from train.small import weights

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"epochs": 2, "ppo_epochs": 2}
CRITIC: dict[str, Any] = {"critic": "head"}
MOVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "num": (3, {}),
    "max_new_tokens": (2, {}),
    "temperature": (0.7, {}),
    "shuffle": (False, {}),
    "missing_eos_penalty": (1.0, {}),
    "missing_eos_score": (-1.0, {}),
    "beta": (1.0, {}),
    "kl_target": (2.0, {"beta": 0.05}),
    "kl_horizon": (20.0, {"kl_target": 2.0}),
    "algorithm": ("rloo", {}),
    "epochs": (3.0, {}),
    "max_steps": (1, {}),
    "batch_size": (8, {}),
    "ppo_epochs": (1, {}),
    "minibatches": (2, {}),
    "learning_rate": (1e-3, {}),
    "schedule": ("constant", {}),
    "warmup": (0.5, {}),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.9, {}),
    "adam_epsilon": (1e-2, {}),
    "max_grad_norm": (0.01, {}),
    "clip": (0.01, {"ppo_epochs": 4}),
    "whiten_advantages": (False, {}),
    "whiten_rewards": (True, {}),
    "normalise_scores": ("running", {}),
    "max_update_kl": (1e-9, {"ppo_epochs": 4}),
    "gamma": (0.5, {}),
    "gae_lambda": (0.2, {}),
    "value_clip": (1e-4, CRITIC),
    "value_coefficient": (1.0, CRITIC),
    "critic": ("head", {}),
    "critic_learning_rate": (1e-4, {}),
    "seed": (1, {}),
    "lora": (True, {}),
    "reference": ("@other", {}),
    "ptx_data": (["@kept.jsonl"], {}),
    "ptx_coefficient": (3.0, {"ptx_data": ["@kept.jsonl"]}),
    "ptx_batch_size": (1, {"ptx_data": ["@kept.jsonl"]}),
    "reward": ("length", {}),
}
SHOWN_HERE = {
    "max_kl": "test_a_run_that_ran_away_leaves_a_model_to_go_on_from",
    "resume": "test_a_stopped_run_goes_on_to_the_same_bits",
    "save_every": "test_a_stopped_run_goes_on_to_the_same_bits",
    "gradient_checkpointing": "test_checkpointing_saves_less_of_actor_and_critic_and_ends_with_the_same_bits",
    "dtype": "test_a_stopped_run_goes_on_to_the_same_bits",
    "judge_url": "test_a_run_learns_from_a_judge_and_resumes_with_it",
    "judge_model": "test_a_run_learns_from_a_judge_and_resumes_with_it",
    "judge_prompt": "test_a_run_learns_from_a_judge_and_resumes_with_it",
    "judge_pattern": "test_a_judge_scores_once_retries_and_says_what_it_did_not_score",
    "true_reward": "test_a_reward_that_is_exploited_is_told_while_it_happens_and_by_diagnose",
    "eval_prompts": "test_a_reward_that_is_exploited_is_told_while_it_happens_and_by_diagnose",
    "eval_every": "test_a_reward_that_is_exploited_is_told_while_it_happens_and_by_diagnose",
    "keep_samples": "test_the_reward_is_the_weighted_sum_of_its_components",
}
SHOWN_ELSEWHERE = set(
    "model adapter lora_rank lora_alpha lora_dropout lora_targets quantise prompts lines on_bad_row format columns"
    " header label_means ignore_columns picture_folder chat_template"
    " judge_key template_variables output keep_last overwrite dry_run progress track track_project token_budget"
    " attention compile deterministic device threads shard optimizer offload"
    " router_aux_loss_coef router_z_loss_coef vision"
    " rollout_server rollout_model rollout_key rollout_folder server_concurrency server_timeout server_gap"
    " stale importance_cap".split()
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("options")
    world.write_world(folder / "m")
    world.write_world(folder / "other", seed=5)
    (folder / "kept.jsonl").write_text('{"text": "abc"}\n{"text": "fed"}\n')
    return folder, {}


def there(folder: Path, value: Any) -> Any:
    """``value``, with paths in the folder where it begins with @."""
    if isinstance(value, list):
        return [there(folder, one) for one in value]
    return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value


def run(places: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that a run ends with; asked for again, those that it did."""
    folder, known = places
    name = json.dumps(options, sort_keys=True)
    if name not in known:
        given = {k: there(folder, v) for k, v in options.items()}
        output = folder / f"run{len(list(folder.glob('run*')))}"
        ppo(str(folder / "m"), output, **{**PLAIN, **given})
        known[name] = weights(output)
    return known[name]


@pytest.mark.parametrize("name", MOVES)
def test_an_option_moves_the_weights(name: str, places: Any) -> None:
    value, company = MOVES[name]
    plain, other = run(places, company), run(places, {**company, name: value})
    assert plain.keys() != other.keys() or any(not torch.equal(plain[n], other[n]) for n in plain)


def test_every_option_is_in_a_table() -> None:
    assert {f.name for f in dataclasses.fields(PpoConfig)} == set(MOVES) | set(SHOWN_HERE) | SHOWN_ELSEWHERE
    here = Path(__file__)
    files = ("ppo", "ppo_details", "ppo_rewards", "last_good")
    text = "".join(here.with_name(f"test_{x}.py").read_text("utf-8") for x in files)
    assert all(f"def {test}" in text for test in SHOWN_HERE.values())
