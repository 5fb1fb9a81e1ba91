"""Losses by name: ``dpo:1.0,nll:0.2`` with options such as ``beta=0.1``, and their descriptions in text.

>>> [(t.loss.name, t.weight, t.values["beta"]) for t in parse_losses("dpo:2,simpo", ["simpo.beta=5"], beta=0.3)]
[('dpo', 2.0, 0.3), ('simpo', 1.0, 5.0)]
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from prefopt.config.data import positive
from prefopt.config.dpo import DpoConfig
from prefopt.core.options import Option, checked, flag, nearest, parse_value
from prefopt.core.options import options as config_options
from prefopt.core.plugins import load_function, load_plugin, plugins
from prefopt.errors import ConfigError
from prefopt.losses.common import WEIGHTINGS, LossOutput, Weighting
from prefopt.losses.declare import LOSSES, Loss, Value, declared
from prefopt.losses.published import published

State = dict[str, dict[str, Tensor]]
Reader = TypeVar("Reader", bound=Loss | Weighting)
GROUP = "prefopt.losses"
"""The entry points of packages with further losses: a name and its ``module:function``."""
LIMITS = {o.name: o.limits for o in config_options(DpoConfig)}
WIDTH = 100
NOTATION = (
    "w is the chosen response, l the rejected one; pi the policy, ref the reference; |y| the trained tokens of y.",
    "s(y) = log pi(y) - log ref(y), summed over those tokens; h = s(w) - s(l). The loss of a batch is the mean, unless",
    "its rows have weights.",
)


class WeightedLoss(NamedTuple):
    """One loss of a weighted sum, with a value for each of its options.

    ``weighting`` multiplies the loss pair by pair, with the options ``weighting_values``.
    """

    loss: Loss
    weight: float
    values: dict[str, Value]
    weighting: Weighting | None = None
    weighting_values: dict[str, Value] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.loss.inputs + (self.weighting.inputs if self.weighting else ())

    def __call__(self, tensors: Mapping[str, Tensor], state: State | None = None) -> LossOutput:
        """The loss, without its weight, on columns named as in ``INPUTS``; ``state``: that of all losses, by name."""
        output = self.loss(tensors, (state or {}).get(self.loss.name), **self.values)
        if self.weighting is None:
            return output
        given = {name: tensors[name] for name in self.weighting.inputs}
        return self.weighting.function(output, **given, **(self.weighting_values or {}))


def find_loss(name: str, place: str = "--loss") -> Loss:
    """A loss of this package, of an installed one (:data:`GROUP`), or ``module:function``. Raises ``ConfigError``."""
    plain = name.replace("-", "_")
    if plain in LOSSES:
        return LOSSES[plain]
    outside = plugins(GROUP)
    module, _, function = name.partition(":")
    if name in outside:
        found = load_plugin(outside[name], f"{place} {name}")
    elif module and function.isidentifier():
        found = load_function(name, f"{place} {name}", list(LOSSES))
    else:
        guess = nearest(module, [*LOSSES, *outside]) or "; prefopt losses lists them; write your own as module:function"
        raise ConfigError(f"{place} {name}: there is no loss {module!r}{guess}")
    return next((loss for loss in LOSSES.values() if loss.function is found), None) or declared(found, name)


def parse_losses(
    text: str, options: Sequence[str] = (), *, weighting: str | None = None, **flags: Value | None
) -> tuple[WeightedLoss, ...]:
    """The losses of ``NAME[:WEIGHT],...``, see :func:`find_loss`.

    ``options`` are ``NAME=VALUE``, for every loss that reads it, or ``LOSS.NAME=VALUE``, which overrides it; ``flags``
    are of the first kind, where they are not None. ``weighting`` is one of ``WEIGHTINGS``; its options are written
    ``WEIGHTING.NAME=VALUE``. Raises ``ConfigError`` for what is unknown, out of range, given twice, or read by no loss.
    """
    chosen = _chosen(text)
    losses = [loss for loss, _ in chosen]
    factor = _weighting(weighting, losses)
    common: dict[str, dict[str, Value]] = {loss.name: {} for loss in losses}
    specific: dict[str, dict[str, Value]] = {found.name: {} for found in (*losses, factor) if found}
    for name, value in flags.items():
        if value is None:
            continue
        for loss, o in _readers(losses, name, flag(name)):  # the config has checked it, by the limits of most losses
            common[loss.name][name] = value if o.limits == LIMITS[name] else checked(o, value, flag(name))
    for item in options:
        scope, name, word = _split_option(item)
        place = f"--loss-options {item.partition('=')[0].strip()}"
        among: Sequence[Loss | Weighting] = losses
        if factor is not None and scope == factor.name:
            among = [factor]
        elif scope is not None:
            among = _named(losses, scope, place)
        for found, o in _readers(among, name, place):
            values = (common if scope is None else specific)[found.name]
            if o.name in values:
                raise ConfigError(f"{place} is given twice; leave one out")
            values[o.name] = checked(o, word if o.choices or o.type is str else parse_value(word), place)
    factor_values = factor.defaults | specific[factor.name] if factor else {}
    return tuple(
        WeightedLoss(loss, weight, _complete(loss, common[loss.name] | specific[loss.name]), factor, factor_values)
        for loss, weight in chosen
    )


def _chosen(text: str) -> list[tuple[Loss, float]]:
    found: list[tuple[Loss, float]] = []
    for part in text.split(","):
        words = [word.strip() for word in part.split(":")]
        # module:function may be without a weight, a name of one word may have one
        name = words[0] if words[0].replace("-", "_") in LOSSES or words[0] in plugins(GROUP) else ":".join(words[:2])
        rest = words[len(name.split(":")) :]
        if len(rest) > 1:
            raise ConfigError(f"--loss {text}: {part.strip()} is neither NAME:WEIGHT nor module:function:WEIGHT")
        loss, weight = (
            find_loss(name),
            positive(rest[0], f"--loss {part}: the weight is {rest[0]!r}; it") if rest else 1.0,
        )
        for other, _ in found:
            if other.name == loss.name:
                raise ConfigError(f"--loss {text}: {loss.name} comes twice; give it one weight")
            if other.kind != loss.kind:
                raise ConfigError(
                    f"--loss {text}: {other.name} is a loss on {other.kind} and {loss.name} one on {loss.kind}; a sum"
                    " needs losses of one kind"
                )
        found.append((loss, weight))
    return found


def _weighting(name: str | None, losses: Sequence[Loss]) -> Weighting | None:
    if name is None:
        return None
    if name not in WEIGHTINGS:
        guess = nearest(name, list(WEIGHTINGS)) or f"; there is {', '.join(WEIGHTINGS)}"
        raise ConfigError(f"--weighting {name}: there is no such weighting{guess}")
    for loss in losses:
        if loss.kind != "pairs" or not loss.per_row:
            why = "sorts the batch" if loss.kind == "pairs" else f"is a loss on {loss.kind}"
            raise ConfigError(f"--weighting {name} weights pair by pair, and {loss.name} {why}; leave one of them out")
    return WEIGHTINGS[name]


def _split_option(item: str) -> tuple[str | None, str, str]:
    """``(LOSS or None, NAME, VALUE)``."""
    key, equals, value = item.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"--loss-options {item}: write NAME=VALUE or LOSS.NAME=VALUE")
    scope, dot, name = key.strip().rpartition(".")
    return (scope if dot else None), name.replace("-", "_"), value.strip()


def _named(losses: Sequence[Loss], scope: str, place: str) -> list[Loss]:
    plain = scope.replace("-", "_")
    found = [x for x in losses if scope == x.name or plain in (x.name, x.name.rpartition(":")[2])]
    if not found:
        names = ", ".join(x.name for x in losses)
        raise ConfigError(f"{place}: {scope} is not what --loss names; it is {names}")
    return found


def _readers(among: Sequence[Reader], name: str, place: str) -> list[tuple[Reader, Option]]:
    readers = [(found, o) for found in among for o in found.options if o.name == name]
    if not readers:
        known = sorted({o.name for found in among for o in found.options})
        guess = nearest(name, known) or (f"; its options are {', '.join(known)}" if known else "; it has no options")
        raise ConfigError(f"{place}: {' and '.join(x.name for x in among)} does not read {name}{guess}")
    return readers


def _complete(loss: Loss, given: dict[str, Value]) -> dict[str, Value]:
    """The values of all options. Raises ``ConfigError`` for one that is missing, or not read beside the others."""
    values = loss.defaults | given
    for o in loss.options:
        if o.name not in values:
            raise ConfigError(f"--loss {loss.name} needs --loss-options {o.name}=VALUE, {o.expects}")
        if o.only is not None and o.name in given and values[o.only[0]] != o.only[1]:
            raise ConfigError(f"--loss {loss.name} reads {o.name} only with {condition(o)}; leave it out")
    return values


def condition(o: Option) -> str:
    """``divergence=alpha``: what an option is read with; empty for one that is always read."""
    return f"{o.only[0]}={str(o.only[1]).lower()}" if o.only else ""


def families() -> dict[str, list[Loss]]:
    """The losses of this package under headings, by their inputs, DPO first."""
    found: dict[str, list[Loss]] = {
        "Pairs: on the difference of log-ratios": [],
        "Pairs: on the log-ratios otherwise": [],
        "Pairs: without a reference": [],
        "Labelled responses": [],
        "Rankings": [],
    }
    difference, otherwise, free, labels, ranking = found.values()
    for loss in sorted(LOSSES.values(), key=lambda x: (x.name != "dpo", x.name)):
        if loss.kind != "pairs":
            (labels if loss.kind == "labels" else ranking).append(loss)
        elif not loss.needs_reference:
            free.append(loss)
        else:
            (difference if loss.on_difference else otherwise).append(loss)
    return found


def needs(loss: Loss) -> list[str]:
    """What the loss needs beyond the policy's log-probabilities, in words."""
    found = {
        "a reference": loss.needs_reference,
        "lengths": loss.needs("length"),
        "scores": loss.needs_scores,
        "log-probabilities of single tokens": loss.needs_head_values,
        "whole distributions at each token": loss.needs_distributions,
        "responses of other rows": loss.needs_mismatched,
        "the whole global batch at once": loss.whole_batch,
        "a running state": loss.state0 is not None,
    }
    return [words for words, needed in found.items() if needed]


def list_losses() -> str:
    """Every loss in a few lines, family by family, the weightings, and the names of losses of other packages."""
    parts = ["\n".join(NOTATION)]
    for title, losses in families().items():
        parts += [title, *(_entry(loss, needs(loss)) for loss in losses)]
    parts += ["Weightings of pairs", *(_entry(weighting, []) for weighting in WEIGHTINGS.values())]
    if outside := plugins(GROUP):
        parts += ["Of other packages", *(f"  {name:<18}{entry.value}" for name, entry in sorted(outside.items()))]
    parts.append(
        "prefopt losses NAME describes one, also your own as module:function: options, and where sources disagree."
    )
    return "\n\n".join(parts)


def describe_loss(name: str) -> str:
    """The description of a loss (see :func:`find_loss`) or a weighting. Raises ``ConfigError`` where there is none."""
    found = WEIGHTINGS.get(name.replace("-", "_")) or find_loss(name, "prefopt losses")
    lines = [found.name, ""]
    lines += [*_wrapped(found.formula, "  "), ""] if found.formula else []
    lines += _wrapped(f"Source: {found.paper}.", "") if found.paper else []
    lines += _wrapped(f"When: {found.when}", "") if found.when else []
    if isinstance(found, Loss):
        lines += _wrapped(f"On: {found.kind}. Needs: {', '.join(needs(found)) or 'nothing more'}.", "")
        inputs = [*found.inputs, *(f"{name} where the data have it" for name in found.optional_inputs)]
        lines += _wrapped(f"Inputs: {', '.join(inputs)}.", "")
        lines += _wrapped(f"Note: {found.notes}", "") if found.notes else []
    if found.options:
        lines += ["", "Options:"]
    for o in found.options:
        only = f"; only with {condition(o)}" if o.only else ""
        paper, trl = published(found.name, o.name)
        elsewhere = (f"; paper: {paper}" if paper else "") + (f"; TRL: {trl}" if trl else "")
        text = f"{o.name}: {o.help} ({o.expects}; default: {o.default_text}{elsewhere}{only})"
        lines += _wrapped(text, "  ", "    ")
    return "\n".join([*lines, "", details(found).replace(":math:`", "`").replace("``", "`")]).rstrip()


def details(found: Loss | Weighting) -> str:
    """The docstring without its first line, dedented."""
    return textwrap.dedent((found.function.__doc__ or "").partition("\n")[2]).strip()


def _entry(found: Loss | Weighting, needed: list[str]) -> str:
    options = ", ".join(f"{o.name} {o.default_text}" for o in found.options)
    lines = _wrapped(found.formula, f"  {found.name:<18}", " " * 20)
    lines += _wrapped(found.when, " " * 20)
    lines += _wrapped(f"Needs {', '.join(needed)}.", " " * 20) if needed else []
    lines += _wrapped(f"Options: {options}.", " " * 20) if options else []
    return "\n".join(lines + _wrapped(f"{found.paper}.", " " * 20))


def _wrapped(text: str, first: str, then: str | None = None) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=first if then is None else then)
