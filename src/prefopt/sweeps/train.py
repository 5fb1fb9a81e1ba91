"""A training of any kind into its folder, once: what sweeps are made of.

``FILE`` holds a command and its options; what became of it is written beside it.

Both are read from samples, ``metrics.jsonl`` and ``run.json`` every time a sweep is told, so that points that were
judged by another share or an earlier version are judged alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.methods import METHODS, MethodConfig, method_of, read_options
from prefopt.config.sweeps import FEWEST_STEPS, SweepOptions
from prefopt.config.tools import is_model_reward
from prefopt.core.files import output_errors, parsed, read_json, write_json
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag
from prefopt.core.terminal import StopRequest
from prefopt.errors import Diverged, Interrupted, RunError, UserError
from prefopt.methods.rlhf import contents_of_name, status_of
from prefopt.rewards import load_reward
from prefopt.runs.history import History, read_history
from prefopt.sweeps.points import Point, plateau


def take_folder(config: SweepOptions, may_grow: Collection[str]) -> None:
    """The output's folder, with the options, the model and the reward that it was begun with; the options of
    ``may_grow`` may differ.

    Raises :class:`RunError` where it was begun with others, or holds something else.
    """
    folder = Path(config.output)
    file = folder / "sweep.json"
    options = {name: value for name, value in config.to_dict().items() if name not in may_grow}
    made_of = {"model": contents_of_name(config.model), "reward": _reward_of(config.reward)}
    now = {"command": type(config).__name__, "options": options, **made_of}
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; name a folder")
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"--output {folder} is not empty and holds no sweep; name another folder")
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
        return
    before = read_json(file, _begun, "name another --output")
    changed = [n for n in options if before["options"].get(n) != options[n]]
    same = {name: before[name] == now[name] for name in ("command", "model", "reward")}
    if not same["command"]:
        raise RunError(f"--output {folder} holds another kind of sweep; name another folder")
    if changed:
        told = ", ".join(f"{flag(n)} was {before['options'].get(n)!r} and is {options[n]!r}" for n in changed)
        raise RunError(f"--output {folder}: {told}; its points would not compare: put it back, or name another folder")
    if not same["model"]:
        raise RunError(f"--output {folder} was begun with another model in {config.model}; name another folder")
    if not same["reward"]:
        what = "model in" if is_model_reward(config.reward) else "code of"
        raise RunError(f"--output {folder} was begun with another {what} --reward {config.reward}; name another folder")


def _begun(found: dict[str, Any]) -> dict[str, Any]:
    return {"options": dict(found["options"]), **{name: found[name] for name in ("command", "model", "reward")}}


def _reward_of(name: str) -> str | None:
    """A digest of a reward model, or of a function's code; none for a rule of prefopt's."""
    return contents_of_name(name) if is_model_reward(name) else load_reward(name).digest()


def train_once(config: MethodConfig, callbacks: Sequence[Any] = ()) -> None:
    """Train, go on with a run that was stopped, or do nothing where it is finished."""
    status = status_of(Path(config.output))
    if status == "finished":
        return
    config = type(config).from_dict(config.to_dict() | {"resume": bool(status)})
    METHODS[method_of(config) or ""].run(config, callbacks=callbacks)


def model_of(config: MethodConfig) -> dict[str, Any]:
    """What a finished training gave: a model's name, and an adapter on it where one was trained."""
    folder = Path(config.output)
    adapter = is_adapter(folder) and not is_adapter(config.model)  # what a run on an adapter gave names its base itself
    return {"name": config.model if adapter else str(folder), "adapter": str(folder) if adapter else None}


def train_alone(config: MethodConfig, file: Path) -> None:
    """What :func:`prefopt.sweeps.train.train_once` does, with the options and the outcome in ``file``.

    Raises what it would: :class:`Diverged`, with the reason alone, :class:`Interrupted`, and any other
    :class:`UserError` as ``RunError``.
    """
    outcome = _outcome(file)
    outcome.unlink(missing_ok=True)
    write_json(file, {"method": method_of(config), "options": config.to_dict()})
    with StopRequest() as stop:
        # In a session of its own: Ctrl-C would reach it twice, once from the terminal and once from here.
        process = subprocess.Popen([sys.executable, "-m", "prefopt.sweeps.train", str(file)], start_new_session=True)
        told = False
        while True:
            try:
                status = process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if stop.signal is not None and not told:
                    process.send_signal(stop.signal)
                    told = True
            except BaseException:
                process.kill()
                raise
        said = _read(outcome)
        if said is not None and said[0] == "done":
            stop.check(" once this training was finished")  # the signal came too late for it
    if said is None:
        raise RunError(f"{config.output}: its process ended with status {status}, perhaps for want of memory")
    kind, what = said
    if kind == "diverged":
        raise Diverged(what)
    if kind == "interrupted":
        raise Interrupted(what, stop.signal or 2)
    if kind == "refused":
        raise RunError(what)


def main(file: Path) -> int:
    """Train what ``file`` says."""
    given = json.loads(file.read_text())
    assert given["method"] in METHODS
    kind, what = "done", ""
    try:
        train_once(read_options(given["method"], given["options"]))
    except Diverged as error:
        kind, what = "diverged", error.reason
    except Interrupted as error:
        kind, what = "interrupted", str(error)
    except UserError as error:
        kind, what = "refused", str(error)
    write_json(_outcome(file), {"kind": kind, "what": what})
    return 0


def _outcome(file: Path) -> Path:
    return file.with_suffix(".outcome.json")


def _read(path: Path) -> tuple[str, str] | None:
    try:
        return read_json(path, lambda found: (str(found["kind"]), str(found["what"])), "")
    except RunError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))


SAMPLES = "samples"
"""Names of the files: ``samples.jsonl`` of the end, ``samples-84.jsonl`` of a step."""


def retold(point: Point, folder: Path, *, start: float, share: float, before: Sequence[Path] = ()) -> Point:
    """``point`` of the training in ``folder``; ``before`` are those of trainings that it needed, and that took time.

    ``start`` (the reward of the reference) and ``share`` are those of :func:`prefopt.sweeps.points.plateau`. Raises
    :class:`prefopt.errors.RunError` for a damaged folder.
    """
    point = replace(point, seconds=_took(point, folder, before))
    return (
        _judged(point, folder, start, share) if point.method.startswith("ppo") and point.reward is not None else point
    )


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
