"""Callbacks, called after steps, evaluations and checkpoints; trackers are callbacks too.

>>> class Patience(Callback):
...     def on_evaluation(self, run, step, metrics):
...         if metrics["rewards/accuracies"] > 0.9:
...             run.stop()
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.config.methods import method_of
from prefopt.config.training import RunOptions
from prefopt.core.plugins import how_to_install
from prefopt.errors import ConfigError, Interrupted, RunError
from prefopt.parallel.world import ALONE, World
from prefopt.runs.folder import RunFolder
from prefopt.runs.history import read_metrics

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class RunInfo:
    """The run as callbacks see it: ``step`` of ``steps`` are done, ``options`` are those of ``run.json``."""

    output: Path
    options: Mapping[str, Any]
    model: Any
    steps: int
    step: int
    stopping: bool = False
    keep: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        """The name of the output folder."""
        return self.output.resolve().name

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one, and wait for it; ``keep_last`` removes older ones. Of
        several processes any may ask for it; it is written when the hooks of all have returned."""
        if self.keep is not None:
            self.keep()

    def stop(self) -> None:
        """End training after this step; the model is saved. Of several processes any may say so."""
        self.stopping = True


class Callback:
    """Subclass it and override what you need. Hooks are called when a step is complete, ``on_step`` first, then that of
    its evaluation. Hooks that draw from torch's random generator change the run.
    """

    def on_start(self, run: RunInfo) -> None:
        """Before the first step of this process; ``run.step`` is above zero in a resumed run."""

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """After every step, with the metrics of its batch, computed before the update."""

    def on_evaluation(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """After an evaluation on held-out rows; metric names as in training."""

    def on_checkpoint(self, run: RunInfo, step: int, path: Path) -> None:
        """When the checkpoint of ``step`` is there, in the folder ``path``. It was written while training went on, so
        that ``run.step`` may be larger; the next one is not begun before the hook has returned."""

    def on_end(self, run: RunInfo, status: str) -> None:
        """Once after ``on_start``, before the model is saved; ``status`` is ``trained``, ``interrupted`` or
        ``failed``."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
OF_STEPS = ("on_step", "on_evaluation", "on_checkpoint")


def _has_steps(one: object) -> bool:
    """Whether an object does anything in the hooks of steps."""
    methods = [(getattr(one, name, None), getattr(Callback, name)) for name in OF_STEPS]
    return any(m is not None and getattr(m, "__func__", None) is not empty for m, empty in methods)


class CallbackFailed(RunError):
    """A callback raised; the run keeps what was computed, and stops."""


@dataclass(slots=True)
class Callbacks:
    """Calls the hooks of several objects in turn. Raises :class:`ConfigError` for an object without any hook.

    Of several ranks each has objects of its own: where one of them stops, saves or fails in a hook, all ranks do, when
    the hooks of the step have been called.
    """

    many: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    world: World = ALONE
    run: RunInfo | None = None
    _keep: Callable[[], object] = lambda: None
    _asks: bool = False
    _of_steps: bool = True
    _failed: bool = False

    def __post_init__(self) -> None:
        for one in self.many:
            if isinstance(one, type):
                raise ConfigError(f"callbacks: {one.__name__} is a class; give an object, {one.__name__}()")
            if not any(callable(getattr(one, hook, None)) for hook in HOOKS):
                raise ConfigError(f"callbacks: {one!r} has none of {', '.join(HOOKS)}; subclass prefopt.Callback")

    @contextmanager
    def around(self, run: RunInfo, keep: Callable[[], object]) -> Iterator[RunInfo]:
        """``on_start`` and ``on_end`` around the training loop. If a callback fails, ``keep`` is called."""
        self.run, self._keep = run, keep
        run.keep = keep if self.world.alone else self._ask
        self._of_steps = self.world.alone or any(self.world.gather(any(map(_has_steps, self.many))))
        status = "failed"
        try:
            self._together(lambda: self._call("on_start"))
            yield run
            status = "trained"
        except Interrupted:
            status = "interrupted"
            raise
        except CallbackFailed:
            keep()
            raise
        finally:
            try:
                self._call("on_end", status)
            except CallbackFailed as error:
                if status == "trained":
                    raise
                log.warning("%s", error)  # the first error is the one to raise

    def done(
        self,
        step: int,
        record: Metrics | None = None,
        evaluation: Metrics | None = None,
    ) -> None:
        """Call the hooks of a complete step."""
        assert self.run is not None
        self.run.step = step

        def call() -> None:
            for hook, value in (("on_step", record), ("on_evaluation", evaluation)):
                if value is not None:
                    self._call(hook, step, value)

        if self._of_steps:
            self._together(call)

    def saved(self, step: int, path: Path) -> None:
        """Call the hooks of a checkpoint that is there. Not after a hook has failed, which ends the run."""
        if self._of_steps and not self._failed:
            self._together(lambda: self._call("on_checkpoint", step, path))

    def _ask(self) -> None:
        self._asks = True

    def _together(self, call: Callable[[], None]) -> None:
        """Call hooks. What those of one rank ask for is done on all, and the first error is raised on all."""
        assert self.run is not None
        failed: CallbackFailed | None = None
        try:
            call()
        except CallbackFailed as error:
            if self.world.alone:
                self._failed = True
                raise
            failed = error
        if self.world.alone:
            return
        every = self.world.gather((self.run.stopping, self._asks, failed))
        stops, asks, errors = zip(*every, strict=True)
        self.run.stopping, self._asks = any(stops), False
        if any(asks):
            self._keep()
        if any(errors):
            self._failed = True
            raise failed or next(error for error in errors if error is not None)

    def _call(self, hook: str, *arguments: object) -> None:
        assert self.run is not None
        failed: CallbackFailed | None = None
        for one in self.many:
            method = getattr(one, hook, None)
            if method is None or (failed is not None and hook != "on_end"):
                continue
            try:
                method(self.run, *arguments)
            except Exception as error:
                if failed is None and isinstance(error, CallbackFailed):
                    failed = error
                elif failed is None:
                    failed = CallbackFailed(
                        f"callback {type(one).__name__} failed in {hook} at step {self.run.step} ({_one_line(error)});"
                        " fix it and continue with --resume: what was computed is kept"
                    )
                    failed.__cause__ = error
        if failed is not None:
            raise failed


@dataclass(slots=True)
class Recorder(Callback):
    """Writes to ``run.json`` when and on what machine training started, its number of steps, and how it ended."""

    folder: RunFolder
    method: str | None

    def on_start(self, run: RunInfo) -> None:
        from prefopt.model.environment import hardware

        started = self.folder.record.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.folder.remember(started=started, steps=run.steps, environment=hardware(), method=self.method)

    def on_end(self, run: RunInfo, status: str) -> None:
        self.folder.remember(status=status)


def default_callbacks(config: RunOptions, folder: RunFolder) -> list[Callback]:
    """The callbacks of every run, called before those given in Python. Create them before the run is resumed. Raises
    :class:`prefopt.errors.ConfigError` if a tracker is not installed."""
    found: list[Callback] = [Recorder(folder, method_of(config))]
    return [*found, Tracking(config.track, config.track_project, folder)] if config.track else found


# -- trackers --------------------------------------------------------------------------------------------------------


class Tracker(NamedTuple):
    """A tracker in use. ``log`` takes finite numbers and a step, ``finish`` the status of :meth:`Callback.on_end`.

    ``purges``: it drops steps after a resumed run's checkpoint by itself; others are sent no step twice. ``id`` is what
    a later process continues with.
    """

    id: str
    log: Callable[[Mapping[str, float], int], object]
    finish: Callable[[str], object]
    purges: bool = False


def _tensorboard(run: RunInfo, project: str, id: str | None) -> Tracker:
    """Event files in ``tensorboard`` of the output folder."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run.output / "tensorboard"), purge_step=run.step + 1 if id else None)
    if id is None:
        rows = [f"| {name} | {value} |" for name, value in run.options.items()]
        writer.add_text("options", "\n".join(["| option | value |", "| --- | --- |", *rows]))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker("tensorboard", log, lambda status: writer.close(), purges=True)


def _wandb(run: RunInfo, project: str, id: str | None) -> Tracker:
    """Its server gets numbers, options, and what wandb itself reports of the machine; no code, no terminal output."""
    import wandb

    found = wandb.init(
        project=project,
        name=run.name,
        id=id or secrets.token_hex(4),
        resume="allow",
        dir=str(run.output),
        config=dict(run.options),
        settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        reinit="create_new",
    )
    finish: Callable[[str], object] = lambda status: found.finish(exit_code=int(status != "trained"))  # noqa: E731
    return Tracker(str(found.id), lambda values, step: found.log(dict(values), step=step), finish)


def _trackio(run: RunInfo, project: str, id: str | None) -> Tracker:
    """A local database. The id is the name, which must be unique."""
    import trackio

    name, quiet = id or f"{run.name}-{secrets.token_hex(3)}", {"auto_log_gpu": False, "auto_log_cpu": False}
    options = dict(run.options)
    found = trackio.init(project=project, name=name, config=options, resume="allow", embed=False, **quiet)
    return Tracker(name, lambda values, step: found.log(dict(values), step=step), lambda status: found.finish())


def _mlflow(run: RunInfo, project: str, id: str | None) -> Tracker:
    """The server of ``MLFLOW_TRACKING_URI``, by a client of its own: the caller's active run stays as it is."""
    import mlflow

    client = mlflow.MlflowClient()
    if id is not None:
        client.update_run(id, status="RUNNING")
    else:
        found = client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else client.create_experiment(project)
        id = str(client.create_run(experiment, run_name=run.name).info.run_id)
        for name, value in run.options.items():
            client.log_param(id, name, value)

    def log(values: Metrics, step: int) -> None:
        for name, value in values.items():
            client.log_metric(id, name, value, step=step)

    ends = {"trained": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    return Tracker(id, log, lambda status: client.set_terminated(id, status=ends[status]))


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


class Tracking(Callback):
    """Sends the metrics of a run to trackers, as ``train/NAME`` and ``eval/NAME``. A tracker that fails to start stops
    the run; one that fails later is dropped with a warning.

    Create it before the metrics after a resumed run's checkpoint are dropped.
    """

    def __init__(self, names: Iterable[str], project: str, folder: RunFolder) -> None:
        """Raises :class:`ConfigError` where a package is not installed."""
        self._names, self._project, self._folder = list(dict.fromkeys(names)), project, folder
        for name in self._names:
            if find_spec(name) is None:
                raise ConfigError(f"--track {name}: it is not installed; run {how_to_install(name)}")
        self._ids: dict[str, str] = dict(folder.record.get("tracking", {}))
        self._running: dict[str, Tracker] = {}
        last = max((line["step"] for line in read_metrics(folder.path)), default=0)
        self._sent = dict.fromkeys(self._ids, last)

    def on_start(self, run: RunInfo) -> None:
        for name in self._names:
            try:
                self._running[name] = TRACKERS[name](run, self._project, self._ids.get(name))
            except Exception as error:
                message = f"--track {name} failed to start ({_one_line(error)}); fix it or remove it from --track"
                raise CallbackFailed(message) from error
            self._ids[name] = self._running[name].id
        self._folder.remember(tracking=self._ids)

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        self._log("train", metrics, step)

    def on_evaluation(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        self._log("eval", metrics, step)

    def on_end(self, run: RunInfo, status: str) -> None:
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.finish(status))

    def _log(self, prefix: str, metrics: Metrics, step: int) -> None:
        values = {f"{prefix}/{name}": float(value) for name, value in metrics.items() if value is not None}
        for name, tracker in list(self._running.items()):
            if tracker.purges or step > self._sent.get(name, 0):
                self._try(name, lambda tracker: tracker.log(values, step))

    def _try(self, name: str, act: Callable[[Tracker], object]) -> None:
        try:
            act(self._running[name])
        except Exception as error:
            del self._running[name]
            log.warning("--track %s failed and is dropped (%s)", name, _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
