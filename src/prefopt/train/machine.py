"""The machine as the options of a run want it: threads, determinism, a precision that the device has."""

from __future__ import annotations

import os

import torch

from prefopt.config.training import RunOptions
from prefopt.errors import ConfigError
from prefopt.model.load import slow_dtype
from prefopt.progress import Reporter


def prepare_machine(options: RunOptions, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> None:
    """Set torch up for a run. Raises :class:`ConfigError` for a precision that the device has not."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if slow := slow_dtype(dtype, device):
        reporter.say(slow)
    if device.type == "mps" and dtype == torch.float64:
        raise ConfigError("--dtype float64: mps has none; take --device cpu")
