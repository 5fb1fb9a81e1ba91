"""Draws the figures of docs/derivation.md from theory.py: python docs/plot_derivation.py."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from prefopt import theory

FOLDER = Path(__file__).with_name("figures")
REF = theory.normalised(np.log([0.4, 0.3, 0.2, 0.1]))
REWARD = np.array([1.0, -0.5, 0.5, 0.0])
NAMES = ("yes", "no", "maybe", "I cannot say")
BETAS = np.geomspace(0.05, 20, 40)


def save(figure: plt.Figure, folder: Path, name: str) -> None:
    """An SVG that is the same to the byte whenever it is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": "prefopt", "svg.fonttype": "none"}):
        figure.savefig(folder / f"derivation-{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def optimum(folder: Path) -> None:
    """What the best policy says, as beta goes from bold to shy."""
    figure, axes = plt.subplots(figsize=(5, 3))
    best = np.exp([theory.optimal_logp(REF, REWARD, beta) for beta in BETAS])
    for y, name in enumerate(NAMES):
        (line,) = axes.semilogx(BETAS, best[:, y], label=name)
        axes.axhline(np.exp(REF[y]), color=line.get_color(), linewidth=0.6, linestyle=":")
    axes.set_xlabel("beta")
    axes.set_ylabel("probability under the optimum")
    axes.legend(fontsize=7)
    save(figure, folder, "optimum")


def frontier(folder: Path) -> None:
    """Expected reward against divergence: optima lie on a curve, every other policy below it."""
    figure, axes = plt.subplots(figsize=(5, 3))
    chance = np.random.Generator(np.random.PCG64(0))
    others = theory.normalised(REF + chance.normal(size=(80, 4)) * chance.uniform(0.2, 2.5, (80, 1)))
    axes.scatter(theory.kl(others, REF), theory.expected(others, REWARD), s=4, color="0.6", label="other policies")
    best = np.array([theory.optimal_logp(REF, REWARD, beta) for beta in BETAS])
    axes.plot(theory.kl(best, REF), theory.expected(best, REWARD), label="optima, a beta each")
    axes.set_xlim(0, 1.2)
    axes.set_xlabel("KL from the reference, nats")
    axes.set_ylabel("expected reward")
    axes.legend(fontsize=7)
    save(figure, folder, "frontier")


def draw(folder: Path) -> None:
    """All figures."""
    for figure in (optimum, frontier):
        figure(folder)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
