"""The output of ``prefopt compare --json`` as the report shows it: win rates, measures and some of the samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.files import read_json
from prefopt.data.comparisons import read_comparisons
from prefopt.evaluate.result import check_pairs
from prefopt.evaluate.tasks import TaskChange
from prefopt.records import Comparison
from prefopt.rewards import prompt_text
from prefopt.runs.plot import shortened
from prefopt.runs.table import as_number

SHOWN = 3
"""Pairs of samples of each kind on a page."""
LONGEST = 4000
"""Characters of a text on a page; longer ones end in an ellipsis."""

Json = Mapping[str, Any]
Bounds = tuple[float, float, float]
"""A rate with the two ends of its interval."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A row of the table of win rates. ``bounds`` are None for too few prompts; ``at_equal_length`` may say why there
    are none."""

    name: str
    prompts: int
    counts: str
    bounds: Bounds | None
    at_equal_length: Bounds | str
    p: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a sample of each of two models, and the verdict of the judge."""

    prompt: str
    models: tuple[str, str]
    responses: tuple[str, str]
    verdict: str


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """One comparison. ``lost``: samples of the first model that lost. ``lengths``: sentences on how lengths differ.
    ``tasks``: rows of name, questions, first, second, difference, verdict."""

    judge: str
    sentences: Sequence[str]
    rates: Sequence[Rate]
    samples: Sequence[tuple[str, Sequence[str]]]
    models: Sequence[str]
    lengths: Sequence[str]
    tasks: Sequence[Sequence[str]]
    strengths: Sequence[tuple[str, str]]
    findings: Sequence[str]
    drawn: Sequence[Pair]
    lost: Sequence[Pair]
    lost_title: str
    notes: Sequence[str]
    command: str
    identities: Sequence[tuple[str, str]]
    environment: Mapping[str, Mapping[str, str]]


def read_comparison(name: str | Path, *, seed: int = 0) -> ComparisonReport:
    """Read the output of ``prefopt compare --json``. Raises :class:`RunError` for another file."""
    path = Path(name)
    remedy = "write what prefopt compare --json prints into a file, and name it"
    return read_json(path, lambda found: comparison_report(found, seed=seed), remedy)


def comparison_report(found: Json, *, seed: int = 0) -> ComparisonReport:
    """The report of a comparison given as plain values; ``seed`` draws the samples that are shown."""
    rows = _judged(found["output"], found["output_sha256"])
    drawn = [_pair(row) for row in random.Random(seed).sample(rows, min(SHOWN, len(rows)))]
    ranked = any(_behind(row) is not None for row in rows)
    return ComparisonReport(
        judge=found["judge"],
        sentences=[sentence(v, found["judge"]) for v in found["versus"]],
        rates=[rate for versus in found["versus"] for rate in _rates(versus)],
        models=list(found["models"]),
        samples=_samples(found["models"]),
        lengths=[words for v in found["versus"] if (words := _longer(v, found["models"]))],
        tasks=[_task(v, c) for v in found["versus"] for c in v["tasks"]],
        strengths=_strengths(found["strengths"]),
        findings=[f["text"] for f in found["findings"]],
        drawn=drawn,
        lost=_worst(rows, seed),
        lost_title="The worst samples: the judge puts the first furthest behind" if ranked else _LOST,
        notes=[*found["notes"], *([] if rows or not found["models"] else [_NO_SAMPLES])],
        command=found["command"],
        identities=list(found["identities"].items()),
        environment=found["environment"],
    )


_LOST = "Samples that lost, drawn at random"
_NO_SAMPLES = "no samples are shown: prefopt compare keeps the judged pairs where --output names a file for them"


def sentence(versus: Json, judge: str) -> str:
    """The verdict on two models, supported by the interval and the sign test."""
    rate, first, second = versus["rate"], versus["first"], versus["second"]
    bounds = _bounds(rate["rate"])
    if bounds is None:
        return f"{rate['prompts']} prompts are too few to say whether {first} is better than {second}"
    mean, low, high = bounds
    told = f"win rate {mean:.1%}, 95 % interval {low:.1%} to {high:.1%}, {rate['prompts']} prompts, judge {judge}"
    if rate["verdict"] == "not shown":
        return f"no difference between {first} and {second} is shown ({told})"
    return f"{first} is {rate['verdict']} than {second} ({told})"


def _rates(versus: Json) -> Iterator[Rate]:
    pair = f"{versus['first']} against {versus['second']}"
    yield _rate(pair, versus["rate"], _at_equal_length(versus))
    for category, rate in versus["categories"].items():
        yield _rate(f"{pair}: {category}", rate, "-")


def _at_equal_length(versus: Json) -> Bounds | str:
    equal = versus["equal_length"]
    if equal is None:
        return "too few" if versus["rate"]["rate"] is None else "all are equally long"
    bounds = _bounds(equal["rate"])
    return "not measurable: one model's are always the longer ones" if bounds is None else bounds


def _rate(name: str, rate: Json, equal: Bounds | str) -> Rate:
    counts = f"{rate['wins']} / {rate['ties']} / {rate['losses']}"
    return Rate(name, int(rate["prompts"]), counts, _bounds(rate["rate"]), equal, rate["p"])


def _bounds(interval: Json | None) -> Bounds | None:
    if interval is None:
        return None
    return float(interval["mean"]), float(interval["low"]), float(interval["high"])


def _samples(models: Json) -> list[tuple[str, Sequence[str]]]:
    """A row for each measure that a model has, with a value for each model."""
    titles = {
        "samples": "samples",
        "characters": "characters",
        "tokens": "tokens",
        "entropy": "entropy, nats per token",
        "repetition": "fraction of repeated 4-grams",
        "perplexity": "perplexity of held-out data",
        "empty": "empty",
    }
    rows = [(title, [_number(m[name]) for m in models.values()]) for name, title in titles.items()]
    gaps = [m["distance"] for m in models.values()]
    rows.append(("KL to the reference, nats per response (k1)", [_gap(g) for g in gaps]))
    rows.append(("the same by k3", ["-" if g is None else f"{g['k3']:.2f}" for g in gaps]))
    return [(title, values) for title, values in rows if set(values) != {"-"}]


def _number(value: float | None) -> str:
    """Values below a thousandth are shown as 0."""
    return "0" if value is not None and abs(value) < 5e-4 else as_number(value)


def _gap(distance: Json | None) -> str:
    return "-" if distance is None else f"{distance['k1']['mean']:.2f} ± {distance['error']:.2f}"


def _longer(versus: Json, models: Json) -> str | None:
    """How much longer the responses of the first model are."""
    bounds = _bounds(versus["longer"])
    if bounds is None:
        return None
    mean, low, high = bounds
    first, second = (models[versus[side]]["characters"] for side in ("first", "second"))
    told = f"{first:.0f} characters against {second:.0f}, {mean:+.0f}, 95 % interval {low:+.0f} to {high:+.0f}"
    way = "longer" if mean > 0 else "shorter"
    if low <= 0 <= high:
        return f"no shift of length from {versus['second']} to {versus['first']} is shown ({told})"
    return f"responses of {versus['first']} are {way} than those of {versus['second']} ({told})"


def _task(versus: Json, c: Json) -> Sequence[str]:
    change = TaskChange(**c)
    error = "" if change.error is None else f" ± {change.error:.3f}"
    count = "-" if change.questions is None else f"{change.questions:,}"
    names = (f"{versus['first']} against {versus['second']}: {change.task} {change.metric}", count)
    return (*names, f"{change.first:.3f}", f"{change.second:.3f}", f"{change.difference:+.3f}{error}", change.verdict)


def _strengths(found: Json) -> list[tuple[str, str]]:
    ranked = sorted(found.items(), key=lambda item: -item[1]["mean"])
    return [(name, f"{s['mean']:+.2f} ({s['low']:+.2f} to {s['high']:+.2f})") for name, s in ranked]


def _judged(file: str | None, digest: str) -> list[Comparison]:
    if file is None:
        return []
    check_pairs(Path(file), digest)
    return [row for row in read_comparisons(file) if isinstance(row, Comparison) and len(row.responses) == 2]


def _worst(rows: Sequence[Comparison], seed: int) -> list[Pair]:
    """Samples that the first model lost: the worst by the judge's scores, or drawn by ``seed`` without scores."""
    lost = [row for row in rows if row.tiers == ((1,), (0,))]
    mixed = random.Random(seed).sample(lost, len(lost))
    ranked = sorted(mixed, key=lambda row: -(_behind(row) or 0.0))
    return [_pair(row) for row in ranked[:SHOWN]]


def _behind(row: Comparison) -> float | None:
    """The score of the second response minus that of the first."""
    scores: Any = row.extra.get("judge_scores")
    return float(scores[1] - scores[0]) if isinstance(scores, list) and len(scores) == 2 else None


def _pair(row: Comparison) -> Pair:
    models: Any = row.extra["models"]
    scores: Any = row.extra.get("judge_scores")
    first, second = (shortened(r.text, LONGEST) for r in row.responses)
    said = {((0,), (1,)): f"{models[0]} is better", ((1,), (0,)): f"{models[1]} is better", ((0, 1),): "a tie"}
    verdict = said.get(row.tiers, "no verdict")
    if scores:
        verdict += f" ({as_number(scores[0])} against {as_number(scores[1])})"
    return Pair(shortened(prompt_text(row), LONGEST), (models[0], models[1]), (first, second), verdict)
