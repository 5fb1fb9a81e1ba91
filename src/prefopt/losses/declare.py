"""What a loss is: a pure function, and a declaration of what it computes, where it is from and what it needs.

A loss maps columns of log-probabilities to numerators, weights and metrics. The trainer divides the sum of the
numerators by the sum of the weights of the whole global batch, so that micro-batches never change the result.

Notation of formulas: w is the chosen response, l the rejected one, |y| the number of trained tokens of y;
s(y) = log pi(y) - log ref(y), summed over them; h = s(w) - s(l).

**The signature is the declaration of needs.** Tensor arguments are named as in :data:`INPUTS`, and nothing else is
computed; one with the default None is given where the data have it. Keyword-only arguments are options: numbers, words
or truth values. A loss on pairs may ask for ``margin_P`` or rewards (:data:`DERIVED`) instead of log-probabilities, and
may return the numerators alone, or with a mapping of further metrics: :func:`prefopt.losses.pair_output` does the rest.
``NAME_2P`` is ``chosen_NAME_P`` and ``rejected_NAME_P`` stacked, [2, P].

>>> from prefopt.losses.pairs import dpo
>>> LOSSES["dpo"].function is dpo, LOSSES["dpo"].needs_reference, LOSSES["simpo"].needs_reference
(True, True, False)
>>> LOSSES["dpo"].inputs
('chosen_logp_P', 'rejected_logp_P', 'chosen_ref_logp_P', 'rejected_ref_logp_P')
>>> declared(lambda margin_P, *, power=2.0: (1 - margin_P) ** power, "mine").defaults
{'beta': 0.1, 'power': 2.0, 'divergence': 'reverse_kl', 'divergence_alpha': 0.5}
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.core.options import Option, nearest
from prefopt.errors import ConfigError
from prefopt.losses.common import BETA, DIVERGENCE, SMOOTHING, LossOutput, implied, loss_option, pair_output, smoothed

Kind = Literal["pairs", "labels", "ranking"]
Value = float | str | bool
Function = Callable[..., LossOutput]

_OF_A_SIDE = {
    "logp": "log-probability of the {} response under the policy",
    "ref_logp": "log-probability of the {} response under the reference",
    "length": "trained tokens of the {} response",
    "score": "score of the {} response; NaN without one",
    "head_logp": "log-probability of the {} response's first min(|w|, |l|) tokens under the policy",
    "head_ref_logp": "log-probability of the same tokens of the {} response under the reference",
    "kl": "KL(reference || policy) summed over the positions of the {} response, with gradient",
    "wpo": "mean over the {} response's tokens of log(pi(token) / sum over the vocabulary of pi^2)",
}
# Sums of log-probabilities are over the trained tokens of a response, natural logarithm. P counts pairs, N responses,
# G groups. What comes from data or from the reference carries no gradient.
INPUTS: dict[Kind, dict[str, str]] = {
    "pairs": {
        **{f"{side}_{n}_P": t.format(side) for n, t in _OF_A_SIDE.items() for side in ("chosen", "rejected")},
        "label_P": "probability that the chosen response is better",
    },
    "labels": {
        "logp_N": "log-probability of the response under the policy",
        "ref_logp_N": "the same under the reference",
        "label_N": "whether the response is desirable (bool)",
        "length_N": "trained tokens of the response",
        "mismatched_logp_N": "log-probability under the policy of another row's response to this prompt",
        "mismatched_ref_logp_N": "the same under the reference",
    },
    "ranking": {
        "logp_N": "log-probability of the response under the policy",
        "ref_logp_N": "the same under the reference",
        "length_N": "trained tokens of the response",
        "tier_N": "rank of the response in its group, 0 the best; equal for ties (whole numbers)",
        "group_N": "index of the response's group, 0 to G - 1, the responses of a group together (whole numbers)",
        "score_N": "score of the response; NaN without one",
    },
}
DERIVED = {
    "margin_P": "beta f'(w) - beta f'(l), with f' of the divergence; adds the options beta and divergence",
    "chosen_reward_P": "beta s(w); adds the option beta",
    "rejected_reward_P": "beta s(l)",
    "chosen_log_ratio_P": "s(w)",
    "rejected_log_ratio_P": "s(l)",
    "chosen_implied_P": "f'(w) of the divergence; adds the option divergence",
    "rejected_implied_P": "f'(l)",
    "target_P": "label_P where the data have it, else 1, with label_smoothing, which it adds; for logistic(label=)",
}
"""Columns of pairs computed from log-probabilities under policy and reference, and from labels."""
_LOGPS = tuple(INPUTS["pairs"])[:4]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One loss, declared. ``inputs`` and ``optional_inputs`` are names of :data:`INPUTS`.

    ``whole_batch``: the columns must be those of the whole global batch. ``per_row``: ``numerator_R[i]`` belongs to row
    i, so that it can be weighted; false where the loss sorts. ``state0``: the running state at the start of a run.
    """

    name: str
    kind: Kind
    function: Function
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    formula: str = ""
    paper: str = ""
    when: str = ""
    whole_batch: bool = False
    per_row: bool = True
    state0: Mapping[str, float] | None = None
    notes: str = ""

    def needs(self, *parts: str) -> bool:
        """Whether the name of any input contains one of ``parts``."""
        return any(part in name for name in self.inputs for part in parts)

    @property
    def needs_reference(self) -> bool:
        """Whether it needs log-probabilities or distributions of the reference."""
        return self.needs("ref_logp", "_kl_")

    @property
    def needs_scores(self) -> bool:
        return self.needs("score")

    @property
    def needs_head_values(self) -> bool:
        """Whether it needs sums over the first tokens of a response."""
        return self.needs("head")

    @property
    def needs_distributions(self) -> bool:
        """Whether it needs the whole next-token distributions of policy and reference."""
        return self.needs("_kl_")

    @property
    def needs_mismatched(self) -> bool:
        return self.needs("mismatched")

    @property
    def on_difference(self) -> bool:
        """Whether it sees log-ratios only through their difference, so that other divergences are valid."""
        return any(o.name == "divergence" for o in self.options)

    @property
    def defaults(self) -> dict[str, Value]:
        return {o.name: o.default for o in self.options if not o.required}

    def start(self, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """The running state at the start of a run, scalars (float64 where the device has it), or None."""
        if self.state0 is None:
            return None
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in self.state0.items()}

    def __call__(
        self, tensors: Mapping[str, Tensor], state: dict[str, Tensor] | None = None, **options: Value
    ) -> LossOutput:
        """The loss on those of ``tensors`` that it reads; ``state`` as ``start`` or the last output gave it."""
        given: dict[str, Any] = {name: tensors[name] for name in self.inputs}
        given |= {name: tensors[name] for name in self.optional_inputs if name in tensors}
        if self.state0 is not None:
            given["state"] = state
        return self.function(**given, **(self.defaults | options))


LOSSES: dict[str, Loss] = {}


def loss(*, name: str | None = None, **about: Any) -> Callable[[Callable[..., Any]], Function]:
    """Declare the decorated function in :data:`LOSSES`.

    ``about``: ``formula``, ``paper``, ``when``, ``notes``, ``options`` (:func:`prefopt.losses.loss_option`; the others
    follow from the signature), ``whole_batch``, ``per_row`` and ``state0`` as in :class:`Loss`. The function that
    comes out takes the columns of ``Loss.inputs`` and returns a :class:`LossOutput`.
    """

    def register(function: Callable[..., Any]) -> Function:
        label = name or function.__name__
        if label in LOSSES:
            raise ConfigError(f"a loss named {label!r} is declared already; give yours another name")
        LOSSES[label] = declared(function, label, **about)
        return LOSSES[label].function

    return register


def declared(
    function: Callable[..., Any],
    name: str,
    *,
    kind: Kind | None = None,
    options: Iterable[Option] = (),
    state0: Mapping[str, float] | None = None,
    **about: Any,
) -> Loss:
    """A function as a loss; without ``kind`` the names of its arguments decide. Raises ``ConfigError``."""
    found = _signature(function, name)
    kind = kind or _kind_of(found.columns, name)
    read = [part for column in found.columns for part in _parts(column)]
    known = [*INPUTS[kind], *(DERIVED if kind == "pairs" else ())]
    for argument in read + found.optional:
        if argument not in known:
            new = f"{argument[:-2]}_P"
            guess = f"; it is now called {new}" if argument[-2:] == "_G" and new in known else nearest(argument, known)
            raise ConfigError(f"loss {name}: nothing is called {argument!r} for a loss of kind {kind}{guess}")
    described = {o.name: o for o in options}
    own = [_described(o, described.pop(o.name, o)) for o in found.options]
    assert not described, f"{name}: the function does not read {set(described)}"
    assert found.state == (state0 is not None), f"{name}: state0 goes with an argument named state"
    derived = set(read) & DERIVED.keys()
    before = [BETA] if any("margin" in column or "reward" in column for column in derived) else []
    after = [SMOOTHING] if "target_P" in read else []
    after += DIVERGENCE if any("margin" in column or "implied" in column for column in derived) else ()
    names = {o.name for o in own}
    logps = _LOGPS if derived - {"target_P"} else ()
    loss = Loss(
        name=name,
        kind=kind,
        function=function,
        inputs=(*logps, *(column for column in read if column not in (*DERIVED, *logps))),
        optional_inputs=(*found.optional, *(["label_P"] if "target_P" in read else [])),
        options=(*(o for o in before if o.name not in names), *own, *(o for o in after if o.name not in names)),
        state0=state0,
        **about,
    )
    return replace(loss, function=_on_inputs(loss, found.columns))


def _parts(column: str) -> tuple[str, ...]:
    """The two columns that a stacked one holds; any other by itself."""
    name = column.removesuffix("_2P")
    return (column,) if name == column else (f"chosen_{name}_P", f"rejected_{name}_P")


def _on_inputs(loss: Loss, columns: Sequence[str]) -> Function:
    """The function of ``loss`` as one of its inputs: derived columns are computed, and its output is completed."""
    function, defaults, names = loss.function, loss.defaults, (*loss.inputs, *loss.optional_inputs)
    stacked = [column for column in columns if _parts(column) != (column,)]
    on_ratios = any(part in DERIVED and part != "target_P" for column in columns for part in _parts(column))
    unread = {*names, *defaults, *DERIVED} - inspect.signature(function).parameters.keys()

    @functools.wraps(function)
    def on_inputs(*args: Tensor, **named: Any) -> LossOutput:
        named.update(zip(names, args, strict=False))
        values = defaults | named
        first = values[names[0]]
        if loss.state0 is not None and not named.get("state"):
            named["state"] = loss.start(first.device)
        derived = _derived(values) if on_ratios else {}
        if "target_P" in columns:
            derived["target_P"] = smoothed(values.get("label_P"), values["label_smoothing"], first.dtype)
        found = named | derived
        found |= {column: torch.stack([found[part] for part in _parts(column)]) for column in stacked}
        output = function(**{name: value for name, value in found.items() if name not in unread})
        if isinstance(output, LossOutput):
            return output
        numerator, metrics = output if isinstance(output, tuple) else (output, {})
        if not on_ratios:
            return LossOutput(numerator, torch.ones_like(numerator.detach()), metrics)
        rewards = derived["chosen_reward_P"], derived["rejected_reward_P"]
        return pair_output(numerator, *rewards, values["chosen_logp_P"], values["rejected_logp_P"], metrics=metrics)

    return on_inputs


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of :data:`DERIVED` on log-ratios; a loss without beta has rewards of beta 1."""
    divergence, alpha = values.get("divergence", "reverse_kl"), values.get("divergence_alpha", 0.5)
    found: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        ratio = values[f"{side}_logp_P"] - values[f"{side}_ref_logp_P"]
        slope = implied(ratio, divergence, alpha)
        found |= {f"{side}_log_ratio_P": ratio, f"{side}_implied_P": slope}
        found[f"{side}_reward_P"] = values.get("beta", 1.0) * slope
    return found | {"margin_P": found["chosen_reward_P"] - found["rejected_reward_P"]}


def _described(o: Option, described: Option) -> Option:
    """The option as it is described, with the type and default of the signature."""
    kind = described.type if described.choices else o.type
    return replace(described, type=kind, required=o.required, default=o.default, default_text=o.default_text)


@dataclass(slots=True)
class _Signature:
    """The arguments of a function by their role."""

    columns: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    state: bool = False


def _signature(function: Callable[..., Any], name: str) -> _Signature:
    found, empty = _Signature(), inspect.Parameter.empty
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"loss {name}: name every argument; {parameter} does not say what the loss needs")
        if key == "state":
            found.state = True
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            (found.columns if parameter.default is empty else found.optional).append(key)
        else:
            default = None if parameter.default is empty else parameter.default
            if default is not None and not isinstance(default, (int, float, str, bool)):
                raise ConfigError(
                    f"loss {name}: option {key} has {default!r} as default; it must be a number or a word"
                )
            found.options.append(loss_option(key, default=default))
    return found


def _kind_of(columns: list[str], name: str) -> Kind:
    if any(word.startswith(("chosen", "rejected")) or word.endswith("P") for word in columns):
        return "pairs"
    if "label_N" in columns:
        return "labels"
    if "tier_N" in columns or "group_N" in columns:
        return "ranking"
    raise ConfigError(
        f"loss {name}: its arguments are {', '.join(columns) or 'none'}; name them margin_P, or chosen_logp_P and"
        " rejected_logp_P for pairs, logp_N and label_N for labels, or logp_N, tier_N and group_N for rankings (see"
        " docs/methods.md)"
    )
