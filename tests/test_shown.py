"""Results of Python print as what the command prints, not as the fields of a class; mistakes name the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from prefopt.core.shown import Shown
from prefopt.errors import ConfigError
from prefopt.evaluate.reward_bench import RewardBenchReport
from prefopt.export.serving import ExportedModel
from prefopt.methods.rlhf import RlhfResult
from prefopt.model.merge import MergeReport
from prefopt.sweeps.methods import MethodsTable
from prefopt.sweeps.points import Frontier

RESULTS: list[tuple[Any, str]] = [
    (RewardBenchReport("length", [], [], [], 0, ["no row"], "prefopt"), "note: no row"),
    (ExportedModel(Path("out"), "merged", "float32", {"vLLM": ["vllm", "serve", "out"]}), "vLLM: vllm serve out"),
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


def test_mistakes_with_functions_name_the_remedy() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'export'; did you mean export_model\?"):
        prefopt.__getattr__("export")  # the package of that name is imported above
    with pytest.raises(ConfigError, match=r"merge\(\) takes no argument without a name; write name=value"):
        prefopt.merge("a")  # type: ignore[call-arg, misc]
