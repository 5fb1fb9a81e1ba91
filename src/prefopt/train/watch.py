"""Who watches every run: its own record, and the trackers that were asked for."""

from __future__ import annotations

import time

from prefopt.config.methods import method_of
from prefopt.config.training import RunOptions
from prefopt.model.environment import hardware
from prefopt.train.callbacks import Callback, RunInfo
from prefopt.train.folder import RunFolder
from prefopt.train.trackers import Tracking


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
