"""Results of Python print as what the command prints, not as the fields of a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.core.shown import Shown
from prefopt.evaluate.reward_bench import RewardBenchReport
from prefopt.export.serving import Exported
from prefopt.methods.rlhf import RlhfResult
from prefopt.model.merge import MergeReport
from prefopt.sweeps.methods import MethodsTable
from prefopt.sweeps.points import Frontier

RESULTS: list[tuple[Any, str]] = [
    (RewardBenchReport("length", [], [], [], 0, ["no row"], "prefopt"), "note: no row"),
    (Exported(Path("out"), "merged", "float32", {"vLLM": ["vllm", "serve", "out"]}), "vLLM: vllm serve out"),
    (MergeReport(Path("out"), torch.float32, 7, 1e-7, 0.1, 0.0, False, 9, None), "7 layers merged in float32"),
    (Frontier("m", "length", 4, 2, 8, finished=False), "the sweep is not finished"),
    (MethodsTable("m", "length", 4, 2, 3, "made", finished=True), "0 policies of m"),
    (RlhfResult(Path("out"), ("sft", "reward"), ("ppo",)), "done: sft, reward"),
]


@pytest.mark.parametrize(("result", "told"), RESULTS, ids=[type(result).__name__ for result, _ in RESULTS])
def test_results_print_as_lines(result: Any, told: str) -> None:
    assert isinstance(result, Shown)
    assert told in repr(result) and f"{type(result).__name__}(" not in repr(result)
    assert result._repr_html_().startswith("<table>")
