"""The losses of a configuration with all their options. Options that no loss reads are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prefopt.config.dpo import OF_LOSSES, DpoConfig, LossOptions
from prefopt.core.options import flag
from prefopt.data.validate import DataKind
from prefopt.errors import ConfigError
from prefopt.losses.declare import Value
from prefopt.losses.parse import WeightedLoss, parse_losses

Losses = tuple[WeightedLoss, ...]
_OF_REFERENCE = ("reference", "reference_adapter", "ref_model_sync_steps")


AnyLossOptions = TypeVar("AnyLossOptions", bound=LossOptions)


def losses_of(config: AnyLossOptions) -> tuple[AnyLossOptions, Losses]:
    """The configuration with the losses' defaults filled in, and the losses.

    Raises :class:`ConfigError` for an unknown loss, and for options that no loss reads.
    """
    flags = {name: getattr(config, name) for name in OF_LOSSES}
    losses = parse_losses(config.loss, config.loss_options or (), weighting=config.weighting, **flags)
    if not needs_reference(losses):
        # Where responses are drawn, their KL is measured from a reference whatever the loss.
        for name in _OF_REFERENCE if isinstance(config, DpoConfig) else ("ref_model_sync_steps",):
            if getattr(config, name) is not None:
                raise ConfigError(f"{flag(name)}: {names_of(losses)} uses no reference; leave it out")
    paired = losses[0].loss.kind == "pairs"
    if not paired and config.pairs is not None:
        raise ConfigError(f"--pairs: {names_of(losses)} is not a loss on pairs; leave it out")
    filled: dict[str, Any] = {}
    for name in OF_LOSSES:  # the value that all losses with this option share, else None
        values = {options[name] for options in map(read_by, losses) if name in options}
        filled[name] = values.pop() if len(values) == 1 else None
    filled["pairs"] = config.pairs or "all" if paired else None
    found = copy.copy(config)  # not replace(): values are checked already
    for name, value in filled.items():
        object.__setattr__(found, name, value)
    return found, losses


def data_kind(losses: Sequence[WeightedLoss]) -> DataKind:
    """The kind of rows that the losses need."""
    kind = losses[0].loss.kind
    return "scored" if kind == "pairs" and any(x.loss.needs_scores for x in losses) else kind


def needs_reference(losses: Sequence[WeightedLoss]) -> bool:
    """Whether any loss needs a reference."""
    return any(x.loss.needs_reference for x in losses)


def names_of(losses: Sequence[WeightedLoss]) -> str:
    """``dpo and nll``."""
    return " and ".join(x.loss.name for x in losses)


def describe(losses: Sequence[WeightedLoss]) -> str:
    """The losses in one line: ``dpo (beta 0.1, label_smoothing 0)``."""
    parts = []
    for x in losses:
        weight = f"{x.weight:g} " if len(losses) > 1 else ""
        parts.append(weight + _with_values(x.loss.name, read_by(x)))
    factor = losses[0].weighting
    times = f", times {_with_values(factor.name, losses[0].weighting_values or {})}" if factor else ""
    return " + ".join(parts) + times


def _with_values(name: str, values: Mapping[str, Value]) -> str:
    listed = ", ".join(f"{option} {_plain(value)}" for option, value in values.items())
    return f"{name} ({listed})" if listed else name


def read_by(x: WeightedLoss) -> dict[str, Value]:
    """The options that are read: some only apply for one value of another."""
    only = {o.name: o.only for o in x.loss.options if o.only is not None}
    return {n: v for n, v in x.values.items() if n not in only or x.values[only[n][0]] == only[n][1]}


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
