"""Draws every loss and its gradient over the margin into docs/plots: python docs/plot_losses.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from prefopt.losses.declare import LOSSES, Loss

FOLDER = Path(__file__).with_name("plots")
POINTS = 121
# One pair whose log-ratios are +h/2 and -h/2. Lengths, scores and divergences are fixed; what is beyond the shorter
# response's length moves.
POLICY, LENGTH = -40.0, 20
INK, CHOSEN, REJECTED, FAINT = "#222222", "#1f6fb4", "#c8502a", "#b0b0b0"
RANGES = {"discopop": 40.0, "plackett_luce": 60.0}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files that a reader can search
    "svg.hashsalt": "prefopt",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "path.simplify_threshold": 0.05,
}
SIDES = ("of log π(w)", "of log π(l)")
Curves = dict[str, torch.Tensor]


def of_pairs(loss: Loss, h: torch.Tensor) -> tuple[torch.Tensor, Curves]:
    """The loss at each h, and its gradients in the two log-probabilities of the pair that moves.

    A loss of the whole batch sees eight more pairs, with log-ratios and reference margins spread around zero, and is
    given as a sum.
    """
    if not loss.whole_batch:
        value, gradients = _in_one_batch(loss, h, torch.zeros_like(h))
        return value, dict(zip(SIDES, gradients, strict=True))
    others = torch.linspace(-20, 20, 8, dtype=h.dtype)
    margins = torch.cat([h.new_zeros(1), others])
    found = [_in_one_batch(loss, torch.cat([x[None], others.roll(3)]), margins) for x in h]
    slopes = [torch.stack([gradients[side][0] for _, gradients in found]) for side in (0, 1)]
    return torch.stack([value.sum() for value, _ in found]), dict(zip(SIDES, slopes, strict=True))


def _in_one_batch(loss: Loss, h: torch.Tensor, margin: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Pairs with these h and reference margins: the loss of each, with its weight in the average, and its gradients."""
    tensors: dict[str, torch.Tensor] = {}
    for side, sign in (("chosen", 0.5), ("rejected", -0.5)):
        reference = POLICY + sign * margin
        policy = reference + sign * h
        tensors |= {f"{side}_logp_P": policy.requires_grad_(), f"{side}_ref_logp_P": reference}
        tensors |= {f"{side}_head_logp_P": policy.detach() / 2, f"{side}_head_ref_logp_P": reference / 2}
        fixed = {"length": LENGTH, "kl": 8 - 8 * sign, "score": 0.5 + sign}
        tensors |= {f"{side}_{name}_P": torch.full_like(reference, number) for name, number in fixed.items()}
    output = loss(tensors, loss.start())
    value = output.numerator_R / output.weight_R.sum() * len(output.weight_R)
    leaves = tensors["chosen_logp_P"], tensors["rejected_logp_P"]
    return value.detach(), torch.autograd.grad(value.sum(), leaves, materialize_grads=True)


def of_labels(loss: Loss, s: torch.Tensor) -> tuple[Curves, Curves]:
    """The loss of one response at each log-ratio, desirable and not, and its gradient. Mismatched ones are at 20."""
    values: Curves = {}
    slopes: Curves = {}
    for name, label in (("desirable", True), ("undesirable", False)):
        leaf, zero = s.clone().requires_grad_(), torch.zeros_like(s)
        tensors = {"logp_N": leaf, "ref_logp_N": zero, "label_N": torch.full_like(s, label, dtype=torch.bool)}
        tensors |= {"mismatched_logp_N": zero + 20, "mismatched_ref_logp_N": zero}
        value = loss(tensors).numerator_R
        (slopes[name],) = torch.autograd.grad(value.sum(), leaf)
        values[name] = value.detach()
    return values, slopes


def of_rankings(loss: Loss, x: torch.Tensor) -> tuple[Curves, Curves]:
    """Three responses at log-ratios x, 0 and -x: in that order, the first two tied, the last two tied."""
    values: Curves = {}
    slopes: Curves = {}
    spread = torch.stack([x, torch.zeros_like(x), -x], 1)
    group = torch.arange(len(x)).repeat_interleave(3)
    for name, tiers in (("1 > 2 > 3", [0, 1, 2]), ("1 = 2 > 3", [0, 0, 1]), ("1 > 2 = 3", [0, 1, 1])):
        leaf = spread.flatten().clone().requires_grad_()
        tier = torch.tensor(tiers).repeat(len(x))
        tensors = {"logp_N": leaf, "ref_logp_N": torch.zeros_like(leaf), "tier_N": tier, "group_N": group}
        value = loss(tensors).numerator_R
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        values[name], slopes[name] = value.detach(), gradient.view(-1, 3)[:, 0]
    return values, slopes


def figure(loss: Loss) -> Figure:
    """Value on the left, gradient on the right."""
    reach = RANGES.get(loss.name, 60.0)
    h = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    made = Figure(figsize=(6.8, 2.1), layout="constrained")
    left, right = made.subplots(1, 2)
    dashes = ("-", "--", ":")
    if loss.kind == "pairs":
        value, slopes = of_pairs(loss, h)
        if loss.name != "dpo" and loss.on_difference:
            left.plot(h, of_pairs(LOSSES["dpo"], h)[0], color=FAINT, label="dpo")
        left.plot(h, value, color=INK, label=loss.name)
        colours = (CHOSEN, REJECTED)
        where = "h = s(w) − s(l)" if loss.needs_reference else "log π(w) − log π(l)"
    else:
        curves: Callable[..., tuple[Curves, Curves]] = of_labels if loss.kind == "labels" else of_rankings
        values, slopes = curves(loss, h)
        colours = (CHOSEN, REJECTED, INK)
        for (name, value), colour, dash in zip(values.items(), colours, dashes, strict=False):
            left.plot(h, value, color=colour, linestyle=dash, label=name)
        where = "s(1) = −s(3), s(2) = 0" if loss.kind == "ranking" else "s, z = 20" if loss.needs_mismatched else "s"
    for (name, slope), colour, dash in zip(slopes.items(), colours, dashes, strict=False):
        right.plot(h, slope, color=colour, linestyle=dash, label=name)
    low, high = left.get_ylim()
    left.set_ylim(min(low, 0.0), high)
    summed = loss.kind == "pairs" and loss.whole_batch
    left.set_title("loss, summed with 8 other pairs" if summed else "loss", loc="left")
    right.set_title("gradient" if loss.kind != "ranking" else "gradient in log π(1)", loc="left")
    for axes in (left, right):
        axes.axvline(0, color=FAINT, linewidth=0.6)
        axes.set_xlabel(where)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, handlelength=1.6)
    return made


def draw(folder: Path = FOLDER, kind: str = "svg") -> None:
    """A file per loss; those of losses that are no more go."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for loss in LOSSES.values():
            metadata = {"Date": None, "Creator": None} if kind == "svg" else None
            figure(loss).savefig(folder / f"{loss.name}.{kind}", metadata=metadata, dpi=110)
    for path in folder.glob(f"*.{kind}"):
        if path.stem not in LOSSES:
            path.unlink()


if __name__ == "__main__":
    os.environ.pop("SOURCE_DATE_EPOCH", None)
    draw()
