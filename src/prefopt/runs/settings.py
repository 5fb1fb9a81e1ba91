"""The options of runs: which are set, which differ, and how values read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt.config.dpo import FILLED
from prefopt.config.methods import METHODS, read_options
from prefopt.core.options import Option, options
from prefopt.core.terminal import duration
from prefopt.errors import UserError
from prefopt.runs.folder import FREE
from prefopt.runs.history import History


def of_one_method(runs: Sequence[History]) -> bool:
    return len({run.method for run in runs}) < 2


def differing(runs: Sequence[History]) -> list[str]:
    """Options that differ and affect results; for runs of several methods, those that all of them have."""
    every = [run.options for run in runs]
    names = dict.fromkeys(name for own in every for name in own if name not in FREE)
    shared = names if of_one_method(runs) else [name for name in names if all(name in own for own in every)]
    return [name for name in shared if any(own.get(name) != every[0].get(name) for own in every)]


def set_options(run: History) -> dict[str, Any]:
    """The options of a run with another value than their default, which may depend on other options. Those that its
    loss fills in are among them."""
    return set_values(run.method, run.options)


def set_values(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the options of a method that is in no run yet."""
    if method not in METHODS:
        return {}
    known = {o.name: o for o in options(METHODS[method].config)}
    config: Any = None
    with suppress(UserError):  # of a version with other options
        config = read_options(method, values)
    kept = {name: value for name, value in values.items() if value is not None and name not in FREE}
    return {n: value for n, value in kept.items() if n not in known or value != _default(known[n], config)}


def _default(o: Option, config: Any) -> Any:
    return o.computed(config) if o.computed is not None and config is not None else o.default


def differing_set(runs: Sequence[History]) -> list[str]:
    """Options that some run sets and that differ. Those that a loss fills in differ between runs of one loss alone."""
    every = [(run, set_options(run)) for run in runs]
    found = []
    for name in dict.fromkeys(name for _, own in every for name in own):
        groups: dict[str, set[str]] = {}
        for run, own in every:
            kind = run.loss_kind if name in FILLED else ""
            if name in own or (name not in FILLED and name in run.options):
                groups.setdefault(kind, set()).add(shown(own[name]) if name in own else "")
        if any(len(values) > 1 for values in groups.values()):
            found.append(name)
    return found


def shown(value: Any) -> str:
    """The value of an option, as a person would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}").replace("e+", "e")
    if isinstance(value, list):
        return ",".join(map(shown, value))
    return "none" if value is None else str(value)


def short_path(value: Any) -> Any:
    """A path by its last part; other values, such as names on the Hub, as they are."""
    is_path = isinstance(value, str) and (value.startswith((".", "/", "~")) or value.count("/") > 1)
    return Path(value).name or value if is_path else value


def when(started: object) -> str:
    """A time of ``run.json`` for a reader: ``2026-01-31 14:05``."""
    return str(started).replace("T", " ")[:16] if started else "-"


def took(run: History) -> str:
    return "-" if run.seconds is None else duration(run.seconds)
