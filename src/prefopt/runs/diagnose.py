"""What the numbers of a run say, in words, each sentence with its evidence.

A sentence is only written where its numbers carry it: a trend where it is more than the noise of batches, an accuracy
with its interval. Where a rule of thumb decides what is worth a look, it is a constant here.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from typing import Any

from prefopt.core.statistics import wilson
from prefopt.runs import trends
from prefopt.runs.history import History
from prefopt.runs.trends import Change, Check, Finding, change, mean_with_noise

HARDLY_MOVED = 0.002  # nats per token: a token is 0.2 % more or less likely
CHOSEN_FELL = 0.3  # nats per token: a token of the good answers is a quarter less likely
LENGTHS_DIFFER = 1.25  # chosen over rejected, or the other way round
OVERSHOT = 1.5  # times the loss before training, in the mean of four steps
SPIKE = 10.0  # times the median of the gradient's norm
TRUNCATED = LEFT_OUT = 0.05  # of the rows
ELSEWHERE = 0.05  # nats per token between policy and reference before any step
LOST = 0.1  # of what the best evaluation had gained
FITTED = (0.99, 4.0)  # accuracy, and a margin of which the logistic function is 0.98


def diagnose(run: History) -> list[Finding]:
    """Everything that there is to say about a run; nothing about one without a step."""
    return [finding for check in CHECKS for finding in check(run)] if run.training else []


def in_words(findings: list[Finding]) -> list[str]:
    """Lines for a person: what happened, then what to look at."""
    lines: list[str] = []
    for title, look in (("what happened", False), ("what to look at", True)):
        if several := [finding for finding in findings if finding.look == look]:
            lines += [f"{title}:", *(f"  - {finding.text}" for finding in several)]
    if findings:
        lines.append("whether the model's own answers got better is only seen on samples of it")
    return lines


def _length(run: History) -> Iterator[Finding]:
    if run.steps is not None and run.status == "finished" and run.step < run.steps:
        yield Finding("ended early", f"training ended at step {run.step} of {run.steps}, before its schedule did")
    if len(run.training) < 8:
        yield Finding(
            "few steps", f"{_count(len(run.training), 'step')}: too few to tell a trend from the noise of batches"
        )


def _loss(run: History) -> Iterator[Finding]:
    curve = run.curve("loss")
    if run.curve("objective/scores"):
        return  # of samples that change with the policy: whether it rose or fell says nothing
    start = loss_at_start(run)
    found = change(curve, since=start)
    if found is None:
        return
    numbers = f"from {found.first:.4f} to {found.last:.4f} ({_where(found, start)}; noise {found.noise:.2g})"
    peak = max((statistics.fmean(curve.values[i : i + 4]), i) for i in range(len(curve.values) - 3))
    if found.direction > 0:
        yield Finding(
            "loss rose",
            f"the loss on training batches rose {numbers}: so it is with a learning rate that is too large{_rate(run)},"
            " or with preferences that contradict one another; try a third of the rate",
            look=True,
        )
    elif start is not None and peak[0] > OVERSHOT * start:
        yield Finding(
            "overshot",
            f"the loss on training batches went {numbers}, but rose to {peak[0]:.4f} on the way (mean of"
            f" steps {curve.steps[peak[1]]} to {curve.steps[peak[1] + 3]}): so it is with a learning rate that is too"
            f" large{_rate(run)}; try a third of it",
            look=True,
        )
    elif found.direction < 0:
        yield Finding("loss fell", f"the loss on training batches fell {numbers}")
    else:
        yield Finding("loss flat", f"the loss on training batches did not change beyond noise: {numbers}", look=True)


def _moved(run: History) -> Iterator[Finding]:
    sides = [run.curve(f"log_ratios_per_token/{side}").values for side in ("chosen", "rejected")]
    if not all(sides) or len(sides[0]) < 8:
        return
    window = max(4, len(sides[0]) // 10)
    ends = [statistics.fmean(values[-window:]) - values[0] for values in sides]
    if max(map(abs, ends)) < HARDLY_MOVED:
        yield Finding(
            "hardly moved",
            f"the policy hardly moved: since the first step the log-ratio per token changed by {ends[0]:+.1g} (chosen)"
            f" and {ends[1]:+.1g} (rejected) nats; the learning rate{_rate(run)} is too small for {run.step} steps:"
            " raise it, or train for longer",
            look=True,
        )


def _held_out(run: History) -> Iterator[Finding]:
    curve = run.curve("loss", held_out=True)
    if not curve:
        if run.status == "finished" and run.curve("loss") and not run.curve("objective/scores"):
            yield Finding(
                "nothing held out",
                "no rows were held out: whether the model learnt more than these rows by heart is not known; give"
                " --eval-fraction or --eval-data",
                look=True,
            )
        return
    best = min(curve.values)
    at, last = curve.steps[curve.values.index(best)], curve.values[-1]
    start = loss_at_start(run)
    if start is not None and best >= start:
        yield Finding(
            "never better",
            f"the loss on held-out rows never came below the {start:.4f} of the model before training: at best"
            f" {best:.4f}, at step {at}; try a tenth of the learning rate{_rate(run)}",
            look=True,
        )
    elif len(curve.values) == 1:
        yield Finding("held out", f"the loss on held-out rows is {last:.4f} at step {at}")
    elif last - best > LOST * (max(curve.values[0], start or 0.0) - best) and last > best:
        yield Finding(
            "over-trained",
            f"the loss on held-out rows was lowest at step {at} ({best:.4f}) and {last:.4f} at the end: what came after"
            f" made it worse. {_saved(run, at)}Fewer --epochs, a smaller --learning-rate or more data",
            look=True,
        )
    else:
        more = ", and was still falling there" if at == curve.steps[-1] else ""
        yield Finding("held out", f"the loss on held-out rows was lowest at step {at}: {best:.4f}{more}")


def _gap(run: History) -> Iterator[Finding]:
    found, held_out = change(run.curve("loss")), run.curve("loss", held_out=True)
    passes = run.curve("epoch").values
    if found is None or not held_out or not passes or passes[-1] <= 1.0:
        return
    gap = held_out.values[-1] - found.last
    if gap > max(found.noise, 0.1 * abs(held_out.values[-1])):
        yield Finding(
            "gap",
            f"after {passes[-1]:.3g} passes over the data the loss is {found.last:.4f} on training rows and"
            f" {held_out.values[-1]:.4f} on held-out ones: some of it was learnt by heart",
            look=True,
        )


def _accuracy(run: History) -> Iterator[Finding]:
    margins, rights = run.curve("rewards/margins", held_out=True), run.curve("rewards/accuracies", held_out=True)
    count = _held_out_count(run)
    if rights and margins and count and all(0 <= share <= 1 for share in rights.values):
        losses = run.curve("loss", held_out=True).values
        at = losses.index(min(losses)) if len(losses) == len(rights.values) else -1
        low, high = wilson(rights.values[at], count)
        share = rights.values[at]
        numbers = (
            f"on {_count(count, 'held-out row')} the chosen answer has the higher reward in {share:.0%} (95% interval"
            f" {low:.0%} to {high:.0%}), by {margins.values[at]:.3g} in the mean, at step {rights.steps[at]}"
        )
        if low > 0.5:
            yield Finding("accuracy", numbers)
        elif high < 0.5:
            yield Finding(
                "worse than chance", f"{numbers}: worse than chance; are chosen and rejected exchanged?", look=True
            )
        else:
            yield Finding("no better than chance", f"{numbers}: that cannot be told from chance", look=True)
    found, margin = change(run.curve("rewards/accuracies")), change(run.curve("rewards/margins"))
    if found and margin and found.last >= FITTED[0] and margin.last >= FITTED[1]:
        yield Finding(
            "fitted",
            f"training rows are fitted almost wholly (accuracy {found.last:.2f}, margin {margin.last:.3g}): further"
            " steps mostly push probabilities down",
            look=True,
        )
    elif found and not rights:
        yield Finding(
            "training accuracy",
            f"accuracy on training batches went from {found.first:.2f} to {found.last:.2f} ({_where(found)})",
        )


def _chosen(run: History) -> Iterator[Finding]:
    chosen, rejected = (_of_ratio(run, side) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or abs(chosen.by) < HARDLY_MOVED or not chosen.direction:
        return
    times = 100 * abs(math.expm1(chosen.by))
    percent = f"{times:{'.0f' if times >= 100 else '.2g'}}% {'more' if chosen.by > 0 else 'less'} likely"
    numbers = f"by {abs(chosen.by):.3g} nats per token, so that each token is {percent}"
    other = f"rejected ones changed by {rejected.by:+.3g}"
    if chosen.direction > 0:
        yield Finding("chosen rose", f"chosen answers became more likely ({numbers}); {other}")
    elif -chosen.by < CHOSEN_FELL:
        yield Finding(
            "chosen fell",
            f"chosen answers became less likely ({numbers}); {other}: in part this is expected, since losses on pairs"
            " reward the difference alone",
        )
    else:
        yield Finding(
            "chosen fell far",
            f"chosen answers became much less likely ({numbers}); {other}: the probability went to answers that are in"
            " no row, so look at samples; a larger --beta, a smaller --learning-rate, fewer steps, or a loss that holds"
            " chosen answers up keeps them",
            look=True,
        )


def _reference(run: History) -> Iterator[Finding]:
    """The first step's log-ratios are those of the model before training: zero where it starts at its reference."""
    first = run.training[0]
    gaps = [first.get(f"log_ratios_per_token/{side}") for side in ("chosen", "rejected")]
    chosen, rejected = (g if isinstance(g, (int, float)) else 0.0 for g in gaps)
    if first["step"] == 1 and max(abs(chosen), abs(rejected)) > ELSEWHERE:
        yield Finding(
            "another reference",
            f"the policy did not start at its reference, {run.options.get('reference') or 'the one given'}: before any"
            f" step a token of chosen answers had a log-ratio of {chosen:+.2g} nats and one of rejected answers"
            f" {rejected:+.2g}. The loss holds the policy to a model that it does not come from: leave --reference out,"
            " unless that is meant",
            look=True,
        )


def _lengths(run: History) -> Iterator[Finding]:
    chosen, rejected = (run.curve(f"lengths/{side}").values for side in ("chosen", "rejected"))
    if len(chosen) != len(rejected) or len(chosen) < 4:
        return
    difference, noise = mean_with_noise([c - r for c, r in zip(chosen, rejected, strict=True)])
    a, b = statistics.fmean(chosen), statistics.fmean(rejected)
    if min(a, b) <= 0:
        return
    longer, ratio = ("longer", a / b) if a > b else ("shorter", b / a)
    if abs(difference) > noise and ratio > LENGTHS_DIFFER:
        yield Finding(
            "lengths differ",
            f"chosen answers are {longer} than rejected ones: {a:.0f} and {b:.0f} tokens in the mean (difference"
            f" {difference:+.0f} ± {noise:.0f}). A model learns that too: compare the length of samples before and"
            " after",
            look=True,
        )


def _gradients(run: History) -> Iterator[Finding]:
    norms = run.curve("grad_norm")
    limit = run.options.get("max_grad_norm")
    if len(norms.values) < 8:
        return
    median, largest = statistics.median(norms.values), max(norms.values)
    if largest > SPIKE * median:
        times = f"{largest / median:.0f} times its median {median:.3g}" if median else "and its median 0"
        at = norms.steps[norms.values.index(largest)]
        yield Finding(
            "spike",
            f"the gradient's norm was {largest:.3g} at step {at}, {times}:"
            " look at the loss there, and at the rows of that batch",
            look=True,
        )
    clipped = sum(norm > limit for norm in norms.values) if isinstance(limit, (int, float)) else 0
    if clipped:
        yield Finding(
            "clipped",
            f"gradients were scaled down to --max-grad-norm {limit:g} in {clipped} of {len(norms.values)} steps (median"
            f" norm {median:.3g})",
        )


def _truncated(run: History) -> Iterator[Finding]:
    kept, truncated = run.rows.get("kept"), run.rows.get("truncated")
    if kept and truncated and truncated / kept >= TRUNCATED:
        limit = run.record.get("max_length")
        yield Finding(
            "truncated",
            f"{truncated} of {kept} rows ({truncated / kept:.0%}) were truncated"
            + (f" to {limit} tokens" if limit else "")
            + ": a larger --max-length keeps them whole",
            look=True,
        )


def _left_out(run: History) -> Iterator[Finding]:
    read, kept = run.rows.get("read"), run.rows.get("kept")
    if read and kept and (read - kept) / read >= LEFT_OUT:
        yield Finding(
            "left out",
            f"{read - kept} of {read} rows ({(read - kept) / read:.0%}) were left out, for they could not be used:"
            " prefopt data check names each with its reason",
            look=True,
        )


CHECKS: tuple[Check, ...] = (
    _length,
    _loss,
    _moved,
    _held_out,
    _gap,
    _accuracy,
    _chosen,
    _lengths,
    _gradients,
    _truncated,
    _left_out,
    _reference,
    *trends.CHECKS,
)


def loss_at_start(run: History) -> float | None:
    """The loss of the model before training on any row, where the first step shows it: under losses that are ln 2 at
    log-ratios of zero, every row has that."""
    first = run.training[0]
    zero = [first.get(f"log_ratios_per_token/{side}") for side in ("chosen", "rejected")]
    zero.append(_less(first.get("loss"), math.log(2)))
    return math.log(2) if first["step"] == 1 and all(x is not None and abs(x) < 1e-3 for x in zero) else None


def _less(a: Any, b: float) -> float | None:
    return a - b if isinstance(a, (int, float)) else None


def _held_out_count(run: History) -> int:
    """Held-out rows, from the fingerprint of the data: ``DIGEST TRAINED+HELD_OUT``."""
    _, _, sizes = str(run.record.get("data", "")).rpartition(" ")
    count = sizes.partition("+")[2]
    return int(count) if re.fullmatch("[0-9]{1,15}", count) else 0


def _saved(run: History, at: int) -> str:
    results: Any = run.record.get("results", {})
    return f"The weights of step {at} are the ones that were saved. " if results.get("best step") == at else ""


def _rate(run: History) -> str:
    rate = run.options.get("learning_rate")
    return f" (it is {rate:.2g})" if isinstance(rate, (int, float)) else ""


def _where(found: Change, start: float | None = None) -> str:
    before = "the model before training" if start is not None else f"the mean of the first {found.window}"
    return f"{before}, and the mean of the last {found.window} of {found.steps} steps"


def _of_ratio(run: History, side: str) -> Change | None:
    return change_of(run, f"log_ratios_per_token/{side}")


def change_of(run: History, metric: str) -> Change | None:
    """The change of a metric; from where it must be before training, where that is known and the first step shows it:
    the loss at log-ratios of zero, and these themselves."""
    curve = run.curve(metric)
    since = loss_at_start(run) if metric == "loss" and run.training else None
    if metric.startswith("log_ratios_per_token/") and curve and abs(curve.values[0]) < 1e-4:
        since = 0.0
    return change(curve, since=since)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
