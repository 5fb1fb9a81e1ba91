"""How fast a step was, and how much of the machine it used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prefopt.data.packer import PackedBatch
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.model.memory import peak_memory
from prefopt.train.sums import Record


def measure_of(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype, unit: str
) -> Callable[[Sequence[PackedBatch], float], Record]:
    """What a step's packed batches and seconds say of ``model`` as it trains; groups are called ``unit``."""
    peak, flops = matmul_peak(device, dtype), FlopCount.of(model)

    def measure(batches: Sequence[PackedBatch], seconds: float) -> Record:
        tokens, groups = sum(b.tokens for b in batches), sum(len(b.groups) for b in batches)
        return {
            "step_seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            f"{unit}_per_second": groups / seconds,
            "utilisation": sum(map(flops, batches)) / seconds / peak,
            "peak_memory_bytes": peak_memory(device),
        }

    return measure
