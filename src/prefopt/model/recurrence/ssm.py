"""State space models over packed rows: Mamba 2 (and lightning attention) by matrix products, Mamba by a scan.

Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6: inside a chunk the recurrence is attention with
decaying weights, and between chunks a state is carried. Gu and Dao 2023, "Mamba" (arXiv 2312.00752), equation 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.model.recurrence.row import Segments, chunk_tree, running_sum
from prefopt.model.recurrence.scan import carry, tree_scan

CHUNK = 64
"""Tokens of a chunk of matrix products."""
STEPS = 16
"""Tokens of a chunk of an elementwise scan, which are computed one after the other."""


def state_space_dual(x: Tensor, decay: Tensor, key: Tensor, query: Tensor, segments: Segments) -> Tensor:
    """``y_t = query_t S_t`` with ``S_t = exp(decay_t) S_{t-1} + key_t x_t'``, a state [N, P] for each head.

    x [T, H, P]; decay [T, H], at most 0; key and query [T, groups, N], each for H / groups heads. Returns [T, H, P].
    """
    groups = key.shape[1]
    tree = chunk_tree(segments, CHUNK, x.device)
    x, decay = (tree.split(v).unflatten(2, (groups, -1)).transpose(1, 2) for v in (x, decay))  # [n, G, C, R, P], [.. R]
    key, query = (tree.split(v).transpose(1, 2) for v in (key, query))  # [n, G, C, N]
    total = running_sum(decay, 2)
    between = total.transpose(2, 3)[..., :, None] - total.transpose(2, 3)[..., None, :]  # [n, G, R, C, C]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    weights = (query @ key.transpose(2, 3))[:, :, None] * between.masked_fill(later, float("-inf")).exp()
    y = (weights @ x.transpose(2, 3)).transpose(2, 3)
    end = total[:, :, -1:]
    update = key.transpose(2, 3) @ (x * (end - total).exp()[..., None]).flatten(3)  # [n, G, N, R P]
    state = carry(end.exp()[..., None], update.unflatten(3, x.shape[3:]), tree)
    y = y + (query @ state.flatten(3)).unflatten(3, x.shape[3:]) * total.exp()[..., None]
    return tree.join(y.transpose(1, 2).flatten(2, 3))


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, key: Tensor, query: Tensor, segments: Segments) -> Tensor:
    """``y_t = S_t query_t`` with ``S_t = exp(dt_t a) S_{t-1} + dt_t x_t key_t'``, a state [N] for each channel.

    x and dt [T, D]; a [D, N]; key and query [T, N]. Returns [T, D].
    """
    tree = chunk_tree(segments, STEPS, x.device)
    x, dt, key, query = (tree.split(v) for v in (x, dt, key, query))
    decay = (dt[..., None] * a).exp()  # one where there is no token
    state = tree_scan(decay, (dt * x)[..., None] * key[:, :, None], tree)
    return tree.join((state @ query[..., None])[..., 0])


def linear_recurrence(gate: Tensor, x: Tensor, segments: Segments) -> Tensor:
    """``h_t = gate_t h_{t-1} + x_t`` for gate and x [T, D] (De et al. 2024, Griffin, arXiv 2402.19427, section 2)."""
    tree = chunk_tree(segments, STEPS, x.device)
    empty = 1 - tree.split(torch.ones_like(gate[:, :1]))
    return tree.join(tree_scan(tree.split(gate) + empty, tree.split(x), tree))
