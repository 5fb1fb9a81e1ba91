"""Methods side by side: what each costs and what it gives, as records, a file and a Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.files import read_json, typed, write_json
from prefopt.core.terminal import duration, size

VERSION = 1
FILE = "methods.json"
NAMES = {"dpo": "SFT, DPO", "ppo": "SFT, reward model, PPO"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy: stages ``method``, trained with ``seed`` at ``factor`` times its learning rate.

    ``costs`` are those of all its stages together (:class:`prefopt.model.costs.Costs`, ``seconds``,
    ``peak_memory_bytes``). ``reward`` with its ``interval`` (95 %, prompts resampled), ``kl`` to its fine-tuned start
    in nats per response with its standard error, ``length`` in tokens, ``perplexity`` of the reference text. A training
    that diverged has none of them, and says why. ``isolated``: every start of every stage had a process of its own, so
    that the peak memory is that of the training.
    """

    method: str
    seed: int
    factor: float
    costs: dict[str, float] = field(default_factory=dict)
    reward: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_se: float | None = None
    length: float | None = None
    perplexity: float | None = None
    diverged: str | None = None
    folder: str = ""
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """A model that methods begin at: the one given, and what fine-tuning made of it for each seed."""

    name: str
    reward: float
    perplexity: float | None


@dataclass(frozen=True, slots=True)
class MethodsTable:
    """Everything that ``prefopt methods`` measured."""

    model: str
    reward: str
    prompts: int
    samples: int
    responses: int
    made: str
    finished: bool
    starts: tuple[Start, ...] = ()
    outcomes: tuple[Outcome, ...] = ()

    def write(self, folder: Path) -> Path:
        """``methods.json`` in ``folder``, whole or not at all. Raises :class:`prefopt.errors.RunError`."""
        write_json(folder / FILE, {"version": VERSION, **asdict(self)})
        return folder / FILE


def read_table(path: Path) -> MethodsTable:
    """What :meth:`MethodsTable.write` wrote. Raises :class:`RunError` where there is none, or of another version."""
    return read_json(path / FILE if path.is_dir() else path, _table, "run prefopt methods again")


def _table(found: dict[str, Any]) -> MethodsTable:
    if (version := found.pop("version")) != VERSION:
        raise ValueError(f"it is of version {version}, and this prefopt reads version {VERSION}")
    starts = tuple(typed(Start, s) for s in found.pop("starts"))
    # Earlier versions told it once, for all.
    isolated = found.pop("isolated", False)
    outcomes = tuple(outcome_of({"isolated": isolated, **o}) for o in found.pop("outcomes"))
    return typed(MethodsTable, {**found, "starts": starts, "outcomes": outcomes})


def outcome_of(values: dict[str, Any]) -> Outcome:
    """What ``asdict`` made of an outcome. Raises ``TypeError`` for other names or types."""
    values = {"method" if name == "road" else name: value for name, value in values.items()}  # as first versions wrote
    interval = values.get("interval")
    return typed(Outcome, {**values, "interval": None if interval is None else tuple(interval)})


def markdown(table: MethodsTable) -> Iterator[str]:
    """The table of the methods, a column for each, with what its numbers are."""
    methods = [method for method in NAMES if any(o.method == method for o in table.outcomes)]
    yield f"| | {' | '.join(NAMES[method] for method in methods)} |"
    yield f"| --- |{' --- |' * len(methods)}"
    columns = [_column(table, [o for o in table.outcomes if o.method == method]) for method in methods]
    for name in columns[0] if columns else ():
        yield f"| {name} | {' | '.join(column[name] for column in columns)} |"
    yield ""
    yield (
        f"True reward `{table.reward}` on {table.prompts} held-out prompts, {table.samples} samples each; KL in nats"
        f" per response, to the fine-tuned model; preferences: {table.made}; {table.responses} responses a stage. Costs"
        " are means over trainings of all stages together, memory is the largest of any."
    )
    for o in table.outcomes:
        if o.diverged is not None:
            yield f"- {NAMES[o.method]}, seed {o.seed}, {o.factor:g} times the rate, diverged: {o.diverged}"


def _column(table: MethodsTable, outcomes: Sequence[Outcome]) -> dict[str, str]:
    method = outcomes[0].method
    good = [o for o in outcomes if o.diverged is None]
    rewards = np.array([o.reward for o in good], np.float64)

    def mean(name: str) -> float:
        return float(np.mean([o.costs.get(name, 0.0) for o in good])) if good else float("nan")

    def most(name: str) -> float:
        return max((o.costs.get(name, 0.0) for o in good), default=float("nan"))

    told = {
        "trainings one after the other": str(NAMES[method].count(",") + 1),
        "models in memory together": f"{most('models'):.0f}, {size(most('model_bytes'))} of weights",
        "forward passes": f"{mean('forward_passes'):,.0f}",
        "tokens forwarded and learned from": f"{mean('trained_tokens'):,.0f}",
        "tokens forwarded to be scored": f"{mean('scored_tokens'):,.0f}",
        "tokens forwarded to draw": f"{mean('decoded_tokens'):,.0f}",
        "tokens generated": f"{mean('generated_tokens'):,.0f}",
        "wall time": duration(mean("seconds")) if good else "",
        "peak memory": _peak(good),
        "policies, and how many diverged": f"{len(outcomes)}, {len(outcomes) - len(good)}",
    }
    if not good:
        return told | dict.fromkeys(("reward", "its spread", "KL", "perplexity"), "")
    return told | {
        "reward": f"{rewards.mean():+.3f}, best {rewards.max():+.3f}",
        "its spread": spread(rewards),
        "KL": f"{np.mean([o.kl for o in good]):.2f}",
        "perplexity": _perplexity(table, good),
    }


def _peak(good: Sequence[Outcome]) -> str:
    """Of those trainings whose process was their own; in one that others had before, their memory counts too."""
    apart = [o for o in good if o.isolated]
    if not apart:
        return "not told: one process for all" if good else ""
    most = size(max(o.costs.get("peak_memory_bytes", 0.0) for o in apart))
    return most if len(apart) == len(good) else f"{most}, of the {len(apart)} with a process of their own"


def spread(rewards: Sequence[float] | np.ndarray) -> str:
    """Standard deviation and interquartile range over trainings.

    >>> spread([0.0, 1.0, 2.0, 3.0])
    'deviation 1.291, quartiles +0.750 to +2.250'
    """
    x = np.asarray(rewards, np.float64)
    if len(x) < 2:
        return "one training shows none"
    low, high = np.quantile(x, [0.25, 0.75])
    return f"deviation {x.std(ddof=1):.3f}, quartiles {low:+.3f} to {high:+.3f}"


def _perplexity(table: MethodsTable, good: Sequence[Outcome]) -> str:
    before, *tuned = [s.perplexity for s in table.starts]
    after = [o.perplexity for o in good if o.perplexity is not None]
    if before is None or not after:
        return "not measured"
    middle = [p for p in tuned if p is not None]
    return f"{before:.2f} before, {np.mean(middle):.2f} fine-tuned, {np.mean(after):.2f} after"
