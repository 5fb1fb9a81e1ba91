"""What a comparison says of how a model was trained: what its own training cannot know, each with its evidence.

A run sees the reward that it raises; only a judge of samples sees whether they got better.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.config.compare import CompareConfig, is_file
from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import output_errors, replace_file
from prefopt.core.statistics import Interval
from prefopt.data.files.sources import find_sources
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.rates import AtEqualLength, Verdict, WinRate
from prefopt.evaluate.samples import Samples
from prefopt.evaluate.tasks import TaskChange
from prefopt.runs.diagnose import Change, Finding, change
from prefopt.runs.history import History, read_history


def check_output(config: CompareConfig, data: Sequence[str]) -> None:
    """Refuse an ``--output`` that is there already, before anything is computed: :class:`RunError`, unless it may be
    replaced; :class:`ConfigError` for a file that the comparison reads, which is never replaced: ``data`` among them.
    """
    if config.output is None or not (path := Path(config.output)).exists():
        return
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it")
    names = [Path(name) for name in (*filter(is_file, config.models), *(config.task_results or ()))]
    names += [source.path for source in find_sources(data) if source.path is not None]
    if any(name.exists() and name.samefile(path) for name in names):
        raise ConfigError(f"--output {path} is read by this comparison; name another file")
    if not config.overwrite:
        raise RunError(f"--output {path} is there already; name another file, or add --overwrite")


def write_judged(path: Path, rows: Sequence[dict[str, object]]) -> str:
    """Write the rows; returns the SHA-256 of the file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogatepass")
    with output_errors(path):
        replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def check_judged(path: Path, digest: str) -> None:
    """Refuse a file that is gone, or not the one of this digest. Raises :class:`DataError`."""
    if file_hashes([path], error=DataError)[0] != digest:
        raise DataError(
            f"{path} no longer holds the pairs of this comparison: something wrote to it since; compare again, with an"
            " --output of its own"
        )


@dataclass(frozen=True, slots=True)
class Versus:
    """Two models: how often the first won, at any length and read at equal length; by category, where one is named.

    ``empty``: comparisons decided by one response having no words, without the judge. ``longer``: characters that the
    first's responses have more than the second's, over prompts; none for too few. ``tasks``: what they know elsewhere.
    """

    first: str
    second: str
    rate: WinRate
    equal_length: AtEqualLength | None
    categories: dict[str, WinRate] = field(default_factory=dict)
    empty: int = 0
    longer: Interval | None = None
    tasks: list[TaskChange] = field(default_factory=list)


REPEATS = 0.1  # of the runs of four words of a sample
TWICE = 2.0  # times as much as the model that it is compared with
FEWEST_SAMPLES = 10
RAISED = ("objective/scores", "rewards/margins")
"""What training raises: the reward of PPO's samples; the margin of the implied reward."""


@dataclass(frozen=True, slots=True)
class _Side:
    """One of two models, seen as the first: its win rate, and so on. ``apart``: the responses of one of the two are the
    longer ones in every comparison."""

    name: str
    other: str
    rate: Interval
    verdict: Verdict
    equal: Interval | None
    apart: bool
    longer: Interval | None


def findings(v: Versus, models: Mapping[str, Samples]) -> list[Finding]:
    """What is worth a look, about either model; nothing where prompts are too few."""
    found: list[Finding] = []
    for side in _sides(v):
        found += [*_by_length(side), *_over_optimised(side, models), *_repeats(side, models)]
    return found


def _sides(v: Versus) -> Iterator[_Side]:
    rate, verdict, longer = v.rate.rate, v.rate.verdict, v.longer
    if rate is None or verdict is None:
        return
    equal = None if v.equal_length is None else v.equal_length.rate
    apart = v.equal_length is not None and equal is None
    yield _Side(v.first, v.second, rate, verdict, equal, apart, longer)
    yield _Side(
        v.second,
        v.first,
        _turned(rate, 1.0),
        _OTHER[verdict],
        None if equal is None else _turned(equal, 1.0),
        apart,
        None if longer is None else _turned(longer, 0.0),
    )


_OTHER: dict[Verdict, Verdict] = {"better": "worse", "worse": "better", "not shown": "not shown"}


def _turned(i: Interval, whole: float) -> Interval:
    """The same, seen from the other side."""
    return Interval(whole - i.mean, whole - i.high, whole - i.low, i.count, i.level)


def _by_length(s: _Side) -> Iterator[Finding]:
    """It wins, by longer responses, and at equal length no longer, or none were of equal length."""
    if s.longer is None or s.verdict != "better" or s.longer.low <= 0:
        return
    if s.apart:
        at_equal = "as they are so in every comparison, nothing tells what it would win by at equal length"
    elif s.equal is not None and s.equal.low <= 0.5:
        at_equal = f"at equal length it wins {_percent(s.equal)}, which shows no gain"
    else:
        return
    yield Finding(
        "length exploited",
        f"{s.name} wins {_percent(s.rate)} against {s.other}, but its responses are longer by {s.longer.mean:.0f}"
        f" characters [{s.longer.low:.0f}, {s.longer.high:.0f}], and {at_equal}: length may be all that was learnt. A"
        " judge that length does not move tells; pairs of like length, or a loss that leaves length out (--loss r_dpo"
        " or ld_dpo), keep it from being learnt",
        look=True,
    )


def _over_optimised(s: _Side, models: Mapping[str, Samples]) -> Iterator[Finding]:
    """Training raised its reward, and the judge finds it worse than where it came from."""
    run = _run_of(s.name)
    if run is None or s.verdict != "worse":
        return
    came = _came_from(run, s.other)
    raised = _raised(run)
    if came is None or raised is None:
        return
    metric, by = raised
    before = _raised(_run_of(s.other)) if came == "less" else None
    if came == "less" and (before is None or before[0] != metric or before[1].last >= by.last):
        return
    what = "which it started from" if before is None else f"which was trained less far (to {before[1].last:.3g})"
    shown = models.get(s.name)
    gap = "" if shown is None or shown.distance is None else f"; its KL is {shown.distance.k1.mean:.3g} nats"
    knob = (
        "a larger --beta or a lower --kl-target, fewer steps, or a reward model that has seen such samples"
        if metric == RAISED[0]
        else "a larger --beta, a smaller --learning-rate or fewer --epochs"
    )
    yield Finding(
        "over-optimised",
        f"training raised the reward of {s.name} ({metric} from {by.first:.3g} to {by.last:.3g}), and yet the judge"
        f" finds it worse than {s.other}, {what}: it wins {_percent(s.rate)}{gap}. What was raised is no longer what"
        f" the judge wants: {knob}",
        look=True,
    )


def _repeats(s: _Side, models: Mapping[str, Samples]) -> Iterator[Finding]:
    mine, theirs = models.get(s.name), models.get(s.other)
    if mine is None or theirs is None or mine.samples < FEWEST_SAMPLES:
        return
    if mine.repetition > REPEATS and mine.repetition > TWICE * theirs.repetition:
        yield Finding(
            "repeats itself",
            f"samples of {s.name} repeat themselves: {mine.repetition:.0%} of their runs of four words came before in"
            f" the same sample, and {theirs.repetition:.0%} in those of {s.other}. Where it was trained on preferences,"
            " probability went where no row is: a larger --beta, a smaller --learning-rate, or a loss that holds"
            " chosen answers up",
            look=True,
        )


def _run_of(name: str) -> History | None:
    """The run whose output folder a model is."""
    try:
        return read_history(name) if (Path(name) / "run.json").is_file() else None
    except RunError:
        return None


def _came_from(run: History, other: str) -> str | None:
    """``start``: the run began with the other model. ``less``: both began with one model, on the same data."""
    if _same(run.options.get("model"), other):
        return "start"
    before = _run_of(other)
    alike = before is not None and _same(run.options.get("model"), before.options.get("model"))
    same_data = before is not None and run.record.get("data") == before.record.get("data") is not None
    return "less" if alike and same_data else None


def _same(one: object, two: object) -> bool:
    if not isinstance(one, str) or not isinstance(two, str):
        return False
    return one == two or (Path(one).exists() and Path(two).exists() and Path(one).samefile(two))


def _raised(run: History | None) -> tuple[str, Change] | None:
    """What training raised, where it did."""
    for name in RAISED if run is not None else ():
        assert run is not None
        found = change(run.curve(name))
        if found is not None and found.direction > 0:
            return name, found
    return None


def _percent(i: Interval) -> str:
    return f"{i.mean:.1%} [{i.low:.1%}, {i.high:.1%}]"
