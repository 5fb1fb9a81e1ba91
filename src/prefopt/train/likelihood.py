"""Supervised fine-tuning: the negative log-likelihood of the trained tokens, by token or by response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.packer import PackedBatch
from prefopt.model.packed import PackedModel
from prefopt.model.scorer import response_sums
from prefopt.train import items
from prefopt.train.facts import Values
from prefopt.train.objective import Normaliser
from prefopt.train.sums import Outcome, Record, State

Average = Literal["tokens", "rows"]
MOST_NATS = 700.0  # beyond, a perplexity is no number


class LikelihoodObjective:
    """See :class:`prefopt.train.objective.Objective`.

    Over the responses n of a global batch, of |y_n| trained tokens each::

        tokens   - sum_n log pi(y_n) / sum_n |y_n|
        rows     - mean_n (log pi(y_n) / |y_n|)

    ``nll`` is the first of the two whichever is trained, in nats per token, and ``perplexity`` its exponential.
    """

    whole_batch = False

    def __init__(self, groups: Sequence[Group], average: Average, *, device: torch.device) -> None:
        self.groups, self.average, self.device = groups, average, device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state: State = {}

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """Trained tokens, or responses, of these groups."""
        length_N = self._lengths(indices)
        return (length_N.sum() if self.average == "tokens" else length_N.new_tensor(float(len(length_N))),)

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Nothing is compared with."""
        return {}

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Log-probability of each response, ``logp_N``."""
        return {"logp_N": response_sums(scorer(batch), batch)}

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """The loss on ``values`` of these groups."""
        length_N = self._lengths(indices)
        nll_N = -values["logp_N"].to(self.dtype)
        numerator = nll_N.sum() if self.average == "tokens" else (nll_N / length_N).sum()
        loss = numerator / normaliser[0]
        metrics = {
            "nll": (nll_N.detach().sum(), length_N.sum()),
            "lengths": (length_N.sum(), length_N.new_tensor(float(len(length_N)))),
        }
        return Outcome(loss, {"loss": loss}, metrics, self.state, {"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """``perplexity``: of a mean, so that it is taken once the mean is there."""
        return {"perplexity": math.exp(min(record["nll"], MOST_NATS))}

    def _lengths(self, indices: Sequence[int]) -> torch.Tensor:
        lengths = items.lengths_of([self.groups[i] for i in indices]).astype(np.float64)
        return torch.from_numpy(lengths).to(self.device, self.dtype)
