"""Dropout is off, whatever a configuration or an adapter says: log-probabilities must not be random."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt.model.scorer import causal_model

_DROPS = re.compile(r"drop(out|_rate)?$|_pdrop$|dropout|layerdrop|jitter_noise")


def silence_dropout(target: PreTrainedConfig | torch.nn.Module) -> None:
    """Set every dropout and jitter of a configuration to zero: log-probabilities must not be random.

    Of a model too, which was built with others: its configuration, its dropout modules, and the rates that its layers
    have taken from the configuration.
    """
    if isinstance(target, torch.nn.Module):
        for module in target.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            _zero_rates(module)
    config: Any = causal_model(target).config if isinstance(target, torch.nn.Module) else target
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        _zero_rates(part)


def _zero_rates(holder: object) -> None:
    for field, value in list(vars(holder).items()):
        if _DROPS.search(field) and isinstance(value, float):
            setattr(holder, field, 0.0)
