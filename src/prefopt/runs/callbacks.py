"""Callbacks: what else happens when a step, an evaluation or a checkpoint is done.

>>> class Patience(Callback):
...     def on_evaluation(self, run, step, metrics):
...         if metrics["rewards/accuracies"] > 0.9:
...             run.stop()
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError, Interrupted, RunError

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class RunInfo:
    """The run as a callback sees it. ``step`` of ``steps`` are done; ``options`` are those of ``run.json``. ``keep`` is
    what :meth:`save` calls."""

    output: Path
    options: Mapping[str, Any]
    model: Any
    steps: int
    step: int
    stopping: bool = False
    keep: Callable[[], object] | None = None

    def save(self) -> None:
        """Write a checkpoint of the step that is done, where there is none yet; ``keep_last`` removes older ones."""
        if self.keep is not None:
            self.keep()

    def stop(self) -> None:
        """End training after this step, as if it were the last one: the model is saved."""
        self.stopping = True


class Callback:
    """Subclass it and override what you need. Hooks are called when a step is wholly done, with its evaluation and
    checkpoint: first ``on_step``, then the other two where there was one. What they draw from torch's generator
    changes the run, unless they put its state back.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step of this process; ``run.step`` is over zero where a run is resumed."""

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """After every step, with the metrics of its batch, taken before the weights moved."""

    def on_evaluation(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """After an evaluation on held-out pairs: the same names as in training."""

    def on_checkpoint(self, run: RunInfo, step: int, path: Path) -> None:
        """After a checkpoint was written to the folder ``path``."""

    def on_end(self, run: RunInfo, status: str) -> None:
        """Once after ``on_start``, however it ends: ``trained``, ``interrupted`` or ``failed``. The model is saved
        after this."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackFailed(RunError):
    """A callback raised; the loop keeps what was computed, and stops."""


@dataclass(slots=True)
class Callbacks:
    """Calls several in turn; anything that has some of the hooks will do. ``options`` are handed to them.

    Raises :class:`ConfigError` for an object that has none of the hooks.
    """

    many: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    run: RunInfo | None = None

    def __post_init__(self) -> None:
        for one in self.many:
            if isinstance(one, type):
                raise ConfigError(f"callbacks: {one.__name__} is a class; give an object, {one.__name__}()")
            if not any(callable(getattr(one, hook, None)) for hook in HOOKS):
                raise ConfigError(f"callbacks: {one!r} has none of {', '.join(HOOKS)}; subclass prefopt.Callback")

    @contextmanager
    def around(self, run: RunInfo, keep: Callable[[], object]) -> Iterator[RunInfo]:
        """``on_start`` and ``on_end`` around the loop. Where a callback fails, ``keep`` is called before it stops."""
        self.run, run.keep = run, keep
        status = "failed"
        try:
            self._call("on_start")
            yield run
            status = "trained"
        except Interrupted:
            status = "interrupted"
            raise
        except CallbackFailed:
            keep()
            raise
        finally:
            self._end(status)

    def done(
        self,
        step: int,
        record: Metrics | None = None,
        evaluation: Metrics | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        """A step with what belongs to it."""
        assert self.run is not None
        self.run.step = step
        if record is not None:
            self._call("on_step", step, record)
        if evaluation is not None:
            self._call("on_evaluation", step, evaluation)
        if checkpoint is not None:
            self._call("on_checkpoint", step, checkpoint)

    def _end(self, status: str) -> None:
        try:
            self._call("on_end", status)
        except CallbackFailed as error:
            if status == "trained":
                raise
            log.warning("%s", error)  # what stopped the run is told, not what followed from it

    def _call(self, hook: str, *arguments: object) -> None:
        assert self.run is not None
        failed: CallbackFailed | None = None
        for one in self.many:
            method = getattr(one, hook, None)
            if method is None or (failed is not None and hook != "on_end"):
                continue
            try:
                method(self.run, *arguments)
            except CallbackFailed as error:  # it has its own words
                failed = failed or error
            except Exception as error:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                failed = failed or CallbackFailed(
                    f"callback {type(one).__name__} failed in {hook} at step {self.run.step} ({what}); mend it, and go"
                    " on with --resume: what was computed is kept"
                )
                failed.__cause__ = failed.__cause__ or error
        if failed is not None:
            raise failed
