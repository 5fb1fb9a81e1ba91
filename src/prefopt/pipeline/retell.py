"""What the folder of a training says of a point anew: whether PPO's reward had stopped rising, and how long it took.

Both are read from samples, ``metrics.jsonl`` and ``run.json`` every time a sweep is told, so that points that were
judged by another share or an earlier version are judged alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.frontier import FEWEST_STEPS
from prefopt.disk.read import parsed
from prefopt.errors import RunError
from prefopt.evaluate.frontier import Point
from prefopt.evaluate.plateau import plateau
from prefopt.train.history import History, read_history

SAMPLES = "samples"
"""Names of the files: ``samples.jsonl`` of the end, ``samples-84.jsonl`` of a step."""


def retold(point: Point, folder: Path, *, start: float, share: float, before: Sequence[Path] = ()) -> Point:
    """``point`` of the training in ``folder``; ``before`` are those of trainings that it needed, and that took time.

    ``start`` (the reward of the reference) and ``share`` are those of :func:`prefopt.evaluate.plateau.plateau`. Raises
    :class:`prefopt.errors.RunError` for a damaged folder.
    """
    point = replace(point, seconds=_took(point, folder, before))
    return _judged(point, folder, start, share) if point.road.startswith("ppo") and point.reward is not None else point


def _took(point: Point, folder: Path, before: Sequence[Path]) -> float | None:
    """Seconds up to the point's step; none where a folder does not say."""
    if not all((path / "run.json").exists() for path in (folder, *before)):
        return None
    history = read_history(folder)
    times = [_seconds(history), *(_seconds(read_history(path)) for path in before)]
    known = [t for t in times if t is not None]
    after = sum(line.get("step_seconds") or 0.0 for line in history.training if line["step"] > point.step > 0)
    return sum(known) - after if len(known) == len(times) else None


def _seconds(history: History) -> float | None:
    """What a run took, all its starts together; none where its folder does not say.

    Earlier versions forgot what was spent before a kill, and older ones wrote no costs: then the steps' own times say
    more.
    """
    told = history.curve("step_seconds").values
    costs: dict[str, Any] = history.record.get("costs", {})
    return max(
        [*([float(costs["seconds"])] if "seconds" in costs else []), *([sum(told)] if told else [])], default=None
    )


def _judged(point: Point, folder: Path, start: float, share: float) -> Point:
    """It counts where the true reward had stopped rising since the policy of an earlier step was measured."""
    steps = sorted(int(p.stem.removeprefix(f"{SAMPLES}-")) for p in folder.glob(f"{SAMPLES}-*.jsonl"))
    if not steps:
        why = f"{point.step} steps are too few to see a plateau"
        if point.step >= FEWEST_STEPS:
            why = f"an earlier version measured its end alone: no plateau can be seen; remove {folder} to redo it"
        return replace(point, plateau=None, counted=False, why_not=why)
    before, after = (_rewards(folder / name) for name in (f"{SAMPLES}-{steps[-1]}.jsonl", f"{SAMPLES}.jsonl"))
    if len(before) != len(after):
        raise RunError(f"{folder}: its samples answer other prompts at step {steps[-1]} than at the end; remove it")
    flat = plateau(before, after, start=start, steps=point.step - steps[-1], share=share)
    return replace(point, plateau=flat, counted=flat.reached, why_not=flat.why_not)


def _rewards(file: Path) -> list[float]:
    """The mean true reward of every prompt."""
    try:
        with file.open("rb") as lines:  # texts may hold characters at which splitlines() would part them
            return [float(np.mean(parsed(line)["scores"])) for line in lines]
    except Exception as error:  # a row of another make fails in any way
        raise RunError(f"{file} cannot be read ({error}); remove its folder to measure again") from None
