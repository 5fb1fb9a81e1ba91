"""Metrics of a run: the lines of ``metrics.jsonl``, averages over the last epoch, and costs.

The last batch of an epoch may be small. So final metrics are averages over all rows since the last whole epoch began,
each with the weights that it had in its batches.

>>> found = Averages()
>>> for step, rows, loss in ((1, 8, 0.7), (2, 2, 0.2)):
...     found.add(step, rows, {"loss": loss, "epoch": step / 2}, {"loss": rows}, ends_epoch=step == 2)
>>> round(found.means()["loss"], 3), found.window
(0.6, (1, 2, 10))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt.core.files import output_errors
from prefopt.model.costs import Costs, combine_costs, count_costs, peak_memory
from prefopt.parallel.world import ALONE, World
from prefopt.runs.folder import RunFolder
from prefopt.runs.history import numbered_lines, read_history

Record = dict[str, float]


class Metrics:
    """Writes ``metrics.jsonl``: a line per step and per evaluation."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        """``writes``: not where another process does."""
        self.path, self._writes = path, writes
        if not writes:
            return
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line. Numbers that are not finite become null."""
        if not self._writes:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with output_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run repeats. Raises :class:`RunError` for a damaged line."""
        if not self._writes:
            return
        kept = [text.decode() for text, line in numbered_lines(self.path) if line["step"] <= step]
        aside = self.path.with_name(f".{self.path.name}")
        with output_errors(self.path):
            aside.write_text("".join(line + "\n" for line in kept))
            aside.replace(self.path)


def note(record: Mapping[str, float]) -> list[str]:
    """The metrics of a step or an evaluation for the progress line."""
    ratios = [record.get(f"log_ratios_per_token/{side}") for side in ("chosen", "rejected")]
    pattern = {
        "objective/scores": "score {:.3f}",
        "objective/true_scores": "true score {:.3f}",
        "objective/kl": "KL {:.3g}",
        "objective/rlhf_reward": "score less penalty {:.3f}",
        "val/length": "{:.0f} tokens each",
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.2f}",
        "rewards/margins": "margin {:+.3f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "": "log-ratio per token {:+.3f} chosen, {:+.3f} rejected",
        "learning_rate": "learning rate {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "pairs_per_second": "{:.1f} pairs/s",
        "rows_per_second": "{:.1f} rows/s",
        "eps": "{:.1f} responses/s",
        "grad_norm": "gradient norm {:.3g}",
    }
    values = {name: ratios if not name else [record.get(name)] for name in pattern}
    return [text.format(*values[name]) for name, text in pattern.items() if None not in values[name]]


RATES = ("tokens_per_second", "pairs_per_second", "rows_per_second", "utilisation", "utilisation_unshared")
PER_STEP = ("grad_norm", "step_seconds", "tokens")


@dataclass(slots=True)
class Pass:
    """Steps ``first`` to ``last``, their ``rows``, and each metric's weighted sum and weight."""

    first: int = 0
    last: int = 0
    rows: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, rows: int, record: Record, weights: Mapping[str, float]) -> None:
        self.first, self.last, self.rows = self.first or step, step, self.rows + rows
        for name, weight in weights.items():
            if weight and math.isfinite(value := record.get(name, math.nan)):
                total = self.sums.setdefault(name, [0.0, 0.0])
                total[0] += weight * value
                total[1] += weight


@dataclass(slots=True)
class Averages:
    """The last whole epoch and the steps after it. ``record`` is that of the last step, for what is no average:
    progress, learning rate, memory."""

    whole: Pass = field(default_factory=Pass)
    begun: Pass = field(default_factory=Pass)
    record: Record = field(default_factory=dict)

    def add(self, step: int, rows: int, record: Record, weights: Mapping[str, float], *, ends_epoch: bool) -> None:
        """Add a step. ``weights``: what each metric of ``record`` was averaged over in its batch."""
        measured = dict.fromkeys(PER_STEP, 1.0) | dict.fromkeys(RATES, record.get("step_seconds", 0.0))
        self.begun.add(step, rows, record, {**measured, **weights})
        self.record = dict(record)
        if ends_epoch:
            self.end_epoch()

    def end_epoch(self) -> None:
        """What was begun is a whole epoch, unless none of its steps had metrics."""
        if self.begun.rows:
            self.whole, self.begun = self.begun, Pass()

    @property
    def window(self) -> tuple[int, int, int]:
        """First step, last step and rows of the averages."""
        parts = [part for part in (self.whole, self.begun) if part.rows]
        return parts[0].first, parts[-1].last, sum(part.rows for part in parts)

    def means(self) -> Record:
        """The metrics of the last step, averaged if they are per row or per time."""
        found, averaged = dict(self.record), {**self.whole.sums, **self.begun.sums}
        for name in averaged:
            parts = [part.sums[name] for part in (self.whole, self.begun) if name in part.sums]
            found[name] = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
        if "rewards/chosen" in found and "rewards/rejected" in found and "rewards/margins" not in averaged:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def final(self, folder: Path, derived: Callable[[Record], Record]) -> tuple[Record, str]:
        """The final metrics of the run in ``folder``, and a phrase on what they average. ``derived`` computes metrics
        from averages."""
        if not self.record:  # nothing was left to do after a checkpoint of a first version
            return dict(read_history(folder).training[-1]), "of the last step's batch"
        means, (first, last, rows) = self.means(), self.window
        return {"step": last, **means, **derived(means)}, f"averages over the {rows} rows of steps {first} to {last}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Averages:
        """From :meth:`to_dict`; empty for a checkpoint without it."""
        return cls(Pass(**kept["whole"]), Pass(**kept["begun"]), dict(kept["record"])) if kept else cls()


class Spending:
    """The costs of a run: those of its processes added to those of earlier starts."""

    def __init__(self, folder: RunFolder, device: torch.device, costs: Costs, world: World) -> None:
        self._folder, self._device, self._costs, self._world = folder, device, costs, world
        self._others: list[dict[str, float]] = []
        self._before: dict[str, float] = dict(folder.record.get("costs", {}))
        self._started = time.monotonic()

    def note(self, *, together: bool = True) -> None:
        """Write them to ``run.json``, if this process holds the folder. ``together``: all ranks call this."""
        self.measured(together=together)()

    def measured(self, *, together: bool = True) -> Callable[[], None]:
        """The costs until now. The function that is returned writes them: with a checkpoint, once that is there."""
        seconds = time.monotonic() - self._started
        now = {**self._costs.to_dict(), "seconds": seconds, "peak_memory_bytes": peak_memory(self._device)}
        if together:
            every = self._world.gather(now)
            self._others = [{n: x for n, x in one.items() if n != "seconds"} for one in every[1:]]
        costs = combine_costs([self._before, now, *self._others])

        def write() -> None:
            if self._folder.taken:
                self._folder.remember(costs=costs)

        return write


@contextmanager
def spending(folder: RunFolder, device: torch.device, world: World = ALONE) -> Iterator[Spending]:
    """Count costs inside this block, write them as ``costs`` of ``run.json``, and release the folder: those of
    :class:`prefopt.model.costs.Costs`, ``seconds``, and ``peak_memory_bytes`` of the process (on a GPU, of tensors)."""
    with count_costs() as costs:
        found = Spending(folder, device, costs, world)
        try:
            yield found
        finally:
            found.note(together=False)  # the others may have failed
            folder.leave()
