"""Several rewards with weights, a language model as judge, scaled scores, and what is watched beside the reward."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefopt
from generate.fake_server import serving
from methods import small_world as world
from methods.test_ppo import ROWS, kept_rollouts, metrics, ppo, same_bits, stopped
from prefopt.config.ppo import PpoConfig
from prefopt.config.rewards import RewardTerm, reward_terms
from prefopt.core.dispatch import ServersLost
from prefopt.data.comparisons import parse_comparisons
from prefopt.errors import ConfigError, DataError, Interrupted, RunError
from prefopt.generate import judged
from prefopt.generate.judged import CachedJudge, LlmScores
from prefopt.generate.rewards import TextRewardScorer
from prefopt.methods.early_checks import check_before_torch
from prefopt.model.scalar import scalar_from
from prefopt.records import Comparison
from prefopt.rewards import Reward
from prefopt.rl.objective import PpoObjective, distinct
from prefopt.rl.ppo import PpoRounds
from prefopt.rl.rollouts import Collector, Rollouts, completed, in_order
from prefopt.rl.scores import ScoreScale
from prefopt.rl.watch import NO_STEP, Watch
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import read_history
from prefopt.train.trainer import Trainer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("world") / "quality"
    scalar_from(world.model(seed=7), world.tokenizer(), seed=3).save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of one's own, found in the working folder."""
    (tmp_path / "own_rewards_of_a_test.py").write_text(
        "def letters(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
        "def hundred(prompts, responses):\n    return [100.0 * len(r) + 7.0 for r in responses]\n"
        "def fewer(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards_of_a_test", raising=False)


# -- components ----------------------------------------------------------------------------------------------------


def test_a_component_has_a_name_a_source_and_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b*2").mkdir()
    found = {
        "length": RewardTerm("length", "length"),
        "brief=length*-0.1": RewardTerm("brief", "length", -0.1),
        "my.rewards:short*1e-2": RewardTerm("short", "my.rewards:short", 0.01),
        "org/some-model": RewardTerm("some-model", "org/some-model"),
        "a=b*2": RewardTerm("a_b_2", "a=b*2"),
    }
    assert reward_terms(list(found)) == list(found.values()) and reward_terms("vader") == [RewardTerm("vader", "vader")]
    for wrong, told in (
        (["vader", "vader*2"], "two components are called vader"),
        (["length*0"], "a weight of 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            reward_terms(wrong)


def test_the_reward_is_the_weighted_sum_of_its_components(
    own: None, small: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_rollouts(monkeypatch)
    asked = [f"quality={reward_model}*0.5", "own_rewards_of_a_test:letters*-2"]
    ppo(small, tmp_path / "out", reward=asked, num=3, keep_samples=2, max_steps=2)
    for rollouts in kept:
        quality_N, letters_N = rollouts.part_N["quality"], rollouts.part_N["letters"]
        torch.testing.assert_close(rollouts.score_N, 0.5 * quality_N - 2 * letters_N)
        lengths = [float(len(world.text_of(c.ids))) for g in rollouts.groups for c in g.continuations]
        assert letters_N.tolist() == lengths and float(quality_N.std()) > 0
    line = metrics(tmp_path / "out")[0]
    assert line["objective/scores/letters"] == pytest.approx(float(kept[0].part_N["letters"].mean()))
    assert line["objective/scores_std/quality"] == pytest.approx(float(kept[0].part_N["quality"].std(unbiased=False)))
    memory = json.loads((tmp_path / "out/run.json").read_text())["memory"]
    assert memory["reward"] > 0 and memory["critic"] > 0, "the critic starts from the model among them"

    rows = [json.loads(text) for text in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2] and all(len(row["responses"]) == 3 for row in rows)
    assert rows[0]["scores"] == kept[0].score_N[:3].tolist()
    assert rows[0]["components"]["letters"] == [float(len(text)) for text in rows[0]["responses"]]
    read = list(parse_comparisons(rows, "samples"))
    assert all(isinstance(c, Comparison) and c.scores == tuple(r["scores"]) for c, r in zip(read, rows, strict=True))


def test_a_component_that_changed_is_noticed_at_resume(own: None, small: str, tmp_path: Path) -> None:
    asked = ["length", "own_rewards_of_a_test:letters*2"]
    stopped(3, small, tmp_path / "out", reward=asked, save_every=1)
    file = tmp_path / "own_rewards_of_a_test.py"
    file.write_text(file.read_text() + "# another\n")
    with pytest.raises(RunError, match="a component of --reward, its weight, its model or its code, changed since"):
        ppo(small, tmp_path / "out", reward=asked, save_every=1, resume=True)


# -- a language model as judge -------------------------------------------------------------------------------------


def judge(url: str, **options: Any) -> LlmScores:
    config = PpoConfig(model="m", prompts=["p"], output="o", reward="llm", judge_url=url, judge_model="big", **options)
    return LlmScores(config, pause=0.0)


def test_a_judge_scores_once_retries_and_says_what_it_did_not_score() -> None:
    with serving() as server:
        server.pieces = ["Clear and [[3]] right.", " [[8.5]]"]
        scores = judge(server.url)
        assert scores(["p", "p", "q"], ["a", "a", "b"]) == [8.5] * 3
        assert len(server.requests) == 2, "an answer that comes twice is asked about once"
        asked = {r[2]["messages"][1]["content"] for r in server.requests}
        assert asked == {"# Prompt\n\np\n\n# Answer\n\na", "# Prompt\n\nq\n\n# Answer\n\nb"}
        assert judge(server.url)(["p"], ["a"]) == [8.5] and len(server.requests) == 2, "kept on disk"
        server.pieces = ["I cannot say."]
        assert repr(scores(["p", "q", "r"], ["a", "b", "c"])) == "[8.5, 8.5, nan]"
        assert len(server.requests) == 5, "three attempts"
        with pytest.raises(RunError, match=r"1 of 1 answers hold no score that --judge-pattern .* 'I cannot say\.'"):
            scores.refuse_unscored(1, 1)
        scores.refuse_unscored(1, 2)
        assert scores.score_in("[[inf]]") is None
        server.pieces = ["grade: 40%"]
        other = judge(server.url, judge_pattern=r"grade: (\d+)%")
        assert other(["p"], ["z"]) == [40.0]
        assert other(["p"], ["a"]) == [40.0], "a kept answer without what is looked for is asked for again"


def by_length(self: CachedJudge, question: str) -> str:
    """As good as it is long, and no score where it has two letters."""
    many = len(question.rsplit("\n", 1)[1])
    return f"[[{many}]]" if many != 2 else "Cannot say."


def test_what_a_judge_did_not_score_gets_the_mean_of_its_step(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of components, and where another process asked about the others."""
    monkeypatch.setattr(CachedJudge, "__call__", by_length)
    options = {"judge_url": "http://localhost", "judge_model": "big", "epochs": 1}
    ppo(small, tmp_path / "out", reward=["llm", "length*0.00001"], **options)
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for line in metrics(tmp_path / "out"):
        many = [len(text) for row in rows if row["step"] == line["step"] for text in row["responses"]]
        found = [x for row in rows if row["step"] == line["step"] for x in row["scores"]]
        mean = np.mean([n for n in many if n != 2])
        assert found == pytest.approx([mean if n == 2 else n for n in many], abs=1e-4)
        assert line["objective/unscored"] == many.count(2)
        assert line["objective/scores/llm"] == pytest.approx(mean)
        assert line["objective/scores"] == pytest.approx(mean, abs=1e-4)
    assert sum(line["objective/unscored"] for line in metrics(tmp_path / "out"))

    nothing_M, finished = (
        torch.zeros(sum(len(c.ids) for c in world.group().continuations)),
        torch.ones(len(world.REWARD), dtype=torch.bool),
    )
    none, some = (torch.full((len(world.REWARD),), x, dtype=torch.float64) for x in (np.nan, 2.0))
    parts = [
        Rollouts((world.group(),), nothing_M, nothing_M, nothing_M, None, score, finished) for score in (none, some)
    ]
    asked = judge("http://localhost")
    scorer = TextRewardScorer(Reward("llm", asked), world.tokenizer(), ())
    whole = completed(in_order(parts, np.arange(2)), scorer)
    assert whole.score_N.tolist() == [2.0] * 2 * len(world.REWARD) and whole.unscored == len(world.REWARD)
    assert Rollouts.from_tensors(whole.tensors()).unscored == whole.unscored
    with pytest.raises(RunError, match="hold no score"):
        completed(parts[0], scorer)


def test_a_stop_is_seen_while_a_judge_is_asked(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"judge_url": "http://localhost", "judge_model": "big", "reward": "llm", "save_every": 1}
    asked = []

    def stops(self: CachedJudge, question: str) -> str:
        asked.append(question)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return "[[2]]"

    monkeypatch.setattr(CachedJudge, "__call__", stops)
    monkeypatch.setattr(judged, "WAVES", 1)
    monkeypatch.setattr(judged, "AT_ONCE", 1)
    with pytest.raises(Interrupted, match=r"after step 0 of \d+;"):
        ppo(small, tmp_path / "out", **options)
    assert len(asked) in (3, 4)
    ppo(small, tmp_path / "out", resume=True, **options)


def test_a_run_learns_from_a_judge_and_resumes_with_it(small: str, tmp_path: Path) -> None:
    (tmp_path / "rubric.txt").write_text("Score it, as [[1]].")
    with serving(pieces=["[[4]]"]) as server:
        options = {"reward": "llm", "judge_url": server.url, "judge_model": "big"}
        options["judge_prompt"] = str(tmp_path / "rubric.txt")
        stopped(5, small, tmp_path / "out", save_every=1, **options)
        (tmp_path / "rubric.txt").write_text("Score it otherwise, as [[1]].")
        with pytest.raises(RunError, match="the judge of --reward changed"):
            ppo(small, tmp_path / "out", save_every=1, resume=True, **options)
        assert metrics(tmp_path / "out")[0]["objective/scores"] == 4.0
        assert server.requests[0][2]["messages"][0]["content"] == "Score it, as [[1]]."
        with pytest.raises(RunError, match="--judge-model was"):
            ppo(small, tmp_path / "out", save_every=1, resume=True, **options | {"judge_model": "small"})
    (tmp_path / "rubric.txt").write_text("Score it, as [[1]].")
    with serving(pieces=["[[4]]"]) as moved:
        ppo(small, tmp_path / "out", save_every=1, resume=True, **options | {"judge_url": moved.url})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reward": "llm"}, "--reward llm needs --judge-url"),
        ({"reward": "length", "judge_url": "http://x/v1"}, "--judge-url belongs to --reward llm"),
        ({"reward": "llm", "judge_url": "u", "judge_pattern": "("}, r"--judge-pattern \(: no regular expression"),
        ({"reward": "llm", "judge_url": "u", "judge_pattern": "x"}, "the score must be in a group"),
        ({"reward": "length", "true_reward": "length"}, "--true-reward is measured on held-out prompts"),
        ({"reward": "length", "eval_every": 3}, "--eval-every does nothing without --eval-prompts"),
    ],
)
def test_options_that_contradict_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        PpoConfig(model="m", prompts=["p"], output="o", **options)
    assert "\n" not in str(caught.value)


# -- one scale for all rewards -------------------------------------------------------------------------------------


def test_a_scale_that_grows_is_that_of_all_scores() -> None:
    chance = np.random.Generator(np.random.PCG64(0))
    parts = [torch.tensor(chance.normal(3.0, 5.0, n)) for n in (1, 7, 200)]
    scale = ScoreScale()
    for part in parts:
        scale = scale.with_scores(part)
    whole = torch.cat(parts)
    assert scale.mean == pytest.approx(float(whole.mean()))
    assert scale.deviation == pytest.approx(float(whole.std(unbiased=False)))
    torch.testing.assert_close(ScoreScale.from_state(scale.state()).of(whole), scale.of(whole))
    assert ScoreScale().with_scores(torch.ones(5)).of(torch.ones(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["running", "reference"])
def test_beta_means_the_same_for_a_reward_in_other_units(kind: str, own: None, small: str, tmp_path: Path) -> None:
    """One reward is 100 times the other, plus 7: the runs end alike, and without a scale they do not."""
    found = {}
    for normalise in (kind, "none"):
        for name in ("letters", "hundred"):
            output = tmp_path / f"{normalise}-{name}"
            options = {
                "normalise_scores": normalise,
                "beta": 0.5,
                "whiten_advantages": False,
                "missing_eos_score": -1.0,
            }
            ppo(small, output, reward=f"own_rewards_of_a_test:{name}", algorithm="rloo", **options)
            found[normalise, name] = metrics(output)[-1]["objective/rlhf_reward"], output
    assert found[kind, "letters"][0] == pytest.approx(found[kind, "hundred"][0], abs=1e-6)
    assert abs(found["none", "letters"][0] - found["none", "hundred"][0]) > 10
    raw = metrics(found[kind, "hundred"][1])[0]
    assert raw["objective/scores"] > 7, "what is reported is what the reward gave"
    assert raw["objective/scale_std"] > 10


@pytest.mark.parametrize("kind", ["running", "reference"])
def test_a_scale_is_resumed_to_the_same_bits(kind: str, small: str, tmp_path: Path) -> None:
    options = {"normalise_scores": kind, "minibatches": 2, "ppo_epochs": 2, "epochs": 2, "max_update_kl": 1e-4}
    ppo(small, tmp_path / "whole", **options)
    stopped(6, small, tmp_path / "parts", **options)
    ppo(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    read = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "parts")]
    assert read[0] == read[1] and read[0].count("\n") == 16


def test_another_reference_gives_its_own_scale(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = world.write_world(tmp_path / "other", seed=5)
    said = {}
    for reference in (None, other):
        output = tmp_path / f"out{len(said)}"
        ppo(small, output, reference=reference, normalise_scores="reference", max_steps=1, progress="plain")
        said[reference] = re.search(r"scores of the reference: (mean \S+, .*) over (\d+) resp", capsys.readouterr().out)
    assert said[None] and said[other] and said[None][1] != said[other][1] and said[None][2] == "256"


# -- updates that are left out -------------------------------------------------------------------------------------


def test_updates_end_where_the_policy_has_moved_too_far(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, bool]] = []
    applies = PpoRounds.applies

    def watched(self: PpoRounds, update: int, record: dict[str, float]) -> bool:
        found = applies(self, update, record)
        seen.append((update, record["policy/approxkl_avg"], found))
        return found

    monkeypatch.setattr(PpoRounds, "applies", watched)
    limit, options = 2e-3, {"ppo_epochs": 8, "minibatches": 2, "max_steps": 1, "learning_rate": 5e-3}
    ppo(small, tmp_path / "all", **options)
    assert [update for update, *_ in seen] == list(range(16)) and max(kl for _, kl, _ in seen) > limit
    assert metrics(tmp_path / "all")[0]["policy/updates_skipped"] == 0
    over = next(update for update, kl, _ in seen if kl > limit)
    seen.clear()
    ppo(small, tmp_path / "few", max_update_kl=limit, **options)
    assert [update for update, *_ in seen] == list(range(over + 1)) and not seen[-1][2]
    assert metrics(tmp_path / "few")[0]["policy/updates_skipped"] == 16 - over
    # The refused update has not moved the weights: they are those of the updates before it.
    monkeypatch.setattr(
        PpoRounds, "applies", lambda self, update, record: update < over or setattr(self, "updates", over + 1)
    )
    ppo(small, tmp_path / "cut", **options)
    from train.small import weights

    few, cut = weights(tmp_path / "few"), weights(tmp_path / "cut")
    assert 0 < over < 15 and all(torch.equal(few[name], cut[name]) for name in few)


# -- a critic on a base that is there ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["actor", "reward"])
def test_a_critic_with_an_adapter_shares_the_base_that_it_starts_from(
    kind: str, small: str, reward_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    init = PpoObjective.__init__

    def kept(self: Any, config: Any, critic: Any, **more: Any) -> None:
        init(self, config, critic, **more)
        seen.append(critic)

    actors: list[Any] = []
    fit = Trainer.fit
    monkeypatch.setattr(PpoObjective, "__init__", kept)
    monkeypatch.setattr(Trainer, "fit", lambda self: actors.append(self.scorer) or fit(self))
    reward: Any = {"reward": reward_model} if kind == "reward" else {}
    ppo(small, tmp_path / "out", critic=kind, lora=True, lora_rank=2, **reward)
    (critic,), (actor,) = seen, actors
    frozen = {p.data_ptr() for p in critic.scorer.model.parameters() if not p.requires_grad}
    trained = {p.data_ptr() for p in critic.scorer.model.parameters() if p.requires_grad}
    shared = {p.data_ptr() for p in actor.model.parameters()}
    memory = json.loads((tmp_path / "out/run.json").read_text())["memory"]
    if kind == "actor":
        assert frozen <= shared and not trained & shared
    else:
        assert not frozen & shared and memory["reward"] > 0
    own = sum(p.numel() * p.element_size() for p in critic.scorer.model.parameters() if p.requires_grad)
    assert memory["critic"] == own < 0.2 * memory["actor"], "the base is counted once"
    assert all(
        critic.weights.masters[n].grad is None or torch.isfinite(p).all() for n, p in critic.weights.masters.items()
    )


# -- the watch -----------------------------------------------------------------------------------------------------


def true(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [-float(len(r)) for r in responses]


def test_a_reward_that_is_exploited_is_told_while_it_happens_and_by_diagnose(
    own: None, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer is better by the reward, and worse by what is meant."""
    (tmp_path / "held_out.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("ab", "cb", "de", "fa"))
    )
    options: dict[str, Any] = {"true_reward": "own_rewards_of_a_test:fewer", "eval_prompts": ["held_out.jsonl"]}
    options |= {"reward": "own_rewards_of_a_test:letters", "algorithm": "rloo", "beta": 0.0, "num": 16, "max_kl": 1e9}
    options |= {"epochs": 15, "learning_rate": 2e-2, "eval_every": 10, "ppo_epochs": 2, "max_new_tokens": 8}
    ppo(small, tmp_path / "out", progress="plain", **options)
    said = capsys.readouterr().out
    assert re.search(r"held out, before training: score \d\.\d+, true score -\d\.\d+, KL", said)
    assert len(re.findall(r"step \d+: the true reward on held-out prompts was best at step", said)) == 1
    run = read_history(tmp_path / "out")
    assert [line["step"] for line in run.held_out] == [10, 20, 30]
    for line in run.held_out:
        assert line["objective/true_scores"] == pytest.approx(-line["objective/scores"])
    before: Any = run.record["before_training"]
    assert before["objective/true_scores"] > run.held_out[-1]["objective/true_scores"] + 1
    told = {finding.name: finding.text for finding in diagnose(run)}
    assert re.search(
        r"best at step 0 \(-\d.*\) and is -\d.* at step 30 .* while the reward rose", told["true reward fell"]
    )
    assert re.search(r"distinct 3-grams fell from 0\.\d+ to 0\.\d+ while the reward rose", told["repeats"])
    # The same evaluations come out of a run that was stopped.
    stopped(25, small, tmp_path / "parts", **options)
    ppo(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "out")


def test_a_stop_wherever_something_is_drawn_is_resumed_to_the_same_bits(small: str, tmp_path: Path) -> None:
    """Also while held-out prompts are answered, before the responses of the next step are drawn."""
    (tmp_path / "held_out.txt").write_text("ab\ndc\n")
    options: dict[str, Any] = {"eval_prompts": [str(tmp_path / "held_out.txt")], "eval_every": 1, "kl_target": 1.0}
    options |= {"normalise_scores": "running", "num": 1, "batch_size": 4, "ppo_epochs": 2}
    collect = Collector.collect

    def drawn(output: Path, stop_at: int | None) -> list[bool]:
        """Whether held-out prompts were answered, of each time that something was drawn."""
        places: list[bool] = []
        sent: list[int] = []

        def wrapped(self: Collector, step: int, prompts: Any, budget: int, progress: Any) -> Any:
            places.append(step == NO_STEP)

            def counted(ended: int, drawn: int) -> None:
                if len(places) == stop_at and not sent:
                    sent.append(stop_at)
                    signal.raise_signal(signal.SIGTERM)
                progress(ended, drawn)

            return collect(self, step, prompts, budget, counted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Collector, "collect", wrapped)
            ppo(small, output, **options)
        return places

    assert drawn(tmp_path / "whole", None) == [True, False, True, False, True]
    for n in range(1, 6):
        with pytest.raises(Interrupted):
            drawn(tmp_path / str(n), n)
        ppo(small, tmp_path / str(n), resume=True, **options)
        assert same_bits(tmp_path / str(n), tmp_path / "whole"), n


def test_a_judge_that_is_lost_in_an_evaluation_leaves_a_checkpoint(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run and at its end. The evaluation is made when the run goes on, and once."""
    (tmp_path / "held_out.txt").write_text("ab\ndc\n")
    lost_at: list[int] = []
    measure = Watch._measure

    def measured(self: Watch, trainer: Trainer) -> Any:
        if trainer.state.step in lost_at:
            raise ServersLost("no server of --judge-url is left; start one again and continue with --resume")
        return measure(self, trainer)

    monkeypatch.setattr(Watch, "_measure", measured)
    options: dict[str, Any] = {"eval_prompts": [str(tmp_path / "held_out.txt")], "eval_every": 1, "ppo_epochs": 1}
    ppo(small, tmp_path / "whole", **options)
    for step in (1, 2):
        output, lost_at[:] = tmp_path / str(step), [step]
        with pytest.raises(ServersLost):
            ppo(small, output, **options)
        assert sorted((output / "checkpoints").glob("step-*"))[-1].name == f"step-{step:08d}"
        lost_at.clear()
        ppo(small, output, resume=True, **options)
        assert same_bits(output, tmp_path / "whole")
    lines = [(line["step"], "loss/policy_avg" in line) for line in metrics(tmp_path / "whole")]
    assert lines == [(n, trained) for n in (1, 2) for trained in (True, False)]


def test_the_true_reward_may_have_a_name_and_a_weight(own: None, small: str, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("ab\ndc\n")
    options: dict[str, Any] = {"reward": "own_rewards_of_a_test:letters", "eval_prompts": ["held_out.txt"]}
    options["true_reward"] = "meant=own_rewards_of_a_test:letters*-0.5"
    check_before_torch(PpoConfig(model=small, prompts=["held_out.txt"], output="other", device="cpu", **options))
    ppo(small, tmp_path / "out", max_steps=1, eval_every=1, **options)
    (line,) = read_history(tmp_path / "out").held_out
    assert line["objective/true_scores"] == pytest.approx(-0.5 * line["objective/scores"]) != 0
    with pytest.raises(ConfigError, match="--reward llm needs --judge-url"):
        PpoConfig(model=small, prompts=["p"], output="o", **{**options, "true_reward": "llm*0.5"})
    with pytest.raises(ConfigError, match=r"--true-reward length\*0: a weight of 0"):
        PpoConfig(model=small, prompts=["p"], output="o", **{**options, "true_reward": "length*0"})


def test_prompts_that_are_trained_on_are_not_held_out(small: str, tmp_path: Path) -> None:
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(DataError, match="all of --eval-prompts are among --prompts"):
        ppo(small, tmp_path / "out", eval_prompts=[str(tmp_path / "same.jsonl")])


def test_repetition_is_counted_within_a_response() -> None:
    from prefopt.generate.sampler import Sample, group_of

    def sample(*ids: int) -> Sample:
        return Sample(np.array(ids, np.int32), np.zeros(len(ids)), np.zeros(len(ids)), True)

    group = group_of([1], [sample(*[4, 5] * 5), sample(2, 3, 4, 5, 6), sample(7), sample(9, 9, 9, 9)])
    assert distinct([group]).tolist() == [2 / 8, 1.0, 1.0, 0.5]


def test_the_plan_says_what_ends_a_response(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"keep their score": {}, r"lose 1 of their score": {"missing_eos_penalty": 1.0}}
    kinds |= {r"get -1 as their score": {"missing_eos_score": -1.0}}
    for told, options in kinds.items():
        prefopt.ppo(
            small,
            ROWS,
            reward=world.reward,
            output=tmp_path / "o",
            device="cpu",
            dry_run=True,
            max_new_tokens=3,
            progress="plain",
            **options,
        )
        said = capsys.readouterr().out
        assert re.search(rf"tokens at once; responses end at </s>; those cut off after 3 tokens {told}", said)
