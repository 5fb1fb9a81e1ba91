"""Gated delta rules over packed rows: one decay for a head (Qwen3-Next, Qwen3.5, OLMo hybrid) or for each channel
(Kimi Linear, Ling).

Yang et al. 2024, "Gated Delta Networks" (arXiv 2412.06464), section 3.3: inside a chunk the products of
``1 - beta k k'`` are condensed to a triangular system; between chunks a state is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from prefopt.model.kernels.gather import gathered
from prefopt.model.recurrence.row import ChunkTree, Segments, chunk_tree, piece_levels, running_sum

CHUNK, CHANNEL_CHUNK = 64, 16
"""Tokens of a chunk; fewer where each channel decays by itself, since that takes memory for each pair of tokens."""


def delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, segments: Segments) -> Tensor:
    """``y_t = S_t' q_t`` with ``S_t = (1 - beta_t k_t k_t') exp(decay_t) S_{t-1} + beta_t k_t v_t'``, [K, V] per head.

    query and key [T, H, K]; value [T, H, V]; beta [T, H]; decay [T, H], or [T, H, K] for each channel. Returns
    [T, H, V]. Queries are neither normalised nor scaled here.
    """
    by_channel = decay.dim() == 3
    tree = chunk_tree(segments, CHANNEL_CHUNK if by_channel else CHUNK, query.device)
    query, key, value, decay, beta = (tree.split(x).transpose(1, 2) for x in (query, key, value, decay, beta))
    beta = beta[..., None]
    total = running_sum(decay if by_channel else decay[..., None], 2)  # [n, H, C, K or 1]
    between = total[..., :, None, :] - total[..., None, :, :]
    later = torch.ones(tree.size, tree.size, dtype=torch.bool, device=query.device).triu(1)
    between = between.masked_fill(later[..., None], float("-inf")).exp()
    if by_channel:
        decayed = between * key[..., None, :, :]
        system = (decayed * (key * beta)[..., :, None, :]).sum(-1)
        inside = (decayed * query[..., :, None, :]).sum(-1)
    else:
        system, inside = ((x @ key.transpose(2, 3)) * between[..., 0] for x in (key * beta, query))
    from_start = total.exp()
    sides = torch.cat([value * beta, key * beta * from_start], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    new, read = solved.split([value.shape[-1], key.shape[-1]], -1)
    end = total[:, :, -1:]
    new, state = _carry(new, read, key * (end - total).exp(), end.exp().transpose(2, 3), tree)
    y, roots = inside @ new, tree.levels[0].stop
    if state is not None:
        y = torch.cat([y[:roots], y[roots:] + (query * from_start)[roots:] @ state])
    return tree.join(y.transpose(1, 2))


@cache
def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash-linear-attention is there for ``device``, and takes ``dtype``: others it refuses."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        import_module("fla")  # as transformers does, which uses torch where that fails
    except Exception:  # of any kind: a package made for another torch
        return False
    return True


def delta_rule_by(kernel: Callable[..., Any], inputs: Sequence[Tensor], segments: Segments, **options: Any) -> Tensor:
    """The same by a kernel of flash-linear-attention, which takes states to start from and lengths: prompts first, then
    all responses, each from the state at the end of its prompt. Nothing has confirmed it on a GPU.

    ``inputs`` are queries, keys, values, decays and betas, [1, T, H, ...]; ``options`` go to the kernel.
    """
    levels = piece_levels(segments, inputs[0].device)
    state: Tensor | None = None
    parts = []
    for n, level in enumerate(levels):
        query, key, value, decay, beta = (x.index_select(1, level.tokens) for x in inputs)
        if level.parent is not None:
            assert state is not None
            state = gathered(state, level.parent, level.sums)
        forks = n < len(levels) - 1
        y, state = kernel(
            query,
            key,
            value,
            g=decay,
            beta=beta,
            initial_state=state,
            output_final_state=forks,
            cu_seqlens=level.ends,
            **options,
        )
        parts.append(y)
    order = torch.cat([level.tokens for level in levels])
    return torch.cat(parts, 1).index_select(1, order.argsort())


def _carry(new: Tensor, read: Tensor, key: Tensor, decay: Tensor, tree: ChunkTree) -> tuple[Tensor, Tensor | None]:
    """What each token writes, [chunks, H, C, V], less what the state at the start of its chunk holds already; and that
    state, [chunks without roots, H, K, V]: ``decay S + key' new`` is the next one."""
    sizes = [level.stop - level.start for level in tree.levels]
    parts = zip(tree.levels, *(x.split(sizes) for x in (new, read, key, decay)), strict=True)
    written, states = [], []
    end: Tensor | None = None
    for level, v, w, k, d in parts:
        if level.parent is None:
            end = k.transpose(2, 3) @ v
        else:
            assert end is not None
            start = gathered(end, level.parent, level.sums)
            v = v - w @ start
            end = d * start + k.transpose(2, 3) @ v
            states.append(start)
        written.append(v)
    return torch.cat(written), torch.cat(states) if states else None
