"""What ``prefopt compare --json`` found, as a report tells it: win rates, what the samples show, and some of them."""

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
"""Pairs of samples of each kind that a page shows."""
LONGEST = 4000
"""Characters of a text that a page shows; what is cut off is told by an ellipsis."""

Json = Mapping[str, Any]
Bounds = tuple[float, float, float]
"""A rate with the two ends of its interval."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One line of the table of win rates. ``bounds``: none where prompts were too few to tell one.
    ``at_equal_length``: or why there is none."""

    name: str
    prompts: int
    counts: str
    bounds: Bounds | None
    at_equal_length: Bounds | str
    p: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a sample of each of two models, and what the judge said of them."""

    prompt: str
    models: tuple[str, str]
    responses: tuple[str, str]
    verdict: str


@dataclass(frozen=True, slots=True)
class ComparisonFacts:
    """One comparison. ``lost``: samples of the first model that the judge liked less than the other's. ``lengths``:
    sentences on how lengths differ. ``tasks``: rows of name, questions, first, second, difference, verdict."""

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


def read_comparison(name: str | Path, *, seed: int = 0) -> ComparisonFacts:
    """Read what ``prefopt compare --json`` printed. Raises :class:`RunError` where a file is nothing of the kind."""
    path = Path(name)
    remedy = "write what prefopt compare --json prints into a file, and name it"
    return read_json(path, lambda found: comparison_facts(found, seed=seed), remedy)


def comparison_facts(found: Json, *, seed: int = 0) -> ComparisonFacts:
    """The facts of a comparison as plain values; ``seed`` draws the samples that are shown."""
    rows = _judged(found["output"], found["output_sha256"])
    drawn, ranked = _drawn(rows, seed), any(_behind(row) is not None for row in rows)
    return ComparisonFacts(
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
    """The verdict on two models, as sure as the interval and the sign test let it be."""
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
    return "not told: one model's are always the longer ones" if bounds is None else bounds


def _rate(name: str, rate: Json, equal: Bounds | str) -> Rate:
    counts = f"{rate['wins']} / {rate['ties']} / {rate['losses']}"
    return Rate(name, int(rate["prompts"]), counts, _bounds(rate["rate"]), equal, rate["p"])


def _bounds(interval: Json | None) -> Bounds | None:
    if interval is None:
        return None
    return float(interval["mean"]), float(interval["low"]), float(interval["high"])


def _samples(models: Json) -> list[tuple[str, Sequence[str]]]:
    """A row for each measure that any model has, a value for each model."""
    titles = {
        "samples": "samples",
        "characters": "characters",
        "tokens": "tokens",
        "entropy": "entropy, nats per token",
        "repetition": "repeated runs of four words, part",
        "perplexity": "perplexity of held-out data",
        "empty": "empty",
    }
    rows = [(title, [_number(m[name]) for m in models.values()]) for name, title in titles.items()]
    gaps = [m["distance"] for m in models.values()]
    rows.append(("KL to the reference, nats per response (k1)", [_gap(g) for g in gaps]))
    rows.append(("the same by k3", ["-" if g is None else f"{g['k3']:.2f}" for g in gaps]))
    return [(title, values) for title, values in rows if set(values) != {"-"}]


def _number(value: float | None) -> str:
    """As a person reads it; parts below a thousandth are as good as none."""
    return "0" if value is not None and abs(value) < 5e-4 else as_number(value)


def _gap(distance: Json | None) -> str:
    return "-" if distance is None else f"{distance['k1']['mean']:.2f} ± {distance['error']:.2f}"


def _longer(versus: Json, models: Json) -> str | None:
    """How much longer the first model's responses are."""
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


def _drawn(rows: Sequence[Comparison], seed: int) -> list[Pair]:
    return [_pair(row) for row in random.Random(seed).sample(rows, min(SHOWN, len(rows)))]


def _worst(rows: Sequence[Comparison], seed: int) -> list[Pair]:
    """Those that the first model lost: by the judge's scores where it gave some, else drawn by ``seed``."""
    lost = [row for row in rows if row.tiers == ((1,), (0,))]
    mixed = random.Random(seed).sample(lost, len(lost))
    ranked = sorted(mixed, key=lambda row: -(_behind(row) or 0.0))
    return [_pair(row) for row in ranked[:SHOWN]]


def _behind(row: Comparison) -> float | None:
    """How much less than the second the judge gave the first response."""
    scores: Any = row.extra.get("judge_scores")
    return float(scores[1] - scores[0]) if isinstance(scores, list) and len(scores) == 2 else None


def _pair(row: Comparison) -> Pair:
    models: Any = row.extra["models"]
    scores: Any = row.extra.get("judge_scores")
    first, second = (shortened(r.text, LONGEST) for r in row.responses)
    said = {((0,), (1,)): f"{models[0]} is better", ((1,), (0,)): f"{models[1]} is better", ((0, 1),): "a tie"}
    verdict = said.get(row.tiers, "nothing said")
    if scores:
        verdict += f" ({as_number(scores[0])} against {as_number(scores[1])})"
    return Pair(shortened(prompt_text(row), LONGEST), (models[0], models[1]), (first, second), verdict)
