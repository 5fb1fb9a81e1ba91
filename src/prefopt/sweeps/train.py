"""The trainings of a sweep: each into its own folder, once, in this process or in one of its own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.methods import METHODS, MethodConfig, method_of, read_options
from prefopt.config.scoring import is_model_reward
from prefopt.config.sweeps import SweepOptions
from prefopt.core.files import output_errors, read_json, write_json
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag
from prefopt.core.terminal import StopRequest
from prefopt.data.files.sources import find_sources
from prefopt.errors import Diverged, Interrupted, RunError, UserError
from prefopt.methods.rlhf import contents_of_name, status_of
from prefopt.rewards import load_reward


def take_folder(
    config: SweepOptions,
    may_grow: Collection[str],
    *,
    judge: str | None = None,
    task: Sequence[str] | None = None,
    begun: bool = False,
) -> None:
    """Start a sweep in its output folder, or continue one with the same options (apart from ``may_grow``), model,
    reward, ``judge`` and ``task``. What no method of it has read so far is not compared, and recorded once one does, as
    is a task that it begins without. Raises
    :class:`RunError` for another sweep, or other content, and with ``begun`` where there is none yet; then nothing is
    written."""
    folder = Path(config.output)
    file = folder / "sweep.json"
    options = {name: value for name, value in config.to_dict().items() if name not in {*may_grow, *config.unread}}
    made_of = {"model": contents_of_name(config.model), "reward": _reward_of(config.reward)}
    if judge is not None:
        made_of["judge"] = _reward_of(judge)
    if task is not None:
        made_of["task"] = _contents_of_questions(task)
    now = {"command": type(config).__name__, "options": options, **made_of}
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; name a folder")
    if not file.exists():
        if begun:
            raise RunError(f"--output {folder} holds no sweep to report; name its folder")
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"--output {folder} is not empty and holds no sweep; name another folder")
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
        return
    before = read_json(
        file,
        lambda found: (
            {"judge": None} | {name: found[name] for name in now if name != "task"} | {"task": found.get("task")}
        ),
        "name another --output",
    )
    old: dict[str, Any] = dict(before["options"])
    absent = {"judge": None, "seconds": None}  # of sweeps that began before these options
    other = [n for n in options if old.get(n, absent.get(n, options[n])) != options[n]]
    changed = [f"{flag(n)} was {old.get(n)!r} and is {options[n]!r}" for n in other]
    if before["command"] != now["command"]:
        what = "another kind of sweep"
    elif changed:
        what = f"points that would not be comparable: {', '.join(changed)}; restore it, or"
    elif before["model"] != now["model"]:
        what = f"a sweep with another model in {config.model}"
    elif other := [n for n in ("reward", "judge") if before[n] != now.get(n)]:
        name = getattr(config, other[0])
        what = f"a sweep with another {'model in' if is_model_reward(name) else 'code of'} {flag(other[0])} {name}"
    elif None not in (before["task"], made_of.get("task")) and before["task"] != made_of["task"]:
        what = f"a sweep with other questions than those of --task {' '.join(task or ())}"
    else:
        kept = {**before, "options": {**old, **options}, "task": made_of.get("task") or before["task"]}
        if kept != before and not begun:
            write_json(file, kept)
        return
    raise RunError(f"--output {folder} holds {what}{'' if changed else ';'} name another folder")


def _reward_of(name: str) -> str | None:
    """A digest of a reward model, or of a function's code; None for a built-in rule."""
    return contents_of_name(name) if is_model_reward(name) else load_reward(name).digest()


def _contents_of_questions(names: Sequence[str]) -> str:
    """A digest of the contents of all files of ``names``, by whatever names. Raises :class:`DataError` as
    :func:`prefopt.data.files.sources.find_sources` does."""
    found = hashlib.sha256()
    for source in find_sources(names):
        path = source.path
        found.update(path.read_bytes() if path is not None and path.is_file() else source.digest().encode())
    return found.hexdigest()


def train_once(config: MethodConfig, callbacks: Sequence[Any] = ()) -> None:
    """Train, or continue a stopped run; do nothing if it is finished."""
    status = status_of(Path(config.output))
    if status == "finished":
        return
    config = type(config).from_dict(config.to_dict() | {"resume": bool(status)})
    METHODS[method_of(config) or ""].run(config, callbacks=callbacks)


def model_of(config: MethodConfig) -> dict[str, Any]:
    """The result of a finished training: ``name`` of the model, and ``adapter`` where one was trained."""
    folder = Path(config.output)
    adapter = is_adapter(folder) and not is_adapter(config.model)  # an adapter trained on names its base itself
    return {"name": config.model if adapter else str(folder), "adapter": str(folder) if adapter else None}


def train_alone(config: MethodConfig, file: Path) -> None:
    """:func:`train_once` in a process of its own; options and outcome go through ``file``.

    Raises what it would: :class:`Diverged`, :class:`Interrupted`, and any other :class:`UserError` as ``RunError``.
    """
    write_json(file, {"method": method_of(config), "options": config.to_dict()})
    with StopRequest() as stop:
        # In a session of its own: Ctrl-C would reach it twice, once from the terminal and once from here.
        process = subprocess.Popen([sys.executable, "-m", "prefopt.sweeps.train", str(file)], start_new_session=True)
        sent = False
        while (status := process.poll()) is None:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop.signal is not None and not sent:
                    process.send_signal(stop.signal)
                    sent = True
            except BaseException:
                process.kill()
                raise
        kind, message = read_json(file, lambda found: (found.get("kind"), str(found.get("what"))), "remove it")
        if kind == "done":
            stop.check(" once this training was finished")  # the signal came too late for it
    if kind == "diverged":
        raise Diverged(message)
    if kind == "interrupted":
        raise Interrupted(message, stop.signal or 2)
    if kind == "refused":
        raise RunError(message)
    if kind is None:
        raise RunError(f"{config.output}: its process ended with status {status}; it may have run out of memory")


def main(file: Path) -> None:
    """The process of :func:`train_alone`: replaces the options in ``file`` by the outcome."""
    given = json.loads(file.read_text())
    kind, message = "done", ""
    try:
        train_once(read_options(given["method"], given["options"]))
    except Diverged as error:
        kind, message = "diverged", error.reason
    except Interrupted as error:
        kind, message = "interrupted", str(error)
    except UserError as error:
        kind, message = "refused", str(error)
    write_json(file, {"kind": kind, "what": message})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
