"""The losses that a configuration names, with everything they need and every option that they would not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.core.options import flag
from prefopt.data.validate import DataKind
from prefopt.errors import ConfigError
from prefopt.losses.declare import Value
from prefopt.losses.parse import Term, parse_losses

Terms = tuple[Term, ...]
_OF_REFERENCE = ("reference", "reference_adapter", "ref_model_sync_steps")


def terms_of(config: DpoConfig) -> tuple[DpoConfig, Terms]:
    """The losses of a run, and its configuration with what they decide filled in.

    Raises :class:`ConfigError` for a loss that does not exist, and for options that none of them reads.
    """
    terms = _parsed(config)
    if not needs_reference(terms):
        for name in _OF_REFERENCE:
            if getattr(config, name) is not None:
                raise ConfigError(f"{flag(name)}: {names_of(terms)} compares with no reference; leave it out")
    paired = terms[0].loss.kind == "pairs"
    if not paired and config.pairs is not None:
        raise ConfigError(f"--pairs: {names_of(terms)} is no loss on pairs; leave it out")
    filled: dict[str, Any] = {
        "beta": _common(terms, "beta"),
        "label_smoothing": _common(terms, "label_smoothing"),
        "divergence": _common(terms, "divergence"),
        "divergence_alpha": _common(terms, "divergence_alpha"),
        "pairs": config.pairs or "all" if paired else None,
    }
    return replace(config, **filled), terms


def _parsed(config: DpoConfig) -> Terms:
    """The losses with the options that have a flag of their own among the others."""
    options = list(config.loss_options or ())
    named: dict[str, Any] = {name: getattr(config, name) for name in ("beta", "label_smoothing", "weighting")}
    plain = parse_losses(config.loss, options, **named)
    for name in ("divergence", "divergence_alpha"):
        value = getattr(config, name)
        if value is None:
            continue
        if not any(name in term.values for term in plain):
            raise ConfigError(
                f"{flag(name)}: {names_of(plain)} sees more than a difference of log-ratios; leave it out"
            )
        options.append(f"{name}={value}")
    return parse_losses(config.loss, options, **named)


def data_kind(terms: Sequence[Term]) -> DataKind:
    """What the losses need of every row."""
    kind = terms[0].loss.kind
    return "scored" if kind == "pairs" and any(term.loss.needs_scores for term in terms) else kind


def needs_reference(terms: Sequence[Term]) -> bool:
    """Whether any loss compares with a reference."""
    return any(term.loss.needs_reference for term in terms)


def names_of(terms: Sequence[Term]) -> str:
    """``dpo and nll``."""
    return " and ".join(term.loss.name for term in terms)


def words(terms: Sequence[Term]) -> str:
    """One line for a person: ``dpo (beta 0.1, label_smoothing 0)``."""
    parts = []
    for term in terms:
        weight = f"{term.weight:g} " if len(terms) > 1 else ""
        parts.append(weight + _with_values(term.loss.name, read_by(term)))
    factor = terms[0].weighting
    times = f", times {_with_values(factor.name, terms[0].weighting_values or {})}" if factor else ""
    return " + ".join(parts) + times


def _with_values(name: str, values: Mapping[str, Value]) -> str:
    told = ", ".join(f"{option} {_plain(value)}" for option, value in values.items())
    return f"{name} ({told})" if told else name


def read_by(term: Term) -> dict[str, Value]:
    """The options that count: one may be read only together with a value of another."""
    only = {o.name: o.only for o in term.loss.options if o.only is not None}
    return {n: v for n, v in term.values.items() if n not in only or term.values[only[n][0]] == only[n][1]}


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _common(terms: Sequence[Term], name: str) -> object:
    """The value that all losses with this option have; none where they differ or have no such option."""
    values = {found[name] for found in map(read_by, terms) if name in found}
    return values.pop() if len(values) == 1 else None
