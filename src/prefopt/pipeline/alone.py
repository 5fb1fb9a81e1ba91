"""One training in a process of its own, whose memory is nobody else's: ``python -m prefopt.pipeline.alone FILE``.

``FILE`` holds a command and its options; what became of it is written beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prefopt.config.methods import METHODS, method_of, read_options
from prefopt.config.sweep import AnyConfig
from prefopt.disk.read import read_json
from prefopt.disk.write import write_json
from prefopt.errors import Diverged, Interrupted, RunError, UserError
from prefopt.pipeline.train import train_once
from prefopt.train.stop import StopRequest


def train_alone(config: AnyConfig, file: Path) -> None:
    """What :func:`prefopt.pipeline.train.train_once` does, with the options and the outcome in ``file``.

    Raises what it would: :class:`Diverged`, with the reason alone, :class:`Interrupted`, and any other
    :class:`UserError` as ``RunError``.
    """
    outcome = _outcome(file)
    outcome.unlink(missing_ok=True)
    write_json(file, {"method": method_of(config), "options": config.to_dict()})
    with StopRequest() as stop:
        # In a session of its own: Ctrl-C would reach it twice, once from the terminal and once from here.
        process = subprocess.Popen([sys.executable, "-m", "prefopt.pipeline.alone", str(file)], start_new_session=True)
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
