"""From what a person writes, ``dpo:1.0,nll:0.2`` and ``beta=0.1``, to losses with their weights and options.

>>> [(t.loss.name, t.weight, t.values["beta"]) for t in parse_losses("dpo:2,simpo", ["simpo.beta=5"], beta=0.3)]
[('dpo', 2.0, 0.3), ('simpo', 1.0, 5.0)]
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from prefopt.core.options import nearest
from prefopt.errors import ConfigError
from prefopt.losses.common import WEIGHTINGS, Weighting
from prefopt.losses.declare import LOSSES, Loss, LossOutput, Value, declared

State = dict[str, dict[str, torch.Tensor]]


class Term(NamedTuple):
    """One part of a weighted sum: the loss, its weight, and a value for each of its options.

    ``weighting``, where there is one, multiplies the loss pair by pair, under the options ``weighting_values``.
    """

    loss: Loss
    weight: float
    values: dict[str, Value]
    weighting: Weighting | None = None
    weighting_values: dict[str, Value] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What loss and weighting must be given."""
        return self.loss.inputs + (self.weighting.inputs if self.weighting else ())

    def __call__(self, tensors: Mapping[str, torch.Tensor], state: State | None = None) -> LossOutput:
        """The loss, without the term's weight, on tensors named as in ``INPUTS``; ``state`` is that of all terms."""
        output = self.loss(tensors, (state or {}).get(self.loss.name), **self.values)
        if self.weighting is None:
            return output
        given = {name: tensors[name] for name in self.weighting.inputs}
        return self.weighting.function(output, **given, **(self.weighting_values or {}))


def parse_losses(
    text: str,
    options: Sequence[str] = (),
    *,
    beta: float | None = None,
    label_smoothing: float | None = None,
    weighting: str | None = None,
) -> tuple[Term, ...]:
    """The terms of ``NAME[:WEIGHT],...``, where a name is one of ``LOSSES`` or ``module:function``, one's own.

    ``options`` are ``NAME=VALUE``, for every chosen loss that reads it, or ``LOSS.NAME=VALUE``, which wins over it;
    ``beta`` and ``label_smoothing``, where not None, are two more of the first kind. ``weighting`` is one of
    ``WEIGHTINGS``, whose options are named as a loss's are. Raises ``ConfigError`` for what does not exist, is out of
    range, comes twice, or is read by no chosen loss.
    """
    chosen = _chosen(text)
    losses = [loss for loss, _ in chosen]
    factor = _weighting(weighting, losses)
    factor_values, options = _weighting_values(factor, options)
    given: dict[str, dict[str, Value]] = {loss.name: {} for loss in losses}
    shared = {"beta": beta, "label_smoothing": label_smoothing}
    for name, value in shared.items():
        if value is not None:
            _set(given, losses, None, name, value, f"--{name.replace('_', '-')}")
    specific: dict[str, dict[str, Value]] = {loss.name: {} for loss in losses}
    for item in options:
        scope, name, word = _split_option(item)
        name = name.replace("-", "_")
        place = f"--loss-options {item.partition('=')[0]}"
        target = given if scope is None else specific
        _set(target, losses, scope, name, word, place)
    terms = []
    for loss, weight in chosen:
        told = given[loss.name] | specific[loss.name]
        values = loss.defaults | told
        for o in loss.options:
            if o.name not in values:
                raise ConfigError(f"--loss {loss.name} needs --loss-options {o.name}=VALUE, {o.expects}")
            if o.only is not None and o.name in told and values[o.only[0]] != o.only[1]:
                raise ConfigError(
                    f"--loss {loss.name} reads {o.name} only with {o.only[0]}={str(o.only[1]).lower()}; leave it out"
                )
        terms.append(Term(loss, weight, values, factor, factor_values))
    return tuple(terms)


def _chosen(text: str) -> list[tuple[Loss, float]]:
    found: list[tuple[Loss, float]] = []
    for part in text.split(","):
        loss, weight = _one(part.strip(), text)
        for other, _ in found:
            if other.name == loss.name:
                raise ConfigError(f"--loss {text}: {loss.name} comes twice; give it one weight")
            if other.kind != loss.kind:
                raise ConfigError(
                    f"--loss {text}: {other.name} is a loss on {other.kind} and {loss.name} one on {loss.kind}; a sum"
                    " takes one kind"
                )
        found.append((loss, weight))
    return found


def _one(part: str, text: str) -> tuple[Loss, float]:
    """A loss and its weight from ``NAME[:WEIGHT]`` or ``module:function[:WEIGHT]``."""
    words = [word.strip() for word in part.split(":")]
    name = words[0].replace("-", "_")
    if name in LOSSES and len(words) <= 2:
        return LOSSES[name], _weight(words[1], part) if len(words) == 2 else 1.0
    own = len(words) in (2, 3) and words[0] and words[1].isidentifier()
    if not own:
        guess = nearest(words[0], list(LOSSES)) or "; prefopt losses lists them, and module:function is one's own"
        raise ConfigError(f"--loss {text}: there is no loss {words[0]!r}{guess}")
    return _own(words[0], words[1]), _weight(words[2], part) if len(words) == 3 else 1.0


def _weighting(name: str | None, losses: Sequence[Loss]) -> Weighting | None:
    if name is None:
        return None
    if name not in WEIGHTINGS:
        guess = nearest(name, list(WEIGHTINGS)) or f"; there is {', '.join(WEIGHTINGS)}"
        raise ConfigError(f"--weighting {name}: there is no such weighting{guess}")
    for loss in losses:
        if loss.kind != "pairs" or not loss.per_row:
            why = "sorts the batch" if loss.kind == "pairs" else f"is a loss on {loss.kind}"
            raise ConfigError(f"--weighting {name} weighs pair by pair, and {loss.name} {why}; leave one of them out")
    return WEIGHTINGS[name]


def _weighting_values(factor: Weighting | None, options: Sequence[str]) -> tuple[dict[str, Value], list[str]]:
    """The values of the weighting's options, and the options that are not the weighting's."""
    if factor is None:
        return {}, list(options)
    known = {o.name: o for o in factor.options}
    values = {o.name: o.default for o in factor.options if o.default is not None}
    others = []
    for item in options:
        scope, name, word = _split_option(item)
        if scope != factor.name:
            others.append(item)
        elif name not in known:
            guess = nearest(name, list(known))
            raise ConfigError(f"--loss-options {scope}.{name}: {scope} does not read {name}{guess}")
        else:
            values[name] = known[name].checked(word, f"--loss-options {scope}.{name}")
    return values, others


def _weight(word: str, part: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"--loss {part}: the weight is {word!r}; it must be a number above 0")
    return weight


def _own(module: str, function: str) -> Loss:
    """A function of the user's, found from the current folder or among what is installed."""
    label, here = f"{module}:{function}", str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise ConfigError(f"--loss {label}: {module} imports {error.name}, which is not installed") from error
        guess = nearest(module, list(LOSSES))
        raise ConfigError(f"--loss {label}: there is no module {module} in {here} or installed{guess}") from error
    except Exception as error:
        raise ConfigError(f"--loss {label}: importing {module} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    what = getattr(found, function, None)
    if what is None:
        raise ConfigError(f"--loss {label}: {module} has no {function}{nearest(function, list(vars(found)))}")
    if not callable(what):
        raise ConfigError(f"--loss {label}: {function} is no function but of type {type(what).__name__}")
    return next((loss for loss in LOSSES.values() if loss.function is what), None) or declared(what, label)


def _split_option(item: str) -> tuple[str | None, str, str]:
    """``(LOSS or None, NAME, VALUE)``."""
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"--loss-options {item}: write NAME=VALUE or LOSS.NAME=VALUE")
    scope, dot, name = key.strip().rpartition(".")
    return (scope if dot else None), name, value.strip()


def _set(
    target: dict[str, dict[str, Value]], losses: list[Loss], scope: str | None, name: str, value: object, place: str
) -> None:
    """Check one option and hand it to the losses that read it."""
    if scope is not None:
        aimed = [x for x in losses if scope.replace("-", "_") in (x.name, x.name.rpartition(":")[2]) or scope == x.name]
        if not aimed:
            names = [x.name for x in losses]
            guess = nearest(scope, names) or f"; it is {', '.join(names)}"
            raise ConfigError(f"{place}: {scope} is not what --loss names{guess}")
        losses = aimed
    readers = [(loss, o) for loss in losses for o in loss.options if o.name == name]
    if not readers:
        known = sorted({o.name for loss in losses for o in loss.options})
        guess = (
            nearest(name, known) or f"; {'what is read is ' + ', '.join(known) if known else 'there are no options'}"
        )
        verb = "do" if len(losses) > 1 else "does"
        raise ConfigError(f"{place}: {' and '.join(x.name for x in losses)} {verb} not read {name}{guess}")
    for loss, o in readers:
        if name in target[loss.name]:
            raise ConfigError(f"{place} is given twice for {loss.name}; leave one out")
        target[loss.name][name] = o.checked(value, place)
