"""PPO and RLOO in shards: the rollouts, losses and weights of one process, also after a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.small import small_tokenizer
from parallel.ranks import Failure, on_ranks
from parallel.test_runs import CASES, PPO, prepared, recorded, same, train, train_twice, weights
from parallel.test_shard import groups, model
from prefopt.config.ppo import PpoConfig
from prefopt.core.ranks import ranks_in
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import scalar_from
from prefopt.model.scorer import Scorer
from prefopt.parallel import shard
from prefopt.parallel.gathered import Shards, copy_as_it_is, cut, shard_with_copy
from prefopt.parallel.tensors import local_of
from prefopt.parallel.world import open_world
from prefopt.rl.models import build_models, bytes_of_others
from prefopt.rl.rewards import Rewards
from prefopt.rl.rollouts import Collector
from prefopt.train.policy import Policy
from prefopt.train.trainer import Trainer
from train.small import tiny_llama, write_model

KEPT = {"save_every": 1, "keep_last": 9}
# Two prompts in the last batch of an epoch, and two micro-batches a rank in the others.
ALL_MODELS = {"critic": "reward", "ptx_coefficient": 0.5, "ptx_batch_size": 2, "kl_target": 3.0}


def write_reward_model(folder: Path, seed: int = 5) -> str:
    tokenizer = small_tokenizer()
    scalar_from(tiny_llama(seed), tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def options_of(case: str, folder: Path) -> dict[str, Any]:
    """Those of a case; ``models``: a reward model, the critic that starts from it, another reference, and PPO-ptx."""
    if case != "models":
        return {**CASES[case][2], **KEPT}
    others = {"reward": write_reward_model(folder / "reward"), "reference": write_model(folder / "other", seed=3)}
    return {**PPO, **KEPT, **ALL_MODELS, **others, "ptx_data": [str(folder / "pairs.jsonl")]}


def rollouts(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Those that checkpoints keep, by step."""
    return {p.parent.name: load_file(p) for p in sorted(run.glob("checkpoints/step-*/rollouts.safetensors"))}


def same_rollouts(one: Path, other: Path, tolerance: float) -> None:
    """The same responses, token by token, whose scores and log-probabilities differ by rounding."""
    first, second = rollouts(one), rollouts(other)
    assert first.keys() == second.keys() and len(first) > 1
    for step, wanted in first.items():
        for name, tensor in wanted.items():
            found = second[step][name]
            if tensor.is_floating_point():
                torch.testing.assert_close(found, tensor, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(found, tensor), (step, name)


def check(case: str, world: int, how: str, folder: Path, node: int | None = None, **more: Any) -> None:
    base, data = prepared(folder, "pairs")
    options = {**options_of(case, folder), **more}
    run = train if "dtype" in more else train_twice
    on_ranks(1, run, "ppo", data, options, base, str(folder / "one"))
    on_ranks(world, run, "ppo", data, {**options, "shard": how}, base, str(folder / "many"), node=node)
    same_rollouts(folder / "one", folder / "many", 1e-9)
    if "dtype" not in more:
        same_rollouts(folder / "one-float32", folder / "many-float32", 2e-5)
    same(folder / "one", folder / "many")


def test_ppo_in_shards_is_that_of_one_process(tmp_path: Path) -> None:
    check("ppo", 3, "full", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", ["ppo-lora", "rloo", "rloo-lora", "models"])
def test_every_kind_of_ppo_in_shards_is_that_of_one_process(case: str, world: int, tmp_path: Path) -> None:
    check(case, world, "full", tmp_path, dtype="float64")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": True, "lora_rank": 2}], ids=["full", "lora"])
def test_replicas_of_shards_draw_and_learn_as_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    """With several micro-batches a rank, whose gradients the replicas sum once: the actor's and the critic's."""
    check("models", 4, "hybrid", tmp_path, node=2, batch_size=8, token_budget=30, dtype="float64", **options)


@pytest.mark.slow
def test_every_rank_issues_the_same_collectives(tmp_path: Path) -> None:
    """Also where the last batch has fewer prompts than there are ranks, so that one draws nothing."""
    base, data = prepared(tmp_path, "pairs")
    options = {**options_of("models", tmp_path), "shard": "full", "save_every": None, "max_steps": 3}
    first, *others = on_ranks(3, recorded, "ppo", data, options, base, str(tmp_path / "out"))
    assert len(first) > 100
    assert all(calls == first for calls in others)


def _killed(update: int, *arguments: Any) -> None:
    """A run, one rank of which is killed within an update."""
    own, calls = Trainer._update, []

    def dies(self: Trainer, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == update and ranks_in().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, *given)

    Trainer._update = dies  # type: ignore[method-assign]
    train(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(lora: bool, tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    options = {**PPO, **KEPT, "shard": "full", "lora": lora}
    arguments = ("ppo", data, options, base)
    on_ranks(2, train, *arguments, str(tmp_path / "whole"))
    first, killed = on_ranks(2, _killed, 18, *arguments, str(tmp_path / "parts"), failing=True)
    assert killed is None and isinstance(first, Failure) and first.kind == "PeerFailed", first
    on_ranks(2, train, "ppo", data, {**options, "resume": True}, base, str(tmp_path / "parts"))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all((one[name] == other[name]).all() for name in one)


def _stopped(update: int, *arguments: Any) -> None:
    own, calls = Trainer._update, []

    def stops(self: Trainer, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == update and ranks_in().rank == min(1, ranks_in().size - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *given)

    Trainer._update = stops  # type: ignore[method-assign]
    train(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2)])
def test_another_number_of_processes_goes_on_within_a_step(before: int, after: int, tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    on_ranks(1, train, "ppo", data, PPO, base, str(tmp_path / "one"))
    shards = [{"shard": "full"} if size > 1 else {} for size in (before, after)]
    where = (base, str(tmp_path / "parts"))
    found = on_ranks(before, _stopped, 11, "ppo", data, {**PPO, **shards[0]}, *where, failing=True)
    assert all(one.kind == "Interrupted" for one in found), found
    (within,) = (tmp_path / "parts" / "checkpoints").glob("step-*-*")
    assert len([*within.glob("weights*.safetensors")]) == before
    on_ranks(after, train, "ppo", data, {**PPO, **shards[1], "resume": True}, *where)
    same(tmp_path / "one", tmp_path / "parts")


def _no_memory(what: str, *arguments: Any) -> int:
    """A run in which rank 1 has no memory once, for a phase of the rollouts or for whole weights."""
    kind: Any = Shards if what == "_allocate" else Collector
    own, calls = getattr(kind, what), []

    def method(self: Any, *given: Any) -> Any:
        calls.append(given)
        if ranks_in().rank == 1 and len(calls) == 2:
            if what == "_allocate":  # at torch's own allocator
                new = torch.Tensor.new_empty
                try:
                    torch.Tensor.new_empty = _fails  # type: ignore[method-assign]
                    return own(self, *given)
                finally:
                    torch.Tensor.new_empty = new  # type: ignore[method-assign]
            _fails()
        return own(self, *given)

    setattr(kind, what, method)
    train(*arguments)
    return len(calls)


def _fails(*given: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["_draw", "_reference_logps", "_own_values"])
def test_out_of_memory_of_one_rank_in_rollouts_is_repeated_by_all(phase: str, tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    options = {**PPO, "token_budget": 200}
    on_ranks(1, train, "ppo", data, options, base, str(tmp_path / "one"))
    where = (data, {**options, "shard": "full"}, base, str(tmp_path / "three"))
    calls = on_ranks(3, _no_memory, phase, "ppo", *where)
    assert len({*calls}) == 1 and calls[0] > 4
    same(tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_whole_weights_that_do_not_fit_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    where = (data, {**PPO, "shard": "full"}, base, str(tmp_path / "out"))
    for found in on_ranks(3, _no_memory, "_allocate", "ppo", *where, failing=True):
        assert found.kind == "RunError" and "whole weights of one model" in found.message, found


def _little_memory(*arguments: Any) -> Any:
    shard.ROOM = 1e-9
    return train(*arguments)


@pytest.mark.slow
def test_auto_takes_shards_where_memory_is_short(tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    on_ranks(2, _little_memory, "ppo", data, {**PPO, **KEPT, "max_steps": 1}, base, str(tmp_path / "out"))
    (kept,) = (tmp_path / "out" / "checkpoints").glob("step-00000001")
    assert sorted(p.name for p in kept.glob("weights*")) == [f"weights-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_knows_the_size_of_the_models_that_are_still_to_come(dtype: str, tmp_path: Path) -> None:
    base, data = prepared(tmp_path, "pairs")
    named = {"reward": write_reward_model(tmp_path / "reward"), "reference": write_model(tmp_path / "other", seed=3)}
    for more, off in (({}, 0.0), ({"reference": None}, 0.0), ({"critic": "actor"}, 0.01), ({"lora": True}, 0.01)):
        config = PpoConfig(model=base, prompts=[data], output=str(tmp_path / "out"), **{**named, **more})
        policy = Policy(config, base, getattr(torch, dtype), torch.device("cpu"), None)
        policy.make_trainable()
        guess = bytes_of_others(config, policy, base, Rewards.of(config))
        models = build_models(config, policy, base, small_tokenizer(), (1,), 64, Rewards.of(config))
        assert models.critic is not None
        wanted = sum(held for name, held in models.memory().items() if name != "actor")
        # gradients, and the optimiser's two moments
        wanted += 3 * sum(m.numel() * m.element_size() for m in models.critic.weights.masters.values())
        assert guess == pytest.approx(wanted, rel=off), more


def _gathered(dtype_name: str, lora: bool) -> dict[str, Any]:
    """Scores with gathered weights, of a model that trains, of the same as it was, and of a frozen one."""
    world, dtype = open_world(), getattr(torch, dtype_name)
    plain = Scorer(model("llama", lora=lora))
    masters = MasterWeights(plain.model, dtype)
    batch = pack(groups()[:2], plain.layout)
    scorer = Scorer(model("llama", lora=lora))
    weights, apart = shard_with_copy(scorer, MasterWeights(scorer.model, dtype), world, dtype, hybrid=False)
    before = copy_as_it_is(apart, world)
    frozen = Scorer(model("qwen3").requires_grad_(False).to(dtype))
    with torch.no_grad():
        wanted_frozen = frozen(batch)
        cut(frozen, weights, world)
        wanted = plain(batch)
        for name, master in masters.masters.items():
            master.mul_(1.1)
            local_of(weights.masters[name]).mul_(1.1)
        masters.publish()
        moved = plain(batch)
        scorer(batch)  # leaves the root's weights gathered, of before or after
        found: dict[str, Any] = {"empty": all(not p.numel() for p in apart.parameters())}
        for name, model_of, value in (("moved", apart, moved), ("as it was", before, wanted)):
            with model_of.gathered():
                if world.rank == 0:  # the others make no pass
                    found[name] = torch.equal(model_of(batch), value)
                    found[f"{name}: weights"] = sum(p.numel() for p in model_of.parameters())
        with frozen.gathered():
            found["frozen"] = torch.equal(frozen(batch), wanted_frozen)
    found["empty again"] = all(not p.numel() for s in (apart, before, frozen) for p in s.parameters())
    assert frozen.shards is not None
    sizes = [(local_of(w).numel(), w.numel()) for w in frozen.shards.weights.values()]
    found["share"] = sum(local for local, _ in sizes) / sum(size for _, size in sizes)
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_weights_are_those_of_one_process_to_the_bit(dtype: str, lora: bool) -> None:
    whole = sum(p.numel() for p in model("llama", lora=lora).parameters())
    for rank, found in enumerate(on_ranks(3, _gathered, dtype, lora)):
        assert found["empty"] and found["empty again"] and found["frozen"]
        assert found["share"] < 0.5
        if rank == 0:
            assert found["moved"] and found["as it was"]
            assert found["moved: weights"] == found["as it was: weights"] == whole
