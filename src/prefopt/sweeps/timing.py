"""How many steps of each method take equally many processor seconds, to compare methods at equal cost.

>>> steps_within(60.0, per_step=0.5, before=10.0)
100
"""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from prefopt.config.methods import MethodConfig
from prefopt.core.files import read_json, write_json
from prefopt.core.terminal import duration
from prefopt.errors import ConfigError
from prefopt.runs.callbacks import Callback, Metrics, RunInfo
from prefopt.sweeps.train import train_once

TIMED = 8
"""Steps that are made to time a method; the first is slower, and left out."""
FILE = "timing.json"


@dataclass
class _Stopwatch(Callback):
    """Processor time of this process at the end of each step."""

    marks: list[float] = field(default_factory=list)

    def on_step(self, run: RunInfo, step: int, metrics: Metrics) -> None:
        self.marks.append(time.process_time())


def seconds_per_step(config: MethodConfig, folder: Path) -> float:
    """Processor seconds of a step of ``config``, the median over a few, made in ``folder``, which is removed."""
    options = {"output": str(folder), "max_steps": TIMED, "save_every": TIMED, "resume": False}
    watch = _Stopwatch()
    shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was stopped here
    train_once(config.from_dict(config.to_dict() | options), [watch])
    shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(after - before for before, after in pairwise(watch.marks))


def timed(configs: Mapping[str, MethodConfig], folder: Path) -> dict[str, float]:
    """:func:`seconds_per_step` of each setting of a method, by name. Kept in ``folder``: a sweep that is continued
    makes as many steps as before, on any machine."""
    file = folder / FILE
    known: dict[str, float] = {}
    if file.exists():
        known = read_json(file, lambda found: {name: float(x) for name, x in found.items()}, f"remove {file}")
    for name, config in configs.items():
        if name not in known:
            known[name] = seconds_per_step(config, folder / "timing" / re.sub(r"[^\w.=+-]", "_", name))
            write_json(file, known)
    shutil.rmtree(folder / "timing", ignore_errors=True)
    return {name: known[name] for name in configs}


def steps_within(seconds: float, *, per_step: float, before: float = 0.0) -> int:
    """The number of steps that fit ``seconds``, of which ``before`` are spent already. Raises :class:`ConfigError`."""
    steps = round((seconds - before) / per_step)
    if steps < 1:
        spent = f", after {duration(before)} for its reward model" if before else ""
        raise ConfigError(f"--seconds {seconds:g} is too little: a step takes {per_step:.3g} s{spent}; give more")
    return steps
