"""Online methods, whole runs: what a round teaches, who judges it, how runs stop and go on, and what they refuse."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefopt
from methods import small_world as world
from methods.test_ppo import ROWS, metrics, same_bits
from prefopt.config.online import OnlineConfig
from prefopt.core.dispatch import ServersLost
from prefopt.core.endpoint import Unreachable
from prefopt.errors import ConfigError, Diverged, Interrupted, RunError, StudyError
from prefopt.generate.chat_model import RemoteChatModel
from prefopt.methods.online import OnlineResult
from prefopt.rl import comparers
from prefopt.rl.last_good import going_on
from prefopt.rl.rollouts import Collector
from prefopt.rl.rounds import Rounds
from prefopt.rl.sampled import SampledCollector
from prefopt.studies.annotators import invite
from prefopt.studies.items import next_item
from prefopt.studies.study import Study, StudySettings
from prefopt.studies.votes import Vote, record
from prefopt.train.trainer import Trainer
from train.small import weights

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "max_new_tokens": 3,
    "learning_rate": 5e-3,
    "device": "cpu",
    "dtype": "float64",
    "progress": "none",
}


def online(model: str, output: Path, rows: Any = ROWS, **options: Any) -> OnlineResult:
    result = prefopt.online(model, rows, output=output, **{"reward": world.reward, **QUICK, **options})
    assert result is not None
    return result


def rounds(output: Path) -> list[dict[str, Any]]:
    """The rows of all rounds, those aside too, in their order."""
    files = [*output.glob("rounds/*.jsonl"), *output.glob("aside/*.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["round"], row["number"]))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_world(tmp_path_factory.mktemp("world") / "m")


# -- a round ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "ipo", "num": 3}, {"labels": "soft", "num": 3}, {"loss": "plackett_luce", "num": 3}],
    ids=str,
)
def test_a_round_is_a_file_of_preferences_and_a_step_on_it_is_one_of_dpo(
    options: dict[str, Any], small: str, tmp_path: Path
) -> None:
    """The same weights, to the digits that another packing leaves."""
    found = online(small, tmp_path / "out", rows=ROWS[:4], max_steps=1, missing_eos_penalty=0.01, **options)
    rows = rounds(tmp_path / "out")
    assert [(row["round"], row["number"]) for row in rows] == [(1, n) for n in range(4)]
    assert sorted(row["prompt"] for row in rows) == [row["prompt"] for row in ROWS[:4]]
    for row in rows:
        assert row["judge_scores"] == world.reward([], row["responses"])
        gone = [0.01 * (reason == "length") for reason in row.get("finish", ["stop"] * len(row["responses"]))]
        assert row["scores"] == [score - less for score, less in zip(row["judge_scores"], gone, strict=True)]
        assert row["responses"] == [world.text_of(ids) for ids in row["token_ids"]]
        assert len(row["logprobs"]) == len(row["ref_logprobs"]) == len(row["responses"])
    learned = [json.loads(line) for line in (found.rounds / "round-0001.jsonl").read_text().splitlines()]
    assert len(learned) >= 3
    aside = [row for row in rows if "why" in row]
    assert len(learned) + len(aside) == 4 and all("is empty" in row["why"] or "equally" in row["why"] for row in aside)
    # The same again from the rows that both can learn from.
    prompts = [{"prompt": row["prompt"]} for row in learned]
    plain = {**QUICK, "max_steps": 1, "warmup": 0.0, "batch_size": len(learned), "shuffle": False}
    online(small, tmp_path / "again", rows=prompts, missing_eos_penalty=0.01, **{**plain, **options})
    assert [r["token_ids"] for r in rounds(tmp_path / "again")] == [r["token_ids"] for r in learned]
    offline = {n: v for n, v in {**plain, **options}.items() if n not in ("max_new_tokens", "num", "labels")}
    prefopt.dpo(small, tmp_path / "again" / "rounds", output=tmp_path / "dpo", **offline)
    ours, theirs, start = weights(tmp_path / "again"), weights(tmp_path / "dpo"), weights(Path(small))
    for name, wanted in theirs.items():
        moved = (wanted - start[name].to(wanted.dtype)).norm()
        assert float((ours[name] - wanted).norm()) <= 1e-5 * float(moved) + 1e-12, name


def test_numbers_of_a_round_are_those_of_its_file(small: str, tmp_path: Path) -> None:
    online(small, tmp_path / "out", num=3, pairs="best-worst", beta=0.5)
    for line in metrics(tmp_path / "out"):
        rows = [row for row in rounds(tmp_path / "out") if row["round"] == line["step"]]
        scores = np.array([row["scores"] for row in rows])
        assert line["objective/scores"] == pytest.approx(scores.mean())
        assert line["objective/best_scores"] == pytest.approx(scores.max(1).mean())
        assert line["round/skipped"] == sum(len(set(row["scores"])) == 1 for row in rows)
        gap = np.array([row["logprobs"] for row in rows]) - np.array([row["ref_logprobs"] for row in rows])
        assert line["objective/kl"] == pytest.approx(gap.mean(), abs=1e-9)
    assert line["objective/kl"] != 0


def test_rounds_that_teach_nothing_change_nothing(small: str, tmp_path: Path) -> None:
    for n, loss in enumerate([{}, {"loss": "dapo"}, {"loss": "kto"}, {"loss": "plackett_luce"}]):
        output = tmp_path / str(n)
        found = online(small, output, reward=lambda p, r: [1.0] * len(r), **loss)
        assert found.steps == 2 and [line["round/skipped"] for line in metrics(output)] == [4, 4]
        after, before = weights(output), weights(Path(small))
        assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in after)
        assert not list(output.glob("rounds/*")) and len(rounds(output)) == 8
    online(small, tmp_path / "both", reward=lambda p, r: [float(p[0] < "c") * x for x in world.reward(p, r)])
    skipped = [line["round/skipped"] for line in metrics(tmp_path / "both")]  # there are zeros among them
    assert 0 < sum(skipped) < 8
    after, before = weights(tmp_path / "both"), weights(Path(small))
    assert not all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in after)


def test_the_rate_is_settled_for_the_model(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    online(small, tmp_path / "out", learning_rate="auto", max_steps=1, passes=2, minibatches=2, progress="plain")
    assert "million weights in 4 updates" in capsys.readouterr().out
    kept = json.loads((tmp_path / "out/run.json").read_text())
    rate = kept["resolved"]["learning_rate"]["to"]
    assert metrics(tmp_path / "out")[0]["learning_rate"] == kept["options"]["learning_rate"] == rate > 1e-5


def test_an_epoch_whose_last_round_taught_nothing_ends(small: str, tmp_path: Path) -> None:
    calls: list[int] = []
    kept: list[tuple[tuple[int, int], int]] = []
    step = Trainer.make_step

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(1)
        return world.reward(prompts, responses) if len(calls) % 2 else [1.0] * len(responses)

    def noting(self: Trainer) -> Any:
        record = step(self)
        kept.append(((self.averages.whole.first, self.averages.whole.last), self.averages.begun.rows))
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "make_step", noting)
        online(small, tmp_path / "out", reward=reward, epochs=2)
    assert [line["round/skipped"] == 4 for line in metrics(tmp_path / "out")] == [False, True] * 2
    assert [whole for whole, _ in kept] == [(0, 0), (1, 1), (1, 1), (3, 3)]
    assert [rows > 0 for _, rows in kept] == [True, False] * 2


def test_only_prompts_that_are_left_out_are_skipped(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best of K imitates the first of equals, or it would not be the best of K draws; and rounds of which nothing was
    learned are counted at the end."""
    for loss, skipped in (("best_of_k", 0), ("grpo", 0), ("dpo", 4)):
        online(small, tmp_path / loss, reward=lambda p, r: [1.0] * len(r), loss=loss, progress="plain")
        lines = metrics(tmp_path / loss)
        assert [(line["round/skipped"], line["round/equal"]) for line in lines] == [(skipped, 4)] * 2
        assert ("loss" in lines[0]) == (not skipped)
        assert ("2 of 2 rounds had nothing to learn from" in capsys.readouterr().out) == bool(skipped)


def test_dynamic_sampling_leaves_out_what_is_equal(small: str, tmp_path: Path) -> None:
    """Prompts that begin with a: all their responses are worth the same."""

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        found = world.reward(prompts, responses)
        return [0.0 if p.startswith("a") else r for p, r in zip(prompts, found, strict=True)]

    seen: list[int] = []
    learn = Rounds.learn_from

    def kept(self: Rounds, batch: Any) -> None:
        seen.append(len(batch))
        learn(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "learn_from", kept)
        online(small, tmp_path / "out", reward=reward, loss="dapo", batch_size=8, num=6)
    equal = sum(len(set(row["scores"])) == 1 for row in rounds(tmp_path / "out"))
    assert equal >= 2 and seen == [8 - equal]
    assert metrics(tmp_path / "out")[0]["round/skipped"] == equal


def test_a_reference_that_moves_is_the_policy_at_the_start_of_a_round(small: str, tmp_path: Path) -> None:
    """Also where a round has several updates; a fixed one stays behind."""
    options: dict[str, Any] = {"epochs": 2, "passes": 2, "minibatches": 2}
    online(small, tmp_path / "moves", ref_model_sync_steps=1, **options)
    assert [abs(line["objective/kl"]) < 1e-9 for line in metrics(tmp_path / "moves")] == [True] * 4
    online(small, tmp_path / "every-2", ref_model_sync_steps=2, **options)
    assert [abs(line["objective/kl"]) < 1e-9 for line in metrics(tmp_path / "every-2")] == [True, False, True, False]
    online(small, tmp_path / "fixed", **options)
    assert [abs(line["objective/kl"]) < 1e-9 for line in metrics(tmp_path / "fixed")] == [True, False, False, False]


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kto", "num": 3},
        {"loss": "tdpo"},
        {"loss": "aot", "minibatches": 2},
        {"loss": "best_of_k", "average": "rows"},
        {"loss": "rloo", "passes": 2},
        {"loss": "grpo", "average": "constant", "minibatches": 2, "overlong_buffer": 2},
        {"loss": "gspo", "kl": "loss", "beta": 0.1, "temperature": 0.7},
        {"lora": True, "temperature": 0.7},
    ],
    ids=str,
)
def test_every_kind_of_loss_learns_from_rounds_and_passes_the_first_look(
    options: dict[str, Any], small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    online(small, tmp_path / "out", **{**options, "progress": "plain"})
    told = capsys.readouterr()
    assert "ratios are 1 within" in told.out + told.err
    assert len(metrics(tmp_path / "out")) == 2 and all(line["grad_norm"] > 0 for line in metrics(tmp_path / "out"))


def test_log_probabilities_that_are_not_those_of_the_samples_stop_the_run(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(look: Any) -> Any:
        def found(self: Collector, *arguments: Any) -> Any:
            logp, value = look(self, *arguments)
            return logp + 0.01, value

        return found

    for kind in (Collector, SampledCollector):
        monkeypatch.setattr(kind, "_look", shifted(kind._look))
    for n, loss in enumerate(("dpo", "grpo", "best_of_k")):
        with pytest.raises(RunError, match="before any weight has moved"):
            online(small, tmp_path / str(n), loss=loss)


def test_a_policy_that_runs_away_leaves_good_weights(small: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="last good weights"):
        online(small, tmp_path / "out", loss="rloo", beta=0.0, max_kl=0.3, learning_rate=2e-3, epochs=20, save_every=1)
    assert (tmp_path / "out" / "last-good" / "model.safetensors").exists()


@pytest.mark.parametrize("options", [{"ref_model_sync_steps": 1}, {"loss": "best_of_k"}], ids=str)
def test_what_a_run_that_diverged_advises_is_allowed(
    options: dict[str, Any], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.make_step

    def diverging(self: Trainer) -> Any:
        if self.state.step == 1:
            raise Diverged("step 2: loss is nan")
        return step(self)

    monkeypatch.setattr(Trainer, "make_step", diverging)
    with pytest.raises(Diverged, match=r"no good weights later than the first|last good weights") as caught:
        online(small, tmp_path / "out", epochs=2, save_every=1, **options)
    said = str(caught.value)
    assert ("--beta" in said) == ("loss" not in options)
    path = tmp_path / "last-good"
    config = OnlineConfig(model=small, prompts=["p"], reward="length", output="o", **options)
    for named in (True, False):
        how = going_on(config, path, named=named)
        given = dict(zip(*[iter(how.split(" with ")[1].split(" and ")[0].split())] * 2, strict=True))
        assert given["--model"] == str(path) and ("--reference" in given) == (named and "loss" in options)
        OnlineConfig(**{**config.to_dict(), **{k[2:]: v for k, v in given.items()}})


# -- stopping and going on ----------------------------------------------------------------------------------------


def stops(when: Callable[[Trainer], bool], patch: pytest.MonkeyPatch) -> None:
    """A signal at the first pause of which ``when`` is true."""
    pause = Trainer.pause

    def wrapped(self: Trainer) -> None:
        if self.stop.signal is None and when(self):
            signal.raise_signal(signal.SIGTERM)
        pause(self)

    patch.setattr(Trainer, "pause", wrapped)


PHASES: dict[str, Callable[[Any], bool]] = {
    "drawing": lambda t: t.state.step == 1 and t.state.done == 0 and t.source.round is None and t.source._batch is None,
    "updating": lambda t: t.state.step == 1 and t.state.done == 2,
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("loss", ["dpo", "dapo"])
def test_a_stopped_run_goes_on_to_the_same_bits(loss: str, phase: str, small: str, tmp_path: Path) -> None:
    moves = {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5} if loss == "dpo" else {}
    options = {"loss": loss, "epochs": 2, "passes": 2, "minibatches": 2, **moves}
    online(small, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stops(PHASES[phase], patch)
        with pytest.raises(Interrupted):
            online(small, tmp_path / "parts", **options)
    online(small, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    assert rounds(tmp_path / "parts") == rounds(tmp_path / "whole")


def test_what_a_judge_said_is_not_asked_again(small: str, tmp_path: Path) -> None:
    """A reward that never says the same twice: what it said before the process died is in the round's file."""
    calls: list[int] = []

    def fickle(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        calls.append(len(responses))
        return [r + 0.1 * np.sin(37.0 * len(calls) + n) for n, r in enumerate(world.reward(prompts, responses))]

    class Killed(BaseException):
        pass

    def dies(self: Trainer, *arguments: Any, **more: Any) -> Any:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "keep", dies)
        with pytest.raises(Killed):
            online(small, tmp_path / "out", reward=fickle)
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))
    before = rounds(tmp_path / "out")
    found = online(small, tmp_path / "out", reward=fickle, resume=True)
    assert found.steps == 2 and len(calls) == 3
    assert rounds(tmp_path / "out")[:4] == before


# -- judges that compare ------------------------------------------------------------------------------------------


def test_a_language_model_judges_in_both_orders(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one prefers longer answers, whichever comes first; of equally long ones the first, which is a tie."""

    def answer(self: Any, asked: Any, attempt: int) -> Any:
        text = asked[1].content
        first, second = (text.split(f"# {name} answer\n\n")[1].split("\n\n# ")[0] for name in ("First", "Second"))
        yield "[[1]]" if len(first) >= len(second) else "[[2]]"

    monkeypatch.setattr(RemoteChatModel, "answer", answer)
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big", "num": 3}
    online(small, tmp_path / "out", batch_size=8, beta=0.5, **options)
    (line,) = metrics(tmp_path / "out")
    ties = every = 0
    for row in rounds(tmp_path / "out"):
        every += len(row["outcomes"])
        size = [len(text) for text in row["responses"]]
        for i, k, x in row["outcomes"]:
            assert x == 0.5 + 0.5 * np.sign(size[i] - size[k])
            ties += x == 0.5
        assert all(size[i] > size[k] and w == 1 for i, k, w in row.get("votes", ()))
        assert len(row.get("votes", ())) == sum(x != 0.5 for *_, x in row["outcomes"])
    assert line["round/ties"] == ties / every > 0 and line["round/undecided"] == 0
    assert "objective/scores" not in line  # what one wins another loses
    online(small, tmp_path / "gradient", loss="rloo", **options)
    assert metrics(tmp_path / "gradient")[-1]["grad_norm"] > 0


def test_a_judge_without_verdicts_ends_the_run(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteChatModel, "answer", lambda self, asked, attempt: iter(["I cannot say."]))
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "mute", "num": 3}
    with pytest.raises(RunError, match=r"round 1: the judge .*mute.* gave no verdict on (\d+) of \1 pairs"):
        online(small, tmp_path / "out", **options)


def test_a_judge_that_is_lost_leaves_a_checkpoint(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round, with answers that were paid for; the run goes on to the same bits."""
    asked: list[str] = []
    most = [10**9]

    def answer(self: Any, messages: Any, attempt: int) -> Any:
        asked.append(messages[1].content)
        if len(asked) > most[0]:
            raise Unreachable("http://localhost:1/v1 cannot be reached (refused); is the server running?")
        first, second = (asked[-1].split(f"# {n} answer\n\n")[1].split("\n\n# ")[0] for n in ("First", "Second"))
        yield "[[1]]" if first > second else "[[2]]"

    monkeypatch.setattr(RemoteChatModel, "answer", answer)
    monkeypatch.setattr("prefopt.generate.judged.PAUSE", 0.0)
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big"}
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "one"))
    online(small, tmp_path / "whole", **options)
    whole, most[0] = len(asked), len(asked) - 2
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "other"))
    asked.clear()
    with pytest.raises(ServersLost, match=r"no server of --judge-url is left .*refused.* continue with --resume"):
        online(small, tmp_path / "parts", judge_parallel=1, **options)
    assert len(metrics(tmp_path / "parts")) == 1
    assert (tmp_path / "parts" / "checkpoints" / "step-00000001" / "rollouts.safetensors").exists()
    most[0] = 10**9
    asked.clear()
    online(small, tmp_path / "parts", judge_parallel=1, resume=True, **options)
    assert len(asked) == 2 < whole, "what was answered is not asked again"
    assert same_bits(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_is_followed_while_a_judge_is_silent(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, asked, answered = threading.Event(), threading.Event(), threading.Event()

    def answer(self: Any, messages: Any, attempt: int) -> Any:
        if not asked.is_set():
            asked.set()
            signal.raise_signal(signal.SIGTERM)
        if not silent.wait(10):
            answered.set()
        yield "[[tie]]"

    monkeypatch.setattr(RemoteChatModel, "answer", answer)
    options: dict[str, Any] = {"reward": "llm", "judge_url": "http://localhost:1/v1", "judge_model": "big"}
    try:
        with pytest.raises(Interrupted, match=r"after step 0 of \d+;"):
            online(small, tmp_path / "out", **options)
        assert asked.is_set() and not answered.is_set(), "nothing was answered when the run stopped"
        assert (tmp_path / "out" / "checkpoints" / "step-00000000" / "rollouts.safetensors").exists()
    finally:
        silent.set()


@pytest.mark.parametrize("name", ["llm", "people"])
def test_a_function_is_called_whatever_its_name(name: str, small: str, tmp_path: Path) -> None:
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        called.append(len(responses))
        return world.reward(prompts, responses)

    called: list[int] = []
    reward.__qualname__ = name
    online(small, tmp_path / "out", reward=reward, max_steps=1)
    assert sum(called) == sum(len(row["judge_scores"]) for row in rounds(tmp_path / "out")) > 0
    assert f"{name}()" in (tmp_path / "out" / "README.md").read_text()


def vote_on_all(path: Path, done: threading.Event, prefer: Callable[[list[str]], int]) -> None:
    """A person who votes on every item of a study as it comes."""
    while not path.exists() and not done.is_set():
        time.sleep(0.02)
    if done.is_set():
        return
    with Study(path) as study:
        anna = invite(study, "anna")[0]
        while not done.is_set():
            found = next_item(study, anna)
            if found is None:
                time.sleep(0.02)
                continue
            texts = found.item.row["responses"]
            best = prefer(list(texts))
            rest = tuple(k for k in range(len(texts)) if k != best)
            record(study, anna, found.ticket, Vote(((best,), rest)))


def test_people_judge_while_the_run_waits(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it waits, and gone on when the votes are there; the same as a run that never stopped."""
    monkeypatch.setattr(comparers, "POLL_SECONDS", 0.02)
    options: dict[str, Any] = {"reward": "people", "num": 3, "labels": "soft"}
    prefer = lambda texts: max(range(len(texts)), key=lambda k: (len(texts[k]), texts[k]))  # noqa: E731

    def with_anna(output: Path, study: Path, **more: Any) -> None:
        done = threading.Event()
        person = threading.Thread(target=vote_on_all, args=(study, done, prefer))
        person.start()
        try:
            online(small, output, study=str(study), **options, **more)
        finally:
            done.set()
            person.join()

    with_anna(tmp_path / "whole", tmp_path / "whole.db")
    with pytest.MonkeyPatch.context() as patch:
        stops(lambda t: t.source.round is not None and not t.source.round.judged, patch)
        with pytest.raises(Interrupted):
            online(small, tmp_path / "parts", study=str(tmp_path / "parts.db"), **options)
    with pytest.MonkeyPatch.context() as patch:  # what was drawn is in the checkpoint
        draw = Rounds.draw
        steps: list[int] = []

        def drawn(self: Rounds, trainer: Trainer) -> Any:
            steps.append(trainer.state.step)
            return draw(self, trainer)

        patch.setattr(Rounds, "draw", drawn)
        with_anna(tmp_path / "parts", tmp_path / "parts.db", resume=True)
    assert steps == [1]
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    for row in rounds(tmp_path / "whole"):
        texts = [text for text in dict.fromkeys(row["responses"]) if text]
        for i, k, x in row["outcomes"]:
            one, two = row["responses"][i], row["responses"][k]
            wanted = 0.5 if one == two else float(bool(one)) if not (one and two) else 0.5
            if one != two and one and two:
                best = texts[prefer(texts)]
                wanted = 1.0 if one == best else 0.0 if two == best else 0.5
            assert x == wanted, row


def test_several_votes_of_people_are_fractions(tmp_path: Path) -> None:
    """Skips answer an item without a vote, all bad is a tie, and votes of an earlier round stay."""
    from prefopt.parallel.world import ALONE
    from prefopt.records import Comparison, Message

    Study.create(tmp_path / "s.db", StudySettings(overlap=3)).close()
    judge = comparers.PeopleComparer(tmp_path / "s.db", ALONE, print, overlap=1, title="t", model="m")
    prompt = Comparison((Message("user", "q"),), (), (), 1, text=True)
    answered = [comparers.Answered(prompt, ["a", "b", "a", ""]), comparers.Answered(prompt, ["x", "y"])]
    said = {"x": iter([Vote(skipped="spam"), Vote(all_bad=True), Vote(skipped="spam")])}
    votes = {"a": iter([Vote(((0,), (1,))), Vote(((0,), (1,))), Vote(((1,), (0,)))]), **said}

    def vote() -> None:
        with Study(tmp_path / "s.db") as study:
            for name in ("anna", "ben", "cleo"):
                person = invite(study, name)[0]
                while (found := next_item(study, person)) is not None:
                    record(study, person, found.ticket, next(votes[found.item.row["responses"][0]]))

    waits: list[int] = []

    def pause() -> None:
        waits.append(1)
        if len(waits) == 1:
            vote()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparers, "POLL_SECONDS", 0.0)
        first, second = judge("round 1", answered, pause)
    assert len(waits) == 1
    by_pair = {(i, k): x for i, k, x in first}
    wanted = {(0, 1): 2 / 3, (0, 2): 0.5, (0, 3): 1.0, (1, 2): 1 / 3, (1, 3): 1.0, (2, 3): 1.0}
    assert by_pair == pytest.approx(wanted)
    assert second == [(0, 1, 0.5)]
    assert judge("round 7", answered, lambda: pytest.fail("waited")) == [first, second]


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "peple"}, "no reward is called 'peple'"),
        ({"reward": "llm"}, "--reward llm needs --judge-url"),
        ({"judge_url": "http://x"}, "--judge-url belongs to --reward llm"),
        ({"study": "s.db"}, "--study belongs to --reward people"),
        ({"reward": "people", "missing_eos_score": -1.0}, "--missing-eos-score applies to scores"),
        ({"loss": "grppo"}, "did you mean grpo"),
        ({"loss": "dpo", "clip": 0.1}, "--clip applies to policy gradients"),
        ({"loss": "grpo", "label_smoothing": 0.1}, "--label-smoothing applies to losses on preferences"),
        ({"loss": "best_of_k", "beta": 0.1}, "--beta applies to losses with a reference"),
        ({"loss": "dpo", "beta": 0.0}, "--beta 0 works for policy gradients alone"),
        ({"loss": "rloo", "average": "rows"}, "--average applies to losses per token"),
        ({"loss": "best_of_k", "average": "constant"}, "--average constant"),
        ({"loss": "kto", "labels": "soft"}, "--labels applies to losses on pairs"),
        ({"loss": "dpo", "desirable_above": 1.0}, "--desirable-above applies to losses on labels"),
        ({"loss": "simpo", "ref_model_sync_steps": 1}, "--ref-model-sync-steps"),
        ({"loss": "aot", "num": 3}, "sorts the pairs"),
        ({"loss": "tdpo", "temperature": 0.5}, "--temperature 0.5"),
        ({"ref_model_sync_steps": 1, "reference": "x"}, "leave one out"),
        ({"ref_model_sync_steps": 1, "max_kl": 5.0}, "--max-kl: with --ref-model-sync-steps the reference follows"),
        ({"reward": "people", "num": 10}, "people compare at most 9"),
        ({"lora": True, "lora_dropout": 0.1}, "--lora-dropout"),
        ({"num": 1}, "--num is 1"),
        ({"loss": "dapo", "overlong_buffer": 9}, "--overlong-buffer 9"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    given = {"reward": "length", **QUICK, **options}
    with pytest.raises(ConfigError, match=words):
        prefopt.online(
            "no-such-model", ROWS, output=tmp_path / "out", **{k: v for k, v in given.items() if v is not None}
        )


def test_a_study_that_is_none_is_refused_before_anything_is_read(small: str, tmp_path: Path) -> None:
    (tmp_path / "s.db").write_text("no study")
    with pytest.raises(StudyError, match="not an SQLite file"):
        online(small, tmp_path / "out", reward="people", study=str(tmp_path / "s.db"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prefopt.online(
        small, ROWS, output=tmp_path / "out", reward=world.reward, dry_run=True, **{**QUICK, "progress": "plain"}
    )
    told = capsys.readouterr()
    assert found is None and not (tmp_path / "out").exists()
    assert "2 rounds of 4 prompts with 2 responses each" in told.out + told.err
