"""What of a scorer and its device the rounding of cached values depends on, as parts of the key of a space."""

from __future__ import annotations

import torch

from prefopt.model.identity import Identity
from prefopt.model.reference import SpaceKey
from prefopt.model.scorer import Scorer, version_of


def space_of(identity: Identity, scorer: Scorer, device: torch.device) -> SpaceKey:
    """Where values of the reference ``identity`` are kept that ``scorer`` makes."""
    dtype = str(scorer.dtype).removeprefix("torch.")
    kernel, kind = scorer.kernel, device.type
    if device.type == "cuda":
        kernel, kind = f"{kernel}, {_flash()}", f"cuda, {torch.cuda.get_device_name(device)}"
    return SpaceKey(identity, dtype, scorer.path, kernel, kind, version_of(scorer.dtype))


def _flash() -> str:
    """Which flash attention torch calls, in words, and torch's version, which brings its own."""
    try:
        from torch.nn.attention import current_flash_attention_impl
    except ImportError:  # torch before 2.12 has one alone
        return f"torch {torch.__version__}"
    return f"{current_flash_attention_impl() or 'FA2'} of torch {torch.__version__}"
