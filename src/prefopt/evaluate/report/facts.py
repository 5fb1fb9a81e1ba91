"""What a report tells of each run, as plain values that the page only lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.config.command import command
from prefopt.config.methods import METHODS, read_options
from prefopt.config.option import options
from prefopt.errors import UserError
from prefopt.evaluate.runs import as_number, labels, reached, shown, summary
from prefopt.train.diagnose import diagnose
from prefopt.train.finding import Finding
from prefopt.train.history import History

Row = tuple[str, str]
"""A name and its value."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An option as the run had it; ``given``: it was not left at its default."""

    name: str
    value: str
    given: bool


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run. ``command`` starts it again, and is empty where its options are not those of this version."""

    name: str
    summary: Mapping[str, str]
    happened: Sequence[Finding]
    look: Sequence[Finding]
    held_out: Sequence[Row]
    training: Sequence[Row]
    data: Sequence[Row]
    identity: Sequence[Row]
    settings: Sequence[Setting]
    environment: Mapping[str, Mapping[str, str]]
    command: str


def facts(runs: Sequence[History]) -> list[RunFacts]:
    """The facts of each run, under names that tell the runs apart."""
    return [_facts(run, name) for run, name in zip(runs, labels(runs), strict=True)]


def _facts(run: History, name: str) -> RunFacts:
    found, values = diagnose(run), reached(run)
    return RunFacts(
        name=name,
        summary=summary(run),
        happened=[f for f in found if not f.look],
        look=[f for f in found if f.look],
        held_out=[(key, as_number(value)) for key, value in values["held_out"].items()],
        training=[(key, as_number(value)) for key, value in values["training"].items()],
        data=_data(run),
        identity=_identity(run),
        settings=_settings(run),
        environment=run.record.get("environment", {}),
        command=_command(run),
    )


def _data(run: History) -> list[Row]:
    """Where the rows come from, how many there were, and what became of them."""
    rows: Mapping[str, Any] = run.record.get("rows", {})
    told = [("files", shown(run.options.get("data")))]
    told += [("held-out files", shown(value))] if (value := run.options.get("eval_data")) else []
    if rows:
        told += [(f"rows {key}", f"{value:,}") for key, value in rows.items()]
        told += [("rows refused and left out", f"{rows['read'] - rows['kept']:,}")] if "kept" in rows else []
    if value := run.record.get("max_length"):
        told.append(("longest sequence", f"{value} tokens"))
    return told


def _identity(run: History) -> list[Row]:
    """Hashes: two runs that agree in one had the same."""
    names = {"reference": "reference model", "data": "training and held-out tokens"}
    return [(title, str(run.record[key])) for key, title in names.items() if run.record.get(key)]


def _settings(run: History) -> list[Setting]:
    defaults = {o.name: o.default for o in options(METHODS[_method(run)])}
    return [
        Setting(name.replace("_", "-"), shown(value), name not in defaults or value != defaults[name])
        for name, value in run.options.items()
    ]


def _command(run: History) -> str:
    try:
        return command(_method(run), read_options(_method(run), run.options))
    except UserError:
        return ""


def _method(run: History) -> str:
    return str(run.record.get("method", "dpo"))
