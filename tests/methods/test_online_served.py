"""Rounds of online losses whose responses come from rollout servers, and rewards with several components."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from generate.fake_rollout_server import FakeRollouts, servers
from methods import small_world as world
from methods.test_online import online, rounds, stops
from methods.test_ppo import metrics, same_bits
from prefopt.config.online import OnlineConfig
from prefopt.core.dispatch import ServersLost
from prefopt.data.group import Group
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.generate.rollout_servers import RolloutServers
from prefopt.generate.sampler import Sample, SamplingParams, key_of, occurrences
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.rl.comparers import LanguageComparer
from prefopt.rl.judgement import Round
from prefopt.rl.lessons import gradient_lesson
from prefopt.rl.policy_gradient import PolicyGradient
from prefopt.rl.rollouts import Rollouts
from prefopt.rl.samplers import LocalSampler
from prefopt.train.trainer import Trainer
from train.small import weights

SERVED: dict[str, Any] = {"minibatches": 2, "passes": 2, "server_concurrency": 3}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RolloutServers.__init__.__kwdefaults__, "pause", 0.01)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


def by(fakes: list[FakeRollouts], **more: Any) -> dict[str, Any]:
    return SERVED | {"rollout_server": [fake.url for fake in fakes]} | more


def asked_one_by_one(
    self: LocalSampler,
    prompts: Any,
    num: int,
    params: SamplingParams,
    *,
    streams: Any = None,
    progress: Any = None,
) -> list[list[Sample]]:
    """What servers are asked for, in this process: every response by itself, with the seed of its request."""
    plain = TransformersSampler(self.scorer, rows=1)

    def drawn(prompt: Any, stream: int, k: int) -> Sample:
        seed = key_of(params.seed, prompt, stream, k) & (2**63 - 1)
        return plain.sample([prompt], 1, replace(params, seed=seed))[0][0]

    streams = occurrences(prompts) if streams is None else streams
    return [[drawn(p, stream, k) for k in range(num)] for p, stream in zip(prompts, streams, strict=True)]


def told(output: Path) -> list[Any]:
    """What was drawn and judged in all rounds."""
    return [[row[name] for name in ("token_ids", "judge_scores", "scores")] for row in rounds(output)]


def clean(output: Path) -> list[dict[str, Any]]:
    return [{n: x for n, x in line.items() if not n.startswith("rollouts/")} for line in metrics(output)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "grpo"])
def test_any_number_of_servers_draws_what_this_process_draws(
    loss: str, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same responses and scores, and the same weights but for the sampler's rounding of log-probabilities."""
    with monkeypatch.context() as patch:
        patch.setattr(LocalSampler, "sample", asked_one_by_one)
        plain = {name: value for name, value in SERVED.items() if name != "server_concurrency"}
        online(small, tmp_path / "here", loss=loss, num=3, **plain)
    for number in (1, 2, 3):
        with servers(small, number) as fakes:
            online(small, tmp_path / str(number), loss=loss, num=3, **by(fakes))
            assert {len(fake.loads) for fake in fakes} == {2}, "every server, every round"
        assert told(tmp_path / str(number)) == told(tmp_path / "here")
        assert clean(tmp_path / str(number)) == clean(tmp_path / "1")
        one, found = weights(tmp_path / "1"), weights(tmp_path / str(number))
        assert all(torch.equal(one[name], found[name]) for name in one)
    here = weights(tmp_path / "here")
    assert all(torch.allclose(one[name], here[name], rtol=0, atol=1e-6) for name in one)
    last = metrics(tmp_path / "3")[-1]
    assert last["rollouts/responses"] == 12 and last["rollouts/stale"] == last["rollouts/servers_lost"] == 0
    assert last["val/sampler_gap_max"] < 1e-6 and abs(last["objective/kl"]) > 1e-4


@pytest.mark.slow
def test_a_server_that_dies_is_survived_by_the_others(small: str, tmp_path: Path) -> None:
    with servers(small) as (whole,), servers(small, dies_after=5) as (dying,):
        online(small, tmp_path / "two", **by([dying, whole]))
    with servers(small) as fakes:
        online(small, tmp_path / "one", **by(fakes))
    assert told(tmp_path / "two") == told(tmp_path / "one")
    assert sum(line["rollouts/servers_lost"] for line in metrics(tmp_path / "two")) >= 1


@pytest.mark.slow
def test_a_run_whose_servers_are_lost_goes_on_with_others_to_the_same_bits(small: str, tmp_path: Path) -> None:
    with servers(small) as fakes:
        online(small, tmp_path / "whole", **by(fakes))
    lost = pytest.raises(ServersLost, match=r"no server of --rollout-server is left")
    with servers(small, dies_after=1 + 8 + 3) as fakes, lost:  # in the second round
        online(small, tmp_path / "parts", **by(fakes))
    assert len(metrics(tmp_path / "parts")) == 1
    assert (tmp_path / "parts" / "checkpoints" / "step-00000001").exists(), "of the moment when the server was lost"
    with servers(small, 2) as fakes:
        online(small, tmp_path / "parts", resume=True, **by(fakes))
        assert sum(fake.answered for fake in fakes) == 8 + 2, "no round is drawn again"
    assert clean(tmp_path / "parts") == clean(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_round_of_a_checkpoint_needs_no_server(small: str, tmp_path: Path) -> None:
    """Stopped between two updates of the last round."""
    with servers(small) as fakes:
        online(small, tmp_path / "whole", **by(fakes))
        with pytest.MonkeyPatch.context() as patch:
            stops(lambda t: t.state.step == 1 and t.state.done == 2, patch)
            with pytest.raises(Interrupted):
                online(small, tmp_path / "parts", **by(fakes))
    online(small, tmp_path / "parts", resume=True, **by(fakes))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert told(tmp_path / "parts") == told(tmp_path / "whole")
    assert not (tmp_path / "parts" / "rollout-weights").exists()


def test_what_servers_drew_is_kept_before_a_judge_is_asked(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while its judge thinks has the responses, which no server would draw again."""

    class Killed(BaseException):
        pass

    def dies(self: Any, *given: Any) -> Any:
        raise Killed

    monkeypatch.setattr(LanguageComparer, "__call__", dies)
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big"}
    with servers(small) as fakes:
        with pytest.raises(Killed):
            online(small, tmp_path / "out", **by(fakes, **options))
        drawn = fakes[0].answered
        with pytest.raises(Killed):
            online(small, tmp_path / "out", resume=True, **by(fakes, **options))
        assert fakes[0].answered == drawn


def test_a_server_with_other_weights_stops_the_run(small: str, tmp_path: Path) -> None:
    with servers(small, lying=True) as fakes, pytest.raises(RunError, match="differ from the scorer's"):
        online(small, tmp_path / "out", **by(fakes))


@pytest.mark.slow
def test_older_weights_are_refused_or_corrected(small: str, tmp_path: Path) -> None:
    """A server that takes no weights after the first round is lost, or what it draws is weighted."""

    def once(fake: FakeRollouts) -> None:
        load, count = fake.post, [0]

        def post(path: str, body: dict[str, Any]) -> Any:
            count[0] += path == "/collective_rpc"
            fake.refuses_loads = count[0] > 1
            return load(path, body)

        fake.post = post  # type: ignore[method-assign]

    with servers(small) as fakes, pytest.raises(ServersLost, match="out of memory"):
        once(fakes[0])
        online(small, tmp_path / "refused", loss="grpo", **by(fakes))
    with servers(small) as fakes:
        once(fakes[0])
        more = {"stale": "correct", "importance_cap": 1.5, "learning_rate": 2e-2, "loss": "grpo", "num": 4}
        online(small, tmp_path / "corrected", **by(fakes, **more))
    first, last = metrics(tmp_path / "corrected")
    assert first["importance/mean"] == pytest.approx(1, abs=1e-6) and first["rollouts/stale"] == 0
    assert last["rollouts/stale"] == 16 and last["rollouts/not_loaded"] == 1
    assert last["importance/max"] > 1.02 > 1 > last["importance/effective"] > 0


@pytest.mark.parametrize(("loss", "average"), [("grpo", "rows"), ("dapo", "tokens"), ("rloo", None), ("gspo", None)])
def test_importance_weights_multiply_advantages(loss: str, average: str | None) -> None:
    """The gradient of the loss, against a plain loop over tokens or responses; without ratios, at the first update."""
    given = {"model": "m", "prompts": ["p"], "reward": "length", "output": "o", "loss": loss, "beta": 0.0}
    served = {"rollout_server": ["http://x"], "stale": "correct", "importance_cap": 1.2}
    torch.manual_seed(0)
    sequences = [(np.arange(2, 4 + n, dtype=np.int32), np.arange(2 + n) > 0) for n in (1, 3, 2)]
    group = Group.from_sequences(sequences, row=0, pairs=())
    M, N = torch.randn(3, 9, dtype=torch.float64) / 3, torch.randn(3, dtype=torch.float64)
    M[2, :2] -= 1  # the policy likes the first response more than what drew it did
    found = Round(Rollouts((group,), M[0], M[1], M[2], None, N, N < 9))

    def gradient(config: OnlineConfig) -> torch.Tensor:
        batch = gradient_lesson(config, found).batch
        objective = PolicyGradient(config, device=torch.device("cpu"))
        logp_M = M[0].clone().requires_grad_()
        values = {"logp_M": logp_M}
        if average is None:
            values["logp_N"], values["old_logp_N"] = (
                torch.stack([part.sum() for part in x.split([2, 4, 3])]) for x in (logp_M, M[0])
            )
        objective(batch, values, objective.normaliser(batch)).total.backward()
        assert logp_M.grad is not None
        return logp_M.grad

    plain = gradient(OnlineConfig(**given))
    gaps = (M[0] - M[2]).split([2, 4, 3])
    wanted = [min(1.2, float(g.exp())) for gap in gaps for g in (gap if average else [gap.sum()] * len(gap))]
    assert min(wanted) < 1.2 == max(wanted)
    weighted = plain * torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(gradient(OnlineConfig(**given, **served)), weighted, rtol=1e-10, atol=1e-14)


def test_options_that_do_nothing_are_refused() -> None:
    given: dict[str, Any] = {"model": "m", "prompts": ["p"], "reward": "length", "output": "o"}
    served: dict[str, Any] = {"rollout_server": ["http://here:1"]}
    for more, line in (
        ({"rollout_folder": "x"}, "--rollout-folder"),
        ({"loss": "grpo", "stale": "correct"}, "--stale does nothing without --rollout-server"),
        ({**served, "stale": "correct"}, "--stale correct weights the advantages of policy gradients, and --loss dpo"),
        ({**served, "loss": "grpo", "stale": "correct", "temperature": 0.7}, "--stale correct needs"),
        ({**served, "loss": "grpo", "importance_cap": 3.0}, "--importance-cap"),
        ({"reward": ["llm", "length"], "judge_url": "http://x"}, "--reward llm compares responses"),
        ({"reward": "people*2"}, "--reward people compares responses"),
        ({"reward": ["length", "length*2"]}, "two components are called length"),
    ):
        with pytest.raises(ConfigError, match=line):
            OnlineConfig(**{**given, **more})
    assert OnlineConfig(**given, **served).server_concurrency == 32


# -- rewards with names and weights --------------------------------------------------------------------------------

LETTERS = "def a(prompts, responses):\n    return [float(r.count('a')) for r in responses]\n"
CHANGING = (
    "import os\n"
    "def fickle(prompts, responses):\n"
    "    with open('calls', 'a') as file:\n"
    "        file.write('x')\n"
    "    return [len(r) + 0.1 * os.path.getsize('calls') for r in responses]\n"
)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of one's own, found in the working folder."""
    (tmp_path / "own_components_of_a_test.py").write_text(LETTERS + CHANGING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_components_of_a_test", raising=False)


@pytest.mark.parametrize("loss", ["dpo", "grpo"])
def test_components_are_added_up_and_kept(loss: str, own: None, small: str, tmp_path: Path) -> None:
    asked = ["brief=length*-0.5", "letters=own_components_of_a_test:a*2"]
    online(small, tmp_path / "out", reward=asked, loss=loss, num=3)
    for line in metrics(tmp_path / "out"):
        rows = [row for row in rounds(tmp_path / "out") if row["round"] == line["step"]]
        for row in rows:
            parts = row["components"]
            assert parts["letters"] == [text.count("a") for text in row["responses"]]
            total = [-0.5 * b + 2 * a for b, a in zip(parts["brief"], parts["letters"], strict=True)]
            assert row["judge_scores"] == pytest.approx(total)
        for name in ("brief", "letters"):
            every = [x for row in rows for x in row["components"][name]]
            assert line[f"objective/scores/{name}"] == pytest.approx(np.mean(every))
            assert line[f"objective/scores_std/{name}"] == pytest.approx(np.std(every))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "-0.5 times `length` (brief) + 2 times `own_components_of_a_test:a` (letters)" in card


def test_components_are_not_asked_again_and_a_change_is_noticed(own: None, small: str, tmp_path: Path) -> None:
    """A component that never says the same twice, in a run that is killed before its first checkpoint."""
    asked = ["own_components_of_a_test:fickle", "length*0.5"]
    keep: dict[str, Any] = {"reward": asked, "max_steps": 1}

    class Killed(BaseException):
        pass

    def dies(self: Trainer, *given: Any, **more: Any) -> Any:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "keep", dies)
        with pytest.raises(Killed):
            online(small, tmp_path / "out", **keep)
    before = rounds(tmp_path / "out")
    with pytest.raises(RunError, match="--reward was"):
        online(small, tmp_path / "out", resume=True, **{**keep, "reward": [asked[0], "length*0.25"]})
    code = Path("own_components_of_a_test.py")
    code.write_text(code.read_text() + "# another\n")
    with pytest.raises(RunError, match="a component of --reward, its weight, its model or its code, changed since"):
        online(small, tmp_path / "out", resume=True, **keep)
    code.write_text(code.read_text().removesuffix("# another\n"))
    online(small, tmp_path / "out", resume=True, **keep)
    assert rounds(tmp_path / "out") == before
    (line,) = metrics(tmp_path / "out")
    every = [x for row in before for x in row["components"]["fickle"]]
    assert line["objective/scores/fickle"] == pytest.approx(np.mean(every), abs=1e-12)


@pytest.mark.slow
def test_a_component_is_resumed_to_the_same_bits(own: None, small: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": ["length*-0.5", "own_components_of_a_test:a"], "passes": 2}
    online(small, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stops(lambda t: t.state.step == 1 and t.state.done == 1, patch)
        with pytest.raises(Interrupted):
            online(small, tmp_path / "parts", **options)
    online(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole") and rounds(tmp_path / "parts") == rounds(
        tmp_path / "whole"
    )


def test_what_is_drawn_after_a_resume_is_kept_too(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run resumes from a checkpoint without a round, which is of the same step."""

    class Killed(BaseException):
        pass

    def judged(self: Any, name: str, answered: Any, pause: Any) -> Any:
        if name == "round 2":
            raise Killed
        return [a.outcomes({}) for a in answered]

    monkeypatch.setattr(LanguageComparer, "__call__", judged)
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big"}
    drawn = []
    with servers(small) as fakes:
        with pytest.MonkeyPatch.context() as patch:
            stops(lambda t: t.state.step == 1 and t.state.done == 0, patch)
            with pytest.raises(Interrupted):
                online(small, tmp_path / "out", **by(fakes, **options))
        kept = tmp_path / "out" / "checkpoints" / "step-00000001"
        assert kept.exists() and not (kept / "rollouts.safetensors").exists()
        for _ in range(2):
            before = fakes[0].answered
            with pytest.raises(Killed):
                online(small, tmp_path / "out", resume=True, **by(fakes, **options))
            drawn.append(fakes[0].answered - before)
    assert (kept / "rollouts.safetensors").exists()
    assert drawn[0] > drawn[1] <= 1, "the second time at most the server's first look is drawn"
