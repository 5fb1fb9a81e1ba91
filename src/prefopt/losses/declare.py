"""What a loss is: a pure function, and a declaration that says what it computes, where it is from and what it needs.

A loss maps vectors of log-probabilities to numerators, weights and metrics. It reads no configuration and knows no
model. The loop divides the sum of the numerators by the sum of the weights of the whole global batch, so that
micro-batches never change the result.

Notation of formulas: w is the chosen response, l the rejected one, |y| the number of trained tokens of y;
s(y) = log pi(y) - log ref(y), summed over them; h = s(w) - s(l).

**The signature is the declaration of needs**: the names of the tensor arguments are those of :data:`INPUTS`, and
nothing that no argument asks for is computed. One with the default None is taken where the data have it. What is
keyword-only is an option, a plain number or word.

>>> from prefopt.losses.declare import LOSSES
>>> from prefopt.losses.pairs import dpo
>>> LOSSES["dpo"].function is dpo, LOSSES["dpo"].needs_reference, LOSSES["simpo"].needs_reference
(True, True, False)
>>> LOSSES["dpo"].inputs
('chosen_logp_P', 'rejected_logp_P', 'chosen_ref_logp_P', 'rejected_ref_logp_P')
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from prefopt.core.options import Option, checked, nearest
from prefopt.errors import ConfigError

Kind = Literal["pairs", "labels", "ranking"]
Value = float | str | bool
Function = Callable[..., "LossOutput"]
_F = TypeVar("_F", bound=Function)

# Sums of log-probabilities are over the trained tokens of a response, natural logarithm. G counts pairs where the kind
# is pairs, and groups where it is ranking. What comes from data or from the reference carries no gradient.
INPUTS: dict[Kind, dict[str, str]] = {
    "pairs": {
        "chosen_logp_P": "log-probability of the chosen response under the policy",
        "rejected_logp_P": "the same of the rejected response",
        "chosen_ref_logp_P": "log-probability of the chosen response under the reference",
        "rejected_ref_logp_P": "the same of the rejected response",
        "chosen_length_P": "trained tokens of the chosen response",
        "rejected_length_P": "trained tokens of the rejected response",
        "chosen_score_P": "score of the chosen response; NaN where it has none",
        "rejected_score_P": "score of the rejected response; NaN where it has none",
        "label_P": "probability that the chosen response is the better one",
        "chosen_head_logp_P": "log-probability of the chosen response's first min(|w|, |l|) tokens under the policy",
        "rejected_head_logp_P": "the same of the rejected response",
        "chosen_head_ref_logp_P": "the same of the chosen response under the reference",
        "rejected_head_ref_logp_P": "the same of the rejected response under the reference",
        "chosen_kl_P": "KL(reference || policy) summed over the positions of the chosen response, with gradient",
        "rejected_kl_P": "the same of the rejected response",
        "chosen_wpo_P": "mean over the chosen response's tokens of log(pi(token) / sum over the vocabulary of pi^2)",
        "rejected_wpo_P": "the same of the rejected response",
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
        "tier_N": "rank of the response in its group, 0 the best; equal where tied (whole numbers)",
        "group_N": "index of the response's group, 0 to G - 1, the responses of a group together (whole numbers)",
        "score_N": "score of the response; NaN where it has none",
    },
}


class LossOutput(NamedTuple):
    """What a loss gives.

    ``numerator_R`` and ``weight_R`` [G] ([N] for labels), the latter constant with respect to the policy; ``metrics``
    [G] without gradients, to be averaged (a NaN is left out: the row has no such value); ``state``, the running state
    after this batch, of losses that keep one.
    """

    numerator_R: torch.Tensor
    weight_R: torch.Tensor
    metrics: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOption:
    """A number, a truth value or one of some words.

    ``default`` is the one in the function's signature, filled in on declaration; None: it must be given (a number).
    ``only`` names another option and the value of it with which alone this one is read.
    """

    name: str
    help: str = ""
    default: Value | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    only: tuple[str, Value] | None = None

    def checked(self, value: object, place: str) -> Value:
        """The value with its type. Raises ``ConfigError``, which names ``place`` and what would be right."""
        if isinstance(value, str) and not self.choices and not isinstance(self.default, str):
            value = _read(value)
        return checked(self._option, value, place)  # type: ignore[no-any-return]

    @property
    def expects(self) -> str:
        """What a value must be, in words: ``a number above 0``."""
        return self._option.expects

    @property
    def _option(self) -> Option:
        bounds = {"of at least": self.at_least, "above": self.above, "of at most": self.at_most, "below": self.below}
        limits = tuple((word, limit) for word, limit in bounds.items() if limit is not None)
        kind: Any = float if self.default is None else type(self.default)
        kind = Literal[self.choices] if self.choices else float if kind is int else kind
        return Option(name=self.name, type=kind, help=self.help, group="loss", required=True, limits=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One loss, declared. ``inputs`` and ``optional_inputs`` are names of :data:`INPUTS`.

    ``whole_batch``: the vectors must be those of the whole global batch. ``per_row``: ``numerator_R[i]`` belongs to
    pair (group, response) i, so that it can be weighted; false where the loss sorts. ``state0`` is the running state
    that a run begins with, or None where the loss has none.
    """

    name: str
    kind: Kind
    formula: str
    paper: str
    when: str
    function: Function
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    options: tuple[LossOption, ...] = ()
    whole_batch: bool = False
    per_row: bool = True
    state0: Mapping[str, float] | None = None
    notes: str = ""

    @property
    def needs_reference(self) -> bool:
        """Whether it needs log-probabilities under the reference, or distributions of it."""
        return any("ref_logp" in name or "_kl_" in name for name in self.inputs)

    @property
    def needs_lengths(self) -> bool:
        """Whether it needs the number of trained tokens."""
        return any("length" in name for name in self.inputs)

    @property
    def needs_scores(self) -> bool:
        """Whether it needs scores from the data."""
        return any("score" in name for name in self.inputs)

    @property
    def needs_head_values(self) -> bool:
        """Whether it needs sums over the first tokens of a response."""
        return any("head" in name for name in self.inputs)

    @property
    def needs_distributions(self) -> bool:
        """Whether it needs the reference's and the policy's whole distributions at each token."""
        return any("_kl_" in name for name in self.inputs)

    @property
    def needs_mismatched(self) -> bool:
        """Whether it needs responses of other rows."""
        return any("mismatched" in name for name in self.inputs)

    @property
    def on_difference(self) -> bool:
        """Whether it sees log-ratios only through their difference, so that other divergences are valid."""
        return any(o.name == "divergence" for o in self.options)

    @property
    def defaults(self) -> dict[str, Value]:
        """Options that have a default, with it."""
        return {o.name: o.default for o in self.options if o.default is not None}

    def start(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor] | None:
        """The running state that a run begins with, scalars (float64 where the device has it), or None."""
        if self.state0 is None:
            return None
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in self.state0.items()}

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor],
        state: dict[str, torch.Tensor] | None = None,
        **options: Value,
    ) -> LossOutput:
        """The loss on those of ``tensors`` that it reads; ``state`` as ``start`` or the last output gave it."""
        given: dict[str, Any] = {name: tensors[name] for name in self.inputs}
        given |= {name: tensors[name] for name in self.optional_inputs if name in tensors}
        if self.state0 is not None:
            given["state"] = state
        return self.function(**given, **(self.defaults | options))


LOSSES: dict[str, Loss] = {}


def loss(
    *,
    kind: Kind,
    formula: str,
    paper: str,
    when: str,
    options: tuple[LossOption, ...] = (),
    whole_batch: bool = False,
    per_row: bool = True,
    state0: Mapping[str, float] | None = None,
    notes: str = "",
    name: str | None = None,
) -> Callable[[_F], _F]:
    """Declare the decorated function in :data:`LOSSES`. What is left out of ``options`` is read from the signature."""

    def register(function: _F) -> _F:
        label = name or function.__name__
        if label in LOSSES:
            raise ConfigError(f"a loss named {label!r} is declared already; give yours another name")
        LOSSES[label] = declared(
            function,
            label,
            kind=kind,
            formula=formula,
            paper=paper,
            when=when,
            options=options,
            whole_batch=whole_batch,
            per_row=per_row,
            state0=state0,
            notes=notes,
        )
        return function

    return register


@dataclass(slots=True)
class Signature:
    """The arguments of a function, taken apart."""

    inputs: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    options: list[LossOption] = field(default_factory=list)
    state: bool = False


def declared(function: Function, name: str, *, kind: Kind | None = None, **about: Any) -> Loss:
    """A function with its declaration; where ``kind`` is None the names of its arguments tell.

    Raises ``ConfigError`` where the signature is none of a loss.
    """
    signature = _taken_apart(function, name)
    kind = kind or _kind_of(signature.inputs, name)
    for argument in signature.inputs + signature.optional:
        if argument not in INPUTS[kind]:
            guess = nearest(argument, list(INPUTS[kind]))
            raise ConfigError(f"loss {name}: nothing is called {argument!r} for a loss of kind {kind}{guess}")
    said = {o.name: o for o in about.pop("options", ())}
    unread = set(said) - {o.name for o in signature.options}
    assert not unread, f"{name}: the function does not read {unread}"
    assert signature.state == (about.get("state0") is not None), f"{name}: state0 goes with an argument named state"
    about = {"formula": "", "paper": "", "when": "", **about}
    return Loss(
        name=name,
        kind=kind,
        function=function,
        inputs=tuple(signature.inputs),
        optional_inputs=tuple(signature.optional),
        options=tuple(replace(said.get(o.name, o), default=o.default) for o in signature.options),
        **about,
    )


def _taken_apart(function: Function, name: str) -> Signature:
    found, empty = Signature(), inspect.Parameter.empty
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"loss {name}: name every argument; {parameter} tells nothing of what the loss needs")
        if key == "state":
            found.state = True
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            (found.inputs if parameter.default is empty else found.optional).append(key)
        else:
            default = None if parameter.default is empty else parameter.default
            if default is not None and not isinstance(default, (int, float, str, bool)):
                raise ConfigError(
                    f"loss {name}: option {key} has {default!r} as default; it must be a number or a word"
                )
            found.options.append(LossOption(name=key, default=default))
    return found


def _kind_of(inputs: list[str], name: str) -> Kind:
    if any(word in INPUTS["pairs"] or word.startswith(("chosen", "rejected")) for word in inputs):
        return "pairs"
    if "label_N" in inputs:
        return "labels"
    if "tier_N" in inputs or "group_N" in inputs:
        return "ranking"
    raise ConfigError(
        f"loss {name}: its arguments are {', '.join(inputs) or 'none'}; name them chosen_logp_P and rejected_logp_P for"
        " pairs, logp_N and label_N for labels, or logp_N, tier_N and group_N for rankings (see docs/methods.md)"
    )


def _read(text: str) -> object:
    """A number or a truth value, else the text."""
    if text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
