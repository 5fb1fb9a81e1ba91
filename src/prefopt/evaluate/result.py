"""The result of a comparison: dataclasses, the lines that are printed, and findings about how a model was trained.

A training run sees the reward that it raises; only a judge of samples sees whether they got better.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.config.compare import CompareConfig, is_file
from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import OVERWRITE, expanded, output_errors, refuse_existing, replace_file
from prefopt.core.shown import ShownLines
from prefopt.core.statistics import MIN_PROMPTS, Interval, p_text
from prefopt.data.files.sources import find_sources
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.length_control import LengthControlled
from prefopt.evaluate.samples import SampleStats
from prefopt.evaluate.tasks import TaskChange, corrected_changes
from prefopt.evaluate.win_rate import LEVEL, WinRate, corrected, swapped
from prefopt.runs.findings import Change, Finding, change
from prefopt.runs.history import History, read_history


@dataclass(frozen=True, slots=True)
class PairResult:
    """Two models. ``rate`` is the first's win rate, ``equal_length`` the length-controlled one, ``categories`` the win
    rates by category. ``empty``: comparisons decided without the judge, as one response was empty. ``longer``: mean
    difference of length in characters, first less second, None for too few prompts."""

    first: str
    second: str
    rate: WinRate
    equal_length: LengthControlled | None
    categories: dict[str, WinRate] = field(default_factory=dict)
    empty: int = 0
    longer: Interval | None = None
    tasks: list[TaskChange] = field(default_factory=list)

    def swapped(self) -> PairResult:
        """The second model against the first, without tasks."""
        equal = self.equal_length
        if equal is not None:
            # The slope is the same.
            equal = replace(equal, rate=swapped(equal.rate, 1.0), linear=swapped(equal.linear, 1.0))
        categories = {name: rate.swapped() for name, rate in self.categories.items()}
        longer = swapped(self.longer, 0.0)
        return PairResult(self.second, self.first, self.rate.swapped(), equal, categories, self.empty, longer)

    def lines(self) -> Iterator[str]:
        """The lines of a report."""
        r = self.rate
        undecided = f", undecided {r.undecided}" if r.undecided else ""
        yield (
            f"{self.first} against {self.second}, {r.prompts} prompts: won {r.wins}, tied {r.ties},"
            f" lost {r.losses}{undecided}"
        )
        if self.empty:
            yield f"  {self.empty} decided without the judge: one response was empty"
        if r.rate is None:
            yield f"  {r.prompts} prompts are too few for a win rate; give at least {MIN_PROMPTS}, and better 100"
        else:
            yield f"  win rate {_percent(r.rate)}, a tie counting half; {test_words(r)}"
            if (equal := self.equal_length) is not None:
                why = ": one model's responses are longer in every comparison" if equal.rate is None else ""
                yield f"  at equal length {_percent(equal.rate)}{why}"
                if equal.differs:
                    yield f"  at equal length {_percent(equal.linear)} if length counted in proportion"
            yield f"  {_no_difference(r) if r.verdict == 'not shown' else _difference(self.first, r)}"
        if (x := self.longer) is not None:
            yield f"  difference of length {x.mean:+.0f} characters [{x.low:+.0f}, {x.high:+.0f}]"
        for task in self.tasks:
            yield f"  {task.line()}"
        for name, c in self.categories.items():
            if c.rate is None:
                yield f"  {name}: {c.prompts} prompts, too few for a rate"
            else:
                verdict = "no difference is shown" if c.verdict == "not shown" else f"{self.first} is {c.verdict}"
                yield f"  {name}: {_percent(c.rate)}, {test_words(c)}: {verdict}"


def correct_pairs(pairs: Sequence[PairResult]) -> list[PairResult]:
    """The verdicts on pairs of models corrected for their number, those on categories for that of all categories of all
    pairs, and those on tasks, too."""
    rates = corrected([pair.rate for pair in pairs])
    categories = iter(corrected([rate for pair in pairs for rate in pair.categories.values()]))
    tasks = iter(corrected_changes([task for pair in pairs for task in pair.tasks]))
    return [
        replace(
            pair,
            rate=rate,
            categories={name: next(categories) for name in pair.categories},
            tasks=[next(tasks) for _ in pair.tasks],
        )
        for pair, rate in zip(pairs, rates, strict=True)
    ]


@dataclass(frozen=True, slots=True, repr=False)
class CompareResult(ShownLines):
    """``versus``: every pair of models. ``strengths``: Bradley-Terry, in log-odds, for three and more models whose
    comparisons connect them. ``models``: statistics of each model's samples; empty where votes were counted.
    ``command`` repeats the comparison (empty where Python gave objects), ``identities`` are SHA-256 of what was
    compared, ``output_sha256`` that of the file of judged pairs, ``environment`` the hardware and versions."""

    judge: str
    versus: list[PairResult]
    strengths: dict[str, Interval]
    models: dict[str, SampleStats]
    output: Path | None = None
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    command: str = ""
    identities: dict[str, str] = field(default_factory=dict)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    output_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(replace(self, output=None)) | {"output": None if self.output is None else str(self.output)}

    def lines(self) -> Iterator[str]:
        """The lines that ``prefopt compare`` prints."""
        yield f"judge: {self.judge}"
        yield from self.notes
        for pair in self.versus:
            yield from ("", *pair.lines())
        if self.strengths:
            yield from ("", "strength (Bradley-Terry, log-odds, 95 % interval over prompts):")
            for name, s in sorted(self.strengths.items(), key=lambda item: -item[1].mean):
                yield f"  {s.mean:+.2f} [{s.low:+.2f}, {s.high:+.2f}]  {name}"
        if self.findings:
            yield from ("", "what to look at:", *(f"  - {finding.text}" for finding in self.findings))
        for name, stats in self.models.items():
            yield from ("", f"{name}: {', '.join(_describe_samples(stats))}")
        if self.output is not None:
            yield from ("", f"written: {self.output}")


def test_words(r: WinRate) -> str:
    """The p-value of a rate, and the one corrected for the number of comparisons."""
    assert r.p is not None and r.p_holm is not None
    among = f", among {r.comparisons} comparisons {p_text(r.p_holm)} (Holm)" if r.comparisons > 1 else ""
    return f"sign-flip test {p_text(r.p)}{among}"


def _difference(first: str, r: WinRate) -> str:
    assert r.rate is not None
    unsure = (
        "" if r.rate.excludes(0.5) else "; the interval reaches 50 %, since it allows for outcomes that no prompt had"
    )
    return f"{first} is {r.verdict} by this judge{unsure}"


def _no_difference(r: WinRate) -> str:
    assert r.rate is not None and r.p is not None
    why = ""
    if r.p <= LEVEL:
        why = f": p is below 5 % by itself, but not among {r.comparisons} comparisons"
    elif r.rate.excludes(0.5):
        why = ": the interval just excludes 50 %, but p is above 5 %"
    return f"no difference is shown{why}{_advice(r)}"


def _advice(r: WinRate) -> str:
    """How many prompts would show a difference."""
    if r.needed is None:
        return ""
    least, most = r.needed
    if most is None:
        return f"; if there is one, showing it takes at least {least:,} prompts, and there may be none"
    return f"; if there is one, {least:,} to {most:,} prompts would show it"


def _percent(i: Interval | None) -> str:
    return "unknown" if i is None else f"{i.mean:.1%} [{i.low:.1%}, {i.high:.1%}]"


def _describe_samples(s: SampleStats) -> Iterator[str]:
    yield f"{s.samples} samples of {s.characters:.0f} characters"
    if s.tokens is not None:
        yield f"{s.tokens:.1f} tokens"
    if s.entropy is not None:
        yield f"entropy {s.entropy:.2f} nats per token"
    yield f"repetition {s.repetition:.1%}"
    if s.empty:
        yield f"{s.empty} empty"
    if (kl := s.distance) is not None:
        yield f"KL to the reference {kl.k1.mean:.2f} ± {kl.error:.2f} nats per response (k1), {kl.k3:.2f} (k3)"
    if s.perplexity is not None:
        yield f"perplexity of the held-out data {s.perplexity:.2f}"


def check_output(config: CompareConfig, data: Sequence[str]) -> None:
    """Refuse an ``--output`` that exists, before anything is computed: :class:`RunError` without ``--overwrite``, and
    :class:`ConfigError` for a file that the comparison reads, ``data`` among them."""
    if config.output is None or not (path := Path(config.output)).exists():
        return
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file in it")
    names = [Path(name) for name in (*filter(is_file, config.models), *(config.task_results or ()))]
    names += [source.path for source in find_sources(data) if source.path is not None]
    if any(name.exists() and name.samefile(path) for name in names):
        raise ConfigError(f"--output {path} is read by this comparison; name another file")
    refuse_existing(path, OVERWRITE, unless=config.overwrite)


def write_pairs(path: Path, rows: Sequence[dict[str, object]]) -> str:
    """Write judged pairs; returns the SHA-256 of the file."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    with output_errors(path):
        replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def check_pairs(path: Path, digest: str) -> None:
    """Refuse a file that is gone or has another digest. Raises :class:`DataError`."""
    if file_hashes([path], error=DataError)[0] != digest:
        raise DataError(f"{path} changed since this comparison wrote it; compare again with an --output of its own")


# -- findings --------------------------------------------------------------------------------------------------

REPETITION = 0.1  # repeated 4-grams: this fraction and ...
REPETITION_RATIO = 2.0  # ... this many times the other model's
MIN_SAMPLES = 10
REWARDS = ("objective/scores", "rewards/margins")
"""Training metrics that optimisation raises: the score of PPO's samples, and the implicit reward margin."""


def findings(pair: PairResult, models: Mapping[str, SampleStats]) -> list[Finding]:
    """Signs of length exploitation, over-optimisation and repetition in either model; none for too few prompts."""
    if pair.rate.rate is None:
        return []
    sides = (pair, pair.swapped())
    checks = (_length_exploited, _over_optimised, _repeats)
    return [finding for side in sides for check in checks for finding in check(side, models)]


def _length_exploited(v: PairResult, models: Mapping[str, SampleStats]) -> Iterator[Finding]:
    """The first model wins with longer responses, but not at equal length."""
    if v.longer is None or v.rate.verdict != "better" or v.longer.low <= 0 or v.equal_length is None:
        return
    equal = v.equal_length.rate
    if equal is None:
        at_equal = "since they are longer in every comparison, its win rate at equal length is unknown"
    elif equal.low <= 0.5:
        at_equal = f"at equal length it wins {_percent(equal)}, which shows no gain"
    else:
        return
    yield Finding(
        "length exploited",
        f"{v.first} wins {_percent(v.rate.rate)} against {v.second}, but its responses are longer by"
        f" {v.longer.mean:.0f} characters [{v.longer.low:.0f}, {v.longer.high:.0f}], and {at_equal}: it may have learnt"
        " length alone. Check with a judge that ignores length; train on pairs of similar length, or with --loss"
        " r_dpo or"
        " ld_dpo",
        look=True,
    )


def _over_optimised(v: PairResult, models: Mapping[str, SampleStats]) -> Iterator[Finding]:
    """Training raised the first model's reward, and the judge finds it worse than the model it started from, or than
    one of the same start and data whose reward was raised less."""
    run = _run_of(v.first)
    raised = None if run is None else _raised(run)
    if run is None or raised is None or v.rate.verdict != "worse":
        return
    metric, by = raised
    what = "which it started from"
    start, data = run.options.get("model"), run.record.get("data")
    if not _same(start, v.second):
        other = _run_of(v.second)
        if other is None or data is None or data != other.record.get("data"):
            return
        before = _raised(other)
        if before is None or before[0] != metric or before[1].last >= by.last:
            return
        if not _same(start, other.options.get("model")):
            return
        what = f"which was trained less far (to {before[1].last:.3g})"
    stats = models.get(v.first)
    kl = "" if stats is None or stats.distance is None else f"; its KL is {stats.distance.k1.mean:.3g} nats"
    remedy = (
        "a larger --beta or a lower --kl-target, fewer steps, or a reward model trained on such samples"
        if metric == REWARDS[0]
        else "a larger --beta, a smaller --learning-rate or fewer --epochs"
    )
    yield Finding(
        "over-optimised",
        f"training raised the reward of {v.first} ({metric} from {by.first:.3g} to {by.last:.3g}), but the judge finds"
        f" it worse than {v.second}, {what}: it wins {_percent(v.rate.rate)}{kl}. The reward no longer follows the"
        f" judge: try {remedy}",
        look=True,
    )


def _repeats(v: PairResult, models: Mapping[str, SampleStats]) -> Iterator[Finding]:
    """More of the first model's words repeat than of the second's."""
    mine, theirs = models.get(v.first), models.get(v.second)
    if mine is None or theirs is None or mine.samples < MIN_SAMPLES:
        return
    if mine.repetition > REPETITION and mine.repetition > REPETITION_RATIO * theirs.repetition:
        yield Finding(
            "repeats itself",
            f"samples of {v.first} repeat themselves: {mine.repetition:.0%} of their 4-grams occurred before in the"
            f" same sample, and {theirs.repetition:.0%} in those of {v.second}. If preference training did this, try a"
            " larger --beta, a smaller --learning-rate, or a loss that keeps chosen responses likely",
            look=True,
        )


def _run_of(name: str) -> History | None:
    """The run whose output folder a model is."""
    try:
        folder = expanded(name)
        return read_history(folder) if (folder / "run.json").is_file() else None
    except RunError:
        return None


def _same(one: object, two: object) -> bool:
    """Whether two model names are one folder."""
    if not isinstance(one, str) or not isinstance(two, str):
        return False
    return one == two or (Path(one).exists() and Path(two).exists() and Path(one).samefile(two))


def _raised(run: History) -> tuple[str, Change] | None:
    """The reward metric that training raised, if any."""
    for name in REWARDS:
        found = change(run.curve(name))
        if found is not None and found.direction > 0:
            return name, found
    return None
