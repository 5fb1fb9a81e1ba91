"""A sweep of methods on a tiny world: what its points say, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods import small_world as world
from pipeline.sweeping import PROMPTS, REWARD
from pipeline.sweeping import frontier_config as config
from prefopt.cli import main
from prefopt.config.sample import SampleConfig
from prefopt.data.comparisons import parse_comparisons
from prefopt.errors import ConfigError, DataError, Interrupted, RunError
from prefopt.evaluate.samples import kl_to_reference
from prefopt.generate.model_io import SampledModel
from prefopt.methods import sample
from prefopt.records import Comparison
from prefopt.reference.cache import FillReport, ReferenceCache
from prefopt.sweeps import frontier
from prefopt.sweeps.data import bradley_terry
from prefopt.sweeps.points import Frontier, Point, plateau, read_frontier
from prefopt.sweeps.train import take_folder
from shortcuts import quick_runs_in
from train.small import write_rows
from train.test_resume import stop_after


def told(points: Sequence[Point]) -> list[Point]:
    """What a clock and the machine do not decide."""
    return [replace(p, seconds=0.0, costs={}) for p in points]


@pytest.fixture(scope="session")
def sweep(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Frontier, Path, list[int]]:
    """Every method, and how many responses were scored by the reference for each training."""
    output, scored = tmp_path_factory.mktemp("out") / "all", []
    methods = ["dpo:beta=0.1,1", "sft:learning_rate=1e-3,2e-3", "unlikelihood:alpha=0.1,0.5"]
    methods += ["ppo-true:kl_target=3,6", "ppo-learned:kl_target=3,6", "best-of:n=2,4"]
    fill = ReferenceCache.fill

    def counted(self: ReferenceCache, *arguments: Any, **options: Any) -> FillReport:
        report = fill(self, *arguments, **options)
        scored.append(report.scored_responses)
        return report

    with quick_runs_in(output.parent) as patch:
        patch.setattr(ReferenceCache, "fill", counted)
        found = frontier.run(config(place, output, methods=methods, checkpoints=2, judge="length"))
    return found, output, scored


def test_every_road_has_its_points(sweep: tuple[Frontier, Path, list[int]]) -> None:
    found, output, _ = sweep
    assert found.finished and read_frontier(output) == found
    assert [(p.method, p.setting, p.step) for p in found.points] == [
        ("reference", "", 0),
        *(("dpo", f"beta={b}", s) for b in ("0.1", "1") for s in (1, 2)),
        *(("sft", f"learning_rate={r}", s) for r in ("1e-3", "2e-3") for s in (4, 8)),
        *(("unlikelihood", f"alpha={a}", s) for a in ("0.1", "0.5") for s in (1, 2)),
        *((f"ppo-{which}", f"kl_target={k}", 4) for which in ("true", "learned") for k in (3, 6)),
        ("best-of", "n=2", 0),
        ("best-of", "n=4", 0),
    ]
    start, best = found.points[0], found.points[-1]
    assert start.kl == pytest.approx(0, abs=1e-6) and start.counted
    assert best.kl_is == "bound" and best.kl == pytest.approx(np.log(4) - 3 / 4) and best.kl_se is None
    assert start.reward is not None and best.reward is not None and best.reward > start.reward
    for p in found.points:
        assert p.reward is not None and p.interval is not None and p.interval[0] <= p.reward <= p.interval[1]
        assert p.length is not None and 1 <= p.length <= 3


def test_a_judge_scores_the_samples_that_the_reward_was_measured_on(sweep: tuple[Frontier, Path, list[int]]) -> None:
    found, output, _ = sweep
    for p in found.points:
        last = [q for q in found.points if (q.method, q.setting) == (p.method, p.setting)][-1] is p
        if not last or p.method == "dpo":  # their samples are in files named by step
            continue
        samples = output / (p.folder or "reference") / "samples.jsonl"
        if samples.exists():
            rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
            assert p.judged == tuple(np.mean([len(text.split()) for text in row["responses"]]) for row in rows)
    assert all(len(p.judged) == len(p.rewards) == 6 for p in found.points)
    assert sum(p.judged != p.rewards for p in found.points) == len(found.points)


def mean_scores(file: Path) -> list[float]:
    return [float(np.mean(json.loads(line)["scores"])) for line in file.read_text().splitlines()]


def test_ppo_counts_where_the_reward_had_stopped_rising(sweep: tuple[Frontier, Path, list[int]]) -> None:
    """By the policy of an earlier step and that of the end, on the same prompts."""
    found, output, _ = sweep
    points = [p for p in found.points if p.method.startswith("ppo")]
    for p in points:
        before, after = (mean_scores(output / p.folder / name) for name in ("samples-2.jsonl", "samples.jsonl"))
        assert before != after and len(before) == 6 and found.points[0].reward is not None
        told = plateau(before, after, start=found.points[0].reward, steps=2, share=0.2)
        assert p.plateau == told and p.counted == told.reached and p.why_not == told.why_not
        assert p.reward == pytest.approx(np.mean(after))
    assert not all(p.counted for p in points), "six prompts with three answers each cannot tell"


def test_the_earlier_policy_is_that_of_its_step(place: Path, tmp_path: Path) -> None:
    """Which a run of as many steps gives, since the rate is constant."""
    options: dict[str, Any] = {"methods": ["ppo-true:beta=0.1"]}
    whole = frontier.run(config(place, tmp_path / "whole", **options)).points[1]
    short = frontier.run(config(place, tmp_path / "short", responses=16, **options)).points[1]
    assert (whole.step, short.step) == (4, 2)
    texts = [
        [json.loads(line)["responses"] for line in (tmp_path / file).read_text().splitlines()]
        for file in (f"whole/{whole.folder}/samples-2.jsonl", f"short/{short.folder}/samples.jsonl")
    ]
    assert texts[0] == texts[1]


def test_an_even_rise_is_no_plateau_by_any_share_and_number_of_steps(place: Path, tmp_path: Path) -> None:
    given = config(place, tmp_path, methods=["ppo-true:beta=1"], plateau_share=0.3)
    (one,) = given.trainings()
    for steps in range(3, 40):
        made = given.config_of(one, data=["d"], prompts="p", each=4.0)
        before, end = given.marks(replace(made, max_steps=steps))
        rewards = np.full(20, before / end) + np.linspace(-1e-3, 1e-3, 20)
        assert not plateau(rewards, np.ones(20), start=0.0, steps=end - before, share=0.3).reached, steps


def test_a_sweep_of_one_reward_is_not_gone_on_with_by_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_reward_of_a_sweep.py"
    file.write_text("def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    given = config(place, tmp_path / "out", methods=["best-of:n=2"], reward="own_reward_of_a_sweep:f")
    frontier.run(given)
    frontier.run(replace(given, methods=["best-of:n=2,3"]))
    file.write_text(file.read_text().replace("len(r)", "-len(r)"))
    with pytest.raises(RunError, match="another code of --reward own_reward_of_a_sweep:f"):
        frontier.run(replace(given, methods=["best-of:n=2,3,4"]))


def test_too_few_steps_show_no_plateau(place: Path, tmp_path: Path) -> None:
    found = frontier.run(config(place, tmp_path / "out", methods=["ppo-true:beta=1"], responses=16))
    assert str(found.points[1].why_not).startswith("2 steps") and not found.points[1].counted


def test_a_point_says_what_training_took_to_get_there(sweep: tuple[Frontier, Path, list[int]]) -> None:
    """As its run and, of ppo-learned, its reward model say; measuring is no part of it."""
    found, output, _ = sweep

    def took(folder: str) -> float:
        seconds: float = json.loads((output / folder / "run.json").read_text())["costs"]["seconds"]
        return seconds

    for p in found.points:
        if p.method in ("reference", "best-of"):
            assert p.seconds == 0
            continue
        whole = took(p.folder) + (took("reward-seed0") if p.method == "ppo-learned" else 0)
        last = max(q.step for q in found.points if q.folder == p.folder)
        assert p.seconds is not None and (
            p.seconds == pytest.approx(whole) if p.step == last else 0 < p.seconds < whole
        )


def test_a_finished_sweep_is_told_anew_and_not_trained_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that an earlier version made: it wrote no costs, its clock began with the start, and it counted all."""
    output = tmp_path / "out"
    options: dict[str, Any] = {
        "methods": ["ppo-true:kl_target=3"],
        "ppo": ["batch_size=4", "num=1", "learning_rate=2e-3"],
    }
    options["responses"] = 80
    found = frontier.run(config(place, output, **options))
    folder = output / found.points[1].folder
    points = json.loads((folder / "points.json").read_text())
    line = {"rise": 0.1, "low": -0.1, "high": 0.3, "climb": 0.2, "steps": 6, "reached": True}  # it knew no share
    points[0] |= {"seconds": 0.25, "counted": True, "why_not": None, "plateau": line}
    (folder / "points.json").write_text(json.dumps(points))
    record = json.loads((folder / "run.json").read_text())
    del record["costs"]
    (folder / "run.json").write_text(json.dumps(record))
    options_file = json.loads((output / "sweep.json").read_text())
    assert "plateau_share" not in options_file["options"]
    monkeypatch.setattr(frontier, "train_once", lambda c, *_: pytest.fail(f"{c.output} is trained again"))
    again = frontier.run(config(place, output, **options)).points[1]
    first = found.points[1]
    assert (
        again.costs == {}
        and replace(again, seconds=first.seconds, costs=first.costs) == first
        and first.plateau is not None
        and first.plateau.share == 0.2
    )
    steps = sum(json.loads(line)["step_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert again.seconds == pytest.approx(steps)
    wide = frontier.run(config(place, output, plateau_share=0.3, **options)).points[1]
    assert wide.plateau is not None and wide.plateau == replace(first.plateau, share=0.3, reached=wide.counted)
    for text in (json.dumps([points[0] | {"reward": "abc"}]), json.dumps([points[0] | {"reward": 10**400}]), "[]"):
        (folder / "points.json").write_text(text)
        with pytest.raises(RunError, match=r"points\.json cannot be read"):
            frontier.run(config(place, output, **options))
    (output / "sweep.json").write_text('{"a": ' * 100_000)
    with pytest.raises(RunError, match=r"sweep\.json cannot be read"):
        frontier.run(config(place, output, **options))


def test_the_reference_is_scored_once_for_the_whole_sweep(sweep: tuple[Frontier, Path, list[int]]) -> None:
    _, output, scored = sweep
    rows = [json.loads(line) for line in (output / "data/scored.jsonl").read_text().splitlines()]
    used = [row for row in rows if len(set(row["scores"])) > 1 and all(row["responses"])]  # the others are skipped
    responses = {(r["prompt"], *one) for r in used for one in zip(r["responses"], r["finish"], strict=True)}
    # Of the four runs of DPO and unlikelihood one has something to score, and scores each response that its steps read
    # once.
    (count,) = scored
    assert len(responses) - 8 < count <= len(responses)


def test_a_point_is_what_its_model_gives_when_sampled_by_hand(sweep: tuple[Frontier, Path, list[int]]) -> None:
    """The last checkpoint of DPO is the model that was saved; the prompts are those that nobody was trained on."""
    found, output, _ = sweep
    held = [json.loads(line)["prompt"] for line in (output / "data/held_out.jsonl").read_text().splitlines()]
    trained = [json.loads(line)["prompt"] for line in (output / "data/train.jsonl").read_text().splitlines()]
    assert len(held) == 6 and sorted(held + trained) == sorted(PROMPTS)
    for point in [p for p in found.points if p.method in ("dpo", "ppo-true") and p.step in (2, 4)]:
        options: dict[str, Any] = {
            "num": 3,
            "max_new_tokens": 3,
            "device": "cpu",
            "dtype": "float32",
            "progress": "none",
        }
        drawn = sample.run(
            SampleConfig(model=str(output / point.folder), prompts=[str(output / "data/held_out.jsonl")], **options)
        )
        rows = [row for row in parse_comparisons(drawn.rows, "rows") if isinstance(row, Comparison)]
        rewards = [world.reward([], [r.text for r in row.responses]) for row in rows]
        assert point.reward == pytest.approx(np.mean(rewards), abs=1e-9)
        policy = SampledModel(str(output / point.folder), device="cpu", dtype="float32")
        gap = kl_to_reference(rows, _reference(output), policy)
        assert gap is not None and (point.kl, point.kl_se) == pytest.approx((gap.k1.mean, gap.error), abs=1e-9)


def _reference(output: Path) -> SampledModel:
    options = json.loads((output / "sweep.json").read_text())["options"]
    return SampledModel(options["model"], device="cpu", dtype="float32")


def test_every_training_learns_from_as_many_responses(place: Path, tmp_path: Path) -> None:
    methods = ["dpo:beta=0.1", "sft:average=rows", "unlikelihood:alpha=1", "ppo-true:beta=0.1", "best-of:n=2"]
    given = config(place, tmp_path, methods=methods, checkpoints=3, responses=96)
    for one in given.trainings():
        if one.kind is None:
            continue
        found: Any = given.config_of(one, data=["d"], prompts="p", each=4.0)
        per_step = found.batch_size * {"dpo": 4, "sft": 1, "ppo": getattr(found, "num", 0)}[one.kind]
        assert found.max_steps * per_step == 96, one.method
        if one.kind != "ppo":
            assert found.save_every == found.max_steps and [3 * m for m in given.marks(found)] == [
                found.max_steps,
                2 * found.max_steps,
                3 * found.max_steps,
            ]


def test_checkpoints_are_as_even_as_steps_allow_and_all_steps_are_made(place: Path, tmp_path: Path) -> None:
    """Five steps and three checkpoints: all five are trained, with and without a stop in between."""
    given = config(place, tmp_path / "out", methods=["sft:average=rows"], checkpoints=3, responses=20)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_after(4, patch)
        frontier.run(given)
    found = frontier.run(given)
    assert [p.step for p in found.points[1:]] == [2, 3, 5]
    assert found == frontier.run(given), "told again, nothing changes"
    whole = frontier.run(replace(given, output=str(tmp_path / "whole")))
    assert told(found.points) == told(whole.points)
    seconds = [p.seconds or 0.0 for p in found.points[1:]]
    assert 0 < seconds[0] < seconds[1] < seconds[2]


def test_a_training_of_other_steps_by_another_version_is_reported(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(place, tmp_path / "out", methods=["sft:average=rows"], checkpoints=3, responses=20, progress="plain")
    frontier.run(given)
    frontier.run(given)
    assert "by another version" not in capsys.readouterr().out
    file = tmp_path / "out/sft/average=rows-seed0/points.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:2]))  # the first version made three steps of five
    frontier.run(given)
    said = capsys.readouterr().out
    assert f"done already (by another version: 3 steps, not 5; remove {file.parent} to redo it)" in said


@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sweep_that_was_stopped_goes_on_and_comes_to_the_same(at: int, place: Path, tmp_path: Path) -> None:
    methods = ["dpo:beta=0.1", "ppo-learned:kl_target=3"]
    whole = frontier.run(config(place, tmp_path / "whole", methods=methods))
    stops = 0
    while True:
        try:
            with pytest.MonkeyPatch.context() as patch:
                stop_after(at, patch)
                again = frontier.run(config(place, tmp_path / "again", methods=methods))
            break
        except Interrupted as stop:
            stops += 1
            assert stops < 9 and "run the same command again to continue" in str(stop)
    assert stops >= 1
    assert told(again.points) == told(whole.points)


def test_what_is_done_is_not_done_again_and_a_sweep_may_grow(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = frontier.run(config(place, tmp_path / "out", methods=["sft:average=rows"]))
    trained: list[str] = []
    train = frontier.train_once
    monkeypatch.setattr(frontier, "train_once", lambda c, *more: (trained.append(c.output), train(c, *more)))
    assert told(frontier.run(config(place, tmp_path / "out", methods=["sft:average=rows"])).points) == told(
        first.points
    )
    assert trained == []
    grown = frontier.run(config(place, tmp_path / "out", methods=["sft:average=rows,tokens"], seeds=2))
    assert [(p.setting, p.seed) for p in grown.points[1:]] == [
        ("average=rows", 0),
        ("average=tokens", 0),
        ("average=rows", 1),
        ("average=tokens", 1),
    ]
    assert told(grown.points[:2]) == told(first.points) and len(trained) == 3


def test_a_training_that_runs_away_is_a_point_that_does_not_count(place: Path, tmp_path: Path) -> None:
    options = ["batch_size=4", "num=2", "learning_rate=1e-2", "max_kl=1e-3"]
    methods = ["ppo-true:beta=0,0.1", "sft:average=rows,tokens"]
    given = config(place, tmp_path / "out", methods=methods, ppo=options)
    found = frontier.run(given)
    assert [(p.method, p.counted, p.reward is None) for p in found.points] == [
        ("reference", True, False),
        *[("ppo-true", False, True)] * 2,
        *[("sft", True, False)] * 2,
    ]
    assert "diverged from its reference" in str(found.points[1].why_not)
    assert frontier.run(given) == found, "and is not tried again"


def test_other_settings_are_refused_with_the_reason(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    given = config(copy, tmp_path / "out", methods=["dpo:beta=0.1", "best-of:n=2"])
    frontier.run(given)
    for changes, said in [
        ({"num": 4}, "--num was 3 and is 4"),
        ({"dpo": ["batch_size=2"]}, "--dpo was"),
        ({"max_new_tokens": 2, "responses": 9}, "--max-new-tokens was 3 and is 2, --responses was 32 and is 9"),
    ]:
        with pytest.raises(RunError) as error:
            frontier.run(replace(given, **changes))
        assert said in str(error.value)
    (copy / "p.txt").write_text("\n".join(PROMPTS[:-1]) + "\n")
    with pytest.raises(RunError, match="the prompts are not those"):
        frontier.run(given)
    world.write_world(copy / "m", seed=5)
    with pytest.raises(RunError, match="with another model"):
        frontier.run(given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(RunError, match="holds no sweep"):
        frontier.run(replace(given, output=str(tmp_path / "full")))


def test_options_of_a_method_are_compared_from_when_it_has_joined_the_sweep(place: Path, tmp_path: Path) -> None:
    def take(*methods: str, **changes: Any) -> None:
        take_folder(config(place, tmp_path / "out", methods=list(methods), **changes), frontier.MAY_GROW)

    take("ppo-true:beta=1", ppo=["batch_size=2"])
    take("ppo-true:beta=1", "dpo:beta=1", ppo=["batch_size=2"], dpo=["batch_size=8"], checkpoints=2)
    take("dpo:beta=1", dpo=["batch_size=8"], checkpoints=2)
    with pytest.raises(RunError, match=r"--dpo was \['batch_size=8'\] and is \['batch_size=4'\]"):
        take("dpo:beta=1", dpo=["batch_size=4"], checkpoints=2)
    with pytest.raises(RunError, match="--checkpoints was 2 and is 1, --ppo was"):
        take("ppo-true:beta=1", "dpo:beta=1", ppo=["batch_size=4"], dpo=["batch_size=8"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["dpoo:beta=1"]}, "no method 'dpoo'; did you mean dpo?"),
        ({"methods": ["dpo:betta=1"]}, "--dpo: unknown option 'betta'; did you mean beta?"),
        ({"methods": ["dpo"]}, "write METHOD:NAME=VALUE,VALUE"),
        ({"methods": ["dpo:beta=1,1"]}, "a value is a duplicate"),
        ({"methods": ["dpo:beta=1", "dpo:beta=2"]}, "names a method twice"),
        ({"methods": ["dpo:beta=1,2", "best-of:n=2"]}, "all methods need equally many settings"),
        ({"methods": ["best-of:n=1"]}, "whole numbers from 2"),
        ({"methods": ["ppo-true:schedule=linear,cosine"]}, "the sweep sets schedule"),
        ({"dpo": ["epochs=2"]}, "--dpo epochs: the sweep sets it"),
        ({"dpo": ["beta=2"]}, "--dpo beta: the sweep varies it"),
        ({"ppo": ["reward=length"], "methods": ["ppo-true:beta=1"]}, "--ppo reward: the sweep sets it"),
        (
            {"rloo": ["nonsense=4"]},
            "--rloo is read by rloo-true or rloo-learned, and --methods has none of them: add one",
        ),
        ({"ppo": ["foo=1"]}, "--ppo is read by ppo-true or ppo-learned, and --methods has none"),
        ({"sft": ["batch_size=4"]}, "--sft is read by sft, and --methods has none"),
        ({"reward_model": ["batch_size=4"], "methods": ["ppo-true:beta=1"]}, "or leave --reward-model out"),
        ({"dpo": ["batch_size=4"], "methods": ["ppo-true:beta=1"]}, "--dpo is read by dpo or unlikelihood"),
        ({"plateau_share": 0.1}, "--plateau-share is read by ppo-true or ppo-learned or rloo-true or rloo-learned"),
        ({"checkpoints": 2, "methods": ["ppo-true:beta=1"]}, "--checkpoints is read by dpo or sft or unlikelihood"),
        ({"prefix_min": 3}, "go together"),
        ({"prefix_min": 3, "prefix_max": 2}, "is more than"),
        ({"data": ["d"], "rounds": 2}, "--rounds is for generated data"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    changes: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        config(place, tmp_path / "out", **changes)
    assert said in str(error.value)


def test_a_loss_option_that_is_none_and_too_few_prompts(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="betta"):
        frontier.run(config(place, tmp_path / "out", methods=["unlikelihood:betta=1"]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="18 different prompts, of which --held-out 18 leaves none"):
        frontier.run(config(place, tmp_path / "out", held_out=18))


def test_given_data_lose_the_rows_whose_prompts_are_held_out(place: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": "a", "rejected": "f"} for p in PROMPTS] * 2
    data = write_rows(tmp_path / "d.jsonl", rows)
    found = frontier.run(config(place, tmp_path / "out", data=[data], methods=["sft:average=rows"]))
    held = (tmp_path / "out/data/held_out.jsonl").read_text()
    left = (tmp_path / "out/data/preferences.jsonl").read_text().splitlines()
    assert len(left) == 24 and not any(f'"{json.loads(line)["prompt"]}"' in held for line in left)
    assert found.made == "given" and found.points[-1].step == 8


def test_labels_by_bradley_terry_are_drawn_as_often_as_it_says() -> None:
    rows = [
        Comparison.scored("p", ["a", "b", "c", "d", "e"], scores=[0.0, 1.0, 2.0, 2.0, 9.0], row=n) for n in range(2000)
    ]
    pairs = bradley_terry(rows, seed=0)
    assert [[r.text for r in p.responses] for p in pairs[:2]] == [["a", "b"], ["c", "d"]]
    first = np.array([p.tiers[0] == (0,) for p in pairs]).reshape(-1, 2).mean(0)
    assert first == pytest.approx([1 / (1 + np.e), 0.5], abs=0.04)


def test_prompts_are_cut_to_their_beginning_and_the_command_tells_the_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {place / 'm'}\nprompts: {place / 'p.txt'}\noutput: {tmp_path / 'out'}\nreward: {REWARD}\nlines: text\n"
        "prefix_min: 1\nprefix_max: 1\nheld_out: 2\nmax_new_tokens: 3\nnum: 2\nresponses: 8\nlabels: bradley-terry\n"
        "dpo: [batch_size=4]\nmethods: ['dpo:beta=0.1,1', 'best-of:n=2,3']\ndevice: cpu\nprogress: none\n"
    )
    assert main(["frontier", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "pairs of samples, drawn by Bradley-Terry" in out and "at most" in out
    every = "".join((tmp_path / f"out/data/{name}.jsonl").read_text() for name in ("train", "held_out"))
    assert sorted(json.loads(line)["prompt"] for line in every.splitlines()) == list("abcdef")
    assert (tmp_path / "out/frontier.png").stat().st_size > 10_000
    assert "KL: upper bound" in (tmp_path / "out/frontier.svg").read_text()


@pytest.mark.slow
def test_adapters_are_measured_as_whole_models_are(place: Path, tmp_path: Path) -> None:
    lora = {
        "dpo": ["batch_size=4", "learning_rate=5e-2", "lora=true"],
        "ppo": ["batch_size=4", "num=2", "learning_rate=2e-2", "lora=true"],
    }
    methods = ["dpo:beta=0.1", "ppo-true:beta=0.1"]
    found = frontier.run(config(place, tmp_path / "out", methods=methods, checkpoints=2, **lora))
    assert [(p.method, p.step) for p in found.points[1:]] == [("dpo", 1), ("dpo", 2), ("ppo-true", 4)]
    options: dict[str, Any] = {"num": 3, "max_new_tokens": 3, "device": "cpu", "dtype": "float32", "progress": "none"}
    held = [str(tmp_path / "out/data/held_out.jsonl")]
    for p in found.points[2:]:
        drawn = sample.run(
            SampleConfig(model=str(place / "m"), adapter=str(tmp_path / "out" / p.folder), prompts=held, **options)
        )
        rewards = [world.reward([], row["responses"]) for row in drawn.rows]
        assert p.reward == pytest.approx(np.mean(rewards), abs=1e-9) and p.kl is not None and p.kl > 0.01
