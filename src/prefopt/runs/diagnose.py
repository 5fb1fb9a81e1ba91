"""What the metrics of a run show, in sentences with their numbers, where the numbers support them: a trend beyond the
noise of batches, an accuracy with its interval. Thresholds are rules of thumb."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prefopt.core.statistics import student, wilson
from prefopt.runs.findings import LEAST, Change, Finding, change
from prefopt.runs.hacking import hacking
from prefopt.runs.history import Curve, History

HARDLY_MOVED = 0.002  # nats per token: a token is 0.2 % more or less likely
CHOSEN_FELL = 0.3  # nats per token: a token of chosen responses is a quarter less likely
OFTEN = 0.05  # fraction of rows that are truncated or skipped
ELSEWHERE = 0.05  # nats per token between policy and reference before any step
LOST = 0.1  # of what the best evaluation had gained
SPIKE = 10.0  # times the median gradient norm


def change_of(run: History, metric: str) -> Change | None:
    """The change of a metric of a run, since before training where that value is known."""
    curve = run.curve(metric)
    since = loss_at_start(run) if metric == "loss" and run.training else None
    if metric.startswith("log_ratios_per_token/") and curve and abs(curve.values[0]) < 1e-4:
        since = 0.0
    return change(curve, since=since)


def loss_at_start(run: History) -> float | None:
    """ln 2 where the first step shows that every row had this loss before training: log-ratios of zero. Else None."""
    first = run.training[0]
    zeros = [first.get(f"log_ratios_per_token/{side}") for side in ("chosen", "rejected")]
    loss = first.get("loss")
    zeros.append(None if loss is None else loss - math.log(2))
    return math.log(2) if first["step"] == 1 and all(x is not None and abs(x) < 1e-3 for x in zeros) else None


def diagnose(run: History) -> list[Finding]:
    """Everything that the metrics show; nothing for a run without a step."""
    return [finding for check in CHECKS for finding in check(run)] if run.training else []


def in_words(findings: list[Finding]) -> list[str]:
    """Lines of text: what happened, then what to look at."""
    lines: list[str] = []
    for title, look in (("what happened", False), ("what to look at", True)):
        if several := [finding for finding in findings if finding.look == look]:
            lines += [f"{title}:", *(f"  - {finding.text}" for finding in several)]
    if findings:
        lines.append("only samples show whether the model's own answers got better")
    return lines


# -- the rules -------------------------------------------------------------------------------------------------------


def _length(run: History) -> Iterator[Finding]:
    done = len(run.training)
    if run.steps is not None and run.status == "finished" and run.step < run.steps:
        yield Finding("ended early", f"training ended at step {run.step} of {run.steps}, before its schedule did")
    if done < 2 * LEAST:
        yield Finding("few steps", f"{done} step{'s' * (done != 1)}: too few to tell a trend from the noise of batches")


def _loss(run: History) -> Iterator[Finding]:
    start, found = loss_at_start(run), change_of(run, "loss")
    if found is None or run.curve("objective/scores"):
        return  # the loss on samples that change with the policy shows no progress
    before = "the model before training" if start is not None else f"average of the first {found.window}"
    numbers = (
        f"from {found.first:.4f} to {found.last:.4f} ({before}, and average of the last {found.window} of"
        f" {found.steps} steps; noise {found.noise:.2g})"
    )
    if found.direction > 0:
        advice = f"try a third of the learning rate{_rate(run)}; or preferences contradict each other"
        yield Finding("loss rose", f"the training loss rose {numbers}: {advice}", look=True)
    elif found.direction < 0:
        yield Finding("loss fell", f"the training loss fell {numbers}")
    else:
        yield Finding("loss flat", f"the training loss did not change beyond noise: {numbers}", look=True)


def _moved(run: History) -> Iterator[Finding]:
    sides = [run.curve(f"log_ratios_per_token/{side}").values for side in ("chosen", "rejected")]
    if not all(sides) or len(sides[0]) < 2 * LEAST:
        return
    window = max(LEAST, len(sides[0]) // 10)
    ends = [statistics.fmean(values[-window:]) - values[0] for values in sides]
    if max(map(abs, ends)) < HARDLY_MOVED:
        text = (
            f"the policy hardly moved: the log-ratio per token changed by {ends[0]:+.1g} (chosen) and {ends[1]:+.1g}"
            f" (rejected) nats; raise the learning rate{_rate(run)}, or train for more than {run.step} steps"
        )
        yield Finding("hardly moved", text, look=True)


def _held_out(run: History) -> Iterator[Finding]:
    curve, start = run.curve("loss", held_out=True), loss_at_start(run)
    if not curve:
        if run.status == "finished" and run.curve("loss") and not run.curve("objective/scores"):
            text = "no rows were held out, so over-fitting cannot be seen; give --eval-fraction or --eval-data"
            yield Finding("nothing held out", text, look=True)
        return
    best, last = min(curve.values), curve.values[-1]
    at = curve.steps[curve.values.index(best)]
    if start is not None and best >= start:
        text = f"the held-out loss never fell below the {start:.4f} of the model before training: at best {best:.4f},"
        text += f" at step {at}; try a tenth of the learning rate{_rate(run)}"
        yield Finding("never better", text, look=True)
    elif last - best > LOST * (max(curve.values[0], start or 0.0) - best) and last > best:
        results: Any = run.record.get("results", {})
        saved = f" The weights of step {at} were saved." if results.get("best step") == at else ""
        text = f"the held-out loss was lowest at step {at} ({best:.4f}) and {last:.4f} at the end.{saved} Try fewer"
        yield Finding("over-trained", f"{text} --epochs, a smaller --learning-rate or more data", look=True)
    else:
        more = ", still falling" if at == curve.steps[-1] and len(curve.steps) > 1 else ""
        yield Finding("held out", f"the held-out loss was lowest at step {at}: {best:.4f}{more}")


def _memorised(run: History) -> Iterator[Finding]:
    """Without held-out rows: the loss of a row that was trained on before is lower than that of the same model on rows
    that are new, so a loss that falls where a pass begins again, and less within it, shows rows that are memorised."""
    epochs, losses = run.curve("epoch"), dict(zip(*_columns(run.curve("loss")), strict=True))
    if run.curve("loss", held_out=True) or run.curve("objective/scores"):
        return
    if run.options.get("shuffle") is False:  # a pass may begin with rows that are easier than those at its end
        return
    passes: dict[int, list[float]] = {}
    for step, epoch in zip(*_columns(epochs), strict=True):
        if step in losses:
            passes.setdefault(math.ceil(epoch - 1e-6), []).append(losses[step])
    halves = [(p[: len(p) // 2], p[len(p) // 2 :]) for _, p in sorted(passes.items()) if len(p) >= 4 * LEAST]
    if len(halves) < 2:
        return
    within = statistics.fmean(statistics.fmean(a) - statistics.fmean(b) for a, b in halves[:-1])
    between = statistics.fmean(statistics.fmean(b) - statistics.fmean(c) for (_, b), (c, _) in pairwise(halves))
    spread = statistics.fmean(statistics.variance(half) / len(half) for pair in halves for half in pair)
    noise = student(sum(len(half) - 1 for pair in halves for half in pair)) * math.sqrt(6 * spread / (len(halves) - 1))
    if between - max(within, 0.0) > noise:
        text = (
            f"rows are memorised: the training loss fell by {between:.3g} where a pass over the same rows began again,"
            f" and by {within:.3g} within a pass (noise {noise:.2g}); give fewer --epochs, a smaller --learning-rate"
            f"{_rate(run)} or more data, and --eval-fraction to see the loss on other rows"
        )
        yield Finding("memorised", text, look=True)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return curve.steps, curve.values


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The fraction of held-out rows that a run ranks as the data do, with its 95 % interval, at the step with the
    lowest held-out loss."""

    share: float
    low: float
    high: float
    rows: int
    step: int

    @property
    def in_words(self) -> str:
        """The accuracy with its interval, rows and step."""
        rows = f"{self.rows} row{'s' * (self.rows != 1)}"
        return f"{self.share:.0%} (95% interval {self.low:.0%} to {self.high:.0%}, {rows}, step {self.step})"

    @property
    def verdict(self) -> int:
        """1 above chance, -1 below, 0 within."""
        return int(self.low > 0.5) - int(self.high < 0.5)


def held_out_accuracy(run: History) -> Accuracy | None:
    """The accuracy on held-out rows; None where it was not measured, or the number of rows is not known."""
    rights = run.curve("rewards/accuracies", held_out=True)
    # The fingerprint of the data is DIGEST TRAINED+HELD_OUT.
    sizes = re.search(r"\+([0-9]{1,15})$", str(run.record.get("data", "")))
    count = int(sizes[1]) if sizes else 0
    if not rights or not count or not all(0 <= share <= 1 for share in rights.values):
        return None
    losses = run.curve("loss", held_out=True).values
    at = losses.index(min(losses)) if len(losses) == len(rights.values) else -1
    return Accuracy(rights.values[at], *wilson(rights.values[at], count), count, rights.steps[at])


def _accuracy(run: History) -> Iterator[Finding]:
    found = held_out_accuracy(run)
    if found is None:
        return
    numbers = f"held-out accuracy {found.in_words}"
    if found.verdict > 0:
        yield Finding("accuracy", numbers)
    elif found.verdict < 0:
        yield Finding("worse than chance", f"{numbers}: worse than chance; are chosen and rejected swapped?", look=True)
    else:
        yield Finding("no better than chance", f"{numbers}: within chance", look=True)


def _chosen(run: History) -> Iterator[Finding]:
    found = change_of(run, "log_ratios_per_token/chosen")
    if found is not None and found.direction < 0 and -found.by >= CHOSEN_FELL:
        text = f"chosen responses became much less likely (by {-found.by:.3g} nats per token), and others outside the"
        text += " data likelier: look at samples; a larger --beta, a smaller --learning-rate or fewer steps prevent it"
        yield Finding("chosen fell far", text, look=True)


def _gradients(run: History) -> Iterator[Finding]:
    norms = run.curve("grad_norm")
    if len(norms.values) < 2 * LEAST:
        return
    median, largest = statistics.median(norms.values), max(norms.values)
    if largest > SPIKE * median:
        at = norms.steps[norms.values.index(largest)]
        text = f"the gradient norm was {largest:.3g} at step {at}, and its median {median:.3g}"
        yield Finding("spike", f"{text}: look at the loss and the rows of that batch", look=True)


def _clipped(run: History) -> Iterator[Finding]:
    norms, limit = run.curve("grad_norm").values, run.options.get("max_grad_norm")
    if len(norms) < 2 * LEAST or not isinstance(limit, int | float) or min(norms) <= limit:
        return
    text = (
        f"gradients were clipped in each of {len(norms)} steps (norms {min(norms):.3g} to {max(norms):.3g},"
        f" --max-grad-norm {limit:g}): AdamW makes up for a constant factor, but batches with large gradients"
        f" get no more weight than others; --max-grad-norm {2 * statistics.median(norms):.2g} clips only outliers"
    )
    yield Finding("always clipped", text)  # usual for sums over many tokens: nothing to worry about


def _reference(run: History) -> Iterator[Finding]:
    """The log-ratios of the first step are those of the model before training: zero if that is the reference."""
    first = run.training[0]
    gaps = [first.get(f"log_ratios_per_token/{side}") or 0.0 for side in ("chosen", "rejected")]
    if first["step"] == 1 and max(map(abs, gaps)) > ELSEWHERE:
        text = (
            f"the policy did not start at its reference, {run.options.get('reference') or 'the one given'}: log-ratios"
            f" per token were {gaps[0]:+.2g} (chosen) and {gaps[1]:+.2g} (rejected) before any step; leave --reference"
            " out unless that is intended"
        )
        yield Finding("another reference", text, look=True)


def _rows(run: History) -> Iterator[Finding]:
    read, kept, truncated = (run.rows.get(name, 0) for name in ("read", "kept", "truncated"))
    if kept and truncated / kept >= OFTEN:
        limit = f" to {found} tokens" if (found := run.record.get("max_length")) else ""
        text = f"{truncated} of {kept} rows ({truncated / kept:.0%}) were truncated{limit}: raise --max-length"
        yield Finding("truncated", text, look=True)
    if kept and read and (read - kept) / read >= OFTEN:
        text = f"{read - kept} of {read} rows ({(read - kept) / read:.0%}) were skipped: see prefopt data check"
        yield Finding("left out", text, look=True)


def _reward(run: History) -> Iterator[Finding]:
    reward = change(run.curve("objective/scores"))
    if reward is None:
        return
    kl = change(run.curve("objective/kl"))
    far = "" if kl is None else f", at {kl.last:.3g} nats from the reference"
    numbers = (
        f"from {reward.first:.4g} to {reward.last:.4g} (averages of the first and the last {reward.window} of"
        f" {reward.steps} steps; noise {reward.noise:.2g}){far}"
    )
    if reward.direction > 0:
        yield Finding("reward rose", f"the reward of the policy's samples rose {numbers}")
    elif reward.direction < 0:
        advice = "try a third of the learning rate, or a larger --beta"
        yield Finding("reward fell", f"the reward of the policy's samples fell {numbers}: {advice}", look=True)
    else:
        advice = "try a larger --learning-rate, a smaller --beta or more steps"
        text = f"the reward of the policy's samples did not change beyond noise: {numbers}; {advice}"
        yield Finding("reward flat", text, look=True)
    yield from hacking(run)


CHECKS = (
    *(_length, _loss, _moved, _held_out, _memorised, _accuracy, _chosen),
    *(_gradients, _clipped, _rows, _reference, _reward),
)


def _rate(run: History) -> str:
    rate = run.options.get("learning_rate")
    return f" (now {rate:.2g})" if isinstance(rate, (int, float)) else ""
