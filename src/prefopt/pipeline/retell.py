"""What the folder of a training says of a point anew: whether PPO's reward had stopped rising, and how long it took.

Both are read from ``metrics.jsonl`` and ``run.json`` every time a sweep is told, so that points that an earlier version
measured, or that were measured under another share, are judged alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from prefopt.evaluate.frontier import Point
from prefopt.evaluate.plateau import FEWEST, plateau
from prefopt.train.history import History, read_history


def retold(point: Point, folder: Path, *, share: float, before: Sequence[Path] = ()) -> Point:
    """``point`` of the training in ``folder``; ``before`` are those of trainings that it needed, and that took time.

    ``share`` is that of :func:`prefopt.evaluate.plateau.plateau`. Raises :class:`prefopt.errors.RunError` for a damaged
    folder.
    """
    if not (folder / "run.json").exists():
        return replace(point, seconds=None)
    history = read_history(folder)
    times = [_seconds(history), *(_seconds(read_history(path)) for path in before)]
    known = [t for t in times if t is not None]
    after = sum(float(line.get("step_seconds", 0.0)) for line in history.training if line["step"] > point.step > 0)
    point = replace(point, seconds=sum(known) - after if len(known) == len(times) else None)
    return _judged(point, history, share) if point.road.startswith("ppo") and point.reward is not None else point


def _seconds(history: History) -> float | None:
    """What a run took, all its starts together; none where its folder does not say.

    Earlier versions forgot what was spent before a kill, and older ones wrote no costs: then the steps' own times say
    more.
    """
    told = [float(line["step_seconds"]) for line in history.training if "step_seconds" in line]
    costs: dict[str, Any] = history.record.get("costs", {})
    return max(
        [*([float(costs["seconds"])] if "seconds" in costs else []), *([sum(told)] if told else [])], default=None
    )


def _judged(point: Point, history: History, share: float) -> Point:
    """It counts where the training reward had stopped rising."""
    lines = history.training
    rewards = [float(line["objective/scores"]) for line in lines]
    seen = [0, *(int(line["episode"]) for line in lines)]
    flat = plateau(rewards, [b - a for a, b in pairwise(seen)], share=share)
    if flat is not None:
        return replace(point, plateau=flat, counted=flat.reached, why_not=flat.why_not)
    steps = len(rewards)
    why = f"{steps} steps are too few to see a plateau: its last third has fewer than {FEWEST}"
    if not all(map(math.isfinite, rewards)):
        why = "its training reward is not finite in every step: no plateau can be seen"
    elif steps < point.step:
        why = f"metrics.jsonl in its folder tells of {steps} of its {point.step} steps: no plateau can be seen"
    return replace(point, plateau=None, counted=False, why_not=why)
