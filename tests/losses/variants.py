"""Every loss in every way that its words and truth values allow, and with numbers off their special values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from prefopt.losses.declare import LOSSES, Loss, Value

OFF = {"label_smoothing": 0.2, "divergence_alpha": 0.3}  # 0 and the like take shortcuts


def variants(loss: Loss) -> list[dict[str, Value]]:
    """Options that together take every branch of a loss: one at a time, the others at their defaults."""
    found: list[dict[str, Value]] = [{}]
    for o in loss.options:
        values: tuple[Value, ...] = o.choices or ((True, False) if isinstance(o.default, bool) else ())
        values += (OFF[o.name],) if o.name in OFF else ()
        for value in values:
            if value != o.default:
                found.append({o.name: value, **({o.only[0]: o.only[1]} if o.only else {})})
    return found


def every(*, kinds: tuple[str, ...] = ("pairs", "labels", "ranking")) -> list[tuple[str, dict[str, Value]]]:
    """(name, options) of every loss of these kinds and variant."""
    chosen = [loss for loss in LOSSES.values() if loss.kind in kinds]
    return list(itertools.chain.from_iterable([(loss.name, v) for v in variants(loss)] for loss in chosen))


def label(value: object) -> str | None:
    """How a test is named after its parameters."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults"
    return None


def for_each(cases: Iterable[tuple[Any, ...]]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """One test of many cases: a failure names its case."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            for case in cases:
                try:
                    check(*case)
                except BaseException as error:
                    error.add_note(f"in the case {case}")
                    raise

        test.__doc__ = check.__doc__
        return test

    return decorate
