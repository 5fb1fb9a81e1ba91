"""Mixtures of experts in training: losses on their routers, and how the tokens are shared out among the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prefopt.data.table import GroupTable
from prefopt.errors import ConfigError
from prefopt.model.architectures import causal_model, expert_fraction
from prefopt.model.flops import active_weights
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.routing import Routers, RoutingSums, balancing_routers, logit_routers, routers_of, token_counts
from prefopt.model.scorer import PackedModel
from prefopt.runs.experts import ExpertUse
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, LossResult, State
from prefopt.train.columns import Values
from prefopt.train.objective import Normaliser, Objective
from prefopt.train.policy import compiles


class RouterLosses(NamedTuple):
    """Coefficients of the losses on routers, None without one: ``balance`` of the load-balancing loss, ``z`` of the
    router z loss."""

    balance: float | None = None
    z: float | None = None


class RoutedObjective(Objective):
    """``inner``, ``losses`` on ``routers``, and a count of the tokens that each expert gets.

    The load-balancing loss is a product of two averages over all tokens of the global batch: micro-batches give sums,
    and several of them take two passes (see ``step.py``). The z loss is one average, over tokens and layers, and takes
    no second pass. In both a token counts once for every response that contains it. The metric ``loss`` is that of
    ``inner``, to be compared with other runs; ``router/aux_loss`` and ``router/z_loss`` are the others, without their
    coefficients. :attr:`LossResult.table` is the count [L, E], in which every position counts once.
    """

    def __init__(self, inner: Objective, routers: Routers, losses: RouterLosses) -> None:
        self.inner, self.routers, self.losses = inner, routers, losses
        self.whole_batch = inner.whole_batch or losses.balance is not None
        self.compares, self.other_models = inner.compares, inner.other_models
        super().__init__(inner.device)

    @property
    def state(self) -> State:
        return self.inner.state

    @state.setter
    def state(self, state: State) -> None:
        if state:
            self.inner.state = state

    def normaliser(self, batch: Batch) -> Normaliser:
        """Those of ``inner``, and last the tokens that the z loss averages over, times layers."""
        return (*self.inner.normaliser(batch), self._tokens(batch))

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        """The values of ``inner``, and sums over the tokens of ``packed`` as one row."""
        with self.routers.recording() as calls:
            values = self.inner.score(scorer, packed, batch, reference)
        tokens = token_counts(packed)
        rows = {"router_counts_BLE": self.routers.counts(calls, packed, tokens)}
        if self.losses.balance is not None:
            sums = self.routers.sums(calls, packed, tokens)
            rows |= {"router_prob_BE": sums.prob_E, "router_count_BE": sums.count_E, "router_rows_B": sums.rows}
        if self.losses.z is not None:
            rows["router_z_B"] = self.routers.z_sum(calls, packed, tokens)
        return values | {name: value[None] for name, value in rows.items()}

    def __call__(self, batch: Batch, values: Values, normaliser: Normaliser) -> LossResult:
        result = self.inner(batch, values, normaliser[:-1])
        total, metrics = result.total, dict(result.metrics)
        if self.losses.balance is not None:
            sums = (values[name].sum(0) for name in ("router_prob_BE", "router_count_BE", "router_rows_B"))
            loss = RoutingSums(*sums).loss().to(total.dtype)
            metrics["router/aux_loss"] = (loss.detach(), torch.ones_like(loss))
            total = total + self.losses.balance * loss
        if self.losses.z is not None:
            z_sum = values["router_z_B"].sum().to(total.dtype)
            metrics["router/z_loss"] = (z_sum.detach(), self._tokens(batch).to(z_sum))
            total = total + self.losses.z * (z_sum / normaliser[-1].to(z_sum))
        table = values["router_counts_BLE"].sum(0)
        return LossResult(total, result.shares, metrics, result.state, result.weights, table)

    def derived(self, record: Record) -> Record:
        return self.inner.derived(record)

    def _tokens(self, batch: Batch) -> torch.Tensor:
        """Tokens of all responses of ``batch``, each with its prompt, times the number of routers."""
        groups = GroupTable.of(batch.groups)
        tokens = int((groups.tokens_G + (groups.sequences_G - 1) * groups.prefix_G).sum())
        return torch.full((), float(tokens * len(self.routers.modules)), dtype=self.dtype, device=self.device)


def routed(inner: Objective, scorer: PackedModel, config: Any) -> Objective:
    """``inner`` with the losses on routers that ``config`` asks for and a count of the tokens of each expert; ``inner``
    itself for a model without experts, and where layers are compiled, inside which nothing is read.

    Raises :class:`ConfigError` for a model without such a loss.
    """
    losses = router_losses(scorer.model, config)
    if scorer.compiled is not None:
        assert losses == RouterLosses(), "routers inside of compiled layers cannot be read"
        return inner
    routers = routers_of(scorer.model)
    return inner if routers is None else RoutedObjective(inner, routers, losses)


def router_losses(model: torch.nn.Module, config: Any) -> RouterLosses:
    """The losses on routers that ``config`` asks for. Raises :class:`ConfigError` for a model without such a loss."""
    asked, z = config.router_aux_loss_coef, config.router_z_loss_coef
    balance = None if asked is None else balance_coefficient(asked, balancing_routers(model))
    if z is not None:
        logit_routers(model)
    return RouterLosses(balance, z)


def balance_coefficient(asked: float | str, routers: Routers) -> float:
    """The value of ``--router-aux-loss-coef``. Raises :class:`ConfigError` for ``auto`` where the model has none."""
    if asked != "auto":
        return float(asked)
    if not routers.coefficient:
        raise ConfigError(
            "--router-aux-loss-coef auto: the model's configuration has no router_aux_loss_coef; give a number"
        )
    return routers.coefficient


def expert_use(objective: Objective) -> ExpertUse | None:
    """What counts the tokens of each expert over a run, where ``objective`` counts those of a batch."""
    if not isinstance(objective, RoutedObjective):
        return None
    routers, asked = objective.routers, objective.losses.balance
    remedy = ""
    if routers.balances:
        remedy = "; --router-aux-loss-coef " + ("auto evens them out" if asked is None else f"is {asked:g}; raise it")
        if asked is None and not routers.coefficient:
            remedy = "; --router-aux-loss-coef 0.001 evens them out"
    return ExpertUse(routers.names, remedy)


def describe_routing(scorer: PackedModel, config: Any) -> Sequence[str]:
    """Lines on the experts of a model, and on the losses on its routers; none without experts. Raises as
    :func:`routed`."""
    losses, routers = router_losses(scorer.model, config), routers_of(scorer.model)
    if routers is None:
        return []
    text = causal_model(scorer.model).config.get_text_config()
    active, whole = active_weights(scorer.model)
    experts = round(routers.chosen / expert_fraction(text))
    lines = [
        f"experts: {len(routers.modules)} routers, {routers.chosen} of {experts} experts for a token, which uses"
        f" {active:,} of {whole:,} weights"
    ]
    over = f"of {len(routers.modules)} routers, over all tokens of a batch"
    if losses.balance is not None:
        lines.append(f"loss: and {losses.balance:g} times the load-balancing loss {over}")
    if losses.z is not None:
        lines.append(f"loss: and {losses.z:g} times the z loss {over}")
    if compiles(config, scorer):
        lines.append("experts: their shares of tokens are not measured inside of compiled layers; --compile off does")
    return lines
