"""The output of ``prefopt compare --json`` as the report shows it: win rates, measures and some of the samples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.core.files import read_json
from prefopt.core.statistics import Interval, p_text
from prefopt.data.comparisons import read_comparisons
from prefopt.data.pictures import ANYWHERE
from prefopt.evaluate.length_control import LengthControlled
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
RANKED = "where the judge prefers the other model most"
NO_SAMPLES = "no samples are shown: prefopt compare keeps the judged pairs where --output names a file for them"

Json = Mapping[str, Any]
Bounds = tuple[float, float, float]
"""A rate with the two ends of its interval."""


def read_comparison(name: str) -> dict[str, Any]:
    """Read the output of ``prefopt compare --json``. Raises :class:`RunError` for another file."""
    return read_json(Path(name), comparison_report, "name a file with the output of prefopt compare --json")


def comparison_report(found: Json) -> dict[str, Any]:
    """The template's values for a comparison given as plain values.

    ``compared`` are the names of all models, ``models`` of those with samples. ``lost`` are samples of the first model
    that lost, ``lengths`` sentences on how lengths differ, ``tasks`` rows of name, questions, first, second, difference
    and verdict.
    """
    versus, models = found["versus"], found["models"]
    rows: list[Comparison] = []
    if file := found["output"]:
        check_pairs(Path(file), found["output_sha256"])
        read = read_comparisons(file, pictures=ANYWHERE)
        rows += [row for row in read if isinstance(row, Comparison) and len(row.responses) == 2]
    strengths = sorted(found["strengths"].items(), key=lambda item: -item[1]["mean"])
    ranked = any(_behind(row) is not None for row in rows)
    return {
        **{name: found[name] for name in ("judge", "command", "environment")},
        "models": list(models),
        "compared": list(dict.fromkeys(v[side] for v in versus for side in ("first", "second"))),
        "identities": list(found["identities"].items()),
        "findings": [f["text"] for f in found["findings"]],
        "sentences": [_sentence(v, found["judge"]) for v in versus],
        "rates": [rate for v in versus for rate in _rates(v)],
        "samples": _samples(models),
        "lengths": [words for v in versus if (words := _longer(v, models))],
        "tasks": [_task(v, c) for v in versus for c in v["tasks"]],
        "strengths": [(name, f"{s['mean']:+.2f} ({s['low']:+.2f} to {s['high']:+.2f})") for name, s in strengths],
        "drawn": [_pair(row) for row in random.Random(0).sample(rows, min(SHOWN, len(rows)))],
        "lost": _worst(rows),
        "lost_title": f"The worst samples: {RANKED}" if ranked else "Samples that lost, drawn at random",
        "notes": [*found["notes"], *([] if rows or not models else [NO_SAMPLES])],
    }


def _sentence(versus: Json, judge: str) -> str:
    """The verdict on two models, with the numbers that support it."""
    rate, first, second = versus["rate"], versus["first"], versus["second"]
    bounds = _bounds(rate["rate"])
    if bounds is None:
        return f"{rate['prompts']} prompts are too few to say whether {first} is better than {second}"
    mean, low, high = bounds
    numbers = f"win rate {mean:.1%}, 95 % interval {low:.1%} to {high:.1%}, {_test(rate)}"
    numbers += f", {rate['prompts']} prompts, judge {judge}"
    if rate["verdict"] == "not shown":
        return f"No difference between {first} and {second} is shown ({numbers})"
    return f"{first} is {rate['verdict']} than {second} ({numbers})"


def _rates(versus: Json) -> Iterator[Json]:
    """Rows of the table of win rates. ``bounds`` are None for too few prompts, ``in_proportion`` where it does not
    differ from the rate at equal length."""
    pair = f"{versus['first']} against {versus['second']}"
    in_proportion: Bounds | None = None
    if (equal := versus["equal_length"]) is None:
        at_equal_length: Bounds | str = "too few" if versus["rate"]["rate"] is None else "all are equally long"
    else:
        at_equal_length = _bounds(equal["rate"]) or "not measurable: one model's are always the longer ones"
        found = {name: None if equal[name] is None else Interval(**equal[name]) for name in ("rate", "slope", "linear")}
        if LengthControlled(**found).differs:
            in_proportion = _bounds(equal["linear"])
    of_category = {f"{pair}: {category}": rate for category, rate in versus["categories"].items()}
    for name, rate in {pair: versus["rate"], **of_category}.items():
        yield {
            "name": name,
            "prompts": int(rate["prompts"]),
            "counts": f"{rate['wins']} / {rate['ties']} / {rate['losses']}",
            "bounds": _bounds(rate["rate"]),
            "at_equal_length": at_equal_length if name == pair else "-",
            "in_proportion": in_proportion if name == pair else None,
            "test": "" if rate["p"] is None else _test(rate),
        }


def _test(rate: Json) -> str:
    among = rate["comparisons"]
    return p_text(rate["p"]) + (f", among {among} comparisons {p_text(rate['p_holm'])} (Holm)" if among > 1 else "")


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

    def number(value: float | None) -> str:
        return "0" if value is not None and abs(value) < 5e-4 else as_number(value)

    rows = [(title, [number(m[name]) for m in models.values()]) for name, title in titles.items()]
    gaps = [m["distance"] for m in models.values()]
    k1 = ["-" if g is None else f"{g['k1']['mean']:.2f} ± {g['error']:.2f}" for g in gaps]
    rows.append(("KL to the reference, nats per response (k1)", k1))
    rows.append(("the same by k3", ["-" if g is None else f"{g['k3']:.2f}" for g in gaps]))
    return [(title, values) for title, values in rows if set(values) - {"-"}]


def _longer(versus: Json, models: Json) -> str | None:
    """How much longer the responses of the first model are."""
    bounds = _bounds(versus["longer"])
    if bounds is None:
        return None
    mean, low, high = bounds
    first, second = (models[versus[side]]["characters"] for side in ("first", "second"))
    numbers = f"{first:.0f} characters against {second:.0f}, {mean:+.0f}, 95 % interval {low:+.0f} to {high:+.0f}"
    way = "longer" if mean > 0 else "shorter"
    if low <= 0 <= high:
        return f"No shift of length from {versus['second']} to {versus['first']} is shown ({numbers})"
    return f"Responses of {versus['first']} are {way} than those of {versus['second']} ({numbers})"


def _task(versus: Json, c: Json) -> Sequence[str]:
    change = TaskChange(**c)
    error = "" if change.error is None else f" ± {change.error:.3f}"
    count = "-" if change.questions is None else f"{change.questions:,}"
    names = (f"{versus['first']} against {versus['second']}: {change.task} {change.metric}", count)
    return (*names, f"{change.first:.3f}", f"{change.second:.3f}", f"{change.difference:+.3f}{error}", change.verdict)


def _worst(rows: Sequence[Comparison]) -> list[Json]:
    """Samples that the first model lost: the worst by the judge's scores, or some at random where it gave none."""
    lost = [row for row in rows if row.tiers == ((1,), (0,))]
    mixed = random.Random(0).sample(lost, len(lost))
    ranked = sorted(mixed, key=lambda row: -(_behind(row) or 0.0))
    return [_pair(row) for row in ranked[:SHOWN]]


def _behind(row: Comparison) -> float | None:
    """The score of the second response minus that of the first."""
    scores: Any = row.extra.get("judge_scores")
    return float(scores[1] - scores[0]) if isinstance(scores, list) and len(scores) == 2 else None


def _pair(row: Comparison) -> Json:
    """A prompt with a sample of each of two models, and the verdict of the judge."""
    models: Any = row.extra["models"]
    scores: Any = row.extra.get("judge_scores")
    better = {((0,), (1,)): f"{models[0]} is better", ((1,), (0,)): f"{models[1]} is better", ((0, 1),): "a tie"}
    verdict = better.get(row.tiers, "no verdict")
    if scores:
        verdict += f" ({as_number(scores[0])} against {as_number(scores[1])})"
    return {
        "prompt": shortened(prompt_text(row), LONGEST),
        "models": models,
        "responses": [shortened(response.text, LONGEST) for response in row.responses],
        "verdict": verdict,
    }
