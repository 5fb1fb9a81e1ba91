"""How far the sampler's log-probabilities are from the scorer's, on the same token ids.

Both compute the same thing in another order, so that the difference is rounding; where it is more, training on samples
would train on ratios that are not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.data.packer import pack
from prefopt.generate.sample import Ids, Sample, group_of
from prefopt.model.scorer import Scorer

# Mean difference of a token's log-probability, in nats, that is still rounding: a tenth of what the load check allows
# between two ways of scoring, as the root mean square is.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Absolute differences over so many ``tokens``, in nats: their mean, and the largest."""

    tokens: int
    mean: float
    largest: float

    def words(self, prompts: int, dtype: torch.dtype) -> str:
        """For the line that a run prints."""
        line = (
            f"sampler and scorer differ by {self.mean:.1g} nats per token in the mean, {self.largest:.1g} at most"
            f" ({self.tokens:,} tokens of {prompts} prompts)"
        )
        if self.mean <= ROUNDING.get(dtype, 0.05):
            return line
        return f"{line}: more than rounding in {str(dtype).removeprefix('torch.')}; please report this architecture"


@torch.no_grad()
def compare(scorer: Scorer, prompts: Sequence[Ids], samples: Sequence[Sequence[Sample]]) -> Mismatch:
    """Score the samples of each prompt and compare, prompt by prompt."""
    device = next(scorer.model.parameters()).device
    parts = []
    for prompt, many in zip(prompts, samples, strict=True):
        if not many:
            continue
        scored = scorer(pack([group_of(prompt, many)], scorer.layout).to(device)).double().cpu().numpy()
        parts.append(np.abs(scored - np.concatenate([s.logps for s in many])))
    gaps = np.concatenate(parts) if parts else np.zeros(0)
    return Mismatch(len(gaps), float(gaps.mean()) if len(gaps) else 0.0, float(gaps.max(initial=0.0)))
