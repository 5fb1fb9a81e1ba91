"""Alignment tax: metrics of two models on lm-eval tasks with standard errors, run here or read from its results."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from prefopt.core.files import parsed
from prefopt.core.plugins import how_to_install
from prefopt.core.statistics import holm, p_text
from prefopt.errors import ConfigError, DataError, RunError, first_line
from prefopt.evaluate.win_rate import LEVEL
from prefopt.model.supported import safe_attention


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task with its standard error. ``of_question``: its value by question, where known."""

    task: str
    metric: str
    value: float
    error: float | None
    questions: int | None
    higher_is_better: bool | None
    of_question: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskChange:
    """A metric of two models. ``difference``: first minus second; ``error``: its standard error, ``paired`` by question
    where values by question are known, else as of independent runs. ``p_holm``: the p-value corrected for
    ``comparisons`` made together, see :func:`corrected_changes`."""

    task: str
    metric: str
    first: float
    second: float
    difference: float
    error: float | None
    paired: bool
    questions: int | None
    higher_is_better: bool | None
    p_holm: float | None = None
    comparisons: int = 1

    @property
    def p(self) -> float | None:
        """Two-sided p-value of the difference by the normal distribution; None without a standard error."""
        if self.error is None:
            return None
        return float(2 * ndtr(-abs(self.difference) / self.error)) if self.error else float(not self.difference)

    @property
    def verdict(self) -> str:
        """Whether the first model is better or worse at 5 %."""
        p = self.p if self.p_holm is None else self.p_holm
        if p is None:
            return "without a standard error: nothing is shown"
        if self.higher_is_better is None:
            return "which way is better is open"
        if p > LEVEL:
            return "no difference is shown"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"

    def line(self) -> str:
        """The line of a report."""
        error = "" if self.error is None else f" ± {self.error:.3f}"
        count = "" if self.questions is None else f", {self.questions:,} questions"
        values = f"{self.first:.3f} against {self.second:.3f}, {self.difference:+.3f}{error}{count}"
        return f"{self.task} {self.metric}: {values}{self.test_words()}: {self.verdict}"

    def test_words(self) -> str:
        """The p-value that the verdict is based on; nothing without a standard error."""
        p = self.p if self.p_holm is None else self.p_holm
        among = f" among {self.comparisons} comparisons (Holm)" if self.comparisons > 1 else ""
        return "" if p is None else f", {p_text(p)}{among}"


class Harness:
    """lm-eval with ``tasks``; ``task_folder`` holds your own tasks, ``limit`` bounds the questions of each."""

    def __init__(self, tasks: Sequence[str], *, task_folder: str | None = None, limit: int | None = None) -> None:
        """Raises :class:`ConfigError` where lm-eval is not installed or knows no such task."""
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            install = how_to_install("lm-eval")
            raise ConfigError(f"--tasks needs lm-eval, which is not installed ({error}): {install}") from None
        self._evaluate, self._manager = lm_eval.simple_evaluate, TaskManager(include_path=task_folder)
        self._tasks, self._limit = list(tasks), limit
        known = [*self._manager.all_tasks]
        if unknown := [name for name in tasks if name not in known]:
            raise ConfigError(f"--tasks: lm-eval has no task {', '.join(unknown)}; lm_eval ls tasks lists what it has")

    def scores(self, name: str, folder: str, adapter: str | None, *, dtype: str, device: str) -> list[TaskScore]:
        """The metrics of the model in ``folder`` with ``adapter``. Raises :class:`RunError` where lm-eval fails."""
        arguments = {"pretrained": folder, "dtype": dtype, **safe_attention(folder)}
        if adapter:
            arguments["peft"] = adapter
        try:
            with redirect_stdout(sys.stderr):  # stdout is for --json
                found = self._evaluate(
                    model="hf",
                    model_args=arguments,
                    tasks=self._tasks,
                    task_manager=self._manager,
                    device=device,
                    limit=self._limit,
                    log_samples=True,
                )
        except Exception as error:  # tasks and downloads raise anything
            raise RunError(f"lm-eval failed on {name}: {type(error).__name__}: {first_line(error)}") from error
        return task_scores(found, "lm-eval")


def read_task_results(path: str) -> list[TaskScore]:
    """The metrics in a file that lm-eval wrote for one model (``results_*.json``). Raises :class:`DataError`."""
    try:
        found = parsed(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); name a results_*.json of lm-eval", file=path) from None
    except ValueError:
        raise DataError("is not JSON; name a results_*.json of lm-eval", file=path) from None
    return task_scores(found, path)


def task_scores(results: Any, file: str) -> list[TaskScore]:
    """Every metric of every task in the results of lm-eval's ``simple_evaluate``. Raises :class:`DataError`."""
    try:
        scores = [s for task, values in results["results"].items() for s in _of_task(results, task, values)]
    except Exception:  # another program, or another version
        raise DataError("holds no results of tasks as lm-eval writes them", file=file) from None
    if not scores:
        raise DataError("holds no metric of any task", file=file)
    return scores


def _of_task(results: Mapping[str, Any], task: str, values: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    better = (results.get("higher_is_better") or {}).get(task) or {}
    count = ((results.get("n-samples") or {}).get(task) or {}).get("effective")
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        scores.append(
            TaskScore(
                task,
                metric if kind == "none" else key,
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                int(count) if isinstance(count, int) else None,
                better.get(metric),
                _of_questions((results.get("samples") or {}).get(task) or [], metric, kind),
            )
        )
    return scores


def _of_questions(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for sample in samples:
        if sample.get("filter", kind) == kind:
            with suppress(TypeError, ValueError, KeyError):
                found[int(sample["doc_id"])] = float(sample[metric])
    return found


def changes(first: Sequence[TaskScore], second: Sequence[TaskScore]) -> list[TaskChange]:
    """The change of each metric that both have."""
    others = {(s.task, s.metric): s for s in second}
    return [_change(a, b) for a in first if (b := others.get((a.task, a.metric))) is not None]


def corrected_changes(found: Sequence[TaskChange]) -> list[TaskChange]:
    """Changes tested together, with Holm's p-values; those without a standard error are not tested."""
    tested = [p for change in found if (p := change.p) is not None]
    p_values = iter(holm(tested))
    return [c if c.p is None else replace(c, p_holm=next(p_values), comparisons=len(tested)) for c in found]


def _change(a: TaskScore, b: TaskScore) -> TaskChange:
    error = paired = _paired(a, b)
    if error is None and a.error is not None and b.error is not None:
        error = float(np.hypot(a.error, b.error))
    questions = a.questions if a.questions == b.questions else None
    values = (a.value, b.value, a.value - b.value)
    return TaskChange(a.task, a.metric, *values, error, paired is not None, questions, a.higher_is_better)


def _paired(a: TaskScore, b: TaskScore) -> float | None:
    """The standard error of the mean difference; None where the metric is no mean over the same questions."""
    if len(a.of_question) < 2 or a.of_question.keys() != b.of_question.keys():
        return None
    one, two = (np.array([s.of_question[k] for k in sorted(s.of_question)]) for s in (a, b))
    if not (np.isclose(one.mean(), a.value) and np.isclose(two.mean(), b.value)):
        return None
    return float((one - two).std(ddof=1) / len(one) ** 0.5)
