"""What a training run returns: its numbers, its model and its curves."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefopt.core.shown import Shown
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.errors import UserError
from prefopt.model.load import load_model
from prefopt.model.precision import resolve_device, resolve_dtype
from prefopt.model.scalar import load_scalar
from prefopt.runs.diagnose import held_out_accuracy
from prefopt.runs.history import read_history
from prefopt.runs.plot import figure_of, shown_in_notebooks
from prefopt.runs.samples import read_samples
from prefopt.runs.table import as_number
from prefopt.train.reliability import Reliability

IN_TABLE = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "perplexity": "perplexity",
    "objective/scores": "reward of samples",
    "objective/kl": "KL to the reference",
}
"""Metrics of the table, by what they are called there."""


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and its tokenizer."""

    model: Any
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, repr=False)
class RunResult(Shown):
    """The numbers of a run. It prints as a table.

    >>> result = prefopt.dpo("my-model", "pairs.jsonl", output="aligned")  # doctest: +SKIP
    >>> model, tokenizer = result.load()  # doctest: +SKIP
    >>> result.plot()  # doctest: +SKIP
    """

    output: Path
    steps: int
    metrics: dict[str, float]

    def table(self) -> tuple[str, list[tuple[str, str]]]:
        """The most telling numbers."""
        shown = [(title, name) for name, title in IN_TABLE.items() if name in self.metrics]
        return f"{self.output}: {self.steps} steps", [(title, as_number(self.metrics[name])) for title, name in shown]

    def load(self, *, device: str | None = None, dtype: str = "auto") -> LoadedModel:
        """The trained model in evaluation mode, with its adapter where one was trained, and its tokenizer. ``device``
        and ``dtype`` as the options of a run. Raises :class:`prefopt.errors.ModelError`."""
        where = resolve_device(device)
        tokenizer = load_tokenizer(str(self.output))
        return LoadedModel(self._load(resolve_dtype(dtype, where), where, tokenizer).eval(), tokenizer)

    def _load(self, dtype: torch.dtype, device: torch.device, tokenizer: Tokenizer) -> torch.nn.Module:
        return load_model(str(self.output), dtype=dtype, device=device).to(device)

    def plot(self, metrics: list[str] | None = None, *, x: str = "step") -> Any:
        """A matplotlib figure of the run's curves, as ``prefopt plot`` draws them. ``metrics``: names of
        ``metrics.jsonl``; ``x``: step or epoch. Raises :class:`prefopt.errors.ConfigError` without matplotlib, and for
        metrics that the run does not have."""
        return shown_in_notebooks(figure_of([read_history(self.output)], metrics=metrics, x=x))


@dataclass(frozen=True, slots=True, repr=False)
class TrainingResult(RunResult):
    """``metrics`` are averages over the rows of the last epoch (see :class:`prefopt.runs.metrics.Averages`),
    ``held_out_loss`` is that of the saved weights."""

    held_out_loss: float | None
    best_step: int | None

    def table(self) -> tuple[str, list[tuple[str, str]]]:
        """Numbers of held-out rows and of training, and the samples that the run wrote."""
        title, training = RunResult.table(self)
        rows: list[tuple[str, str]] = []
        if self.held_out_loss is not None:
            rows.append(("held-out loss", f"{as_number(self.held_out_loss)}, at step {self.best_step}"))
        with suppress(UserError):  # the folder may have been moved since
            if (accuracy := held_out_accuracy(read_history(self.output))) is not None:
                rows.append(("held-out accuracy", accuracy.in_words))
        rows += [(f"training {name}", value) for name, value in training]
        if samples := self.samples():
            rows.append(("samples", f"before and after on {len(samples)} held-out prompts: result.samples()"))
        return title, rows

    def samples(self) -> list[dict[str, Any]]:
        """Rows of ``samples.jsonl``: ``prompt`` and ``responses``, before and after training."""
        return read_samples(self.output)


@dataclass(frozen=True, slots=True, repr=False)
class RewardResult(TrainingResult):
    """With the ``shift`` of the saved weights and, if rows were held out, their ``reliability``."""

    shift: float
    reliability: Reliability | None

    def _load(self, dtype: torch.dtype, device: torch.device, tokenizer: Tokenizer) -> torch.nn.Module:
        return load_scalar(str(self.output), dtype=dtype, device=device, tokenizer=tokenizer).to(device)
