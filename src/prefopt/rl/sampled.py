"""Rollouts whose log-probabilities are those that the sampler drew by: a pass through the policy less."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.generate.sampler import ProgressCallback, Sample
from prefopt.rl.rollouts import Collector
from prefopt.train.batch import MicroBatch


class SampledCollector(Collector):
    """For losses without ratios, which need the log-probabilities of responses for their KL alone.

    They are exact where the policy's own model draws at the temperature and no token is cut off: the scorer would give
    the same but for rounding.
    """

    _sampled: Sequence[Sample] = ()

    def _draw(
        self, step: int, prompts: Sequence[int], streams: Sequence[int], progress: ProgressCallback
    ) -> tuple[tuple[Group, ...], list[Sample]]:
        groups, samples = super()._draw(step, prompts, streams, progress)
        self._sampled = samples
        return groups, samples

    def _look(self, micro: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.settings.never:  # the sampler's are of the other tokens alone
            return super()._look(micro)
        drawn = [sample.sampling_logps for sample in self._sampled]
        return torch.from_numpy(np.concatenate(drawn) if drawn else np.zeros(0)).double(), None
