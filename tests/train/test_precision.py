"""bfloat16 means computing in it: weights move as under float32, and nothing of that is lost on the way to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prefopt
from train.small import dpo, pairs, weights, write_model

ROWS = pairs(40)


class Saved(prefopt.Callback):
    """Checkpoints of the first step and of the fiftieth."""

    def on_step(self, run: Any, step: int, metrics: Any) -> None:
        if run.step in (1, 50):
            run.save()


@pytest.mark.parametrize("options", [{}, {"lora": True}], ids=["full", "lora"])
def test_fifty_steps_in_bfloat16_move_the_weights_as_float32_does(
    options: dict[str, Any], model: str, tmp_path: Path
) -> None:
    moved = []
    given = {"learning_rate": 1e-6, "epochs": 5, "save_every": 50, "keep_last": 2, "callbacks": [Saved()], **options}
    # One pair at a time in bfloat16: gradients of four micro-batches are added up.
    for dtype, token_budget in (("float32", 10_000), ("bfloat16", 1)):
        output = tmp_path / dtype
        dpo(model, ROWS, output, dtype=dtype, token_budget=token_budget, **given)
        start, end = (load_file(output / f"checkpoints/step-{n:08d}/weights.safetensors") for n in (1, 50))
        assert {t.dtype for t in end.values()} == {torch.float32}
        moved.append(torch.cat([(end[name] - start[name]).flatten() for name in sorted(end)]))
    norms = [m.norm() for m in moved]
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.05)
    assert torch.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize("tied", [False, True])
def test_float32_weights_are_saved_as_they_were_trained(tied: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tie_word_embeddings=tied)
    before = weights(tmp_path / "model")
    output = tmp_path / "out"
    dpo(model, ROWS[:8], output, dtype="bfloat16", learning_rate=1e-6, save_every=2)
    after, masters = weights(output), load_file(output / "checkpoints/step-00000002/weights.safetensors")
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) == (not tied)
    for name, value in after.items():
        assert value.dtype == torch.float32 and torch.equal(value, masters[name]), name
        assert not torch.equal(value, before[name]), name
        # 1e-6 a step is far below what bfloat16 can tell apart.
        torch.testing.assert_close(value, before[name], rtol=0, atol=3e-6, msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, after["model.embed_tokens.weight" if tied else "lm_head.weight"])


def test_an_adapter_is_saved_as_it_was_trained(model: str, tmp_path: Path) -> None:
    dpo(model, ROWS[:8], tmp_path / "out", dtype="bfloat16", lora=True, save_every=2)
    masters = load_file(tmp_path / "out/checkpoints/step-00000002/weights.safetensors")
    trained = {name.replace(".default", ""): value for name, value in masters.items()}
    saved = weights(tmp_path / "out")
    assert saved.keys() == trained.keys()
    for name, value in saved.items():
        assert value.dtype == torch.float32 and torch.equal(value, trained[name]), name
