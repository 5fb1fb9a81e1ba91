"""A task of questions: answered by log-probability per token, as the model's own forward pass has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.core.files import expanded
from prefopt.errors import DataError
from prefopt.evaluate.choices import ChoiceTask, best_first
from prefopt.generate.model_io import SampledModel
from train.small import write_rows

DEMO = "prefopt:demo/tiny_imdb"
SHIPPED = "prefopt:demo/grammar.jsonl"


def model() -> SampledModel:
    return SampledModel(str(expanded(DEMO)), device="cpu", dtype="float32")


def test_the_shipped_questions_are_answered_as_one_by_one() -> None:
    """Each answer by itself in transformers, without the package: the same ones are right."""
    policy = model()
    task = ChoiceTask([SHIPPED], policy.tokenizer, policy.context)
    rows = [json.loads(line) for line in Path(expanded(SHIPPED)).read_text("utf-8").splitlines()]
    assert task.words == f"{len(rows)} questions, of which chance answers 50.0%" and len(rows) == 100
    plain = AutoModelForCausalLM.from_pretrained(expanded(DEMO), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(expanded(DEMO))

    def per_token(prompt: str, answer: str) -> float:
        start, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, prompt + answer))
        count = start.shape[1]
        assert whole[0, :count].tolist() == start[0].tolist()
        with torch.no_grad():
            logp = plain(whole).logits.double().log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
        return float(logp[count - 1 :].mean())

    found = task(policy)
    for row, right in list(zip(rows, found, strict=True))[::5]:
        each = [per_token(row["prompt"], answer) for answer in row["responses"]]
        assert right == float(each[row["order"][0]] == max(each)), row["prompt"]
    assert 0.8 < np.mean(found) < 1.0, "neither chance nor without room to fall"
    assert np.mean([row["order"][0] for row in rows]) == pytest.approx(0.5, abs=0.1), "nor is the first always right"


def test_ties_and_several_right_answers_count_by_their_share() -> None:
    assert best_first([-6.0, -4.0, -9.0], [3, 1, 3], {0}) == 1.0, "per token"
    assert best_first([-2.0, -2.0, -3.0], [1, 1, 1], {0, 2}) == 0.5
    assert best_first([-2.0, -2.0], [1, 1], {0, 1}) == 1.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "responses": ["b", "c"]}, "no preference: 1"),
        ({"prompt": "a", "responses": ["b", "c"], "tiers": [[0, 1]]}, "only ties: 1"),
        ({"prompt": "a", "chosen": "b " * 3000, "rejected": "c"}, "--task: 1 of 1 rows are longer than the model's"),
    ],
)
def test_what_is_no_question_is_refused(row: dict[str, object], said: str, tmp_path: Path) -> None:
    policy = model()
    with pytest.raises(DataError, match=said):
        ChoiceTask([write_rows(tmp_path / "task.jsonl", [row])], policy.tokenizer, policy.context)
