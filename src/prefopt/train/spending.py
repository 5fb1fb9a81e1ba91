"""What a run costs, written into its folder at every checkpoint and however it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prefopt.model.costs import Costs, counting, together
from prefopt.model.memory import peak_memory
from prefopt.train.folder import RunFolder


class Spending:
    """What this start of a run has spent so far, on top of what earlier ones have."""

    def __init__(self, folder: RunFolder, device: torch.device, costs: Costs) -> None:
        self._folder, self._device, self._costs = folder, device, costs
        self._before: dict[str, float] = dict(folder.record.get("costs", {}))
        self._started = time.monotonic()

    def note(self) -> None:
        """Write it down, where the folder is this run's: a process that is killed later has told this much."""
        seconds = time.monotonic() - self._started
        now = {**self._costs.to_dict(), "seconds": seconds, "peak_memory_bytes": peak_memory(self._device)}
        self._folder.spent(together([self._before, now]))


@contextmanager
def spending(folder: RunFolder, device: torch.device) -> Iterator[Spending]:
    """Count what is spent inside, note it as ``costs`` of ``run.json``, and let the folder go.

    Beside the counts of :class:`prefopt.model.costs.Costs` stand ``seconds`` and the ``peak_memory_bytes`` of the
    process (of the device's tensors, where that is a GPU).
    """
    with counting() as costs:
        found = Spending(folder, device, costs)
        try:
            yield found
        finally:
            found.note()
            folder.leave()
