"""A next-token distribution of which only the likeliest tokens are known, as of a teacher behind a URL.

Of a position the K likeliest tokens S are known with their probabilities q. What remains is one bin, of mass
q_rest = 1 - sum_S q. The model's p is binned alike, p_rest = sum of p outside of S, and the divergence is that of two
distributions over K + 1 bins. By the data-processing inequality it is at most that of the whole distributions, and it
is that where p and q have the same shape outside of S.

    a_v = z_v for v in S,  a_rest = logsumexp of z outside of S         log p_bin = a_bin - logsumexp(a)

    d/dz_v = s_v for v in S,  s_rest exp(z_v - a_rest) outside of it    with s the slope at a, as at any logits

(:mod:`prefopt.model.kernels.divergence`). Where K is the whole vocabulary there is no rest.

>>> top = TopTokens(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log(), torch.zeros(1), 4)
>>> own, ref = top.bins(slice(0, 1), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log())
>>> [round(x, 3) for x in own.exp()[0].tolist()], [round(x, 3) for x in ref.exp()[0].tolist()]
([0.3, 0.1, 0.6], [0.5, 0.25, 0.25])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.model.kernels.divergence import Divergence

LEAST_REST = 1e-6
"""Mass of the rest at least: what is left of 1 by subtraction is rounding below this."""


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The other model's K likeliest tokens ``id_MK`` [M, K] (int64) with log-probabilities ``logp_MK``, and the
    log-probability ``own_M`` [M] of the token at hand. ``vocabulary``: the logits of the model compared with it."""

    id_MK: Tensor
    logp_MK: Tensor
    own_M: Tensor
    vocabulary: int

    def bins(self, rows: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the bins, of the model (from its ``logp`` [rows, V]) and of the other, [rows, K + 1]
        each, the rest last; [rows, K] where there is no rest."""
        at, ref = self.id_MK[rows], self.logp_MK[rows].to(logp.dtype)
        own = logp.gather(-1, at)
        if at.shape[-1] < logp.shape[-1]:
            rest = logp.scatter(-1, at, -math.inf).logsumexp(-1, keepdim=True)
            own = torch.cat([own, rest], -1)
            left = (1 - ref.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
            ref = torch.cat([ref, left], -1)
        return own, ref.log_softmax(-1)

    def value(self, rows: slice, logp: Tensor, divergence: Divergence) -> Tensor:
        """The divergence [rows] of the bins, in nats."""
        return divergence.value(*self.bins(rows, logp))

    def slope(self, rows: slice, logp: Tensor, divergence: Divergence) -> Tensor:
        """The gradient [rows, V] of :meth:`value` with respect to the model's logits."""
        own, ref = self.bins(rows, logp)
        at, slope = self.id_MK[rows], divergence.slope(own, ref)
        many = at.shape[-1]
        if many == logp.shape[-1]:
            return torch.zeros_like(logp).scatter_(-1, at, slope)
        outside = (logp - own[:, many:]).exp_().mul_(slope[:, many:])
        return outside.scatter_(-1, at, slope[:, :many])
