"""How fast a step was, and how much of the machine it used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from prefopt.data.packer import PackedBatch
from prefopt.errors import first_line
from prefopt.model.flops import FlopCount, matmul_peak
from prefopt.model.memory import peak_memory
from prefopt.train.sums import Record

log = logging.getLogger(__name__)


def measure_of(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype, unit: str
) -> Callable[[Sequence[PackedBatch], float], Record]:
    """What a step's packed batches and seconds say of ``model`` as it trains; groups are called ``unit``.

    Where the utilisation cannot be found out it is left out: no run ends for want of a measurement.
    """
    rate = _rate(model, device, dtype)

    def measure(batches: Sequence[PackedBatch], seconds: float) -> Record:
        tokens, groups = sum(b.tokens for b in batches), sum(len(b.groups) for b in batches)
        return {
            "step_seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            f"{unit}_per_second": groups / seconds,
            **({"utilisation": rate(batches, seconds)} if rate is not None else {}),
            "peak_memory_bytes": peak_memory(device),
        }

    return measure


def _rate(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype
) -> Callable[[Sequence[PackedBatch], float], float] | None:
    try:
        peak, flops = matmul_peak(device, dtype), FlopCount.of(model)
    except Exception as error:  # whatever a configuration refuses to tell
        log.warning("utilisation is not measured: %s", first_line(error))
        return None
    return lambda batches, seconds: sum(map(flops, batches)) / seconds / peak
