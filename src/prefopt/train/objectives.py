"""Objectives of SFT (likelihood) and reward models (Bradley-Terry)."""

from __future__ import annotations

import math
from typing import Literal

import torch

from prefopt.losses.rl import bradley_terry
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, response_sums
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, LossResult, weighted_sum
from prefopt.train.columns import LossInputs, Values
from prefopt.train.objective import Normaliser, Objective

Average = Literal["tokens", "rows"]
MOST_NATS = 700.0  # above, a perplexity overflows


class LikelihoodObjective(Objective):
    """Negative log-likelihood of the trained tokens.

    Over the responses n of a global batch, of |y_n| trained tokens each::

        tokens   - sum_n log pi(y_n) / sum_n |y_n|
        rows     - mean_n (log pi(y_n) / |y_n|)

    ``nll`` is always the first, in nats per token, and ``perplexity`` its exponential.
    """

    def __init__(self, average: Average, *, device: torch.device) -> None:
        super().__init__(device)
        self.average = average

    def normaliser(self, batch: Batch) -> Normaliser:
        """Trained tokens, or responses."""
        length_N = batch.on_device(self.device)["length_N"].to(self.dtype)
        return (length_N.sum() if self.average == "tokens" else length_N.new_full((), len(length_N)),)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Log-probability of each response, ``logp_N``."""
        return {"logp_N": response_sums(scorer(packed), packed)}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        length_N = batch.on_device(self.device)["length_N"].to(self.dtype)
        nll_N = -values["logp_N"].to(self.dtype)
        numerator = nll_N.sum() if self.average == "tokens" else (nll_N / length_N).sum()
        loss = numerator / normaliser[0]
        metrics = {
            "nll": (nll_N.detach().sum(), length_N.sum()),
            "lengths": (length_N.sum(), length_N.new_full((), len(length_N))),
        }
        return LossResult(loss, {"loss": loss}, metrics, weights={"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """With ``perplexity``, the exponential of an average."""
        return record | {"perplexity": math.exp(min(record["nll"], MOST_NATS))}


class RewardObjective(Objective):
    """Bradley-Terry on the pairs of groups, those of a group weighing 1 together.

    A group of K ranked responses has K (K - 1) / 2 pairs, fewer where some are tied, each of which weighs 1 over their
    number (Ouyang et al. 2022, equation 1: all pairs of a prompt in one batch). ``margin``: times the difference of the
    data's scores, none without it. ``centre``: coefficient of the penalty on the sum of both rewards.
    """

    def __init__(self, *, device: torch.device, margin: float | None = None, centre: float = 0.0) -> None:
        super().__init__(device)
        self.margin, self.centre = margin, centre

    def normaliser(self, batch: Batch) -> Normaliser:
        """The groups: each has pairs of weight 1."""
        return (torch.full((), len(batch), dtype=self.dtype, device=self.device),)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """The reward of each response, ``reward_N``."""
        return {"reward_N": scorer(packed).to(self.dtype)}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        inputs = LossInputs(batch, "pairs", self.device, self.dtype)
        columns, weight_P = batch.columns, inputs.weight_R
        at = {side: inputs.column(f"{side}_P") for side in ("chosen", "rejected")}
        chosen, rejected = (values["reward_N"][at[side]] for side in at)
        label = inputs.column("label_P", self.dtype) if (columns["label_P"] != 1).any() else None
        margin = None
        if self.margin is not None:
            better, worse = (inputs.column("score_N", self.dtype)[place] for place in at.values())
            margin = self.margin * (better - worse)
        loss_P = bradley_terry(chosen, rejected, label, margin, centre=self.centre)
        total = (loss_P * weight_P).sum() / normaliser[0]
        seen = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": (chosen - rejected).detach(),
            "rewards/accuracies": 0.5 + 0.5 * (chosen - rejected).detach().sign(),
            "lengths/chosen": inputs.length_N[at["chosen"]],
            "lengths/rejected": inputs.length_N[at["rejected"]],
        }
        metrics = {name: weighted_sum(x, weight_P) for name, x in seen.items()}
        return LossResult(total, {"loss": total}, metrics, weights={"loss": normaliser[0]})
