"""Divergences between two next-token distributions, by tiles of rows: values, and slopes at the logits.

With q = softmax(r) of another model (a reference or a teacher) and p = softmax(z)::

    forward    KL(q || p) = sum_v q (log q - log p)                 slope  p - q
    reverse    KL(p || q) = sum_v p (log p - log q)                 slope  p (log(p / q) - KL(p || q))
    jsd        w KL(q || m) + (1 - w) KL(p || m),  m = w q + (1 - w) p
                                                                    slope  p (a - sum_u p a),  a = (1 - w) log(p / m)

The last is the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649, equation 1), with
gradients towards forward KL as w falls to 0 and towards reverse KL as it rises to 1 (after division by w (1 - w)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A kind of divergence; ``weight``: that of the other model in the mixture of ``jsd``, between 0 and 1.

    >>> logp, ref = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> [round(float(Divergence(kind).value(logp, ref)), 4) for kind in ("forward", "reverse", "jsd")]
    [0.1308, 0.1438, 0.0338]
    """

    kind: Kind = "forward"
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"the weight of a mixture is between 0 and 1, not {self.weight}")

    def value(self, logp: Tensor, ref: Tensor) -> Tensor:
        """Log-probabilities [rows, V] of the model and of the other -> [rows], in nats."""
        if self.kind == "forward":
            return (ref.exp() * (ref - logp)).sum(-1)
        if self.kind == "reverse":
            return (logp.exp() * (logp - ref)).sum(-1)
        mixed, w = self._mixed(logp, ref), self.weight
        return w * (ref.exp() * (ref - mixed)).sum(-1) + (1 - w) * (logp.exp() * (logp - mixed)).sum(-1)

    def slope(self, logp: Tensor, ref: Tensor) -> Tensor:
        """The gradient [rows, V] of :meth:`value` with respect to the model's logits."""
        p = logp.exp()
        if self.kind == "forward":
            return p - ref.exp()
        ratio = logp - ref if self.kind == "reverse" else (1 - self.weight) * (logp - self._mixed(logp, ref))
        return p * (ratio - (p * ratio).sum(-1, keepdim=True))

    def _mixed(self, logp: Tensor, ref: Tensor) -> Tensor:
        return torch.logaddexp(ref + math.log(self.weight), logp + math.log1p(-self.weight))
