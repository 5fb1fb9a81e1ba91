"""Scores are put to the right responses, and what is wrong is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.config.tools import ScoreConfig
from prefopt.evaluate.score import load_row_scorer, run
from prefopt.model.scalar import scalar_from, set_shift
from prefopt.records import Comparison, Message, Response
from train.small import tiny_llama, write_model

ROWS = [
    {"prompt": "p", "chosen": "a b c", "rejected": "a", "note": 1},
    {"prompt": "q", "chosen": "a", "rejected": "a b"},
    {"prompt": "r", "chosen": "b a", "rejected": "a b"},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_scores_stand_beside_their_responses_and_agreement_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "scored.jsonl"
    assert main(["score", write(tmp_path / "pairs.jsonl", ROWS), "--reward", "length", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["responses"], row["scores"]) for row in rows] == [
        (["a b c", "a"], [3.0, 1.0]),
        (["a", "a b"], [1.0, 2.0]),
        (["b a", "a b"], [2.0, 2.0]),
    ]
    assert rows[0]["note"] == 1
    assert "6 responses of 3 rows: mean 1.833" in said and "50.0% of the pairs" in said

    # What was written can be scored again, and trained on: its preference is that of the scores now.
    again = tmp_path / "again.jsonl"
    assert main(["score", str(out), "--reward", "length", "--output", str(again)]) == 0
    assert "order 100.0% of the pairs" in capsys.readouterr().out
    assert again.read_text() == out.read_text()
    assert main(["score", str(out), "--reward", "length", "--output", str(again)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["score", str(out), "--reward", "length", "--output", str(again), "--overwrite"]) == 0


@pytest.mark.parametrize(("prompts", "low"), [(20, 0.7), (1, 0.0)])
def test_all_in_order_is_not_all_certain_and_rows_of_one_prompt_are_one(
    prompts: int, low: float, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{i % prompts}", "chosen": "a b", "rejected": "a" * (1 + i)} for i in range(20)]
    config = ScoreConfig(files=[write(tmp_path / "p.jsonl", rows)], reward="length", output=str(tmp_path / "o.jsonl"))
    found = run(config).agreement
    assert found is not None and (found.mean, found.high, found.count) == (1.0, 1.0, prompts)
    assert low <= found.low < low + 0.2


@pytest.mark.parametrize(
    ("rows", "reward", "said"),
    [
        (ROWS, "lenght", "did you mean length"),
        ([{"prompt": "only a prompt"}], "length", "row 1: has no response to score"),
        ([*ROWS, {"prompt": "q"}], "length", "row 4"),
        (ROWS, "tests_have_no_such_module:f", "no module tests_have_no_such_module"),
        (ROWS, "implicit", "give --model and --reference"),
        (ROWS, "./no/such/folder", "no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    rows: list[dict[str, object]], reward: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scored.jsonl"
    assert main(["score", write(tmp_path / "d.jsonl", rows), "--reward", reward, "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def folders(place: Path) -> tuple[str, str, str]:
    """A policy, its reference, and a reward model, all small and random."""
    other, policy = write_model(place / "reference"), write_model(place / "policy", seed=1)
    model = scalar_from(tiny_llama(2), small_tokenizer())
    set_shift(model, 0.5)
    model.save_pretrained(place / "reward")
    small_tokenizer().save_pretrained(place / "reward")
    return policy, other, str(place / "reward")


TEXTS = [row["prompt"] + row[side] + "</s>" for row in ROWS for side in ("chosen", "rejected")]
CPU = ["--device", "cpu", "--dtype", "float64"]


def written(path: Path) -> np.ndarray:
    return np.array([score for line in path.read_text().splitlines() for score in json.loads(line)["scores"]])


def test_a_reward_model_and_the_implicit_reward_score_as_plain_transformers_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, reference, reward = folders(tmp_path)
    tokenizer, data = small_tokenizer(), write(tmp_path / "pairs.jsonl", ROWS)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    out = tmp_path / "scored.jsonl"
    assert main(["score", data, "--reward", reward, "--output", str(out), *CPU]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float64)
    with torch.no_grad():
        own = [plain(row).logits[0, 0].item() - 0.5 for row in ids]
    np.testing.assert_allclose(written(out), own, atol=1e-6)
    pairs = np.array(own).reshape(-1, 2)
    assert f"order {(pairs[:, 0] > pairs[:, 1]).mean():.1%} of the pairs" in capsys.readouterr().out

    out = tmp_path / "implicit.jsonl"
    words = ["--reward", "implicit", "--model", policy, "--reference", reference, "--beta", "0.3"]
    assert main(["score", data, *words, "--output", str(out), *CPU]) == 0
    own = []
    for text, row in zip(TEXTS, ids, strict=True):
        sums = []
        for name in (policy, reference):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
            with torch.no_grad():
                logp = model(row).logits[0].log_softmax(-1)
            prompt = len(tokenizer(text[:1])["input_ids"])
            sums.append(sum(logp[t - 1, row[0, t]].item() for t in range(prompt, row.shape[1])))
        own.append(0.3 * (sums[0] - sums[1]))
    np.testing.assert_allclose(written(out), own, atol=1e-6)


@pytest.mark.parametrize("text", [True, False])
def test_an_empty_answer_that_was_cut_off_is_scored_as_one_that_ended(text: bool, tmp_path: Path) -> None:
    """As where stop tokens are not kept: nothing else of it can be scored."""
    model = scalar_from(tiny_llama(), small_tokenizer())
    model.save_pretrained(tmp_path / "r")
    small_tokenizer().save_pretrained(tmp_path / "r")
    scorer = load_row_scorer(ScoreConfig(files=["f"], output="o", reward=str(tmp_path / "r"), dtype="float32"))
    ended, cut = (
        Comparison(
            (Message("user", "abc"),),
            tuple(Response((Message("assistant", x),), cut=c) for x in ("", "ab")),
            (),
            1,
            text=text,
        )
        for c in (False, True)
    )
    (of_ended, of_cut) = scorer([ended]) + scorer([cut])
    assert of_cut[0] == pytest.approx(of_ended[0], abs=1e-6) and of_cut[1] != pytest.approx(of_ended[1], abs=1e-3)


def test_an_empty_answer_of_a_model_is_scored_by_its_end_token(tmp_path: Path) -> None:
    """A sample may end at once: a sweep with a reward model must not end there, too."""
    model = scalar_from(tiny_llama(), small_tokenizer())
    model.save_pretrained(tmp_path / "r")
    small_tokenizer().save_pretrained(tmp_path / "r")
    scorer = load_row_scorer(ScoreConfig(files=["f"], output="o", reward=str(tmp_path / "r"), dtype="float32"))
    row = Comparison((Message("user", "abc"),), tuple(Response((Message("assistant", x),)) for x in ("", "ab")), (), 1)
    (found,) = scorer([replace(row, text=True)])
    tokenizer = small_tokenizer()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r", dtype=torch.float32)
    for text, score in zip(("abc", "abcab"), found, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            assert score == pytest.approx(float(plain(ids).logits), abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, _, reward = folders(tmp_path)
    small_tokenizer(marks=["</s>", "<s>"]).save_pretrained(tmp_path / "reference")
    data, out = write(tmp_path / "d.jsonl", ROWS), str(tmp_path / "o.jsonl")
    for words, said in [
        (["--reward", policy], "is a language model, which gives no score"),
        (["--reward", "implicit", "--model", policy], "give --reference"),
        (["--reward", "implicit", "--model", policy, "--reference", str(tmp_path / "reference")], "another tokenizer"),
        (["--reward", "length", "--model", policy], "--model is read with --reward implicit alone"),
        (["--reward", "length", "--dtype", "float64"], "--dtype is for rewards that are models"),
        (["--reward", reward, "--beta", "0.1"], "--beta is read with --reward implicit alone"),
    ]:
        assert main(["score", data, "--output", out, *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["score", data, "--output", out, "--reward", reward, "--max-length", "5", *CPU]) == 0
    assert "1 of 3 rows truncated" in capsys.readouterr().out
