"""What a report tells of each run, as plain values that the page only lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """One run. ``command`` starts it again, and is empty where its options are not those of this version. ``samples``
    says what a run that learns from samples of its own earned, and is empty for others."""

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
    samples: str


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
        samples=_samples(run),
    )


def _data(run: History) -> list[Row]:
    """Where the rows come from, how many there were, and what became of them."""
    rows = run.rows
    told = [("files", shown(run.options.get("data", run.options.get("prompts"))))]
    told += [("held-out files", shown(value))] if (value := run.options.get("eval_data")) else []
    told += [(f"rows {key}", f"{value:,}") for key, value in rows.items()]
    if {"read", "kept"} <= rows.keys():
        told.append(("rows refused and left out", f"{rows['read'] - rows['kept']:,}"))
    if value := run.record.get("max_length"):
        told.append(("longest sequence", f"{value} tokens"))
    return told


def _identity(run: History) -> list[Row]:
    """Hashes: two runs that agree in one had the same."""
    names = {"reference": "reference model", "data": "training and held-out tokens"}
    return [(title, str(run.record[key])) for key, title in names.items() if run.record.get(key)]


def _settings(run: History) -> list[Setting]:
    defaults = {o.name: o.default for o in options(METHODS[run.method])} if run.method in METHODS else {}
    return [
        Setting(name.replace("_", "-"), shown(value), name not in defaults or value != defaults[name])
        for name, value in run.options.items()
    ]


def _command(run: History) -> str:
    try:
        return command(run.method, read_options(run.method, run.options)) if run.method in METHODS else ""
    except UserError:
        return ""


def _samples(run: History) -> str:
    scores, ending = run.curve("objective/scores").values, reached(run)["training"]
    if not scores or "objective/scores" not in ending:
        return ""
    far = f", at {ending['objective/kl']:.3g} nats from the reference" if "objective/kl" in ending else ""
    return (
        f"the reward of its own samples was {scores[0]:.3g} in the first step and is {ending['objective/scores']:.3g}"
        f" over the last tenth of the steps{far}; this is the reward that it was trained on"
    )
