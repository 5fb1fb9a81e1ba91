"""PPO and RLOO, whole runs: what they reach, how they stop and go on, and what they refuse."""

from __future__ import annotations

import gc
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

import prefopt
from methods import small_world as world
from prefopt.errors import ConfigError, DataError, Interrupted, ModelError, RunError, UserError
from prefopt.methods.ppo import PpoResult
from prefopt.model.packing import pack
from prefopt.model.scalar import ScalarScorer, scalar_from
from prefopt.model.scorer import Scorer
from prefopt.rl import ppo as rl_ppo
from prefopt.rl.critic import Critic
from prefopt.rl.objective import PpoObjective
from prefopt.rl.rollouts import Collector, Rollouts
from prefopt.train.trainer import Trainer
from train.small import weights

ROWS = [{"prompt": a + b} for a in "abcd" for b in "ef"]
QUICK: dict[str, Any] = {
    "batch_size": 4,
    "num": 2,
    "max_new_tokens": 3,
    "learning_rate": 5e-3,
    "device": "cpu",
    "dtype": "float64",
    "progress": "none",
}
CLOCKS = ("seconds", "eps", "peak_memory_bytes")


def ppo(model: str, output: Path, rows: Any = ROWS, **options: Any) -> PpoResult:
    result = prefopt.ppo(model, rows, output=output, **{"reward": world.reward, **QUICK, **options})
    assert result is not None
    return result


def metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(clock in k for clock in CLOCKS)} for line in lines]


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(one) == metrics(other)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model on the small world's tokens, with random weights."""
    folder = tmp_path_factory.mktemp("world") / "reward"
    tokenizer = world.tokenizer()
    scalar_from(world.model(seed=7), tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# -- what a run says of its responses ------------------------------------------------------------------------------


def test_numbers_of_the_first_step_are_those_of_an_untrained_policy(small: str, tmp_path: Path) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        seen.append((list(prompts), list(responses)))
        return world.reward(prompts, responses)

    ppo(small, tmp_path / "out", reward=reward, max_steps=1, missing_eos_penalty=1.0, beta=0.3)
    (record,) = metrics(tmp_path / "out")
    ((prompts, texts),) = seen
    assert len(texts) == 8 and not any("</s>" in text for text in texts)  # cut at the end mark, which is not shown
    assert set(prompts) <= {row["prompt"] for row in ROWS} and prompts[0] == prompts[1]
    scores = world.reward(prompts, texts)
    assert record["objective/scores"] == pytest.approx(np.mean(scores))
    cut = 8 - record["val/num_eos_tokens"]
    assert record["objective/rlhf_reward"] == pytest.approx((sum(scores) - cut) / 8)
    assert record["objective/kl"] == pytest.approx(0, abs=1e-9) and record["objective/kl_k3"] >= 0
    assert record["val/sampler_gap"] < 1e-6
    assert record["objective/beta"] == 0.3


def test_the_temperature_is_in_every_log_probability(small: str) -> None:
    scorer = Scorer(world.model().double().requires_grad_(False))
    with scorer.at_temperature(0.5):
        cold = world.distribution(scorer)
    plain = world.distribution(scorer)
    # Every response is the product of its tokens' tempered distributions: listed one by one.
    model = world.model().double()
    prompt = [world.LETTERS.index(x) for x in world.PROMPT]
    for y in (0, 5, 77, 300):
        ids = torch.tensor([[*prompt, *world.RESPONSES[y]]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        at = torch.arange(len(world.RESPONSES[y]))
        for temperature, found in ((0.5, cold), (1.0, plain)):
            logp = (logits / temperature).log_softmax(-1)[at, torch.tensor(world.RESPONSES[y])].sum()
            assert float(found[y]) == pytest.approx(float(logp), abs=1e-9)


def test_sampler_and_scorer_agree_at_another_temperature(small: str, tmp_path: Path) -> None:
    ppo(small, tmp_path / "out", temperature=0.6, epochs=2)
    lines = metrics(tmp_path / "out")
    assert all(line["val/sampler_gap_max"] < 1e-5 for line in lines)
    assert abs(lines[0]["objective/kl"]) < 1e-9 < abs(lines[-1]["objective/kl"])


def test_ratios_that_are_not_one_stop_the_run(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Collector._look

    def shifted(self: Collector, *arguments: Any) -> Any:
        logp, value = look(self, *arguments)
        return logp + 0.01, value

    monkeypatch.setattr(Collector, "_look", shifted)
    with pytest.raises(RunError, match="before any weight has moved"):
        ppo(small, tmp_path / "out")


def test_rollouts_come_back_from_a_file(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_rollouts(monkeypatch)
    ppo(small, tmp_path / "out", max_steps=1)
    again = Rollouts.from_tensors(kept[0].tensors())
    one, two = kept[0].tensors(), again.tensors()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- stopping and going on -----------------------------------------------------------------------------------------


def stopped(number: int, model: str, output: Path, **options: Any) -> None:
    """A run that is sent a signal in its n-th minibatch of all."""
    update, count = Trainer._update, [0]

    def wrapped(self: Trainer, *arguments: Any) -> Any:
        record = update(self, *arguments)
        count[0] += 1
        if count[0] == number:
            signal.raise_signal(signal.SIGTERM)
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", wrapped)
        with pytest.raises(Interrupted):
            ppo(model, output, **options)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"minibatches": 2, "ppo_epochs": 2, "kl_target": 2.0, "kl_horizon": 20.0}, 6),  # within a step
        ({"minibatches": 2, "ppo_epochs": 2, "critic": "head"}, 4),  # at its end
        ({"algorithm": "rloo", "lora": True, "minibatches": 2}, 3),
        pytest.param({"lora": True, "minibatches": 2, "ppo_epochs": 2}, 6, marks=pytest.mark.slow),
        pytest.param(
            {"dtype": "bfloat16", "minibatches": 2, "ppo_epochs": 1, "save_every": 1}, 3, marks=pytest.mark.slow
        ),
    ],
    ids=["within", "end", "rloo-lora", "lora", "bfloat16"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    options: dict[str, Any], number: int, small: str, tmp_path: Path
) -> None:
    options = {"epochs": 2, **options}
    ppo(small, tmp_path / "whole", **options)
    stopped(number, small, tmp_path / "parts", **options)
    assert not list((tmp_path / "parts").glob("*model.safetensors"))
    ppo(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_a_last_batch_of_fewer_prompts_than_minibatches_is_learned_from(small: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": ROWS[:5], "minibatches": 3, "ppo_epochs": 2}  # batches of 4 prompts and of 1
    ppo(small, tmp_path / "whole", **options)
    assert [line["step"] for line in metrics(tmp_path / "whole")] == [1, 2]
    stopped(7, small, tmp_path / "parts", **options)  # between the two passes over the one prompt
    ppo(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_a_run_stopped_while_it_samples_goes_on(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo(small, tmp_path / "whole", epochs=2)
    pause, count = Trainer.pause, [0]

    def wrapped(self: Any) -> None:
        count[0] += 1
        if self.state.step == 2 and self.source.round is None and self.stop.signal is None and count[0] > 8:
            signal.raise_signal(signal.SIGTERM)
        pause(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "pause", wrapped)
        with pytest.raises(Interrupted):
            ppo(small, tmp_path / "parts", epochs=2)
    ppo(small, tmp_path / "parts", epochs=2, resume=True)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_a_rollout_of_a_checkpoint_is_not_drawn_or_judged_again(small: str, tmp_path: Path) -> None:
    judged: list[int] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        judged.append(len(responses))
        return world.reward(prompts, responses)

    stopped(1, small, tmp_path / "out", reward=reward, ppo_epochs=2)
    assert len(judged) == 1
    ppo(small, tmp_path / "out", reward=reward, ppo_epochs=2, resume=True)
    assert len(judged) == 2  # the second step's


# -- models --------------------------------------------------------------------------------------------------------


def test_with_lora_one_base_serves_actor_and_reference(small: str, tmp_path: Path) -> None:
    bodies: list[int] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        bodies.append(sum(issubclass(type(x), LlamaModel) for x in gc.get_objects()))
        return world.reward(prompts, responses)

    ppo(small, tmp_path / "full", critic="head")
    gc.collect()
    before = sum(issubclass(type(x), LlamaModel) for x in gc.get_objects())
    ppo(small, tmp_path / "lora", critic="head", lora=True, lora_rank=2, reward=reward)
    assert len(bodies) == 2 and bodies[0] - before == 1
    full, lora = (json.loads((tmp_path / n / "run.json").read_text())["memory"] for n in ("full", "lora"))
    assert full["reference"] == full["actor"]
    assert lora["reference"] < 0.5 * full["reference"]
    assert metrics(tmp_path / "lora")[0]["objective/kl"] == pytest.approx(0, abs=1e-9)
    assert abs(metrics(tmp_path / "lora")[-1]["objective/kl"]) > 0


def kept_rollouts(patch: pytest.MonkeyPatch) -> list[Rollouts]:
    """Where the rollouts of every step will be found."""
    kept: list[Rollouts] = []
    targets = rl_ppo.targets_of
    patch.setattr(rl_ppo, "targets_of", lambda config, r, beta: kept.append(r) or targets(config, r, beta))
    return kept


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_reward_model_scores_the_tokens_and_starts_the_critic(
    lora: bool, small: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_rollouts(monkeypatch)
    ppo(small, tmp_path / "out", reward=reward_model, max_steps=1, lora=lora)  # a new adapter changes nothing yet
    memory = json.loads((tmp_path / "out/run.json").read_text())["memory"]
    # With LoRA the critic shares the reward model's base, which counts once.
    assert memory["reward"] > memory["critic"] > 0 if lora else memory["critic"] == memory["reward"] > 0
    scorer = ScalarScorer(scalar_from(world.model(seed=7), world.tokenizer(), seed=3).double().requires_grad_(False))
    batch = pack(kept[0].groups, scorer.layout)
    torch.testing.assert_close(kept[0].score_N, scorer(batch), rtol=1e-6, atol=1e-6)
    assert kept[0].value_M is not None
    torch.testing.assert_close(kept[0].value_M, scorer(batch, tokens=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype", "lora"), [("reward", "bfloat16", False), ("actor", "float64", True)])
def test_what_a_critic_computes_in_and_what_trains_of_it(
    kind: str, dtype: str, lora: bool, small: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Critic] = []
    init = PpoObjective.__init__
    monkeypatch.setattr(PpoObjective, "__init__", lambda *given, **more: seen.append(given[2]) or init(*given, **more))
    company: dict[str, Any] = {"reward": reward_model} if kind == "reward" else {}
    ppo(small, tmp_path / "out", critic=kind, dtype=dtype, lora=lora, max_steps=1, **company)
    (critic,) = seen
    assert critic.scorer is not None and critic.scorer.dtype == getattr(torch, dtype)
    own = dict(critic.scorer.model.named_parameters())
    assert {master.dtype for master in critic.weights.masters.values()} == {torch.float64 if lora else torch.float32}
    assert {name for name, p in own.items() if p.requires_grad} == set(critic.weights.masters)
    masters = critic.weights.masters
    many = sum(p.numel() for p in masters.values())
    assert all(("lora_" in n) != ("score" in n) for n in masters) if lora else masters.keys() == own.keys()
    assert (many < 0.6 * sum(p.numel() for p in own.values())) == lora


@pytest.mark.parametrize(
    "critic", ["actor", "head", *(pytest.param(c, marks=pytest.mark.slow) for c in ("actor lora", "reward"))]
)
def test_the_critic_learns_what_will_be_earned(critic: str, small: str, reward_model: str, tmp_path: Path) -> None:
    critic, _, lora = critic.partition(" ")
    company: dict[str, Any] = {"reward": reward_model} if critic == "reward" else {"lora": bool(lora)}
    options: dict[str, Any] = {"num": 16, "epochs": 4, "ppo_epochs": 8, "gae_lambda": 1.0, "learning_rate": 1e-5}
    rate = {} if critic == "head" else {"critic_learning_rate": 1e-2}
    if critic == "head":
        options["learning_rate"] = 1e-2
    ppo(small, tmp_path / "out", critic=critic, **options, **rate, **company)
    lines = metrics(tmp_path / "out")
    assert lines[-1]["loss/value_avg"] < 0.8 * lines[0]["loss/value_avg"]


# -- what is refused -----------------------------------------------------------------------------------------------


def constant(value: Any) -> Any:
    return lambda prompts, responses: [value] * len(responses)


def raising(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise KeyError("missing")


def short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0]


LONG = [{"prompt": "abcdefabcdefab"}]
BAD: dict[str, tuple[type[UserError], str, dict[str, Any]]] = {
    "a reward that raises": (RunError, r"failed \(the first prompt was '\w\w'\): KeyError", {"reward": raising}),
    "NaN": (RunError, "gave nan for a response to", {"reward": constant(math.nan)}),
    "an absurd number": (RunError, r"gave -1e\+300 for a .* squares of scores overflow", {"reward": constant(-1e300)}),
    "the wrong count": (RunError, r"gave 1 numbers for 8 .* prompt was '\w\w'\)", {"reward": short}),
    "a folder that is not there": (ConfigError, "and folders of reward models", {"reward": "reward-model"}),
    "no such reward": (ConfigError, "no reward is called 'vadr'; did you mean vader", {"reward": "vadr"}),
    "no such reward model": (ModelError, "no such folder", {"reward": "./nowhere"}),
    "a prompt over the context": (DataError, "row 1; has 14 tokens, --max-new-tokens 3 more", {"rows": LONG}),
    "nothing to compare": (ConfigError, "--num 2 or more", {"algorithm": "rloo", "num": 1}),
    "a critic for RLOO": (ConfigError, "--gae-lambda configures the critic", {"algorithm": "rloo", "gae_lambda": 0.9}),
    "dropout": (ConfigError, "must not be random", {"lora": True, "lora_dropout": 0.1}),
    "two wishes": (ConfigError, "give one of them", {"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}),
    "no model to start from": (ModelError, "use --critic actor", {"critic": "reward"}),
    "horizon alone": (ConfigError, "without --kl-target", {"kl_horizon": 5.0}),
    "more minibatches than prompts": (ConfigError, "--minibatches 5", {"minibatches": 5}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "what", "options"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    kind: type[UserError], what: str, options: dict[str, Any], small: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=what) as caught:
        ppo(small, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_a_wrong_name_of_a_reward_is_told_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward is called 'vadr'"):
        ppo(str(tmp_path / "no model either"), tmp_path / "out", reward="vadr")


def test_repeated_prompts_and_a_single_step_are_told(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo(small, tmp_path / "out", rows=[*ROWS[:2], ROWS[0]], progress="plain")
    said = capsys.readouterr()
    assert "1 duplicate, whose" in said.out + said.err and "before the only step" in said.out + said.err
    assert "1 step of PPO, from 3 prompts, will change little" in said.out
    ppo(small, tmp_path / "more", rows=ROWS, progress="plain")
    said = capsys.readouterr()
    assert "duplicate" not in said.out + said.err and "in the first step" in said.out + said.err


def test_reward_models_that_do_not_fit_are_refused(small: str, reward_model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a language model, which gives no score"):
        ppo(small, tmp_path / "a", reward=small)
    other = world.tokenizer()
    other.add_tokens(["zz"])
    folder = tmp_path / "reward"
    made = scalar_from(world.model(seed=7), other, seed=3)
    made.save_pretrained(folder)
    swapped = {"a": "b", "b": "a"}
    text = world.tokenizer().backend_tokenizer.to_str()
    vocab = json.loads(text)
    table = vocab["model"]["vocab"]
    vocab["model"]["vocab"] = {swapped.get(token, token): i for token, i in table.items()}
    world.tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(ModelError, match=r"has another tokenizer: '[ab]' is token"):
        ppo(small, tmp_path / "b", reward=str(folder))
    config = json.loads((Path(reward_model) / "config.json").read_text())
    three = tmp_path / "three"
    three.mkdir()
    for file in Path(reward_model).iterdir():
        (three / file.name).write_bytes(file.read_bytes())
    config["id2label"], config["label2id"] = {str(i): str(i) for i in range(3)}, {str(i): i for i in range(3)}
    (three / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has 3 labels"):
        ppo(small, tmp_path / "c", reward=str(three))


def test_a_dry_run_shows_prompts_plan_and_memory_and_writes_nothing(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"reward": world.reward, **QUICK, "progress": "plain", "dry_run": True}
    assert prefopt.ppo(small, ROWS, output=tmp_path / "out", **options) is None
    shown = capsys.readouterr().out
    for fact in ("row 1:", "options set: ", "max_new_tokens=", "memory:", "dry run: nothing was trained"):
        assert fact in shown, fact
    assert len(shown.splitlines()) <= 25
    assert not (tmp_path / "out").exists()
