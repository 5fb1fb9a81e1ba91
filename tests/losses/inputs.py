"""Inputs of every name that losses know, from log-probabilities of tokens or drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefopt.losses.common import LossOutput
from prefopt.losses.declare import Loss
from prefopt.losses.parse import State, WeightedLoss

Rows = Sequence[torch.Tensor]


def of_tokens(policy: dict[str, Rows], reference: dict[str, Rows], sum_sq: dict[str, Rows]) -> dict[str, torch.Tensor]:
    """The inputs of losses on pairs, from log-probabilities of the tokens of each response, by side."""
    tensors: dict[str, torch.Tensor] = {}
    shared = [min(len(w), len(x)) for w, x in zip(policy["chosen"], policy["rejected"], strict=True)]
    for side in ("chosen", "rejected"):
        for name, rows in ((f"{side}_%slogp_P", policy[side]), (f"{side}_%sref_logp_P", reference[side])):
            tensors[name % ""] = torch.stack([row.sum() for row in rows])
            tensors[name % "head_"] = torch.stack([row[:n].sum() for row, n in zip(rows, shared, strict=True)])
        tensors[f"{side}_length_P"] = torch.tensor([len(row) for row in policy[side]])
        means = [(row.detach() - sq).mean() for row, sq in zip(policy[side], sum_sq[side], strict=True)]
        tensors[f"{side}_wpo_P"] = torch.stack(means)
    return tensors


def drawn(seed: int, count: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Every input of losses on pairs, and of those on labels and rankings, of moderate size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(count, dtype=dtype, generator=generator)

    tensors: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        length = torch.randint(1, 40, (count,), generator=generator)
        tensors[f"{side}_length_P"] = length
        tensors[f"{side}_logp_P"] = -length * (0.2 + normal(1.0).abs())
        tensors[f"{side}_ref_logp_P"] = tensors[f"{side}_logp_P"] + normal(4.0)
        tensors[f"{side}_head_logp_P"] = 0.6 * tensors[f"{side}_logp_P"] + normal(0.5)
        tensors[f"{side}_head_ref_logp_P"] = 0.6 * tensors[f"{side}_ref_logp_P"] + normal(0.5)
        tensors[f"{side}_kl_P"] = normal(3.0).abs()
        tensors[f"{side}_score_P"] = normal(1.5)
        tensors[f"{side}_wpo_P"] = -normal(1.0).abs()
    tensors["label_P"] = torch.rand(count, dtype=dtype, generator=generator)
    tensors |= {name.replace("chosen_", "").replace("_P", "_N"): tensors[name] for name in list(tensors)[:3]}
    tensors["mismatched_logp_N"] = normal(5.0, -40.0)
    tensors["mismatched_ref_logp_N"] = tensors["mismatched_logp_N"] - normal(3.0).abs()
    tensors["label_N"] = torch.arange(count) % 3 != 0
    tensors["group_N"] = torch.arange(count) // 3
    tensors["tier_N"] = torch.arange(count).flip(0) % 3 % 2
    tensors["score_N"] = normal(1.0)
    return tensors


def leaves(loss: Loss, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The inputs that carry a gradient: what comes from the policy."""
    policy = [name for name in loss.inputs if "logp" in name and "ref" not in name and "mismatched" not in name]
    return [*policy, *(name for name in loss.inputs if "_kl_" in name)]


def mean(output: LossOutput) -> torch.Tensor:
    """The loss of a batch."""
    return output.numerator_R.sum() / output.weight_R.sum()


def total(
    terms: Sequence[WeightedLoss], tensors: Mapping[str, torch.Tensor], state: State | None = None
) -> torch.Tensor:
    """The loss of a batch under a weighted sum: every part has its own normaliser."""
    return torch.stack([term.weight * mean(term(tensors, state)) for term in terms]).sum()
