"""What ``prefopt frontier`` measured, as a report tells it: reward against divergence, drawn and in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from prefopt.reports.figures import inline, plain
from prefopt.sweeps.points import FILE, Frontier, Point, dominated, frontier, read_frontier
from prefopt.sweeps.show import figure_of_frontier


@dataclass(frozen=True, slots=True)
class Row:
    """One point in words; ``best``: no other dominates it."""

    road: str
    setting: str
    reward: str
    kl: str
    length: str
    counts: str
    best: bool


@dataclass(frozen=True, slots=True)
class SweepFacts:
    """One sweep. ``sentences`` say what it showed, ``about`` how it was measured."""

    name: str
    about: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    rows: Sequence[Row]
    figure: Markup | None


def is_sweep(folder: str | Path) -> bool:
    """Whether a folder holds a sweep of ``prefopt frontier``, or is its file."""
    path = Path(folder)
    return path.name == FILE or (path / FILE).is_file()


def sweep_facts(folder: str | Path, *, number: int = 0) -> SweepFacts:
    """Read a sweep. Raises :class:`prefopt.errors.RunError`."""
    found = read_frontier(folder)
    path = Path(folder)
    name = (path.parent if path.name == FILE else path).resolve().name
    best = frontier(found.points)
    return SweepFacts(
        name=name,
        about=_about(found),
        sentences=list(_sentences(found)),
        rows=[_row(p, p in best) for p in found.points],
        figure=_figure(found, name=f"frontier{number}"),
    )


def _about(f: Frontier) -> list[tuple[str, str]]:
    told = [
        ("reference", f.reference),
        ("true reward", f.reward),
        ("prompts", f"{f.prompts:,}, {f.samples} samples each, at most {f.max_new_tokens} tokens"),
        ("preferences", f.made),
        ("status", "finished" if f.finished else "unfinished: points are still to come"),
    ]
    return [(title, value) for title, value in told if value]


def _sentences(f: Frontier) -> list[str]:
    """Whose points dominate whose, counted both by the numbers and beyond their errors."""
    roads = list(dict.fromkeys(p.road for p in f.points if p.stands))
    said = []
    if len(roads) < 2:
        said.append("fewer than two roads have a point that counts, so that nothing is compared")
    for one in roads:
        for other in roads:
            if one == other:
                continue
            plain, count = dominated(f.points, one, other)
            if plain:
                sure, _ = dominated(f.points, one, other, clearly=True)
                said.append(
                    f"{one} has more reward at no more KL than {plain} of the {count} trainings of {other} that count,"
                    f" each at its last step and within a seed; beyond the errors, than {sure}"
                )
    out = sum(not p.stands for p in f.points)
    if out:
        said.append(f"{out} of {len(f.points)} points do not count; the table says why")
    return said


def _row(p: Point, best: bool) -> Row:
    reward = "-" if p.reward is None else f"{p.reward:.3f}"
    if p.reward is not None and p.interval is not None:
        reward += f" ({p.interval[0]:.3f} to {p.interval[1]:.3f})"
    kl = "-" if p.kl is None else f"{p.kl:z.2f}"
    if p.kl is not None:
        kl = f"at most {kl}" if p.kl_is == "bound" else kl + ("" if p.kl_se is None else f" ± {p.kl_se:.2f}")
    counts = "yes" if p.stands else f"no: {p.why_not or 'it has no numbers'}"
    setting = f"{p.setting}, seed {p.seed}, step {p.step}"
    return Row(p.road, setting, reward, kl, "-" if p.length is None else f"{p.length:.1f}", counts, best)


def _figure(f: Frontier, *, name: str) -> Markup | None:
    """Rewards with their intervals over divergences; none where no point has numbers."""
    drawn = [replace(p, road=plain(p.road)) for p in f.points if None not in (p.reward, p.interval, p.kl)]
    if not drawn:
        return None
    figure = figure_of_frontier(replace(f, reward=plain(f.reward), points=tuple(drawn)), titled=False)
    return inline(figure, name=name, label="Expected reward against KL to the reference; the table has the numbers")
