"""Trackers: TensorBoard, wandb, trackio and MLflow, each an extra, each only when asked for.

What they are told is what ``metrics.jsonl`` holds, as ``train/NAME`` and ``eval/NAME``, and the options of the run.
The id that a tracker gives the run is kept in ``run.json``: a resumed run continues its curves.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from prefopt.config.methods import method_of
from prefopt.config.training import RunOptions
from prefopt.errors import ConfigError
from prefopt.model.environment import hardware
from prefopt.runs.callbacks import Callback, CallbackFailed, Metrics, RunInfo
from prefopt.runs.folder import RunFolder
from prefopt.runs.history import read_metrics

log = logging.getLogger(__name__)

Values = Mapping[str, float]
MLFLOW_STATUS = {"trained": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracked:
    """The run as a tracker is told of it. ``id`` is the one it gave when the run was first started, if it did."""

    project: str
    name: str
    output: Path
    options: Mapping[str, Any]
    step: int
    id: str | None = None


class Tracker(Protocol):
    """One tool that draws curves. ``forgets``: it drops by itself what was told after the step that a resumed run goes
    on from; to others no step is told twice."""

    forgets: bool

    def start(self, run: Tracked) -> str:
        """Begin or continue the run; returns its id."""

    def log(self, values: Values, step: int) -> None:
        """Numbers of one step, finite all of them."""

    def finish(self, status: str) -> None:
        """The end: ``trained``, ``interrupted`` or ``failed``."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the output folder, which is the id; ``tensorboard --logdir`` reads
    them. What a killed run told after its last checkpoint is purged when it is resumed."""

    forgets = True

    def start(self, run: Tracked) -> str:
        """See :class:`Tracker`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.output / "tensorboard"), purge_step=run.step + 1 if run.id else None)
        if run.id is None:
            rows = [f"| {name} | {value} |" for name, value in run.options.items()]
            self._writer.add_text("options", "\n".join(["| option | value |", "| --- | --- |", *rows]))
        return "tensorboard"

    def log(self, values: Values, step: int) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill loses nothing that a checkpoint will not bring again

    def finish(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases: its server gets numbers and options, and what wandb itself reports of the machine; no code, no
    output of the terminal."""

    forgets = False

    def start(self, run: Tracked) -> str:
        """See :class:`Tracker`."""
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id or secrets.token_hex(4),
            resume="allow",
            dir=str(run.output),
            config=dict(run.options),
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
            reinit="create_new",
        )
        return str(self._run.id)

    def log(self, values: Values, step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=0 if status == "trained" else 1)


class Trackio:
    """Trackio: a local database, which ``trackio show`` draws; a Space only where its own variables name one."""

    forgets = False

    def start(self, run: Tracked) -> str:
        """See :class:`Tracker`. The id is the name, which must be the run's alone."""
        import trackio

        name = run.id or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=dict(run.options),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def log(self, values: Values, step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._run.finish()


class MLflow:
    """MLflow: the server that ``MLFLOW_TRACKING_URI`` names, else MLflow's own place on this machine."""

    forgets = False

    def start(self, run: Tracked) -> str:
        """See :class:`Tracker`. A client of our own: the caller's active run stays as it is."""
        import mlflow

        self._client = client = mlflow.MlflowClient()
        if run.id is None:
            found = client.get_experiment_by_name(run.project)
            experiment = found.experiment_id if found else client.create_experiment(run.project)
            self._id = str(client.create_run(experiment, run_name=run.name).info.run_id)
            for name, value in run.options.items():
                client.log_param(self._id, name, value)
        else:
            self._id = run.id
            client.update_run(self._id, status="RUNNING")
        return self._id

    def log(self, values: Values, step: int) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self, status: str) -> None:
        """See :class:`Tracker`."""
        self._client.set_terminated(self._id, status=MLFLOW_STATUS[status])


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Tracking(Callback):
    """The trackers of a run. One that cannot begin stops the run before its first step; one that fails later is left
    out of the rest, with a warning: what it missed is in ``metrics.jsonl``.

    Make it before the lines of ``metrics.jsonl`` are dropped that a resumed run writes again. ``ids`` holds what
    :meth:`on_start` of an earlier process gave to ``remember``.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        project: str,
        output: Path,
        ids: Mapping[str, str],
        remember: Callable[[dict[str, str]], None],
    ) -> None:
        """Raises :class:`ConfigError` where a package is not installed."""
        for name in names:
            if find_spec(name) is None:
                raise ConfigError(f'--track {name}: it is not installed; run pip install "prefopt[{name}]"')
        self._names, self._project, self._ids, self._remember = names, project, dict(ids), remember
        self._running: dict[str, Tracker] = {}
        told = max((line["step"] for line in read_metrics(output)), default=0)
        self._told = {name: told for name in names if name in ids}

    def on_start(self, run: RunInfo) -> None:
        """Begin, or go on under the ids of before."""
        for name in self._names:
            tracker = TRACKERS[name]()
            about = Tracked(
                project=self._project,
                name=run.output.resolve().name,
                output=run.output,
                options=run.options,
                step=run.step,
                id=self._ids.get(name),
            )
            try:
                self._ids[name] = tracker.start(about)
            except Exception as error:
                raise CallbackFailed(
                    f"--track {name} cannot begin ({_words(error)}); mend that, or leave it out"
                ) from error
            self._running[name] = tracker
        self._remember(self._ids)

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """``train/...``."""
        self._log("train", metrics, step)

    def on_evaluation(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        """``eval/...``."""
        self._log("eval", metrics, step)

    def on_end(self, run: RunInfo, status: str) -> None:
        """Close them."""
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.finish(status))

    def _log(self, prefix: str, metrics: Metrics, step: int) -> None:
        values = {f"{prefix}/{name}": float(value) for name, value in metrics.items() if value is not None}
        for name, tracker in list(self._running.items()):
            if tracker.forgets or step > self._told.get(name, 0):
                self._try(name, lambda tracker: tracker.log(values, step))

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._running[name])
        except Exception as error:
            del self._running[name]
            log.warning("--track %s failed and is left out from here on (%s)", name, _words(error))


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Recorder(Callback):
    """Keeps in ``run.json`` when and on what training started, how many steps it has, and how it ended."""

    def __init__(self, folder: RunFolder, method: str | None) -> None:
        self._folder, self._method = folder, method

    def on_start(self, run: RunInfo) -> None:
        """``started`` is when the first process began to train, ``steps`` how many there are to do; ``environment``
        is what the last process ran on, ``method`` the command."""
        started = self._folder.record.get("started") or time.strftime(TIME)
        self._folder.remember(started=started, steps=run.steps, environment=hardware(), method=self._method)

    def on_end(self, run: RunInfo, status: str) -> None:
        """``trained``, ``interrupted`` or ``failed``, until the model is saved."""
        self._folder.remember(status=status)


def watchers(config: RunOptions, folder: RunFolder) -> list[Callback]:
    """The callbacks of every run, before those that are given in Python.

    Make them before the run is resumed. Raises :class:`prefopt.errors.ConfigError` where a tracker is not installed.
    """
    many: list[Callback] = [Recorder(folder, method_of(config))]
    if config.track:
        tracking = Tracking(
            list(dict.fromkeys(config.track)),
            project=config.track_project,
            output=folder.path,
            ids=folder.record.get("tracking", {}),
            remember=lambda ids: folder.remember(tracking=ids),
        )
        many.append(tracking)
    return many


TIME = "%Y-%m-%dT%H:%M:%S%z"
