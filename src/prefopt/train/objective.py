"""The DPO loss on packed batches: where a pure function of log-probabilities meets the loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.packer import PackedBatch
from prefopt.losses.preference import LossOutput, dpo


class PairObjective:
    """The DPO loss on packed pairs: response 2g is group g's chosen one, 2g + 1 its rejected one.

    ``reference_N``: sums of the reference's log-probabilities for all responses of the data, in their order.
    """

    def __init__(self, reference_N: npt.NDArray[np.float64], *, beta: float, label_smoothing: float) -> None:
        self.reference_G2 = torch.from_numpy(reference_N.reshape(-1, 2))
        self.beta, self.label_smoothing = beta, label_smoothing

    def weight(self, indices: Sequence[int]) -> float:
        """Every pair weighs 1."""
        return float(len(indices))

    def __call__(self, logp_N: torch.Tensor, batch: PackedBatch, indices: Sequence[int]) -> LossOutput:
        """See :class:`prefopt.train.loop.Objective`."""
        reference = self.reference_G2[list(indices)].to(logp_N.device, logp_N.dtype)
        policy = logp_N.view(-1, 2)
        out = dpo(*policy.unbind(1), *reference.unbind(1), beta=self.beta, label_smoothing=self.label_smoothing)
        length = batch.length.view(-1, 2).to(logp_N.dtype)
        ratio = (policy.detach() - reference) / length
        more = {}
        for side, name in enumerate(("chosen", "rejected")):
            more[f"log_ratios_per_token/{name}"] = ratio[:, side]
            more[f"lengths/{name}"] = length[:, side]
        return LossOutput(out.numerator_G, out.weight_G, {**out.metrics, **more})
