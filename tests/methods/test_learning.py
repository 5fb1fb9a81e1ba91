"""Every loss learns what people like, as far as it can be told from rows of its kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from prefopt.losses.declare import LOSSES
from train.small import dpo, evaluations, steps, write_rows

SLOW = pytest.mark.slow
LIKED = "qjvz"  # in this order, whatever else a response says

# nll knows the chosen response alone, which most of rpo is too; discopop's curve has a valley before the slope.
PART = {"nll": 0.6, "rpo": 0.55, "discopop": 0.7}
QUICK = ("kto", "plackett_luce")  # pairs: test_evaluation.py; the others take half a minute


def rows(kind: str, n: int = 160) -> list[dict[str, Any]]:
    """Responses that hold one of the letters in the middle of others, and what people say of them."""
    chance = random.Random(0)

    def response(letter: str) -> str:
        text = ["".join(chance.choice("abcdefgh") for _ in range(chance.randint(3, 7))) for _ in range(2)]
        return text[0] + letter + text[1]

    found: list[dict[str, Any]] = []
    for i in range(n):
        prompt = f"{i}{''.join(chance.choice('klm') for _ in range(3))}: "
        if kind == "labels":
            good = i % 2 == 0
            found.append({"prompt": prompt, "completion": response("q" if good else "z"), "label": good})
            continue
        letters = list(LIKED if kind == "ranking" else "qz")
        chance.shuffle(letters)
        scores = [3.0 - LIKED.index(letter) for letter in letters]
        found.append({"prompt": prompt, "responses": [response(x) for x in letters], "scores": scores})
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in [*LOSSES, "dpo:1,nll:0.3"]]
)
def test_a_loss_lowers_its_own_value_on_rows_it_has_not_seen(name: str, model: str, tmp_path: Path) -> None:
    loss = LOSSES[name.partition(":")[0]]
    options: dict[str, Any] = {"loss": name, "learning_rate": 5e-3, "batch_size": 8, "token_budget": 300}
    if name == "sppo_hard":  # the paper's 0.001 aims at log-ratios of 500, of which two epochs reach little
        options["beta"] = 0.1
    result = dpo(model, rows(loss.kind), tmp_path / "out", eval_fraction=0.1, epochs=2, eval_every=1, **options)
    told = evaluations(tmp_path / "out")
    first, last = told[0], told[-1]
    assert result.best_step is not None and result.held_out_loss is not None
    assert result.held_out_loss < 0.9 * first["eval_loss"]
    assert last["eval_rewards/accuracies"] > PART.get(name, 0.85)
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"]


@pytest.mark.parametrize("which", ["all", "best-worst"])
def test_pairs_of_rankings_are_learnt(which: str, model: str, tmp_path: Path) -> None:
    dpo(model, rows("ranking", 80), tmp_path / "out", pairs=which, eval_fraction=0.1, epochs=2, learning_rate=5e-3)
    assert evaluations(tmp_path / "out")[-1]["eval_rewards/accuracies"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss": "plackett_luce"}, {"pairs": "all"}, {"pairs": "best-worst"}], ids=str)
def test_orders_of_real_answers_are_learnt(options: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    """Answers to questions that were not trained on, four to each, with ties; the order is planted: longer is better.

    People's own orders of these answers go neither with length nor with anything else that so small a model can tell.
    """
    every = json.loads((shared / "data/finegrained_qa/dev_feedback.json").read_text("utf-8"))
    answers = [(row["question"], [row[f"prediction {k}"] for k in (1, 2, 3, 4)]) for row in every]
    short = sorted(answers, key=lambda row: len("".join(row[1])))[:96]
    rows = [{"prompt": q, "responses": a, "scores": [len(x) // 20 for x in a]} for q, a in short]
    data = write_rows(tmp_path / "data.jsonl", rows)
    given: dict[str, Any] = {"eval_fraction": 0.25, "batch_size": 8, "max_length": 256, "on_bad_row": "skip", **options}
    model = str(shared / "models/stories260k")
    start = dpo(model, data, tmp_path / "start", learning_rate=1e-12, max_steps=1, **given).held_out_loss
    result = dpo(model, data, tmp_path / "out", learning_rate=3e-4, eval_every=3, **given)
    assert start is not None and result.held_out_loss is not None and result.held_out_loss < 0.8 * start
    assert evaluations(tmp_path / "out")[-1]["eval_rewards/accuracies"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss": "plackett_luce"}, {"pairs": "all"}, {"pairs": "best-worst"}], ids=str)
def test_people_s_orders_of_four_answers_are_fitted(options: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    """Real orders, with ties: on the rows that are trained on, for 0.26 million weights know nothing of the others."""
    every = json.loads((shared / "data/finegrained_qa/dev_feedback.json").read_text("utf-8"))
    short = sorted(every, key=lambda row: sum(len(row[f"prediction {k}"]) for k in (1, 2, 3, 4)))[:24]
    data = write_rows(tmp_path / "data.jsonl", short)
    given: dict[str, Any] = {
        "learning_rate": 1e-3,
        "batch_size": 8,
        "epochs": 5,
        "max_length": 384,
        "schedule": "constant",
    }
    model = str(shared / "models/stories260k")
    dpo(model, data, tmp_path / "out", eval_data=[data], eval_every=1, on_bad_row="skip", **given, **options)
    told = evaluations(tmp_path / "out")
    assert told[-1]["eval_loss"] < 0.6 * steps(tmp_path / "out")[0]["loss"]
    assert told[-1]["eval_rewards/accuracies"] > 0.8
