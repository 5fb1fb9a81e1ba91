"""What a person is told of losses: in a terminal here, and in docs/methods.md from the same declarations."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from prefopt.core.options import nearest
from prefopt.errors import ConfigError
from prefopt.losses.common import WEIGHTINGS, Weighting
from prefopt.losses.declare import LOSSES, Loss, LossOption

WIDTH = 100
NOTATION = (
    "w is the chosen response, l the rejected one; pi the policy, ref the reference; |y| the trained tokens of y.",
    "s(y) = log pi(y) - log ref(y), sums over those tokens; h = s(w) - s(l). Where a batch has no other weights, its",
    "loss is the mean.",
)


def families() -> dict[str, list[Loss]]:
    """All losses under headings, by what they are computed on, DPO first."""
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
    said = {
        "a reference": loss.needs_reference,
        "lengths": loss.needs_lengths,
        "scores": loss.needs_scores,
        "log-probabilities of single tokens": loss.needs_head_values,
        "whole distributions at each token": loss.needs_distributions,
        "responses of other rows": loss.needs_mismatched,
        "the whole global batch at once": loss.whole_batch,
        "a running state": loss.state0 is not None,
    }
    return [words for words, needed in said.items() if needed]


def default(o: LossOption) -> str:
    """An option's default as it would be written."""
    value = o.default
    if value is None:
        return "required"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def list_losses() -> str:
    """Every loss in a few lines, family by family, and the weightings."""
    parts = ["\n".join(NOTATION)]
    for title, losses in families().items():
        parts += [title, *(_entry(loss, needs(loss)) for loss in losses)]
    parts += ["Weightings of pairs", *(_entry(weighting, []) for weighting in WEIGHTINGS.values())]
    parts.append("prefopt losses NAME tells all of one: what its options mean, and where sources disagree.")
    return "\n\n".join(parts)


def describe_loss(name: str) -> str:
    """Everything about one loss or weighting. Raises ``ConfigError`` where there is none of that name."""
    plain = name.replace("-", "_")
    found: Loss | Weighting | None = LOSSES.get(plain) or WEIGHTINGS.get(plain)
    if found is None:
        guess = nearest(name, [*LOSSES, *WEIGHTINGS]) or "; prefopt losses lists them"
        raise ConfigError(f"there is no loss {name!r}{guess}")
    lines = [found.name, "", *_wrapped(found.formula, "  "), "", *_wrapped(f"Source: {found.paper}.", "")]
    lines += _wrapped(f"When: {found.when}", "")
    if isinstance(found, Loss):
        lines += _wrapped(f"On: {found.kind}. Needs: {', '.join(needs(found)) or 'nothing more'}.", "")
        lines += _wrapped("Inputs: " + ", ".join(_inputs(found)) + ".", "")
        lines += _wrapped(f"Note: {found.notes}", "") if found.notes else []
    if found.options:
        lines += ["", "Options:"]
    for o in found.options:
        only = f"; only with {o.only[0]}={str(o.only[1]).lower()}" if o.only else ""
        lines += _wrapped(f"{o.name}: {o.help} ({o.expects}; default: {default(o)}{only})", "  ", "    ")
    prose = "\n".join(said(found.function.__doc__ or "")).replace(":math:`", "`").replace("``", "`")
    return "\n".join([*lines, "", prose])


def said(docstring: str) -> list[str]:
    """The lines of a docstring behind its first."""
    return textwrap.dedent(docstring.partition("\n")[2]).strip().splitlines()


def _inputs(loss: Loss) -> Iterable[str]:
    yield from loss.inputs
    yield from (f"{name} where the data have it" for name in loss.optional_inputs)


def _entry(found: Loss | Weighting, needed: list[str]) -> str:
    options = ", ".join(f"{o.name} {default(o)}" for o in found.options)
    lines = _wrapped(found.formula, f"  {found.name:<18}", " " * 20)
    lines += _wrapped(found.when, " " * 20)
    lines += _wrapped(f"Needs {', '.join(needed)}.", " " * 20) if needed else []
    lines += _wrapped(f"Options: {options}.", " " * 20) if options else []
    return "\n".join(lines + _wrapped(f"{found.paper}.", " " * 20))


def _wrapped(text: str, first: str, then: str | None = None) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=first if then is None else then)
