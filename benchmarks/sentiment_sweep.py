"""The sweep of controlled sentiment, in parts. What is finished is kept as JSON, from which it goes on later.

    python benchmarks/sentiment_sweep.py --prompts imdb_test.txt --output sweep --minutes 60

``imdb_test.txt`` is made as docs/results.md says. Stopped after ``--minutes``, or with Ctrl-C, the sweep writes its
points to ``--points``: numbers of prompts, no texts and no weights. An empty ``--output`` begins with those, on any
machine; one that is still there goes on with the training that was at work.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.core.files import write_json
from prefopt.sweeps.frontier import POINTS
from prefopt.sweeps.points import FILE

DIGITS = 6


def save(folder: Path, file: Path) -> int:
    """Write the finished points of a sweep to ``file``. Returns their number."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob(POINTS)):
        found[path.parent.relative_to(folder).as_posix()] = json.loads(path.read_text("utf-8"))
    if (whole := folder / FILE).exists():  # with time, costs and plateaus, which points.json lacks
        told: dict[str, list[Any]] = {}
        for point in json.loads(whole.read_text("utf-8"))["points"]:
            told.setdefault(point["folder"], []).append(point)
        found |= told
    kept = {name: [_rounded(point) for point in points] for name, points in found.items()}
    write_json(file, {"sweep": json.loads((folder / "sweep.json").read_text("utf-8")), "points": kept})
    return sum(map(len, kept.values()))


def _rounded(point: Mapping[str, Any]) -> dict[str, Any]:
    """``point`` with numbers of prompts of few digits."""
    short = {name: [round(x, DIGITS) for x in point.get(name, ())] for name in ("rewards", "kls", "earlier", "judged")}
    return {**point, **short}


def restore(file: Path, folder: Path) -> int:
    """Begin a sweep in an empty ``folder`` with the points of ``file``. Returns their number."""
    kept = json.loads(file.read_text("utf-8"))
    write_json(folder / "sweep.json", kept["sweep"])
    for name, points in kept["points"].items():
        write_json(folder / name / POINTS, points)
    return sum(map(len, kept["points"].values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", help="one review in every line; default: the openings of the recipe")
    parser.add_argument("--output", type=Path, default=Path("sweep"))
    parser.add_argument("--points", type=Path, default=Path(__file__).with_name("sentiment_points.json"))
    parser.add_argument("--config", default="prefopt:recipes/frontier.yaml")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("rest", nargs="*", help="further options of prefopt frontier, after --")
    given = parser.parse_args()
    if given.points.exists() and not (given.output / "sweep.json").exists():
        print(f"{restore(given.points, given.output)} points from {given.points}")
    words = ["frontier", "--config", given.config, "--output", str(given.output)]
    if given.prompts:
        words += ["--prompts", given.prompts, "--held-out", "128", "--tune", "64", "--rounds", "1", "--num", "8"]
    process = subprocess.Popen([sys.executable, "-m", "prefopt", *words, *given.rest])
    try:
        status = process.wait(timeout=60 * given.minutes)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)  # a checkpoint is written, and the same command goes on
        status = process.wait()
    if (given.output / "sweep.json").exists():
        print(f"{save(given.output, given.points)} points in {given.points}")
    return status


if __name__ == "__main__":
    sys.exit(main())
