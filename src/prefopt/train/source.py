"""Where the batches of a run come from: data read once, or responses sampled during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.objective import Objective

if TYPE_CHECKING:
    from prefopt.train.trainer import Trainer


class AuxiliaryLoss(NamedTuple):
    """An objective on a batch of its own, ``coefficient`` times whose loss is added. ``name`` is its metric."""

    objective: Objective
    batch: Batch
    coefficient: float
    name: str


class BatchSource:
    """The batches of a run. Subclasses override :meth:`batch`, and what else differs."""

    steps_per_epoch: int
    updates: int = 1
    """Optimiser updates in the step at hand."""
    draws: bool = False
    """Whether steps begin by drawing responses. Checkpoints are then written after that."""

    def begin(self, trainer: Trainer) -> bool:
        """Prepare the next step. Returns whether responses were drawn for it, which a checkpoint should keep."""
        return False

    def batch(self, step: int, update: int) -> Batch:
        """The global batch of an update of a step, both counted from 0."""
        raise NotImplementedError

    def applies(self, update: int, record: Record) -> bool:
        """Whether the weights move by an update, whose metrics are in ``record``. A source that says no ends the step
        with it."""
        return True

    def auxiliary(self, step: int, update: int) -> AuxiliaryLoss | None:
        """A second loss of an update."""
        return None

    def end(self, trainer: Trainer, record: Record) -> Record:
        """Add metrics of the whole step to ``record``, the averages over its updates."""
        return record

    def saves(self, step: int) -> bool:
        """Whether to write a checkpoint after ``step``, where ``save_every`` is None."""
        return False

    @property
    def held_out(self) -> Batch | None:
        """The batch of evaluations."""
        return None

    @property
    def holds(self) -> str:
        """What :meth:`tensors` are, empty where there are none. It changes whenever they do within an update: a
        checkpoint is written again then."""
        return ""

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor] | None:
        """Tensors for a checkpoint."""
        return None

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None) -> None:
        """The inverse of :meth:`state` and :meth:`tensors`."""
