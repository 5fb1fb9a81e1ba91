"""Accuracy on tasks before and after: what alignment cost elsewhere (the alignment tax), with standard errors.

Tasks are lm-eval's, run where it is installed, or read from the results that it wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.files import parsed
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.rates import Z95
from prefopt.model.supported import safe_attention

INSTALL = 'pip install "prefopt[lm-eval]"'


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task: ``error`` is its standard error. ``of_question``: its value by question, where known."""

    task: str
    metric: str
    value: float
    error: float | None
    questions: int | None
    higher_is_better: bool | None
    of_question: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskChange:
    """A metric of two models. ``difference``: first less second; ``error``: its standard error, from the differences
    question by question where these are known (``paired``), else as of independent runs, which is the larger one."""

    task: str
    metric: str
    first: float
    second: float
    difference: float
    error: float | None
    paired: bool
    questions: int | None
    higher_is_better: bool | None

    @property
    def verdict(self) -> str:
        """Whether the first model is better, worse, or not shown to be either, at 5 %."""
        if self.error is None or self.higher_is_better is None:
            return "without a standard error: nothing is shown" if self.error is None else "which way is better is open"
        if abs(self.difference) <= Z95 * self.error:
            return "no difference is shown"
        return "better" if (self.difference > 0) == self.higher_is_better else "worse"


class Harness:
    """lm-eval with some of its tasks. ``task_folder`` holds tasks of one's own, ``limit`` bounds questions of each."""

    def __init__(self, tasks: Sequence[str], *, task_folder: str | None = None, limit: int | None = None) -> None:
        """Raises :class:`ConfigError` where lm-eval is not installed or knows no such task."""
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(f"--tasks needs lm-eval, which is not installed ({error}): {INSTALL}") from None
        self._evaluate, self._manager = lm_eval.simple_evaluate, TaskManager(include_path=task_folder)
        self._tasks, self._limit = list(tasks), limit
        known = [*self._manager.all_tasks]
        if unknown := [name for name in tasks if name not in known]:
            raise ConfigError(f"--tasks: lm-eval has no task {', '.join(unknown)}; lm_eval ls tasks lists what it has")

    def scores(self, name: str, folder: str, adapter: str | None, *, dtype: str, device: str) -> list[TaskScore]:
        """What the model in ``folder`` reaches, ``adapter`` on it. Raises :class:`RunError` where lm-eval fails."""
        try:
            with redirect_stdout(sys.stderr):  # what it prints is no part of --json
                found = self._evaluate(
                    model="hf",
                    model_args={"pretrained": folder, "dtype": dtype, **safe_attention(folder)}
                    | ({"peft": adapter} if adapter else {}),
                    tasks=self._tasks,
                    task_manager=self._manager,
                    device=device,
                    limit=self._limit,
                    log_samples=True,
                )
        except Exception as error:  # whatever a task or a download does wrong
            first = next(iter(str(error).splitlines()), "")
            raise RunError(f"lm-eval failed on {name}: {type(error).__name__}: {first}") from error
        return _scores(found, "lm-eval")


def read_task_results(path: str) -> list[TaskScore]:
    """What lm-eval wrote of one model (``results_*.json``). Raises :class:`DataError`."""
    try:
        found = parsed(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); name a results_*.json of lm-eval", file=path) from None
    except ValueError:
        raise DataError("is no JSON; name a results_*.json of lm-eval", file=path) from None
    return _scores(found, path)


def _scores(results: Any, file: str) -> list[TaskScore]:
    """Every metric of every task, from what ``simple_evaluate`` gives and lm-eval writes."""
    try:
        parts = [_of_task(results, task, values) for task, values in results["results"].items()]
        scores = list(chain.from_iterable(parts))
    except Exception:  # written by another program, of whatever version
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
                _questions((results.get("samples") or {}).get(task) or [], metric, kind),
            )
        )
    return scores


def _questions(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for sample in samples:
        if sample.get("filter", kind) == kind:
            with suppress(TypeError, ValueError, KeyError):
                found[int(sample["doc_id"])] = float(sample[metric])
    return found


def changes(first: Sequence[TaskScore], second: Sequence[TaskScore]) -> list[TaskChange]:
    """Each metric that both have."""
    others = {(s.task, s.metric): s for s in second}
    return [_change(a, b) for a in first if (b := others.get((a.task, a.metric))) is not None]


def _change(a: TaskScore, b: TaskScore) -> TaskChange:
    difference, paired = a.value - b.value, _paired(a, b)
    error = paired
    if error is None and a.error is not None and b.error is not None:
        error = float(np.hypot(a.error, b.error))
    return TaskChange(
        a.task,
        a.metric,
        a.value,
        b.value,
        difference,
        error,
        paired is not None,
        a.questions if a.questions == b.questions else None,
        a.higher_is_better,
    )


def _paired(a: TaskScore, b: TaskScore) -> float | None:
    """The standard error of the mean difference; none where the metric is no mean over the same questions."""
    if len(a.of_question) < 2 or a.of_question.keys() != b.of_question.keys():
        return None
    one, two = (np.array([s.of_question[k] for k in sorted(s.of_question)]) for s in (a, b))
    if not (np.isclose(one.mean(), a.value) and np.isclose(two.mean(), b.value)):
        return None
    return float((one - two).std(ddof=1) / len(one) ** 0.5)
