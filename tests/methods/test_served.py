"""Runs whose responses come from rollout servers: any number of them, lost ones, stops, older weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefopt
from generate.fake_rollout_server import FakeRollouts, servers
from methods import small_world as world
from methods.test_online import stops
from methods.test_ppo import metrics, ppo, stopped
from prefopt.config.ppo import PpoConfig
from prefopt.core.dispatch import ServersLost
from prefopt.data.group import Group
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.generate.rollout_servers import RolloutServers
from prefopt.losses.rl import truncated_importance
from prefopt.rl import objective
from prefopt.rl.rollouts import Rollouts
from prefopt.train.trainer import Trainer
from train.small import steps, weights
from train.test_resume import stop_after

OPTIONS: dict[str, Any] = {"minibatches": 2, "ppo_epochs": 2, "server_concurrency": 3}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RolloutServers.__init__.__kwdefaults__, "pause", 0.01)


NUMBERS = {False: (1, 3), True: (2,)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


def by(fakes: list[FakeRollouts], **more: Any) -> dict[str, Any]:
    return OPTIONS | {"rollout_server": [fake.url for fake in fakes]} | more


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["model", "lora"])
def test_ppo_is_the_same_with_any_number_of_servers(lora: bool, small: str, tmp_path: Path) -> None:
    more = {"lora": True, "lora_rank": 2, "learning_rate": 5e-2} if lora else {}
    for number in NUMBERS[lora]:
        with servers(small, number) as fakes:
            ppo(small, tmp_path / str(number), **by(fakes, **more))
            assert {len(fake.loads) for fake in fakes} == {2}  # every server, every step
            assert sum(fake.answered for fake in fakes) == 2 * 4 * 2 + number
            adapters = {name for fake in fakes for name in fake.scorers}
            assert len(adapters) == (2 if lora else 1)  # older ones are unloaded
        assert not (tmp_path / str(number) / "rollout-weights").exists()
    runs = [tmp_path / str(number) for number in NUMBERS[lora]]
    one, *others = ([line | {"rollouts/bias": 0} for line in metrics(run)] for run in runs)
    assert all(other == one for other in others)
    assert all(weights_are_the_same(runs[0], run) for run in runs)
    last = one[-1]
    assert last["val/sampler_gap_max"] < 1e-6 and abs(last["objective/kl"]) > 1e-3
    assert last["rollouts/responses"] == 8 and last["rollouts/stale"] == last["rollouts/servers_lost"] == 0


def test_what_is_in_a_checkpoint_needs_no_server(small: str, tmp_path: Path) -> None:
    """A run that was stopped within its last step ends without one."""
    with servers(small) as fakes:
        ppo(small, tmp_path / "whole", **by(fakes))
        stopped(7, small, tmp_path / "parts", **by(fakes))
        assert list((tmp_path / "parts" / "rollout-weights").iterdir())
    ppo(small, tmp_path / "parts", resume=True, **by(fakes))
    assert weights_are_the_same(tmp_path / "parts", tmp_path / "whole")
    assert not (tmp_path / "parts" / "rollout-weights").exists()


def weights_are_the_same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_run_whose_servers_are_lost_goes_on_with_others(small: str, tmp_path: Path) -> None:
    with servers(small) as fakes:
        ppo(small, tmp_path / "whole", **by(fakes))
    lost = pytest.raises(ServersLost, match=r"no server of --rollout-server is left")
    with servers(small, dies_after=1 + 8 + 3) as fakes, lost:  # in the second step
        ppo(small, tmp_path / "parts", **by(fakes))
    assert len(metrics(tmp_path / "parts")) == 1
    assert (tmp_path / "parts" / "checkpoints" / "step-00000001").exists(), "of the moment when the server was lost"
    with servers(small, 2) as fakes:
        ppo(small, tmp_path / "parts", resume=True, **by(fakes))
        assert sum(fake.answered for fake in fakes) == 8 + 2  # no step is drawn again
    assert weights_are_the_same(tmp_path / "parts", tmp_path / "whole")


def test_checkpoints_after_a_resume_hold_the_responses(small: str, tmp_path: Path) -> None:
    """A run that resumes from the end of a step, and is killed between two updates of the next."""

    class Killed(BaseException):
        pass

    def dies(self: Trainer, batch: Any) -> Any:
        if self.state.step == 1 and self.state.done == 1:
            raise Killed
        return update(self, batch)

    update, drawn = Trainer._update, []
    with servers(small) as fakes:
        with pytest.MonkeyPatch.context() as patch:
            stops(lambda t: t.state.step == 1 and t.state.done == 0, patch)
            with pytest.raises(Interrupted):
                ppo(small, tmp_path / "out", save_every=1, **by(fakes))
        for _ in range(2):
            before = fakes[0].answered
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_update", dies)
                with pytest.raises(Killed):
                    ppo(small, tmp_path / "out", resume=True, save_every=1, **by(fakes))
            drawn.append(fakes[0].answered - before)
    assert drawn[0] >= 8 and drawn[1] <= 1, drawn


def test_a_server_with_other_weights_stops_the_run(small: str, tmp_path: Path) -> None:
    with servers(small, lying=True) as fakes, pytest.raises(RunError, match="differ from the scorer's"):
        ppo(small, tmp_path / "out", **by(fakes))


def test_stale_responses_are_corrected(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server takes no weights after the first: what it draws is weighted, and the mismatch reported."""
    with servers(small, 1) as fakes:
        options = by(fakes, stale="correct", importance_cap=1.5, learning_rate=2e-2)
        load, count = fakes[0].post, [0]

        def once(path: str, body: dict[str, Any]) -> Any:
            count[0] += path == "/collective_rpc"
            fakes[0].refuses_loads = count[0] > 1
            return load(path, body)

        fakes[0].post = once  # type: ignore[method-assign]
        ppo(small, tmp_path / "out", **options)
    first, *later = metrics(tmp_path / "out")
    assert first["importance/mean"] == pytest.approx(1, abs=1e-6) and first["rollouts/stale"] == 0
    assert all(line["rollouts/stale"] == 8 and line["rollouts/not_loaded"] == 1 for line in later)
    assert all(line["val/sampler_gap"] > 1e-3 for line in later)
    assert later[-1]["importance/max"] > 1.02 > 1 > later[-1]["importance/effective"] > 0


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_importance_weights_multiply_advantages(algorithm: str) -> None:
    """Truncated, per token for PPO and per response for RLOO; against a plain loop."""
    given = {"model": "m", "prompts": "p", "reward": "vader", "output": "o", "algorithm": algorithm}
    config = PpoConfig(**given, rollout_server=["http://x"], stale="correct", importance_cap=1.2)
    torch.manual_seed(0)
    sequences = [(np.arange(2, 4 + n, dtype=np.int32), np.arange(2 + n) > 0) for n in (1, 3, 2)]
    group = Group.from_sequences(sequences, row=0, pairs=())
    M, N = torch.randn(4, 9, dtype=torch.float64) / 3, torch.randn(3, dtype=torch.float64)
    M[2, :2] -= 1  # the policy likes the first response more than what drew it did
    rollouts = Rollouts((group,), M[0], M[1], M[2], M[3], N, N > 0)
    plain = objective.targets_of(config, rollouts, 0.1)
    assert objective.corrected(PpoConfig(**given), plain, rollouts) is plain
    found, plain = objective.corrected(config, plain, rollouts).advantage, plain.advantage
    gaps = (rollouts.logp_M - rollouts.sampled_logp_M).split(rollouts.length_N.tolist())
    wanted = [min(1.2, float(g.exp())) for gap in gaps for g in ([gap.sum()] if algorithm == "rloo" else gap)]
    assert min(wanted) < 1.2 == max(wanted)
    assert found.tolist() == pytest.approx((plain * torch.tensor(wanted, dtype=torch.float64)).tolist(), rel=1e-12)


def test_importance_weights_turn_expectations_into_the_policys() -> None:
    torch.manual_seed(1)
    p, q, f = torch.randn(3, 50, dtype=torch.float64)
    p, q = p.log_softmax(0), q.log_softmax(0)
    whole = (q.exp() * truncated_importance(p, q, float("inf")) * f).sum()
    assert float(whole) == pytest.approx(float((p.exp() * f).sum()), rel=1e-12)
    assert float(truncated_importance(p, q, 1.5).max()) == 1.5


@pytest.mark.slow
def test_a_student_learns_from_what_servers_draw(small: str, tmp_path: Path) -> None:
    """Any number of them; a stopped run has the responses of its step in the checkpoint."""
    teacher = world.write_world(tmp_path / "teacher", seed=3)
    rows = [{"prompt": world.PROMPT[: 1 + n % 3], "completion": "ab"} for n in range(8)]

    def distil(name: str, fakes: list[FakeRollouts], **more: Any) -> None:
        options: dict[str, Any] = {"on_policy": 0.7, "max_new_tokens": 3, "batch_size": 4, "epochs": 2}
        options |= {"device": "cpu", "dtype": "float64", "progress": "none", "learning_rate": 1e-2, "save_every": 1}
        urls = [fake.url for fake in fakes]
        prefopt.distil(small, rows, teacher=teacher, output=tmp_path / name, rollout_server=urls, **options, **more)

    for number in (1, 2):
        with servers(small, number) as fakes:
            distil(str(number), fakes)
    assert weights_are_the_same(tmp_path / "1", tmp_path / "2")
    lines = steps(tmp_path / "1")
    assert {line["on_policy"] for line in lines} == {0.0, 1.0}
    assert all(("rollouts/responses" in line) for line in lines if line["on_policy"])
    with servers(small) as fakes, pytest.MonkeyPatch.context() as patch:
        stop_after(len(lines) - 1, patch)
        with pytest.raises(Interrupted):
            distil("parts", fakes)
    with servers(small) as fakes:
        distil("parts", fakes, resume=True)
    assert weights_are_the_same(tmp_path / "1", tmp_path / "parts")


def test_a_student_keeps_what_servers_draw_after_a_resume(small: str, tmp_path: Path) -> None:
    """A run that resumes from the end of a step, and is killed before the update of the next."""
    teacher = world.write_world(tmp_path / "teacher", seed=3)
    rows = [{"prompt": world.PROMPT[: 1 + n % 3], "completion": "ab"} for n in range(8)]
    options: dict[str, Any] = {"on_policy": 1.0, "max_new_tokens": 3, "batch_size": 4, "save_every": 1}
    options |= {"device": "cpu", "dtype": "float64", "progress": "none", "learning_rate": 1e-2}

    class Killed(BaseException):
        pass

    def dies(self: Trainer, batch: Any) -> Any:
        raise Killed

    drawn = []
    with servers(small) as fakes:
        options |= {"teacher": teacher, "output": tmp_path / "out", "rollout_server": [fakes[0].url]}
        with pytest.MonkeyPatch.context() as patch:
            stop_after(1, patch)
            with pytest.raises(Interrupted):
                prefopt.distil(small, rows, **options)
        for _ in range(2):
            before = fakes[0].answered
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_update", dies)
                with pytest.raises(Killed):
                    prefopt.distil(small, rows, resume=True, **options)
            drawn.append(fakes[0].answered - before)
    assert drawn[0] >= 4 and drawn[1] <= 1, drawn


def test_options_that_do_nothing_are_refused() -> None:
    given: dict[str, Any] = {"model": "m", "prompts": "p", "reward": "vader", "output": "o"}
    served = {"rollout_server": ["http://here:1"]}
    for more, line in (
        ({"rollout_model": "x"}, "--rollout-model"),
        ({"server_gap": 0.1}, "--server-gap"),
        ({"stale": "correct"}, "--stale"),
        ({**served, "importance_cap": 3.0}, "--importance-cap"),
        ({**served, "stale": "correct", "temperature": 0.7}, "--stale correct needs"),
        ({"rollout_server": ["here:1"]}, "should begin with http"),
        ({"rollout_server": ["http://here:1", "http://here:1/v1"]}, "twice"),
    ):
        with pytest.raises(ConfigError, match=line):
            PpoConfig(**given, **more)
    config = PpoConfig(**given, **served)
    assert config.server_concurrency == 32 and config.importance_cap is None


def test_an_absent_server_is_said_at_once(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefopt.cli import main

    (tmp_path / "p.txt").write_text("ab\n")
    words = ["ppo", "--model", small, "--prompts", str(tmp_path / "p.txt"), "--reward", "length"]
    assert main([*words, "--output", str(tmp_path / "o"), "--rollout-server", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert "127.0.0.1:9/v1 cannot be reached" in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists() or not json.loads((tmp_path / "o" / "run.json").read_text())
