"""What a sampler takes and gives: settings, samples, and the protocol that every sampler follows.

>>> import numpy as np
>>> sample = Sample(np.array([7, 8, 2], np.int32), np.array([-0.5, -0.1, -0.2]), np.array([-1.0, -0.4, -0.3]), True)
>>> sample.tokens, round(sample.logp, 6), round(sample.sampling_logp, 6), sample.finish
(3, -1.7, -0.8, 'stop')

Both compute the same thing in another order, so that the difference is rounding; where it is more, training on samples
would train on ratios that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.errors import ConfigError
from prefopt.model.packing import pack, split
from prefopt.model.scorer import Scorer

FloatArray = npt.NDArray[np.float64]
Ids = Sequence[int] | IntArray


@dataclass(frozen=True, slots=True)
class Settings:
    """How tokens are drawn.

    ``temperature`` divides the logits; at 0 the likeliest token is taken. Then ``top_k`` keeps the k likeliest tokens,
    then ``top_p`` the smallest set of likeliest tokens that holds so much probability; tokens as likely as the last
    one kept stay too. What is left is renormalised. A sample ends with one of ``stop`` (which it holds, but not among
    its first ``min_new_tokens``), after ``max_new_tokens``, or where the model's context ends.
    """

    max_new_tokens: int
    stop: tuple[int, ...] = ()
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        good = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "min_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k is None or self.top_k >= 1,
        }
        if bad := [name for name, ok in good.items() if not ok]:
            raise ConfigError(f"{bad[0]} is {getattr(self, bad[0])!r}, which no sampler can do")

    @property
    def pure(self) -> bool:
        """Whether tokens come from the model's own distribution, so that both log-probabilities are the same."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k is None and self.min_new_tokens == 0


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One response to one prompt, R tokens.

    ``ids`` [R] hold the stop token where there is one. ``sampling_logps`` [R] are the log-probabilities under the
    distribution that was drawn from (0 for greedy choices), ``logps`` [R] those under the model, at temperature 1 and
    with nothing left out. ``finished``: it ended with a stop token.
    """

    ids: IntArray
    sampling_logps: FloatArray
    logps: FloatArray
    finished: bool

    @property
    def tokens(self) -> int:
        """How many tokens it has, the stop token too."""
        return len(self.ids)

    @property
    def logp(self) -> float:
        """Log-probability of the whole response under the model, in nats."""
        return float(self.logps.sum())

    @property
    def sampling_logp(self) -> float:
        """The same under the distribution that was drawn from."""
        return float(self.sampling_logps.sum())

    @property
    def finish(self) -> str:
        """``stop``, or ``length`` where the sample was cut off."""
        return "stop" if self.finished else "length"


Progress = Callable[[int, int], None]
"""Called with the samples that ended and the tokens drawn since the last call; may raise to stop the sampler.

Both are negative where a batch that did not fit into memory will be drawn again."""


class Sampler(Protocol):
    """Draws ``num`` samples for each prompt."""

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        settings: Settings,
        *,
        streams: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Sample]]:
        """``num`` samples of every prompt (token ids, at least one), in the order of the prompts.

        What is drawn depends on the seed, the prompt and the number of the sample alone: not on the other prompts,
        their order or the size of batches. A prompt that comes again draws other samples: ``streams`` numbers the
        occurrences of each prompt, where they are not all in this call. Raises :class:`prefopt.errors.UserError`.
        """
        ...


def occurrences(prompts: Sequence[Ids]) -> list[int]:
    """How often each prompt has come before: the ``streams`` of a sampler.

    >>> occurrences([[1, 2], [3], [1, 2]])
    [0, 0, 1]
    """
    seen: dict[bytes, int] = {}
    numbers = []
    for prompt in prompts:
        key = np.asarray(prompt, np.int32).tobytes()
        numbers.append(seen.get(key, 0))
        seen[key] = numbers[-1] + 1
    return numbers


def group_of(prompt: Ids, samples: Sequence[Sample], row: int = 0) -> Group:
    """A prompt and its samples as the scorer takes them: every sampled token is scored, and no preference is known."""
    start = np.asarray(prompt, np.int32)
    sequences: list[tuple[IntArray, BoolArray]] = []
    for sample in samples:
        ids = np.concatenate([start, sample.ids])
        sequences.append((ids, np.arange(len(ids)) >= len(start)))
    return Group.from_sequences(sequences, row=row, pairs=())


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
