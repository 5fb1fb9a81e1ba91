"""Rollout servers: the same samples from any number of them, and every way in which one can be wrong is found."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from generate.fake_rollout_server import FakeRollouts, loaded, serving
from methods import small_world as world
from prefopt.core.dispatch import Dispatch, ServerFailed, ServersLost
from prefopt.core.endpoint import Endpoint
from prefopt.errors import ConfigError, RunError
from prefopt.generate.completion import Completion, Wanted
from prefopt.generate.rollout_checks import RolloutChecks, bias_of, largest_bias
from prefopt.generate.rollout_server import RolloutServer
from prefopt.generate.rollout_servers import RolloutServers, Stale
from prefopt.generate.sampler import Sample, SamplingParams
from prefopt.model.scorer import Scorer

PROMPTS = [[2, 3, 4], [5], [2, 3, 4], [6, 7]]
PARAMS = SamplingParams(5, (world.STOP,), seed=3)
Plain = list[list[tuple[list[int], list[float], bool]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets of weights of one model."""
    place = tmp_path_factory.mktemp("rollouts")
    return [world.write_world(place / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def policies(folders: list[str]) -> list[Scorer]:
    return [loaded(folder) for folder in folders]


def connected(
    servers: Sequence[FakeRollouts], policy: Scorer, *, stale: Stale = "refuse", **options: Any
) -> RolloutServers:
    """A sampler on servers that do not have the weights yet."""
    found = [RolloutServer(Endpoint(s.url, flag="--rollout-server"), "base", False, 5.0) for s in servers]
    for server in found:
        server.connect(16)
    given = {"concurrency": 4, "pause": 0.01, **options}
    return RolloutServers(found, RolloutChecks(policy, tolerance=1e-6), context=16, stale=stale, **given)


def plain(samples: Sequence[Sequence[Sample]]) -> Plain:
    return [[(s.ids.tolist(), s.sampling_logps.tolist(), s.finished) for s in many] for many in samples]


def drawn(folders: list[str], policies: list[Scorer], *, servers: int = 1, num: int = 3, **faults: Any) -> Plain:
    """Samples of the second weights, from servers that began with the first."""
    with ExitStack() as stack:
        fakes = [stack.enter_context(serving(folders[0])) for _ in range(servers)]
        sampler = connected(fakes, policies[1])
        sampler.hand_over("v1", Path(folders[1]))
        for name, value in faults.items():
            setattr(fakes[0], name, value)
        return plain(sampler.sample(PROMPTS, num, PARAMS))


@pytest.fixture(scope="module")
def expected(folders: list[str], policies: list[Scorer]) -> Plain:
    """What one server draws that does nothing wrong."""
    return drawn(folders, policies)


def test_samples_are_the_same_from_any_number_of_servers(
    folders: list[str], policies: list[Scorer], expected: Plain
) -> None:
    for servers in (2, 3):
        assert drawn(folders, policies, servers=servers) == expected
    assert drawn(folders, policies, pause=0.02, servers=2) == expected
    for (_, logps, _), scored in zip(expected[0], _scored(policies[1], PROMPTS[0], expected[0]), strict=True):
        assert logps == pytest.approx(scored, abs=1e-9)
    assert expected[0] != expected[2], "a prompt that comes again gets other samples"


@torch.no_grad()
def _scored(policy: Scorer, prompt: list[int], samples: list[tuple[list[int], list[float], bool]]) -> list[list[float]]:
    """By the class's own forward pass."""
    found = []
    for ids, _, _ in samples:
        policy.detach_hook()
        logits = policy.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        policy.attach_hook()
        found.append(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].tolist())
    return found


def test_several_responses_are_in_flight_and_all_servers_work(folders: list[str], policies: list[Scorer]) -> None:
    with serving(folders[0], pause=0.02) as one, serving(folders[0], pause=0.02) as two:
        sampler = connected([one, two], policies[0])
        sampler.hand_over("v0", Path(folders[0]))
        told: list[tuple[int, int]] = []
        samples = sampler.sample(PROMPTS, 6, PARAMS, progress=lambda ended, tokens: told.append((ended, tokens)))
        assert one.most_in_flight == two.most_in_flight == 4
        assert one.answered + two.answered == 24 + 2 and min(one.answered, two.answered) > 6  # two trials
        assert sum(ended for ended, _ in told) == 24
        assert sum(tokens for _, tokens in told) == sum(s.tokens for many in samples for s in many)
        assert sampler.metrics()["rollouts/responses"] == 24
        assert sampler.sample([], 2, PARAMS) == [] and sampler.sample([[5]], 0, PARAMS) == [[]]


@pytest.mark.parametrize(
    ("faults", "metric"),
    [
        ({"errors": 2}, "retries"),
        ({"broken": 2}, "retries"),
        ({"dropped": 2}, "incomplete"),
        ({"cut": 2}, "incomplete"),
        ({"misdirected": 2}, "misdirected"),
        ({"duplicated": 2}, "duplicated"),
        ({"duplicated": 2, "echoes": False}, "duplicated"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x,
)
def test_what_a_server_spoils_is_drawn_again(
    faults: dict[str, Any], metric: str, folders: list[str], policies: list[Scorer], expected: Plain
) -> None:
    with serving(folders[0], echoes=faults.get("echoes", True)) as fake:
        sampler = connected([fake], policies[1], concurrency=1)
        sampler.hand_over("v1", Path(folders[1]))
        for name, value in faults.items():
            setattr(fake, name, value)
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.metrics()[f"rollouts/{metric}"] == 2


def test_a_server_that_dies_leaves_its_work_to_the_others(
    folders: list[str], policies: list[Scorer], expected: Plain
) -> None:
    with serving(folders[0]) as one, serving(folders[0], pause=0.01) as two:
        sampler = connected([one, two], policies[1])
        sampler.hand_over("v1", Path(folders[1]))
        one.dies_after = one.answered + 2
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.metrics()["rollouts/servers_lost"] == 1
        one.dies_after = None  # it was started again, and gets the next weights
        sampler.hand_over("v2", Path(folders[1]))
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.metrics()["rollouts/servers_lost"] == 0 and one.answered > 4


def test_without_a_server_left_the_run_stops_in_one_line(folders: list[str], policies: list[Scorer]) -> None:
    with serving(folders[0]) as one, serving(folders[0]) as two:
        sampler = connected([one, two], policies[0])
        sampler.hand_over("v0", Path(folders[0]))
        one.dies_after = two.dies_after = 3
        with pytest.raises(ServersLost, match=r"no server of --rollout-server is left .*start one again.*--resume"):
            sampler.sample(PROMPTS, 6, PARAMS)


def test_a_slow_answer_counts_as_failed(folders: list[str], policies: list[Scorer], expected: Plain) -> None:
    with serving(folders[0]) as slow, serving(folders[0]) as quick:
        sampler = connected([slow, quick], policies[1])
        sampler.hand_over("v1", Path(folders[1]))
        slow.pause, sampler.servers[0].timeout = 1.5, 0.1
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.servers[0].lost and "timed out" in sampler.servers[0].lost


def test_a_stop_does_not_wait_for_answers(folders: list[str], policies: list[Scorer]) -> None:
    class Stopped(Exception):
        pass

    def stop(ended: int, tokens: int) -> None:
        raise Stopped

    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[0])
        sampler.hand_over("v0", Path(folders[0]))
        fake.pause, before = 2.0, time.monotonic()
        with pytest.raises(Stopped):
            sampler.sample(PROMPTS, 3, PARAMS, progress=stop)
        assert time.monotonic() - before < 1.5


# -- weights ---------------------------------------------------------------------------------------------------------


def test_stale_responses_are_refused(folders: list[str], policies: list[Scorer], expected: Plain) -> None:
    """They are drawn again by the server, when it has taken the weights, or by another."""
    with serving(folders[0]) as one, serving(folders[0], stale=True) as two:
        sampler = connected([one, two], policies[1])
        sampler.hand_over("v1", Path(folders[1]))
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.metrics()["rollouts/stale"] >= 4
        assert "weights default, and not with v1" in sampler.servers[1].lost and len(two.loads) > 1


def test_a_server_that_lost_its_weights_gets_them_again(
    folders: list[str], policies: list[Scorer], expected: Plain
) -> None:
    with serving(folders[0]) as fake:
        sampler, before = connected([fake], policies[1]), fake.scorers["base"]
        sampler.hand_over("v1", Path(folders[1]))
        fake.scorers["base"], fake.version = before, "default"  # it was started again
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert 1 <= sampler.metrics()["rollouts/stale"] <= 4 and len(fake.loads) == 2


def test_a_response_during_which_weights_were_loaded_is_drawn_again(
    folders: list[str], policies: list[Scorer], expected: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first tokens may be of the weights before, whatever the server says at its end."""
    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[1], concurrency=1)
        sampler.hand_over("v1", Path(folders[1]))
        complete, left = RolloutServer.complete, [1, 1]

        def loads_meanwhile(server: RolloutServer, *given: Any) -> Completion:
            found = complete(server, *given)
            if left:
                left.pop()
                server.load("v1", Path(folders[1]))
            return found

        monkeypatch.setattr(RolloutServer, "complete", loads_meanwhile)
        assert plain(sampler.sample(PROMPTS, 3, PARAMS)) == expected
        assert sampler.metrics()["rollouts/stale"] == 2


def test_stale_responses_are_kept_to_be_corrected(folders: list[str], policies: list[Scorer]) -> None:
    """With the log-probabilities of the weights that drew them beside those of the policy."""
    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[1], stale="correct")
        sampler.hand_over("v0", Path(folders[0]))
        fake.refuses_loads = True
        sampler.hand_over("v1", Path(folders[1]))
        samples = sampler.sample(PROMPTS[:1], 4, PARAMS)[0]
        found = sampler.metrics()
        assert found["rollouts/stale"] == 4 and found["rollouts/not_loaded"] == 1
    ids = [(s.ids.tolist(), [], s.finished) for s in samples]
    old, new = (_scored(policy, PROMPTS[0], ids) for policy in policies)
    for sample, one, two in zip(samples, old, new, strict=True):
        assert sample.sampling_logps.tolist() == pytest.approx(one, abs=1e-9)
        assert sample.logps.tolist() == pytest.approx(two, abs=1e-9)
    assert np.abs(samples[0].logps - samples[0].sampling_logps).max() > 1e-3


def test_a_server_that_takes_no_weights_is_lost(folders: list[str], policies: list[Scorer]) -> None:
    with serving(folders[0], refuses_loads=True) as fake:
        sampler = connected([fake], policies[1])
        with pytest.raises(ServersLost, match="out of memory"):
            sampler.hand_over("v1", Path(folders[1]))


# -- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "line"),
    [
        ({"lying": True}, r"log-probabilities differ from the scorer's by [\d.]+ nats per token"),
        ({"wrong": 1e-3}, r"lower on average \(\d+ tokens of 12 responses; rounding explains 1e-06\)"),
        ({"top_p": 0.9}, "higher, as with top-p, top-k or a lower temperature"),
        ({"temperature": 0.8}, "log-probabilities differ from the scorer's"),
    ],
    ids=["lying", "wrong", "top_p", "temperature"],
)
def test_what_is_not_of_the_weights_is_refused(
    faults: dict[str, Any], line: str, folders: list[str], policies: list[Scorer]
) -> None:
    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[1])
        for name, value in faults.items():
            setattr(fake, name, value)
        sampler.hand_over("v1", Path(folders[1]))
        with pytest.raises(RunError, match=line):
            sampler.sample(PROMPTS, 3, PARAMS)


def test_a_server_that_does_not_heed_seeds_is_found(policies: list[Scorer]) -> None:
    wanted = [Wanted((2,), seed, 40) for seed in range(2)]
    ids = np.full(40, 3, np.int32)
    same = [Completion(ids, np.full(40, -2.0), False, "v", "here:1", True)] * 2
    with pytest.raises(RunError, match="the same 40 tokens for different seeds"):
        RolloutChecks(policies[0], tolerance=9.0)(wanted, same, SamplingParams(40))


def test_a_single_wrong_response_is_found(folders: list[str], policies: list[Scorer]) -> None:
    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[0], concurrency=1)
        sampler.checks.tolerance = 0.01
        sampler.hand_over("v0", Path(folders[0]))
        draw, count = fake.draw, [0]

        def once(body: dict[str, Any]) -> Any:
            count[0] += 1
            fake.wrong = 0.5 if count[0] == 5 else 0.0
            return draw(body)

        fake.draw = once  # type: ignore[method-assign]
        with pytest.raises(RunError, match="in one response"):
            sampler.sample(PROMPTS, 20, PARAMS)


@pytest.mark.parametrize("faults", [{"top_p": 0.7}, {"temperature": 0.4}, {}], ids=["top_p", "temperature", "none"])
def test_right_log_probabilities_of_tokens_drawn_from_elsewhere(
    faults: dict[str, Any], folders: list[str], policies: list[Scorer]
) -> None:
    """The server draws otherwise than it was asked to, and reports the model's own log-probabilities."""
    with serving(folders[0]) as fake:
        sampler = connected([fake], policies[0])
        sampler.hand_over("v0", Path(folders[0]))
        fake.admits = False
        for name, value in faults.items():
            setattr(fake, name, value)
        if faults:
            with pytest.raises(RunError, match=r"places in it deviate by 0\.\d+ from uniform"):
                for seed in range(20):
                    sampler.sample(PROMPTS[:2], 8, SamplingParams(13, seed=seed))
        else:
            sampler.sample(PROMPTS, 8, SamplingParams(12, seed=1))
            assert 0 < largest_bias([sampler.checks.places]) < 0.08


def test_a_server_may_report_the_models_own_log_probabilities(folders: list[str], policies: list[Scorer]) -> None:
    """At another temperature those of the distribution drawn from are then the scorer's."""
    params = SamplingParams(5, (world.STOP,), temperature=0.6, seed=3)
    found = []
    for admits in (True, False):
        with serving(folders[0], admits=admits) as fake:
            sampler = connected([fake], policies[0])
            sampler.hand_over("v0", Path(folders[0]))
            found.append(sampler.sample(PROMPTS, 3, params))
    for one, two in zip(*([s for many in samples for s in many] for samples in found), strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert one.sampling_logps == pytest.approx(two.sampling_logps, abs=1e-9)
        assert one.logps == pytest.approx(two.logps, abs=1e-12)
        assert np.abs(one.logps - one.sampling_logps).max() > 1e-3


def test_places_of_uniform_draws_are_uniform() -> None:
    draws = np.random.default_rng(0).random(20_000)
    assert bias_of(np.histogram(draws, 100, (0, 1))[0]) < 0.015
    assert bias_of(np.histogram(draws * 0.9, 100, (0, 1))[0]) == pytest.approx(0.1, abs=0.01)


# -- before anything is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "line"),
    [
        ({"ids": False}, "its answers lack token ids"),
        ({"max_model_len": 8}, "takes 8 tokens, but prompt and response may have 16"),
        ({"without": "weight_info"}, "does not say which weights it has"),
    ],
    ids=["ids", "length", "version"],
)
def test_a_server_that_cannot_be_used_is_refused(
    faults: dict[str, Any], line: str, folders: list[str], policies: list[Scorer]
) -> None:
    with serving(folders[0], **faults) as fake, pytest.raises(ConfigError, match=line):
        connected([fake], policies[0])


def test_a_server_that_cannot_load_weights_is_refused(folders: list[str], policies: list[Scorer]) -> None:
    with serving(folders[0], without="collective_rpc") as fake:
        sampler = connected([fake], policies[0])
        with pytest.raises(ConfigError, match="it has no /collective_rpc"):
            sampler.hand_over("v0", Path(folders[0]))


class _Server:
    def __init__(self, place: str) -> None:
        self.place, self.lost = place, ""


def test_requests_of_lost_servers_are_given_to_waiting_threads() -> None:
    """A server may be lost when the others have nothing left to do."""
    good, bad, free, begun = _Server("good"), _Server("bad"), threading.Event(), threading.Event()

    def ask(server: _Server, n: int) -> int:
        if server is bad:
            begun.set()
            free.wait(1)
            raise ServerFailed("gone")
        begun.wait(1)
        return n * n

    requests: Dispatch[_Server, int] = Dispatch([good, bad], 20, ask, flag="--x", concurrency=2, pause=0.01)
    count: list[int | None] = []

    def progress(answer: int | None) -> None:
        count.append(answer)
        if len([a for a in count if a is not None]) >= 18:
            free.set()

    assert requests.run(progress) == [n * n for n in range(20)] and bad.lost == "bad: gone"


def test_what_fails_in_a_thread_is_raised() -> None:
    def ask(server: _Server, n: int) -> int:
        raise RunError("nonsense")

    call: Callable[[], Any] = Dispatch([_Server("a")], 3, ask, flag="--x", concurrency=2).run
    with pytest.raises(RunError, match="nonsense"):
        call()
