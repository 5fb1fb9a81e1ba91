"""The losses that a configuration names, with everything they need and every option that they would not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.option import flag
from prefopt.errors import ConfigError
from prefopt.losses.parse import Term, parse_losses

Terms = tuple[Term, ...]
_OF_REFERENCE = ("reference", "reference_adapter")


def terms_of(config: DpoConfig) -> tuple[DpoConfig, Terms]:
    """The losses of a run, and its configuration with what they decide filled in.

    Raises :class:`ConfigError` for a loss that does not exist, and for options that none of them reads.
    """
    terms = parse_losses(
        config.loss, config.loss_options or (), beta=config.beta, label_smoothing=config.label_smoothing
    )
    if not needs_reference(terms):
        for name in _OF_REFERENCE:
            if getattr(config, name) is not None:
                raise ConfigError(f"{flag(name)}: {names_of(terms)} compares with no reference; leave it out")
    ranks = terms[0].loss.kind == "ranking"
    if ranks and config.pairs is not None:
        raise ConfigError(f"--pairs: {names_of(terms)} ranks all responses at once; leave it out")
    filled: dict[str, Any] = {
        "beta": _common(terms, "beta"),
        "label_smoothing": _common(terms, "label_smoothing"),
        "pairs": None if ranks else config.pairs or "all",
    }
    return replace(config, **filled), terms


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
        values = ", ".join(f"{name} {_plain(value)}" for name, value in term.values.items())
        parts.append(f"{weight}{term.loss.name}{f' ({values})' if values else ''}")
    return " + ".join(parts)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _common(terms: Sequence[Term], name: str) -> object:
    """The value that all losses with this option have; none where they differ or have no such option."""
    values = {term.values[name] for term in terms if name in term.values}
    return values.pop() if len(values) == 1 else None
