"""What a sweep measures of a policy does not depend on where the policy comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.sweeping import PROMPTS, frontier_config
from prefopt.config.frontier import FrontierConfig
from prefopt.config.tools import ScoreConfig
from prefopt.generate.model_io import SampledModel
from prefopt.model.precision import scoring_dtype
from prefopt.sweeps import data
from prefopt.sweeps.data import Measure, true_reward
from train.small import write_rows


@pytest.fixture
def bfloat16_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that would compute in bfloat16, and nobody who asked for another precision."""
    monkeypatch.delenv("PREFOPT_DTYPE", raising=False)
    monkeypatch.setattr("prefopt.model.precision.native_bfloat16", lambda device: True)


def config(place: Path, output: Path, **changes: Any) -> FrontierConfig:
    return frontier_config(place, output, methods=["best-of:n=2"], **{"dtype": "auto", **changes})


@pytest.mark.usefixtures("bfloat16_machine")
def test_a_policy_in_a_folder_and_one_in_memory_are_measured_in_one_precision(place: Path, tmp_path: Path) -> None:
    """The ends of PPO are read from folders, steps of DPO are in memory, in the reference's precision."""
    name = str(place / "m")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": p, "responses": []} for p in PROMPTS[:6]])
    given = config(place, tmp_path / "out", num=8)
    reference = SampledModel(name, device="cpu", dtype=scoring_dtype(given.dtype))
    assert reference.dtype == torch.float32
    measure = Measure(given, Path(prompts), reference, true_reward(given))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    from_folder = measure(name, tmp_path / "a.jsonl")
    in_memory = measure(name, tmp_path / "b.jsonl", model=model, tokenizer=tokenizer)
    # Their log-probabilities too, which differ in every row where one was drawn in bfloat16.
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert from_folder == in_memory


@pytest.mark.usefixtures("bfloat16_machine")
def test_a_reward_model_scores_in_that_precision_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ScoreConfig] = []
    monkeypatch.setattr(data, "load_row_scorer", asked.append)
    for dtype in ("auto", "bfloat16"):
        true_reward(config(place, tmp_path / "out", reward=str(place / "m"), dtype=dtype))
    assert [one.dtype for one in asked] == ["float32", "bfloat16"]
