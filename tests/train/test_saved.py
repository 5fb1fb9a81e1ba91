"""What a run leaves behind, loaded by plain transformers and PEFT, gives what the trained model gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.model.merge import merge_adapter
from train.small import doubtful_pairs, dpo, pairs, weights, write_model, write_rows

ROWS = pairs(12)
IDS = torch.tensor([[0, 20, 30, 40, 21, 31, 41, 22]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("best", [False, True], ids=["", "best"])
def test_a_whole_model(best: bool, tied: bool, tmp_path: Path) -> None:
    """``best``: the weights of an earlier evaluation are saved, not the last ones."""
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    given = AutoModelForCausalLM.from_pretrained(base)
    before = logits(given)
    more: dict[str, Any] = {}
    if best:
        held_out = write_rows(tmp_path / "eval.jsonl", doubtful_pairs(10, seed=3))
        more = {"eval_data": [held_out], "eval_every": 1, "learning_rate": 3e-3, "epochs": 3, "schedule": "constant"}
    result = dpo(given, ROWS, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(base), **more)
    assert not best or (result.best_step or result.steps) < result.steps
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(logits(saved), logits(given))
    assert float((logits(saved) - before).abs().max()) > 1e-4
    assert saved.config.tie_word_embeddings == tied


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]], ids=["", "with the head"])
def test_an_adapter(targets: list[str] | None, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    given = AutoModelForCausalLM.from_pretrained(base)
    before, tokenizer = logits(given), AutoTokenizer.from_pretrained(base)
    dpo(given, ROWS, tmp_path / "out", tokenizer=tokenizer, lora=True, learning_rate=2e-2, lora_targets=targets)
    trained = logits(given)  # PEFT has put its layers into the model that was given
    assert float((trained - before).abs().max()) > 1e-4
    same(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")), trained)
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), trained)
    assert all("lora_" in name for name in weights(tmp_path / "out")), "an adapter holds no weights of its model"
    merge_adapter(str(tmp_path / "out"), tmp_path / "merged", dtype=torch.float32, device=torch.device("cpu"))
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained)
