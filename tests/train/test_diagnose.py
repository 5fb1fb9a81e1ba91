"""Every sentence at the end of a run is said where its numbers carry it, and not where they do not."""

from __future__ import annotations

import ast
import inspect
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.core.statistics import wilson
from prefopt.errors import RunError
from prefopt.runs.diagnose import CHECKS, change, diagnose, in_words
from prefopt.runs.hacking import hacking
from prefopt.runs.history import Curve, read_history
from train.small import dpo, pairs, write_model, write_rows

N = 60
LN2 = math.log(2)


def noisy(f: Callable[[float], float], spread: float = 0.02, n: int = N, seed: int = 0) -> list[float]:
    """A curve over a run, ``f`` of the part of it that is done, under noise; its first step has none."""
    chance = random.Random(seed)
    return [f(0.0)] + [f(i / (n - 1)) + chance.gauss(0, spread) for i in range(1, n)]


BEFORE_TRAINING = {"before_training": {"objective/true_scores": 1.0, "objective/true_scores_error": 0.1}}
GOOD: dict[str, Any] = {
    "training": {
        "loss": noisy(lambda t: LN2 - 0.2 * t),
        "rewards/margins": noisy(lambda t: 0.5 * t),
        "rewards/accuracies": noisy(lambda t: 0.5 + 0.3 * t),
        "log_ratios_per_token/chosen": noisy(lambda t: 0.05 * t, 0.002),
        "log_ratios_per_token/rejected": noisy(lambda t: -0.1 * t, 0.002),
        "lengths/chosen": noisy(lambda t: 100, 5),
        "lengths/rejected": noisy(lambda t: 98, 5),
        "grad_norm": noisy(lambda t: 0.8, 0.02),
        "epoch": [(i + 1) / N for i in range(N)],
    },
    "held_out": {
        "loss": [0.66, 0.62, 0.58],
        "rewards/margins": [0.1, 0.3, 0.4],
        "rewards/accuracies": [0.6, 0.65, 0.7],
    },
    "record": {
        "status": "finished",
        "steps": N,
        "data": "0123abcd 900+100",
        "options": {"learning_rate": 1e-6, "max_grad_norm": 1.0},
        "rows": {"read": 1000, "kept": 1000, "truncated": 10},
        "max_length": 512,
        "results": {"best step": 60},
    },
}


def write(folder: Path, *, training: Any = None, held_out: Any = None, record: Any = None) -> Path:
    """An output folder with the good run's numbers but for those given; a metric that is None is left out."""
    training = {k: v for k, v in {**GOOD["training"], **(training or {})}.items() if v is not None}
    held_out = {k: v for k, v in {**GOOD["held_out"], **(held_out or {})}.items() if v is not None}
    steps = min(len(values) for values in training.values())
    lines = [{"step": i + 1, **{k: v[i] for k, v in training.items()}} for i in range(steps)]
    evaluations = min((len(values) for values in held_out.values()), default=0)
    for i in range(evaluations):
        lines.append({"step": (i + 1) * steps // evaluations, **{f"eval_{k}": v[i] for k, v in held_out.items()}})
    folder.mkdir(exist_ok=True)
    lines.sort(key=lambda line: int(line["step"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({**GOOD["record"], **(record or {})}))
    return folder


def names(folder: Path) -> set[str]:
    return {finding.name for finding in diagnose(read_history(folder))}


def test_a_good_run_has_nothing_to_look_at(tmp_path: Path) -> None:
    findings = diagnose(read_history(write(tmp_path)))
    assert {f.name for f in findings} == {"loss fell", "held out", "accuracy"}
    assert not any(f.look for f in findings)
    text = "\n".join(in_words(findings))
    assert "what happened:\n" in text and "what to look at" not in text
    assert "fell from 0.6931 to 0.49" in text and "average of the last 6 of 60 steps" in text
    assert "held-out accuracy 70% (95% interval 60% to 78%, 100 rows" in text
    assert "lowest at step 60: 0.5800, still falling" in text


NONE_HELD_OUT: dict[str, Any] = dict.fromkeys(GOOD["held_out"])

PASSES = [(i + 1) / 20 for i in range(N)]
"""The epochs of three passes of twenty steps."""

STAIRS = noisy(lambda t: LN2 - 0.15 * min(2, int(3 * t)))
"""A loss that falls where a pass begins again."""

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "loss rose": ({"training": {"loss": noisy(lambda t: LN2 + 0.5 * t)}}, r"rose from 0.6931 to 1.1.* \(now 1e-06\)"),
    "loss flat": ({"training": {"loss": noisy(lambda t: LN2, 0.1)}}, "did not change beyond noise"),
    "hardly moved": (
        {
            "training": {
                "log_ratios_per_token/chosen": noisy(lambda t: 2e-4 * t, 2e-5),
                "log_ratios_per_token/rejected": noisy(lambda t: -2e-4 * t, 2e-5),
            }
        },
        r"\+0.0002 \(chosen\) and -0.0002 \(rejected\) nats; raise the learning rate \(now 1e-06\)",
    ),
    "nothing held out": ({"held_out": NONE_HELD_OUT}, "give --eval-fraction or --eval-data"),
    "memorised": (
        {"held_out": NONE_HELD_OUT, "training": {"loss": STAIRS, "epoch": PASSES}},
        r"fell by 0\.1\d+ where a pass over the same rows began again, and by -?0\.0\d+ within a pass",
    ),
    "never better": ({"held_out": {"loss": [0.8, 0.75, 0.9]}}, "never fell below the 0.6931 .* 0.7500, at step 40"),
    "over-trained": (
        {"held_out": {"loss": [0.60, 0.55, 0.65]}, "record": {"results": {"best step": 40}}},
        r"lowest at step 40 \(0.5500\) and 0.6500 at the end.*step 40 were saved",
    ),
    "no better than chance": (
        {"held_out": {"rewards/accuracies": [0.5, 0.5, 0.55]}},
        r"55% \(95% interval 45% to 64%",
    ),
    "worse than chance": (
        {"held_out": {"rewards/accuracies": [0.5, 0.4, 0.3]}},
        r"30% \(95% interval 22% to 40%",
    ),
    "chosen fell far": (
        {"training": {"log_ratios_per_token/chosen": noisy(lambda t: -0.7 * t, 0.002)}},
        "by 0.6.* nats per token",
    ),
    "spike": (
        {"training": {"grad_norm": [0.8] * 29 + [9.6] + [0.8] * 30}},
        "was 9.6 at step 30, and its median 0.8",
    ),
    "always clipped": (
        {"training": {"grad_norm": [1.5] * 30 + [3.0] * 30}},
        r"in each of 60 steps \(norms 1.5 to 3, --max-grad-norm 1\).* --max-grad-norm 4.5 clips only outliers",
    ),
    "truncated": (
        {"record": {"rows": {"read": 1000, "kept": 1000, "truncated": 120}}},
        r"120 of 1000 rows \(12%\) .* 512 tokens",
    ),
    "left out": (
        {"record": {"rows": {"read": 1000, "kept": 900, "truncated": 10}}},
        r"100 of 1000 rows \(10%\)",
    ),
    "another reference": (
        {
            "training": {"log_ratios_per_token/chosen": noisy(lambda t: 0.3 + 0.05 * t, 0.002)},
            "record": {"options": {"reference": "older"}},
        },
        r"reference, older: .* \+0.3 \(chosen\)",
    ),
    "reward rose": (
        {"training": {"objective/scores": noisy(lambda t: t), "objective/kl": noisy(lambda t: 6 * t)}},
        r"rose from 0.0\d+ to 0.9\d+ .*, at 5.\d+ nats from the reference",
    ),
    "reward fell": ({"training": {"objective/scores": noisy(lambda t: -t)}}, "fell from .* try a third"),
    "reward flat": ({"training": {"objective/scores": noisy(lambda t: 0, 0.1)}}, "did not change beyond noise"),
    "samples grew": (
        {"training": {"objective/scores": noisy(lambda t: t), "val/length": noisy(lambda t: 20 + 20 * t, 1)}},
        r"grew from 2\d.* to 39.* tokens while the reward rose",
    ),
    "repeats": (
        {"training": {"objective/scores": noisy(lambda t: t), "val/distinct": noisy(lambda t: 0.9 - 0.5 * t)}},
        r"distinct 3-grams fell from 0\.[89]\d to 0\.4\d while the reward rose",
    ),
    "narrow": (
        {"training": {"objective/scores": noisy(lambda t: t), "policy/entropy_avg": noisy(lambda t: 2 - 1.8 * t)}},
        r"entropy fell from 1\.\d+ to 0\.\d+ nats per token while the reward rose",
    ),
    "true reward fell": (
        {
            "training": {"objective/scores": noisy(lambda t: t)},
            "held_out": {"objective/true_scores": [2.0, 1.0, 0.5], "objective/true_scores_error": [0.1] * 3},
            "record": BEFORE_TRAINING,
        },
        r"best at step 20 \(2\) and is 0\.5 at step 60 \(noise 0\.28\) while the reward rose",
    ),
    "true reward rose": (
        {
            "training": {"objective/scores": noisy(lambda t: 0, 0.1)},
            "held_out": {"objective/true_scores": [1.2, 1.3, 1.4], "objective/true_scores_error": [0.1] * 3},
            "record": BEFORE_TRAINING,
        },
        r"rose from 1 to 1\.4 \(noise 0\.28\)",
    ),
    "ended early": ({"record": {"steps": 90}}, "ended at step 60 of 90"),
    "few steps": ({"training": {"loss": [0.69, 0.6, 0.5]}}, "3 steps: too few"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_where_its_numbers_carry_it(name: str, tmp_path: Path) -> None:
    changes, pattern = CASES[name]
    found = {f.name: f for f in diagnose(read_history(write(tmp_path, **changes)))}
    assert name in found and re.search(pattern, found[name].text), found.get(name)


NEARLY: dict[str, dict[str, Any]] = {
    "loss rose": {"training": {"loss": noisy(lambda t: LN2 + 0.02 * t, 0.1)}},
    "loss fell": {"training": {"loss": noisy(lambda t: LN2 - 0.02 * t, 0.1)}},
    "hardly moved": {"training": {"log_ratios_per_token/rejected": noisy(lambda t: -0.01 * t, 1e-3)}},
    "never better": {"held_out": {"loss": [0.8, 0.69, 0.9]}},
    "over-trained": {"held_out": {"loss": [0.60, 0.55, 0.56]}},
    "accuracy": {"record": {"data": "0123abcd 900+10"}},
    "no better than chance": {"record": {"data": "0123abcd 900+1000"}, "held_out": {"rewards/accuracies": [0.55] * 3}},
    "chosen fell far": {"training": {"log_ratios_per_token/chosen": noisy(lambda t: -0.2 * t, 0.002)}},
    "spike": {"training": {"grad_norm": [0.8] * 29 + [7.2] + [0.8] * 30}},
    "always clipped": {"training": {"grad_norm": [0.9] + [3.0] * 59}},
    "truncated": {"record": {"rows": {"kept": 1000, "truncated": 40}}},
    "left out": {"record": {"rows": {"read": 1000, "kept": 960}}},
    "another reference": {"training": {"log_ratios_per_token/chosen": noisy(lambda t: 0.01 + 0.05 * t, 0.002)}},
    "reward rose": {"training": {"objective/scores": noisy(lambda t: 0.02 * t, 0.1)}},
    "reward fell": {"training": {"objective/scores": noisy(lambda t: -0.02 * t, 0.1)}},
    "reward flat": {"training": {"objective/scores": noisy(lambda t: t)}},
    "samples grew": {
        "training": {"objective/scores": noisy(lambda t: t), "val/length": noisy(lambda t: 40 + 4 * t, 1)},
    },
    "repeats": {
        "training": {"objective/scores": noisy(lambda t: t), "val/distinct": noisy(lambda t: 0.9 - 0.1 * t)},
    },
    "narrow": {
        "training": {"objective/scores": noisy(lambda t: -t), "policy/entropy_avg": noisy(lambda t: 2 - 1.8 * t)},
    },
    "true reward fell": {
        "held_out": {"objective/true_scores": [1.2, 1.1, 1.0], "objective/true_scores_error": [0.1] * 3},
        "record": BEFORE_TRAINING,
    },
    "true reward rose": {
        "held_out": {"objective/true_scores": [1.1, 1.2, 1.2], "objective/true_scores_error": [0.1] * 3},
        "record": BEFORE_TRAINING,
    },
    "ended early": {"record": {"status": "interrupted", "steps": 90}},
    "nothing held out": {"held_out": NONE_HELD_OUT, "record": {"status": "interrupted"}},
    "few steps": {"training": {"loss": noisy(lambda t: 1 - t, n=12)}},
    # As steep a fall, evenly.
    "memorised": {"held_out": NONE_HELD_OUT, "training": {"loss": noisy(lambda t: LN2 - 0.45 * t), "epoch": PASSES}},
}


@pytest.mark.parametrize("name", NEARLY)
def test_it_is_not_said_where_they_do_not(name: str, tmp_path: Path) -> None:
    assert name not in names(write(tmp_path, **NEARLY[name]))


def test_rows_that_are_memorised_are_seen_beside_those_held_out_and_rarely_by_chance(tmp_path: Path) -> None:
    stairs: dict[str, Any] = {"loss": STAIRS, "epoch": PASSES}
    assert "memorised" not in names(write(tmp_path, training=stairs)), "the held-out loss says more"
    false = 0
    for seed in range(200):
        even = noisy(lambda t: LN2 - 0.2 * t, 0.05, seed=seed)
        write(tmp_path, held_out=NONE_HELD_OUT, training={"loss": even, "epoch": PASSES})
        false += "memorised" in names(tmp_path)
    assert false <= 10, false
    easy_first = {"loss": noisy(lambda t: LN2 + 0.2 * (round(t * (N - 1)) % 20) / 20, 0.02), "epoch": PASSES}
    for shuffle in (True, False):  # nothing is learned; in one order the loss falls from hard rows to easy ones
        write(tmp_path, held_out=NONE_HELD_OUT, training=easy_first, record={"options": {"shuffle": shuffle}})
        assert ("memorised" in names(tmp_path)) == shuffle


def test_every_sentence_is_tested_both_ways() -> None:
    said = {
        node.args[0].value
        for rules in (diagnose, hacking)
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[rules.__module__])))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding" and node.args
        if isinstance(node.args[0], ast.Constant)
    }
    good = {"loss fell", "held out", "accuracy"}
    assert said == set(CASES) | good
    assert said - set(NEARLY) == {"loss flat", "held out", "worse than chance"}  # said above
    assert len(CHECKS) == 12


def test_losses_of_other_kinds_are_told_too(tmp_path: Path) -> None:
    """A run that has a loss and little else; one whose first step is not at ln 2 claims no known start."""
    only = {name: None for name in GOOD["training"] if name not in ("loss", "epoch")}
    loss = noisy(lambda t: 3 - t)
    changes = {"training": {**only, "loss": loss}, "held_out": {**NONE_HELD_OUT, "loss": [3.5, 3.2]}}
    assert names(write(tmp_path, **changes)) == {"loss fell", "held out"}
    text = "\n".join(in_words(diagnose(read_history(tmp_path))))
    assert "average of the first 6, and average of the last 6" in text


def test_a_run_of_ppo_is_told_of_its_samples_and_not_of_rows(tmp_path: Path) -> None:
    only = dict.fromkeys(name for name in GOOD["training"] if name != "epoch")
    rising = {"objective/scores": noisy(lambda t: t), "val/length": noisy(lambda t: 40, 1)}
    assert names(write(tmp_path, training={**only, **rising}, held_out=NONE_HELD_OUT)) == {"reward rose"}


def test_gradients_of_nothing_are_found(tmp_path: Path) -> None:
    """A run at an absurd learning rate: after a few steps every sigmoid is flat."""
    write(tmp_path, training={"grad_norm": [5.0, 5.0] + [0.0] * (N - 2)})
    assert "was 5 at step 1, and its median 0" in "\n".join(in_words(diagnose(read_history(tmp_path))))


PLANTED: dict[str, dict[str, Any]] = {
    "hardly moved": {"learning_rate": 1e-8},
    "worse than chance": {"eval": "exchanged"},
    "another reference": {"reference": "other"},
    "truncated": {"max_length": 24},
    "chosen fell far": {"data": "alike", "epochs": 8, "learning_rate": 1e-2},
    "healthy": {"learning_rate": 1e-4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_in_a_real_run(name: str, model: str, tmp_path: Path) -> None:
    """And nothing of the kind in a healthy one."""
    options: dict[str, Any] = {"learning_rate": 1e-3, "epochs": 2, **PLANTED[name]}
    rows, held = pairs(96), pairs(60, seed=1)
    kind = options.pop("data", "")
    if kind == "alike":
        rows = [{**row, "chosen": row["rejected"] + "z", "rejected": row["rejected"]} for row in rows]
    if options.pop("eval", "") == "exchanged":
        held = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held]
    if "reference" in options:
        options["reference"] = write_model(tmp_path / "other", seed=3)
    eval_data = write_rows(tmp_path / "held.jsonl", held)
    dpo(model, rows, tmp_path / "out", eval_data=[eval_data], eval_every=8, **options)
    found = diagnose(read_history(tmp_path / "out"))
    if name == "healthy":
        assert not [f for f in found if f.look], found
    else:
        assert name in {f.name for f in found if f.look}, found


@pytest.mark.slow
def test_labels_by_chance_can_only_be_memorised_which_a_run_says_without_held_out_rows(
    model: str, tmp_path: Path
) -> None:
    """And does not say of as many rows with a rule to learn."""
    chance = random.Random(0)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(128)]
    by_chance = [chance.choice(both) for both in zip(pairs(128), turned, strict=True)]
    found = {}
    for name, rows in {"chance": by_chance, "rule": pairs(128)}.items():
        options = {"learning_rate": 3e-3, "epochs": 6, "batch_size": 8, "eval_fraction": 0.0}
        dpo(model, rows, tmp_path / name, **options)
        found[name] = {f.name: f.text for f in diagnose(read_history(tmp_path / name))}
        print(f"\n{name}: {found[name]}")
    assert "rows are memorised" in found["chance"]["memorised"] and "memorised" not in found["rule"]


def test_a_run_without_steps_has_nothing_to_tell(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert in_words(diagnose(read_history(tmp_path))) == []


def test_a_run_tells_it_at_its_end(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo(model, pairs(40), tmp_path / "out", eval_fraction=0.2, epochs=4, progress="plain", learning_rate=5e-3)
    said = capsys.readouterr().out
    told = in_words(diagnose(read_history(tmp_path / "out")))
    assert "what happened:" in told and "\n".join(told) in said


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run of prefopt \(no run.json in it\)"):
        read_history(tmp_path / "none")
    write(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 61, "lo']))
    assert read_history(tmp_path).step == N
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "what", *lines[1:]]))
    with pytest.raises(RunError, match="line 2 holds no metrics"):
        read_history(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match="damaged"):
        read_history(tmp_path)


def test_noise_is_told_from_change_at_the_level_it_says() -> None:
    """Of curves that are noise alone, one in twenty seems to change."""
    chance = random.Random(1)
    curves = [[chance.gauss(0, 1) for _ in range(50)] for _ in range(1000)]
    for since in (None, 0.0):
        found = [change(Curve(list(range(50)), values), since=since) for values in curves]
        share = sum(c is not None and c.direction != 0 for c in found) / len(curves)
        assert 0.03 < share < 0.07
    assert change(Curve([1, 2, 3, 4, 5, 6, 7], [0.0] * 7)) is None


def test_an_interval_of_a_share_covers_it() -> None:
    chance = random.Random(2)
    for share, count in ((0.5, 20), (0.9, 40), (0.1, 50)):
        seen = [sum(chance.random() < share for _ in range(count)) / count for _ in range(2000)]
        covered = statistics.fmean(low <= share <= high for low, high in (wilson(s, count) for s in seen))
        assert covered > 0.92
    assert wilson(1.0, 10)[1] == 1.0
