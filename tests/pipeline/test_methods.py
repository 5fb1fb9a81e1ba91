"""DPO against reward model and PPO: costs that are counted, outcomes that are measured, and a table of both."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweeping import REWARD, count_loads, values
from prefopt.config.sweeps import MethodsConfig
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.sweeps import methods
from prefopt.sweeps.methods import MethodsTable, Outcome, Start, markdown, read_table
from shortcuts import forget_trials, quick_runs_in
from train.small import write_rows
from train.test_resume import stop_after

PPO = ["batch_size=4", "num=2", "learning_rate=2e-3"]


def config(place: Path, output: Path, **changes: Any) -> MethodsConfig:
    given: dict[str, Any] = {
        "seeds": 1,
        "rate_factors": ["1"],
        "isolate": False,
        "sft": ["batch_size=4", "learning_rate=1e-3"],
    }
    return MethodsConfig(**{**values(place, output), **given, **changes})


@pytest.fixture(scope="session")
def table(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MethodsTable, Path]:
    output = tmp_path_factory.mktemp("out") / "all"
    text = write_rows(
        output.with_name("text.jsonl"), [{"prompt": "ab", "completion": "cab"}, {"prompt": "b", "completion": "c"}]
    )
    with quick_runs_in(output.parent):
        return methods.run(config(place, output, perplexity=[text], rate_factors=["1", "2"])), output


def test_every_policy_is_measured_and_its_costs_are_those_of_all_its_stages(table: tuple[MethodsTable, Path]) -> None:
    found, output = table
    assert found.finished and read_table(output) == found
    assert [(o.method, o.seed, o.factor) for o in found.outcomes] == [
        (r, 0, f) for r in ("dpo", "ppo") for f in (1.0, 2.0)
    ]
    runs = {
        name: json.loads((output / name / "run.json").read_text())
        for name in ("sft/seed0", "reward/seed0", "ppo/seed0-rate2")
    }
    assert runs["ppo/seed0-rate2"]["options"]["learning_rate"] == pytest.approx(4e-3)
    last = found.outcomes[-1]
    for name in ("forward_passes", "trained_tokens", "generated_tokens", "seconds"):
        assert last.costs[name] == pytest.approx(sum(run["costs"][name] for run in runs.values())), name
    assert last.costs["models"] == max(run["costs"]["models"] for run in runs.values()) == 4
    dpo, ppo = found.outcomes[0].costs, found.outcomes[2].costs
    assert dpo["models"] == 1 and dpo["generated_tokens"] == dpo["decoded_tokens"] == 0 < ppo["generated_tokens"]
    for o in found.outcomes:
        assert o.interval is not None and o.reward is not None and o.interval[0] <= o.reward <= o.interval[1]
        assert o.kl is not None and o.perplexity is not None and o.perplexity > 1
    assert not any(o.isolated for o in found.outcomes)
    assert [s.name for s in found.starts] == ["as given", "fine-tuned, seed 0"]
    assert found.starts[0].perplexity != found.starts[1].perplexity


def test_the_tokens_of_ppo_are_counted_as_they_are_drawn(table: tuple[MethodsTable, Path]) -> None:
    """Its rollouts, as its metrics tell them, and the four prompts that are answered twice to check the scorer."""
    _, output = table
    lines = [json.loads(line) for line in (output / "ppo/seed0-rate1/metrics.jsonl").read_text().splitlines()]
    drawn = sum(round(line["val/length"] * 8) for line in lines)
    costs = json.loads((output / "ppo/seed0-rate1/run.json").read_text())["costs"]
    assert 8 <= costs["generated_tokens"] - drawn <= 4 * 2 * 3
    assert costs["peak_memory_bytes"] > 1e8 and costs["seconds"] > 0


def test_what_is_done_is_not_done_again_and_a_stop_changes_nothing(
    place: Path, tmp_path: Path, table: tuple[MethodsTable, Path]
) -> None:
    found, output = table
    text = [str(output.with_name("text.jsonl"))]
    assert methods.run(config(place, output, perplexity=text, rate_factors=["1", "2"])) == found
    stops = 0
    forget_trials()  # whose tokens are costs
    while True:
        try:
            with pytest.MonkeyPatch.context() as patch:
                stop_after(2, patch)
                again = methods.run(config(place, tmp_path / "out", perplexity=text))
            break
        except Interrupted:
            stops += 1
    assert stops >= 3

    def told(table: MethodsTable) -> list[Outcome]:
        return [replace(o, costs={}) for o in table.outcomes if o.factor == 1]

    assert told(again) == told(found)
    one, other = again.outcomes[0].costs, found.outcomes[0].costs
    assert one["trained_tokens"] >= other["trained_tokens"], "what was done before the stop is counted too"


def test_a_road_that_diverges_is_counted_as_such(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = count_loads(monkeypatch)
    found = methods.run(config(place, tmp_path / "out", ppo=[*PPO, "max_kl=1e-6"]))
    assert [(o.method, o.diverged is None) for o in found.outcomes] == [("dpo", True), ("ppo", False)]
    assert loaded == [REWARD], "one for all models that are measured"
    page = (tmp_path / "out/methods.md").read_text()
    assert "| policies | 1, 0 diverged | 1, 1 diverged |" in page and "diverged from its reference\n" in page


def test_the_table_says_the_numbers_of_its_outcomes() -> None:
    costs = {
        "models": 1,
        "model_bytes": 2e6,
        "forward_passes": 1000,
        "trained_tokens": 50_000,
        "seconds": 60,
        "peak_memory_bytes": 3e9,
    }
    dpo = [Outcome("dpo", s, 1.0, costs, r, (r, r), 2.0, 0.1, 9.0, 12.0) for s, r in ((0, 0.5), (1, 0.7))]
    ppo = [replace(dpo[0], method="ppo", costs={**costs, "models": 4, "seconds": 180, "generated_tokens": 7777})]
    starts = (Start("as given", 0.1, 10.0), Start("fine-tuned, seed 0", 0.2, 11.0))
    table = MethodsTable("m", "vader", 32, 4, 512, "order", True, starts, (*dpo, *ppo))
    page = list(markdown(table))
    assert page[0] == "| | SFT, DPO | SFT, reward model, PPO |"
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page if line.startswith("| ")}
    assert rows["models in memory at once"].endswith("| 1, 2.0 MB of weights | 4, 2.0 MB of weights |")
    assert rows["tokens generated"].endswith("| 0 | 7,777 |")
    assert rows["wall time"].endswith("| 1 min 00 s | 3 min 00 s |")
    assert rows["reward"].startswith("| reward | +0.600, best +0.700 |")
    assert "deviation 0.141" in rows["spread of rewards"] and "one training shows none" in rows["spread of rewards"]
    assert "10.00 before, 11.00 fine-tuned, 12.00 after" in rows["perplexity"]
    assert "not measured" in rows["peak memory"]
    apart = [replace(o, isolated=True) for o in (*dpo, *ppo)]
    assert "| peak memory | 3.0 GB | 3.0 GB |" in list(markdown(replace(table, outcomes=tuple(apart))))


def test_tables_of_first_versions_are_read(tmp_path: Path) -> None:
    """They say ``road``, and some ``isolated`` once for all policies."""
    outcome = {"road": "dpo", "seed": 0, "factor": 1.0, "interval": [0.1, 0.2], "reward": 0.15}
    table = {"version": 1, **asdict(MethodsTable("m", "vader", 32, 4, 512, "order", True)), "outcomes": [outcome]}
    (tmp_path / "methods.json").write_text(json.dumps({**table, "isolated": True}))
    (read,) = read_table(tmp_path).outcomes
    assert (read.method, read.interval, read.isolated) == ("dpo", (0.1, 0.2), True)


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    table = {"version": 1, **asdict(MethodsTable("m", "vader", 32, 4, 512, "order", True))}
    (tmp_path / "methods.json").write_text(json.dumps(table))
    assert read_table(tmp_path).samples == 4
    wrong = [table | {"starts": [asdict(Start("a", 1.0, None)) | {"reward": "abc"}]}, table | {"responses": None}]
    wrong.append(table | {"outcomes": [asdict(Outcome("dpo", 0, 1.0)) | {"interval": [0.1, "x"]}]})
    for text in (
        "[",
        "[" * 100_000,
        json.dumps(table | {"outcomes": [asdict(Outcome("dpo", 0, 1.0)) | {"reward": 10**400}]}),
        '{"version": 9}',
        json.dumps({"version": 1, **asdict(Start("a", 1.0, None))}),
        *map(json.dumps, wrong),
    ):
        (tmp_path / "methods.json").write_text(text)
        with pytest.raises(RunError, match="run prefopt methods again"):
            read_table(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate_factors": ["x"]}, "--rate-factors x: it must be a number above 0"),
        ({"rate_factors": ["1", "1.0"]}, "a factor is a duplicate"),
        ({"sft": ["lora=true"]}, "--sft lora"),
        ({"ppo": ["betta=1"]}, "--ppo: unknown option 'betta'"),
        ({"reward_model": ["model=m"]}, "--reward-model model: the sweep sets it"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    changes: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        config(place, tmp_path / "out", **changes)
    assert said in str(error.value)


@pytest.mark.slow
def test_trainings_of_their_own_processes_give_the_same_and_can_be_stopped(
    place: Path, tmp_path: Path, table: tuple[MethodsTable, Path]
) -> None:
    found, output = table
    given = config(place, tmp_path / "out", perplexity=[str(output.with_name("text.jsonl"))], isolate=True)
    waiting = threading.Thread(target=_signal_once_written, args=(tmp_path / "out/sft/seed0/run.json",))
    waiting.start()
    with pytest.raises(Interrupted):
        methods.run(given)
    waiting.join()
    assert not (tmp_path / "out/methods.json").exists()
    apart = methods.run(given)
    assert [o.reward for o in apart.outcomes] == [o.reward for o in found.outcomes if o.factor == 1]
    assert all(o.costs["peak_memory_bytes"] > 1e8 for o in apart.outcomes)
    assert "not measured: all trainings" not in (tmp_path / "out/methods.md").read_text()


def _signal_once_written(file: Path) -> None:
    """Ask this process to stop once the training in another one has begun."""
    while not file.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
