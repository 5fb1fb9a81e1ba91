"""A sweep in words: a table of its points, which of them are on the frontier, and how many of PPO's DPO dominates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefopt.evaluate.frontier import Frontier, Point, dominated, frontier
from prefopt.progress import duration

HEAD = ("road", "setting", "seed", "step", "reward", "95 %", "KL", "± error", "tokens", "training", "")


def lines(sweep: Frontier) -> Iterator[str]:
    """What a person is told."""
    yield f"true reward {sweep.reward} on {sweep.prompts} held-out prompts, {sweep.samples} samples each; KL in nats"
    yield f"preferences: {sweep.made}"
    if not sweep.finished:
        yield "the sweep is not finished: more points are to come"
    yield ""
    best = frontier(sweep.points)
    yield from table([HEAD, *(_row(p, p in best) for p in sweep.points)])
    left_out = [p for p in sweep.points if not p.counted]
    if left_out:
        yield ""
        yield "not counted:"
        yield from (f"  {p.road} {p.setting}, seed {p.seed}: {p.why_not}" for p in left_out)
    yield ""
    yield from plateaus(sweep.points)
    yield from _against_ppo(sweep.points)


def _against_ppo(points: Sequence[Point]) -> Iterator[str]:
    """How many trainings of PPO a training of DPO dominates; that none counts is said too."""
    roads = [road for road in ("ppo-true", "ppo-learned") if any(p.road == road for p in points)]
    if not roads or not any(p.road == "dpo" for p in points):
        return
    yield "DPO against PPO, trainings of the same seed, each at its last step: checkpoints before it are not counted"
    for road in roads:
        count, of = dominated(points, "dpo", road)
        clear, _ = dominated(points, "dpo", road, clearly=True)
        if of:
            yield f"  DPO dominates {count} of {of} counted trainings of {road}; beyond the errors of both, {clear}"
        else:
            yield f"  no training of {road} counts, so that DPO is not compared with it"


def plateaus(points: Sequence[Point]) -> Iterator[str]:
    """What the true reward did in the last steps of PPO."""
    shown = [p for p in points if p.plateau is not None]
    if shown:
        yield "true reward on the held-out prompts over the last steps of PPO: rise [95 %], and the whole climb"
    for p in shown:
        f = p.plateau
        assert f is not None
        yield (
            f"  {p.road} {p.setting}, seed {p.seed}: {f.rise:+.3f} [{f.low:+.3f}, {f.high:+.3f}] in {f.steps} steps,"
            f" climb {f.climb:+.3f}: {f.told}"
        )
    if shown:
        yield ""


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns side by side, each as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(p: Point, on_frontier: bool) -> tuple[str, ...]:
    told = ("", "", "", "", "")
    if p.reward is not None and p.interval is not None and p.kl is not None:
        error = "at most" if p.kl_is == "bound" else f"{p.kl_se or 0:.2f}"
        bounds = f"[{p.interval[0]:+.3f}, {p.interval[1]:+.3f}]"
        told = (f"{p.reward:+.3f}", bounds, f"{p.kl:z.2f}", error, f"{p.length or 0:.1f}")
    mark = "on the frontier" if on_frontier else "" if p.counted else "not counted"
    time = "unknown" if p.seconds is None else duration(p.seconds) if p.seconds else ""
    return (p.road, p.setting, str(p.seed), str(p.step), *told, time, mark)
