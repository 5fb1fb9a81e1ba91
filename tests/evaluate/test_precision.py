"""Log-probabilities of models are compared in float32, where nobody asked for another precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt.config.compare import CompareConfig
from prefopt.config.tools import ScoreConfig
from prefopt.evaluate import score
from prefopt.evaluate.compare import run
from train.small import write_rows


def test_models_are_compared_in_float32_unless_a_dtype_is_named(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model and one that differs from it by less than bfloat16 can tell: its KL, its perplexity, and the verdicts of
    the implicit reward, on a device that would compute in bfloat16."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{'klm'[i % 3]}{i}: "} for i in range(12)])
    near = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for n, weight in enumerate(near.parameters()):
            weight.mul_(1 + (1e-4 if n % 2 else -1e-4))
    near.save_pretrained(tmp_path / "near")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "near")
    file = tmp_path / "drawn.jsonl"
    options: dict[str, Any] = {"device": "cpu", "progress": "none", "max_new_tokens": 8}
    prefopt.sample(str(tmp_path / "near"), prompts, output=str(file), num=4, **options, dtype="float32")
    held_out = write_rows(tmp_path / "text.jsonl", [{"text": "one two three"}, {"text": "four five"}])
    given: dict[str, Any] = {"prompts": [prompts], "num": 4, "held_out": [held_out], **options}
    given |= {"reference": model, "judge": f"implicit:{tmp_path / 'near'},{model}"}
    monkeypatch.delenv("PREFOPT_DTYPE")
    monkeypatch.setattr("prefopt.model.precision.native_bfloat16", lambda device: True)

    def numbers(dtype: str) -> tuple[float, float, list[float], list[str]]:
        found = run(CompareConfig(a=str(tmp_path / "near"), b=str(file), json=True, **given, dtype=dtype))
        near, drawn = found.models.values()
        assert drawn.distance is not None and near.perplexity is not None
        models = {"model": str(tmp_path / "near"), "reference": model}
        output = {"output": str(tmp_path / "scored.jsonl"), "overwrite": True}
        scores = score.run(ScoreConfig(files=[str(file)], reward="implicit", **models, **output, dtype=dtype))
        return drawn.distance.k1.mean, near.perplexity, [scores.mean, scores.spread], found.notes

    auto, wide, narrow = (numbers(dtype) for dtype in ("auto", "float32", "bfloat16"))
    assert auto[:3] == wide[:3] and auto[:3] != narrow[:3]
    assert abs(narrow[2][1] - wide[2][1]) > 0.5 * wide[2][1], "in bfloat16 the implicit reward is rounding"
    assert auto[3] == ["samples are drawn in bfloat16, and log-probabilities of models compared in float32"]
    assert wide[3] == narrow[3] == []
