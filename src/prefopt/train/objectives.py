"""Supervised fine-tuning: the negative log-likelihood of the trained tokens, by token or by response.

That loss is a product of two averages over all tokens of a batch, so that it is computed on the whole global batch:
what a micro-batch gives is sums, and a batch that is cut takes two passes (see ``step.py``). Its value and gradient
are the same however a batch is cut or packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.errors import ConfigError, DataError
from prefopt.losses.rl import bradley_terry
from prefopt.model.packed_model import PackedModel
from prefopt.model.packing import PackedBatch
from prefopt.model.routing import Routers, RoutingSums, routers_of
from prefopt.model.scorer import response_sums
from prefopt.runs.metrics import Record
from prefopt.train import rows
from prefopt.train import rows as items
from prefopt.train.inputs import Facts, Values
from prefopt.train.objective import Normaliser, Objective
from prefopt.train.results import Outcome, State, summed

Average = Literal["tokens", "rows"]
MOST_NATS = 700.0  # beyond, a perplexity is no number


class LikelihoodObjective:
    """See :class:`prefopt.train.objective.Objective`.

    Over the responses n of a global batch, of |y_n| trained tokens each::

        tokens   - sum_n log pi(y_n) / sum_n |y_n|
        rows     - mean_n (log pi(y_n) / |y_n|)

    ``nll`` is the first of the two whichever is trained, in nats per token, and ``perplexity`` its exponential.
    """

    whole_batch = False

    def __init__(self, groups: Sequence[Group], average: Average, *, device: torch.device) -> None:
        self.groups, self.average, self.device = groups, average, device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state: State = {}

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """Trained tokens, or responses, of these groups."""
        length_N = self._lengths(indices)
        return (length_N.sum() if self.average == "tokens" else length_N.new_tensor(float(len(length_N))),)

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Nothing is compared with."""
        return {}

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Log-probability of each response, ``logp_N``."""
        return {"logp_N": response_sums(scorer(batch), batch)}

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """The loss on ``values`` of these groups."""
        length_N = self._lengths(indices)
        nll_N = -values["logp_N"].to(self.dtype)
        numerator = nll_N.sum() if self.average == "tokens" else (nll_N / length_N).sum()
        loss = numerator / normaliser[0]
        metrics = {
            "nll": (nll_N.detach().sum(), length_N.sum()),
            "lengths": (length_N.sum(), length_N.new_tensor(float(len(length_N)))),
        }
        return Outcome(loss, {"loss": loss}, metrics, self.state, {"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """``perplexity``: of a mean, so that it is taken once the mean is there."""
        return {"perplexity": math.exp(min(record["nll"], MOST_NATS))}

    def _lengths(self, indices: Sequence[int]) -> torch.Tensor:
        lengths = rows.lengths_of([self.groups[i] for i in indices]).astype(np.float64)
        return torch.from_numpy(lengths).to(self.device, self.dtype)


class RewardObjective:
    """See :class:`prefopt.train.objective.Objective`.

    A group of K ranked responses has K (K - 1) / 2 pairs, fewer where some are tied, each of which weighs 1 over their
    number (Ouyang et al. 2022, equation 1: all pairs of a prompt in one batch). ``pairs``: see
    :data:`prefopt.train.rows.WHICH`. ``margin``: times the difference of the data's scores, none without it.
    """

    whole_batch = False

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        device: torch.device,
        pairs: str = "all",
        margin: float | None = None,
        centre: float = 0.0,
    ) -> None:
        """Raises :class:`DataError` where a margin is asked for and a row has no scores."""
        self.groups, self.device, self.which, self.margin, self.centre = groups, device, pairs, margin, centre
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state: State = {}
        if margin is not None:
            for group in groups:
                if group.scores is None or not np.isfinite(group.scores).all():
                    raise DataError("--margin needs a finite score of every response; leave it out", row=group.row)

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """The groups: each has pairs of weight 1."""
        return (torch.tensor(float(len(indices)), dtype=self.dtype, device=self.device),)

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Nothing is compared with."""
        return {}

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """The reward of each response, ``reward_N``."""
        return {"reward_N": scorer(batch).to(self.dtype)}

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """The loss on ``values`` of these groups."""
        groups = [self.groups[i] for i in indices]
        facts = Facts(groups, "pairs", self.which, True, self.device, self.dtype)
        reward_N, rows, weight_R = values["reward_N"], facts.pairs, facts.weight_R
        chosen, rejected = (reward_N[facts.tensor(side)] for side in (rows.chosen, rows.rejected))
        label = facts.tensor(rows.label, self.dtype) if (rows.label != 1).any() else None
        margin = None
        if self.margin is not None:
            score_N = items.scores_of(groups)
            margin = facts.tensor(self.margin * (score_N[rows.chosen] - score_N[rows.rejected]), self.dtype)
        loss_R = bradley_terry(chosen, rejected, label, margin, centre=self.centre)
        total = (loss_R * weight_R).sum() / normaliser[0]
        length_N = facts.length_N
        seen = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": (chosen - rejected).detach(),
            "rewards/accuracies": 0.5 + 0.5 * (chosen - rejected).detach().sign(),
            "lengths/chosen": length_N[facts.tensor(rows.chosen)],
            "lengths/rejected": length_N[facts.tensor(rows.rejected)],
        }
        metrics = {name: summed(x, weight_R) for name, x in seen.items()}
        return Outcome(total, {"loss": total}, metrics, self.state, {"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """See :class:`prefopt.train.objective.Objective`."""
        return {}


METRIC = "router/aux_loss"


class BalancedObjective:
    """``inner``, and ``coefficient`` times the load-balancing loss of ``routers`` (see :class:`Objective`).

    ``loss`` stays that of ``inner``, to be compared with other runs; the other is the metric ``router/aux_loss``,
    before it is multiplied.
    """

    whole_batch = True

    def __init__(self, inner: Objective, routers: Routers, coefficient: float) -> None:
        self.inner, self.routers, self.coefficient = inner, routers, coefficient

    @property
    def state(self) -> State:
        """That of ``inner``."""
        return self.inner.state

    @state.setter
    def state(self, state: State) -> None:
        self.inner.state = state

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """That of ``inner``."""
        return self.inner.normaliser(indices)

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Those of ``inner``."""
        return self.inner.fixed(scorer, batch, indices)

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Those of ``inner``, and a row of sums over the tokens of ``batch``."""
        with self.routers.recording() as calls:
            values = self.inner.policy(scorer, batch, indices)
        sums = self.routers.sums(calls, batch)
        return {
            **values,
            "router_prob_PE": sums.prob_E[None],
            "router_count_PE": sums.count_E[None],
            "router_rows_P": sums.rows[None],
        }

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """See :class:`Objective`; ``values`` are those of the whole batch."""
        outcome = self.inner(values, indices, normaliser)
        sums = RoutingSums(
            values["router_prob_PE"].sum(0), values["router_count_PE"].sum(0), values["router_rows_P"].sum()
        )
        loss = sums.loss().to(outcome.total.dtype)
        metrics = {**outcome.metrics, METRIC: (loss.detach(), torch.ones_like(loss))}
        return outcome._replace(total=outcome.total + self.coefficient * loss, metrics=metrics)

    def derived(self, record: Record) -> Record:
        """Those of ``inner``."""
        return self.inner.derived(record)


def coefficient_of(asked: float | str, routers: Routers) -> float:
    """What ``--router-aux-loss-coef`` stands for. Raises :class:`ConfigError` where ``auto`` is nothing."""
    if asked != "auto":
        return float(asked)
    if not routers.coefficient:
        raise ConfigError(
            "--router-aux-loss-coef auto: the model's configuration has no router_aux_loss_coef; give a number"
        )
    return routers.coefficient


def balanced(inner: Objective, model: torch.nn.Module, asked: float | str | None) -> Objective:
    """``inner`` as it is where nothing is ``asked``, else with the load-balancing loss.

    Raises :class:`ConfigError` for a model that has no such loss.
    """
    if asked is None:
        return inner
    routers = routers_of(model)
    return BalancedObjective(inner, routers, coefficient_of(asked, routers))


def in_words(model: torch.nn.Module, asked: float | str | None) -> str | None:
    """A line on what is added, where it is asked for. Raises :class:`ConfigError` as :func:`balanced`."""
    if asked is None:
        return None
    routers = routers_of(model)
    coefficient, layers = coefficient_of(asked, routers), len(routers.modules)
    return f"loss: and {coefficient:g} times the load-balancing loss of {layers} routers, over all tokens of a batch"
