"""Objectives beside those on preferences: likelihood (SFT), Bradley-Terry (reward models), load balancing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.errors import ConfigError, DataError
from prefopt.losses.rl import bradley_terry
from prefopt.model.architectures import Routers, RoutingSums, routers_of
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, response_sums
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, LossResult, State, tensor, weighted_sum
from prefopt.train.columns import LossInputs, Values
from prefopt.train.objective import Normaliser, Objective

Average = Literal["tokens", "rows"]
MOST_NATS = 700.0  # beyond, a perplexity is no number


class LikelihoodObjective(Objective):
    """Negative log-likelihood of the trained tokens.

    Over the responses n of a global batch, of |y_n| trained tokens each::

        tokens   - sum_n log pi(y_n) / sum_n |y_n|
        rows     - mean_n (log pi(y_n) / |y_n|)

    ``nll`` is the first of the two whichever is trained, in nats per token, and ``perplexity`` its exponential.
    """

    def __init__(self, average: Average, *, device: torch.device) -> None:
        super().__init__(device)
        self.average = average

    def normaliser(self, batch: Batch) -> Normaliser:
        """Trained tokens, or responses."""
        length_N = tensor(batch.length_N, self.device, self.dtype)
        return (length_N.sum() if self.average == "tokens" else length_N.new_tensor(float(len(length_N))),)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Log-probability of each response, ``logp_N``."""
        return {"logp_N": response_sums(scorer(packed), packed)}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        length_N = tensor(batch.length_N, self.device, self.dtype)
        nll_N = -values["logp_N"].to(self.dtype)
        numerator = nll_N.sum() if self.average == "tokens" else (nll_N / length_N).sum()
        loss = numerator / normaliser[0]
        metrics = {
            "nll": (nll_N.detach().sum(), length_N.sum()),
            "lengths": (length_N.sum(), length_N.new_tensor(float(len(length_N)))),
        }
        return LossResult(loss, {"loss": loss}, metrics, weights={"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """``perplexity``: of an average, so that it is computed once the average is there."""
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
        return (torch.tensor(float(len(batch)), dtype=self.dtype, device=self.device),)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """The reward of each response, ``reward_N``."""
        return {"reward_N": scorer(packed).to(self.dtype)}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        inputs = LossInputs(batch, "pairs", self.device, self.dtype)
        columns, weight_P = batch.columns, inputs.weight_R
        at = {"chosen": inputs.tensor(inputs.chosen), "rejected": inputs.tensor(inputs.rejected)}
        chosen, rejected = (values["reward_N"][at[side]] for side in at)
        label = inputs.tensor(columns["label_P"], self.dtype) if (columns["label_P"] != 1).any() else None
        margin = None
        if self.margin is not None:
            score_N = columns["score_N"]
            margin = inputs.tensor(self.margin * (score_N[inputs.chosen] - score_N[inputs.rejected]), self.dtype)
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


def check_scores(groups: Sequence[Group]) -> None:
    """Raises :class:`DataError` where a margin is asked for and a row has no scores."""
    for group in groups:
        if group.scores is None or not np.isfinite(group.scores).all():
            raise DataError("--margin needs a finite score of every response; leave it out", row=group.row)


class BalancedObjective(Objective):
    """``inner``, and ``coefficient`` times the load-balancing loss of ``routers``.

    That loss is a product of two averages over all tokens of a batch, so that it is computed on the whole global batch:
    a micro-batch gives sums, and a batch that is cut takes two passes (see ``step.py``). ``loss`` stays that of
    ``inner``, to be compared with other runs; the other is the metric ``router/aux_loss``, before it is multiplied.
    """

    whole_batch = True

    def __init__(self, inner: Objective, routers: Routers, coefficient: float) -> None:
        self.inner, self.routers, self.coefficient = inner, routers, coefficient
        self.compares = inner.compares
        super().__init__(inner.device)

    @property
    def state(self) -> State:
        """That of ``inner``."""
        return self.inner.state

    @state.setter
    def state(self, state: State) -> None:
        if state:
            self.inner.state = state

    def normaliser(self, batch: Batch) -> Normaliser:
        """That of ``inner``."""
        return self.inner.normaliser(batch)

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """Those of ``inner``, and a row of sums over the tokens of ``packed``."""
        with self.routers.recording() as calls:
            values = self.inner.score(scorer, packed, batch, reference)
        sums = self.routers.sums(calls, packed)
        return {
            **values,
            "router_prob_PE": sums.prob_E[None],
            "router_count_PE": sums.count_E[None],
            "router_rows_P": sums.rows[None],
        }

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        """See :class:`Objective`; ``values`` are those of the whole batch."""
        result = self.inner(batch, values, normaliser)
        sums = RoutingSums(
            values["router_prob_PE"].sum(0), values["router_count_PE"].sum(0), values["router_rows_P"].sum()
        )
        loss = sums.loss().to(result.total.dtype)
        metrics = {**result.metrics, "router/aux_loss": (loss.detach(), torch.ones_like(loss))}
        total = result.total + self.coefficient * loss
        return LossResult(total, result.shares, metrics, result.state, result.weights)

    def derived(self, record: Record) -> Record:
        """Those of ``inner``."""
        return self.inner.derived(record)


def balanced(inner: Objective, model: torch.nn.Module, asked: float | str | None) -> Objective:
    """``inner`` as it is where nothing is ``asked``, else with the load-balancing loss.

    Raises :class:`ConfigError` for a model that has no such loss.
    """
    if asked is None:
        return inner
    routers = routers_of(model)
    return BalancedObjective(inner, routers, balance_coefficient(asked, routers))


def balance_coefficient(asked: float | str, routers: Routers) -> float:
    """The value of ``--router-aux-loss-coef``. Raises :class:`ConfigError` where ``auto`` is nothing."""
    if asked != "auto":
        return float(asked)
    if not routers.coefficient:
        raise ConfigError(
            "--router-aux-loss-coef auto: the model's configuration has no router_aux_loss_coef; give a number"
        )
    return routers.coefficient


def describe_balance(model: torch.nn.Module, asked: float | str | None) -> str | None:
    """A line on what is added, where it is asked for. Raises :class:`ConfigError` as :func:`balanced`."""
    if asked is None:
        return None
    routers = routers_of(model)
    coefficient, layers = balance_coefficient(asked, routers), len(routers.modules)
    return f"loss: and {coefficient:g} times the load-balancing loss of {layers} routers, over all tokens of a batch"
