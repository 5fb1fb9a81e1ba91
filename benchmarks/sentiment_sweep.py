"""The sweep of controlled sentiment, in parts. What is finished is kept as JSON, from which it goes on later.

    python benchmarks/sentiment_sweep.py --prompts imdb_test.txt --output sweep --minutes 60
    python benchmarks/sentiment_sweep.py --report

``imdb_test.txt`` is made as docs/results.md says. First all methods but RLOO are trained at the learning rates of the
recipe, seed after seed: 27 trainings, the matrix that says most. Then RLOO and all other rates of the recipe follow,
and the trainings at the rates that are chosen. Stopped after ``--minutes``, or with Ctrl-C, the sweep writes its points
to ``--points``: numbers of prompts, no texts and no weights. An empty ``--output`` begins with those, on any machine;
one that is still there goes on with the training that was at work. ``--report`` trains nothing: it tells what the
points say so far, and what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.frontier import FrontierConfig
from prefopt.core.files import expanded, write_json
from prefopt.core.yaml_file import read_document
from prefopt.runs.history import POINTS
from prefopt.sweeps import frontier
from prefopt.sweeps.points import FILE, LISTS, Frontier

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
    sweep = json.loads((folder / "sweep.json").read_text("utf-8"))
    options, prompts = sweep["options"], sweep["options"]["prompts"]
    options["prompts"] = [name if name.startswith("prefopt:") else Path(name).name for name in prompts]
    write_json(file, {"sweep": sweep, "prompts": digest_of(prompts), "points": kept})
    return sum(map(len, kept.values()))


def digest_of(names: Sequence[str]) -> str | None:
    """SHA-256 of the files' contents; None where one is not here."""
    files = [Path(expanded(name)) for name in names]
    found = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return None
        found.update(file.read_bytes())
    return found.hexdigest()


def _rounded(point: Mapping[str, Any]) -> dict[str, Any]:
    """``point`` with numbers of prompts of few digits."""
    short = {name: [round(x, DIGITS) for x in point.get(name, ())] for name in LISTS}
    return {**point, **short}


def restore(file: Path, folder: Path, prompts: Sequence[str] | None = None) -> int:
    """Begin a sweep in an empty ``folder`` with the points of ``file``. Returns their number. ``prompts``: where the
    files of prompts are now; without them the points can be reported alone. Raises ``SystemExit`` where one is missing,
    and for other prompts."""
    kept = json.loads(file.read_text("utf-8"))
    if prompts is not None:
        if missing := [name for name in prompts if not Path(expanded(name)).is_file()]:
            raise SystemExit(f"--prompts {missing[0]}: no such file; make it as docs/results.md says")
        if kept.get("prompts") not in (None, digest_of(prompts)):
            raise SystemExit(f"--prompts {' '.join(prompts)} are not those of the points in {file}: give these")
        kept["sweep"]["options"]["prompts"] = list(prompts)
    write_json(folder / "sweep.json", kept["sweep"])
    for name, points in kept["points"].items():
        write_json(folder / name / POINTS, points)
    return sum(map(len, kept["points"].values()))


def stages(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipe without RLOO at its own rates, and all of it."""
    first = {name: value for name, value in recipe.items() if name != "rloo"}
    first["methods"] = [text for text in recipe["methods"] if not text.startswith("rloo")]
    return [first | {"rate_factors": ["1"]}, dict(recipe)]


def report(file: Path, config: str) -> Frontier:
    """What the points of ``file`` say, and what is missing. Raises ``SystemExit`` where there are none."""
    if not file.is_file():
        raise SystemExit(f"{file}: no points yet; run this script without --report, or give --points")
    with tempfile.TemporaryDirectory() as folder:
        restore(file, Path(folder) / "sweep")
        options = json.loads((Path(folder) / "sweep/sweep.json").read_text("utf-8"))["options"]
        whole = read_document(config) | options | {"output": f"{folder}/sweep", "report_only": True}
        return frontier.run(FrontierConfig.from_dict(whole))


def run(options: Mapping[str, Any], folder: str, seconds: float, rest: Sequence[str]) -> int:
    """``prefopt frontier`` for so many seconds at most; its exit status."""
    config = Path(folder) / "config.yaml"
    config.write_text(json.dumps(dict(options)), "utf-8")
    process = subprocess.Popen([sys.executable, "-m", "prefopt", "frontier", "--config", str(config), *rest])
    try:
        return process.wait(timeout=seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)  # a checkpoint is written, and the same command goes on
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", help="one review in every line; default: the openings of the recipe")
    parser.add_argument("--output", type=Path, default=Path("sweep"))
    parser.add_argument("--points", type=Path, default=Path(__file__).with_name("sentiment_points.json"))
    parser.add_argument("--config", default="prefopt:recipes/frontier.yaml")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--report", action="store_true", help="report --points, and train nothing")
    parser.add_argument("rest", nargs="*", help="further options of prefopt frontier, after --")
    given = parser.parse_args()
    if given.report:
        print(*report(given.points, given.config).lines(), sep="\n")
        return 0
    recipe, end = read_document(given.config) | {"output": str(given.output)}, time.monotonic() + 60 * given.minutes
    if given.prompts:
        recipe |= {"prompts": [given.prompts], "held_out": 128, "tune": 64, "rounds": 1, "num": 8}
    prompts = [recipe["prompts"]] if isinstance(recipe["prompts"], str) else recipe["prompts"]
    if given.points.exists() and not (given.output / "sweep.json").exists():
        print(f"{restore(given.points, given.output, prompts)} points from {given.points}")
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(recipe):
            if status == 0 and (left := end - time.monotonic()) > 0:
                status = run(stage, folder, left, given.rest)
    if (given.output / "sweep.json").exists():
        print(f"{save(given.output, given.points)} points in {given.points}")
    return status


if __name__ == "__main__":
    sys.exit(main())
