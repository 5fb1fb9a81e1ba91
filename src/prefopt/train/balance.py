"""An objective with the model's load-balancing loss beside it.

That loss is a product of two averages over all tokens of a batch, so that it is computed on the whole global batch:
what a micro-batch gives is sums, and a batch that is cut takes two passes (see ``step.py``). Its value and gradient
are the same however a batch is cut or packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefopt.data.packer import PackedBatch
from prefopt.errors import ConfigError
from prefopt.model.packed import PackedModel
from prefopt.model.routing import Routers, RoutingSums, routers_of
from prefopt.train.facts import Values
from prefopt.train.objective import Normaliser, Objective
from prefopt.train.sums import Outcome, Record, State

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
