"""What a run costs, written into its folder however it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prefopt.model.costs import counting
from prefopt.model.memory import peak_memory
from prefopt.train.folder import RunFolder


@contextmanager
def spending(folder: RunFolder, device: torch.device) -> Iterator[None]:
    """Count what is spent inside, note it as ``costs`` of ``run.json``, and let the folder go.

    Beside the counts of :class:`prefopt.model.costs.Costs` stand ``seconds`` and the ``peak_memory_bytes`` of the
    process (of the device's tensors, where that is a GPU).
    """
    started = time.monotonic()
    with counting() as costs:
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            folder.spent({**costs.to_dict(), "seconds": seconds, "peak_memory_bytes": peak_memory(device)})
            folder.leave()
