"""The words and corrections of verdicts on rates, categories and tasks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import prefopt
from prefopt.cli import main
from prefopt.core.statistics import holm
from prefopt.evaluate.result import PairResult, correct_pairs
from prefopt.evaluate.tasks import TaskChange, corrected_changes
from prefopt.evaluate.win_rate import win_rate
from train.small import write_rows


def test_verdicts_are_corrected_for_the_number_of_pairs_and_of_categories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three models one is a little better: it would be called so alone, but not among three comparisons; nor in one
    of two categories among six."""
    many = [{"prompt": f"p{i} ", "kind": "ab"[i % 2]} for i in range(100)]
    files = {}
    for name, won in (("a", 62), ("b", 38), ("c", 50)):
        good = [(["good"] if (i < won if name != "b" else i >= 100 - won) else ["bad"]) for i in range(100)]
        files[name] = write_rows(
            tmp_path / f"{name}.jsonl", [row | {"responses": r} for row, r in zip(many, good, strict=True)]
        )
    a, b, c = files.values()
    alone = prefopt.compare(a, b, judge="regex:good").versus[0].rate
    assert alone.p == alone.p_holm and alone.verdict == "better" and alone.comparisons == 1
    found = prefopt.compare(a, b, others=[c], judge="regex:good", category="kind").versus
    rates = [v.rate for v in found]
    assert rates[0].p == alone.p and [r.comparisons for r in rates] == [3, 3, 3]
    p = [r.p for r in rates]
    assert all(x is not None for x in p) and [r.p_holm for r in rates] == pytest.approx(holm(p))  # type: ignore[arg-type]
    kinds = [c for v in found for c in v.categories.values()]
    assert [c.comparisons for c in kinds] == [6] * 6
    assert [c.p_holm for c in kinds] == pytest.approx(holm([c.p for c in kinds]))  # type: ignore[misc]
    words = ["compare", "--a", a, "--b", b, "--others", c, "--judge", "regex:good", "--category", "kind"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("among 3 comparisons p = ") == 3 and said.count("among 6 comparisons p = ") == 6


def test_what_is_said_of_a_rate_agrees_with_its_interval_and_its_p() -> None:
    """Sixty of a hundred: the interval just excludes one half, and the exact test does not."""

    def lines(won: int, prompts: int = 100, tied: int = 0) -> str:
        outcomes = np.repeat([1.0, 0.5, 0.0], [won, tied, prompts - won - tied])[:, None]
        return "\n".join(PairResult("x", "y", win_rate(outcomes), None).lines())

    assert "no difference is shown: the interval just excludes 50 %, but p is above 5 %" in lines(60)
    assert "if there is one, 73 to 2,601 prompts would show it" in lines(60)
    assert re.search(r"showing it takes at least \d+ prompts, and there may be none", lines(52))
    assert "x is better by this judge" in lines(80) and "reaches" not in lines(80)
    assert lines(0, tied=100).endswith("no difference is shown")
    many = [win_rate(np.repeat([1.0, 0.0], [n, 100 - n])[:, None]) for n in (62, 50, 50)]
    said = "\n".join(correct_pairs([PairResult("x", "y", r, None) for r in many])[0].lines())
    assert "p = 0.021, among 3 comparisons p = 0.063 (Holm)" in said
    assert "no difference is shown: p is below 5 % by itself, but not among 3 comparisons" in said
    few = np.repeat([[1.0, 0.5, 0.5, 0.5]], 6, 0)
    edge = np.concatenate([few, np.full((6, 4), 0.5)])
    assert "better by this judge; the interval reaches 50 %" in "\n".join(
        PairResult("x", "y", win_rate(edge), None).lines()
    )


def change(difference: float, error: float | None, *, higher_is_better: bool | None = True) -> TaskChange:
    return TaskChange("t", "acc", 0.5 + difference, 0.5, difference, error, True, 100, higher_is_better)


def test_tasks_are_corrected_together() -> None:
    """Two standard errors and a half are a finding alone, and none among eight metrics."""
    alone, unknown = change(0.05, 0.02), change(0.05, None)
    assert alone.p == pytest.approx(0.01242, abs=1e-5) and alone.verdict == "better"
    assert unknown.p is None and unknown.verdict.startswith("without a standard error")
    found = corrected_changes([alone, unknown, *[change(0.0, 0.02)] * 6, change(-0.1, 0.02)])
    assert [c.verdict for c in found if c.p is not None] == [*["no difference is shown"] * 7, "worse"]
    assert found[0].comparisons == 8 and found[0].p_holm == pytest.approx(7 * 0.01242, abs=1e-4)
    assert "p = 0.087 among 8 comparisons (Holm): no difference is shown" in found[0].line()
    assert found[1] == unknown and "p =" not in unknown.line()
    assert change(0.1, 0.0).verdict == "better" and change(0.0, 0.0).verdict == "no difference is shown"
