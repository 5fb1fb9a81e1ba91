"""A fast attention kernel against the plain loop, in the precision of the run.

The load check's twin is in float64, which variable-length flash attention does not take: on CUDA nothing of that
kernel would be seen before it trains. So the twin is scored once more in the run's own dtype, by both kernels, values
and gradients; its window is shorter than its rows. How far rounding takes either from the truth is measured, not
assumed: the truth is the twin with the same rounded weights in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from prefopt.data.group import Group
from prefopt.data.packer import pack
from prefopt.errors import ModelError
from prefopt.model.head import Head
from prefopt.model.scorer import Scorer

_ALLOWED, _TIMES = 0.05, 4.0
"""Relative error of a kernel that rounding explains in any case, and beyond it as a multiple of the loop's own."""


def check_kernel(
    twin: PreTrainedModel, groups: Sequence[Group], device: torch.device, dtype: torch.dtype, head: Head | None
) -> None:
    """Raise :class:`ModelError` where the fast kernel's values or gradients are further from the truth than the loop's.

    ``twin`` is a float64 copy that may be changed.
    """
    rounded = copy.deepcopy(twin).to(dtype)
    truth = _scored(copy.deepcopy(rounded).to(torch.float64), groups, "loop", head)
    loop, fast = (_scored(copy.deepcopy(rounded).to(device), groups, kernel, head) for kernel in ("loop", "auto"))
    for what, right, plain, found in zip(("values", "gradients"), truth, loop, fast, strict=True):
        error, allowed = _error(found, right), max(_ALLOWED, _TIMES * _error(plain, right))
        if not error <= allowed:
            raise ModelError(
                f"{type(twin).__name__}: {what} by the fast attention kernel differ by {error:.2g} (relative) from the"
                f" right ones on a small copy in {dtype}, where {allowed:.2g} is rounding; give --attention loop, and"
                " please report this device"
            )


def _scored(
    model: PreTrainedModel, groups: Sequence[Group], attention: str, head: Head | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log-probabilities [M], and all gradients of a weighted sum of them in one vector, in float64."""
    scorer = Scorer(model.eval(), attention=attention, head=head)
    weights = [p for p in model.parameters() if p.requires_grad]
    logp_M = scorer(pack(groups, scorer.layout).to(weights[0].device))
    assert isinstance(logp_M, torch.Tensor)
    upstream = torch.linspace(-1, 1, len(logp_M), dtype=logp_M.dtype, device=logp_M.device)
    grads = torch.autograd.grad((logp_M * upstream).sum(), weights, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]
    return logp_M.detach().double().cpu(), torch.cat([g.double().flatten().cpu() for g in flat])


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())
