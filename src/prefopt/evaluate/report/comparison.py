"""What ``prefopt compare --json`` found, as a report tells it: win rates, what the samples show, and some of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data.formats import read_comparisons
from prefopt.errors import RunError
from prefopt.evaluate.runs import as_number
from prefopt.records import Comparison
from prefopt.rewards import prompt_text

SHOWN = 3
"""Pairs of samples of each kind that a page shows."""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rate:
    """One line of the table of win rates. ``bounds``: rate, low, high; none where prompts were too few to tell one."""

    name: str
    prompts: int
    counts: str
    bounds: tuple[float, float, float] | None
    at_equal_length: tuple[float, float, float] | None
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
    """One comparison. ``lost``: samples of the first model that the judge liked less than the other's."""

    judge: str
    sentences: Sequence[str]
    rates: Sequence[Rate]
    samples: Sequence[tuple[str, Sequence[str]]]
    models: Sequence[str]
    drawn: Sequence[Pair]
    lost: Sequence[Pair]
    notes: Sequence[str]


def read_comparison(name: str | Path, *, seed: int = 0) -> ComparisonFacts:
    """Read what ``prefopt compare --json`` printed. Raises :class:`RunError` where a file is nothing of the kind."""
    path = Path(name)
    try:
        found = json.loads(path.read_text("utf-8"))
        rates = [rate for versus in found["versus"] for rate in _rates(versus)]
        models = list(found["models"])
        return ComparisonFacts(
            judge=found["judge"],
            sentences=[sentence(v, found["judge"]) for v in found["versus"]],
            rates=rates,
            models=models,
            samples=_samples(found["models"]),
            drawn=_pairs(found["output"], seed, lost=False),
            lost=_pairs(found["output"], seed, lost=True),
            notes=found["notes"],
        )
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}); name what prefopt compare --json printed"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: is not what prefopt compare --json prints; write that into a file, and name it"
        ) from error


def sentence(versus: Json, judge: str) -> str:
    """The verdict on two models, as sure as the interval lets it be."""
    rate, first, second = versus["rate"], versus["first"], versus["second"]
    bounds = _bounds(rate["rate"])
    if bounds is None:
        return f"{rate['prompts']} prompts are too few to say whether {first} is better than {second}"
    mean, low, high = bounds
    told = f"win rate {mean:.1%}, 95 % interval {low:.1%} to {high:.1%}, {rate['prompts']} prompts, judge {judge}"
    if low <= 0.5 <= high:
        return f"no difference between {first} and {second} is shown ({told})"
    return f"{first} is {'better' if mean > 0.5 else 'worse'} than {second} ({told})"


def _rates(versus: Json) -> Iterator[Rate]:
    pair = f"{versus['first']} against {versus['second']}"
    equal = versus["equal_length"]
    yield _rate(pair, versus["rate"], None if equal is None else _bounds(equal["rate"]))
    for category, rate in versus["categories"].items():
        yield _rate(f"{pair}: {category}", rate, None)


def _rate(name: str, rate: Json, equal: tuple[float, float, float] | None) -> Rate:
    counts = f"{rate['wins']} / {rate['ties']} / {rate['losses']}"
    return Rate(name, int(rate["prompts"]), counts, _bounds(rate["rate"]), equal, rate["p"])


def _bounds(interval: Json | None) -> tuple[float, float, float] | None:
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
        "repetition": "repeated runs of four words",
        "perplexity": "perplexity of held-out data",
        "empty": "empty",
    }
    rows = [(title, [as_number(m[name]) for m in models.values()]) for name, title in titles.items()]
    gaps = [m["distance"] for m in models.values()]
    rows.append(("KL to the reference, nats per response (k1)", [_gap(g) for g in gaps]))
    rows.append(("the same by k3", [as_number(None if g is None else g["k3"]) for g in gaps]))
    return [(title, values) for title, values in rows if set(values) != {"-"}]


def _gap(distance: Json | None) -> str:
    return "-" if distance is None else f"{distance['k1']['mean']:.2f} ± {distance['error']:.2f}"


def _pairs(file: str | None, seed: int, *, lost: bool) -> list[Pair]:
    """Pairs drawn by ``seed`` from the file of judged pairs: of all of them, or of those that the first model lost."""
    if file is None:
        return []
    rows = [row for row in read_comparisons(file) if isinstance(row, Comparison) and len(row.responses) == 2]
    rows = [row for row in rows if row.tiers == ((1,), (0,))] if lost else rows
    return [_pair(row) for row in random.Random(seed).sample(rows, min(SHOWN, len(rows)))]


def _pair(row: Comparison) -> Pair:
    models: Any = row.extra["models"]
    first, second = (r.text for r in row.responses)
    said = {((0,), (1,)): f"{models[0]} is better", ((1,), (0,)): f"{models[1]} is better", ((0, 1),): "a tie"}
    return Pair(prompt_text(row), (models[0], models[1]), (first, second), said.get(row.tiers, "nothing said"))
