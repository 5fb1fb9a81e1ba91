"""Attention by definition: every query against every key of the row, and a mask that knows who may see whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefopt.data.group import Group


def who_sees_whom(groups: Sequence[Group], window: int | None) -> torch.Tensor:
    """Bool [T, T] for a row of shared groups, from the meaning of a group alone."""
    who = []  # group, step of a response (-1: the prompt), position
    for g, group in enumerate(groups):
        prefix = len(group.prefix)
        who += [(g, -1, p) for p in range(prefix)]
        for k, (ids, _) in enumerate(step for c in group.continuations for step in c.steps):
            who += [(g, k, prefix + p) for p in range(len(ids))]
    group, step, position = torch.tensor(who).T
    visible = (group[:, None] == group) & ((step == -1) | (step[:, None] == step))
    distance = position[:, None] - position
    visible &= distance >= 0
    return visible if window is None else visible & (distance < window)


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [1, Hq, T, D], key and value [1, Hk, T, D]; returns [1, T, Hq, D]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible.to(scores.device), float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : visible.shape[1]]
    return (weights @ value).transpose(1, 2)


def random_heads(
    tokens: int, heads: int, key_heads: int, width: int, *, sinks: bool = False, seed: int = 0, **where: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, key, value and sinks, as leaves; the same numbers in every dtype and on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(**where).requires_grad_()

    query, key, value = (normal(1, h, tokens, width) for h in (heads, key_heads, key_heads))
    return query, key, value, normal(heads) if sinks else None
