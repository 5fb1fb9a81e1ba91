"""How far the sampler's log-probabilities are from the scorer's, on the same token ids.

Both compute the same thing in another order, so that the difference is rounding; where it is more, training on samples
would train on ratios that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.data.packer import pack, split
from prefopt.generate.sample import Ids, Sample, group_of
from prefopt.model.scorer import Scorer

# Mean difference of a token's log-probability, in nats, that is still rounding: a tenth of what the load check allows
# between two ways of scoring, as the root mean square is.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}
TOKENS = 2048
"""Scored at once, about."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Absolute differences over so many ``tokens`` of so many ``samples``, in nats: their mean, and the largest."""

    samples: int
    tokens: int
    mean: float
    largest: float

    def words(self, dtype: torch.dtype) -> str:
        """For the line that a run prints."""
        line = (
            f"sampler and scorer differ by {self.mean:.1g} nats per token in the mean, {self.largest:.1g} at most"
            f" ({self.tokens:,} tokens of {self.samples} samples)"
        )
        if self.mean <= ROUNDING.get(dtype, 0.05):
            return line
        return f"{line}: more than rounding in {str(dtype).removeprefix('torch.')}; please report this architecture"


@torch.no_grad()
def compare(scorer: Scorer, prompts: Sequence[Ids], samples: Sequence[Sequence[Sample]]) -> Mismatch:
    """Score the samples of each prompt and compare."""
    device = next(scorer.model.parameters()).device
    held = [(group_of(prompt, many), many) for prompt, many in zip(prompts, samples, strict=True) if many]
    parts = []
    for part in split(range(len(held)), [scorer.layout.cost(group) for group, _ in held], TOKENS):
        scored = scorer(pack([held[i][0] for i in part], scorer.layout).to(device)).double().cpu().numpy()
        parts.append(np.abs(scored - np.concatenate([s.logps for i in part for s in held[i][1]])))
    gaps = np.concatenate(parts) if parts else np.zeros(0)
    mean = float(gaps.mean()) if len(gaps) else 0.0
    return Mismatch(sum(len(many) for _, many in held), len(gaps), mean, float(gaps.max(initial=0.0)))
