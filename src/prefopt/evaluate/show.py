"""What ``prefopt compare`` tells a person."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.core.statistics import Interval
from prefopt.evaluate.compare import CompareResult
from prefopt.evaluate.judged import Versus
from prefopt.evaluate.rates import WinRate
from prefopt.evaluate.samples import Samples
from prefopt.evaluate.tasks import TaskChange


def lines(result: CompareResult) -> Iterator[str]:
    """Who wins how often, how sure that is, and what the samples show."""
    yield f"judge: {result.judge}"
    yield from result.notes
    for v in result.versus:
        yield ""
        yield from _versus_lines(v)
    if result.strengths:
        yield ""
        yield "strength (Bradley-Terry, log-odds, 95 % interval over prompts):"
        for name, s in sorted(result.strengths.items(), key=lambda item: -item[1].mean):
            yield f"  {s.mean:+.2f} [{s.low:+.2f}, {s.high:+.2f}]  {name}"
    if result.findings:
        yield ""
        yield "what to look at:"
        yield from (f"  - {finding.text}" for finding in result.findings)
    for name, shown in result.models.items():
        yield ""
        yield f"{name}: {', '.join(_sample_words(shown))}"
    if result.output is not None:
        yield ""
        yield f"written: {result.output}"


def _versus_lines(v: Versus) -> Iterator[str]:
    r = v.rate
    undecided = f", undecided {r.undecided}" if r.undecided else ""
    yield f"{v.first} against {v.second}, {r.prompts} prompts: won {r.wins}, tied {r.ties}, lost {r.losses}{undecided}"
    if v.empty:
        yield f"  {v.empty} decided without the judge, for a response had no words"
    if r.rate is None:
        yield f"  {_too_few(r.prompts)}"
    else:
        assert r.p is not None and r.verdict is not None
        yield f"  win rate {_percent(r.rate)}, a tie counting half; sign test p = {r.p:.2g}"
        if v.equal_length is not None:
            yield f"  at equal length {_at_equal_length(v.equal_length.rate)}"
        if r.verdict != "not shown":
            yield f"  {v.first} is {r.verdict} here by this judge"
        else:
            yield f"  no difference is shown{_why_not(r)}"
    if v.longer is not None:
        x = v.longer
        yield f"  difference of length {x.mean:+.0f} characters [{x.low:+.0f}, {x.high:+.0f}]"
    for task in v.tasks:
        yield f"  {task_words(task)}"
    for name, part in v.categories.items():
        told = f"{part.prompts} prompts, too few for a rate" if part.rate is None else _percent(part.rate)
        yield f"  {name}: {told}"


def _why_not(r: WinRate) -> str:
    """What else there is to say where neither is better."""
    if r.rate is not None and r.rate.excludes(0.5):
        return ": the interval leaves 50 % out, but a sign test does not agree"
    more = r.needed is not None and r.needed > r.prompts
    return f"; if it is as large as it looks, about {r.needed:,} prompts would show it" if more else ""


def _at_equal_length(rate: Interval | None) -> str:
    return "not told: one model's responses are the longer ones in every comparison" if rate is None else _percent(rate)


def task_words(c: TaskChange) -> str:
    """A metric of a task before and after."""
    error = "" if c.error is None else f" ± {c.error:.3f}"
    count = "" if c.questions is None else f", {c.questions:,} questions"
    return f"{c.task} {c.metric}: {c.first:.3f} against {c.second:.3f}, {c.difference:+.3f}{error}{count}: {c.verdict}"


def _too_few(prompts: int) -> str:
    return f"{prompts} prompts are too few to tell a rate; give at least 10, better 100"


def _percent(i: Interval) -> str:
    return f"{i.mean:.1%} [{i.low:.1%}, {i.high:.1%}]"


def _sample_words(s: Samples) -> Iterator[str]:
    yield f"{s.samples} samples of {s.characters:.0f} characters"
    if s.tokens is not None:
        yield f"{s.tokens:.1f} tokens"
    if s.entropy is not None:
        yield f"entropy {s.entropy:.2f} nats per token"
    yield f"repetition {s.repetition:.1%}"
    if s.empty:
        yield f"{s.empty} empty"
    if s.distance is not None:
        d = s.distance
        yield f"KL to the reference {d.k1.mean:.2f} ± {d.error:.2f} nats per response (k1), {d.k3:.2f} (k3)"
    if s.perplexity is not None:
        yield f"perplexity of the held-out data {s.perplexity:.2f}"
