"""Shared-prefix attention segment by segment in plain arithmetic, with soft-caps, on any device.

Scores are computed again in the backward pass, so that nothing of their size is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.model.kernels.shared import How
from prefopt.model.packing import Segment


def visible_keys(rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``columns`` keys each of the last ``rows`` positions sees: bool [rows, columns], bottom-right causal."""
    q = torch.arange(columns - rows, columns, device=device)[:, None]
    k = torch.arange(columns, device=device)[None, :]
    mask = k <= q
    return mask if window is None else mask & (q - k < window)


def forward(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], how: How
) -> tuple[Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`."""
    out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for segment in segments:
        rows = slice(segment[0], segment[1])
        scores, _ = _scores(query, key, segment, how)
        lse[:, rows] = scores.logsumexp(-1).flatten(0, 1)
        chance = torch.exp(scores - _grouped(lse[:, rows], key)[..., None]).to(value.dtype)
        out[rows] = (chance @ _keys(value, segment)[:, None]).flatten(0, 1).transpose(0, 1)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: tuple[Segment, ...],
    how: How,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`prefopt.model.kernels.shared.Kernel`. Gradients of a prefix are added in float32, rounded once."""
    wide = lse.dtype
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    for segment in segments:
        rows = slice(segment[0], segment[1])
        scores, uncapped = _scores(query, key, segment, how)
        chance = torch.exp(scores - _grouped(lse[:, rows], key)[..., None])
        g, o = (_grouped(x[rows].transpose(0, 1), key) for x in (grad, out))
        slope = (g @ _keys(value, segment)[:, None].transpose(-1, -2)).to(wide)
        slope = chance * (slope - (g.to(wide) * o.to(wide)).sum(-1, keepdim=True))
        if how.softcap is not None:
            slope = slope * (1 - torch.tanh(uncapped / how.softcap) ** 2)
        slope = (slope * how.scale).to(query.dtype)
        grad_q[:, rows] = (slope @ _keys(key, segment)[:, None]).flatten(0, 1)
        of_keys = slope.transpose(-1, -2) @ _grouped(query[:, rows], key)
        of_values = chance.to(value.dtype).transpose(-1, -2) @ g
        for total, part in ((grad_k, of_keys), (grad_v, of_values)):
            _add_keys(total, part.sum(1, dtype=wide), segment)
    return grad_q, grad_k.to(key.dtype), grad_v.to(value.dtype)


def _scores(query: Tensor, key: Tensor, segment: Segment, how: How) -> tuple[Tensor, Tensor]:
    """Scores [Hk, Hq / Hk, rows, columns], -inf where hidden; and the same before cap and mask. Float32 or wider."""
    start, stop, _, prefix = segment
    q, k = _grouped(query[:, start:stop], key), _keys(key, segment)[:, None]
    uncapped = ((q @ k.transpose(-1, -2)) * how.scale).to(torch.promote_types(query.dtype, torch.float32))
    scores = uncapped if how.softcap is None else torch.tanh(uncapped / how.softcap) * how.softcap
    visible = visible_keys(stop - start, stop - start + prefix, how.window, query.device)
    return scores.masked_fill(~visible, float("-inf")), uncapped


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[Hq, ...] to [Hk, Hq / Hk, ...]."""
    grouped: Tensor = x.unflatten(0, (key.shape[0], -1))
    return grouped


def _keys(x: Tensor, segment: Segment) -> Tensor:
    """What the segment's queries see of keys or values [Hk, T, D], prefix first."""
    start, stop, origin, prefix = segment
    return torch.cat([x[:, origin : origin + prefix], x[:, start:stop]], 1) if prefix else x[:, start:stop]


def _add_keys(total: Tensor, part: Tensor, segment: Segment) -> None:
    start, stop, origin, prefix = segment
    if prefix:
        total[:, origin : origin + prefix] += part[:, :prefix]
    total[:, start:stop] += part[:, prefix:]
