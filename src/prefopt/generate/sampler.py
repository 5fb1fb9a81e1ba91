"""What samplers take and return, and how a token is drawn from logits so that no sample depends on its batch.

A token is drawn by the Gumbel-max trick: the argmax of log p + g, with g standard Gumbel, is distributed as p. Unlike
inverse-CDF sampling, where a rounding error anywhere moves the borders of every token, the choice changes only where
two tokens come within a rounding error of one another. The draw has two stages, which together are exact, so that not
every token of the vocabulary needs a random number: first a block of tokens by the sum of their probabilities, then a
token of that block.

Random numbers are counter-based: a sample and a step are hashed by the output function of SplitMix64 (Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). No generator advances, so that no draw depends on
the batch, its order, or which samples have ended. All devices give the same numbers.

>>> sample = Sample(np.array([7, 8, 2], np.int32), np.array([-0.5, -0.1, -0.2]), np.array([-1.0, -0.4, -0.3]), True)
>>> sample.tokens, round(sample.logp, 6), round(sample.sampling_logp, 6), sample.finish
(3, -1.7, -0.8, 'stop')
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.group import Group, IntArray, PicturedIds, pictures_in
from prefopt.errors import ConfigError
from prefopt.model.packing import packed_batches
from prefopt.model.scorer import Scorer

FloatArray = npt.NDArray[np.float64]
Ids = Sequence[int] | IntArray


ProgressCallback = Callable[[int, int], None]
"""Called with the number of samples that ended and of tokens drawn since the last call; may raise to stop the sampler.
Both are negative where a batch ran out of memory and will be drawn again."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    ``temperature`` divides the logits; 0 is greedy. Then ``top_k`` keeps the k likeliest tokens, then ``top_p`` the
    smallest set of likeliest tokens with this probability; tokens as likely as the last one kept stay too. The rest is
    renormalised. A sample ends with a token of ``stop`` (which it keeps, but not among its first ``min_new_tokens``),
    after ``max_new_tokens``, or where the model's context ends. Tokens ``never`` drawn, such as that in whose place a
    picture's features go, have no probability, whatever the other settings.
    """

    max_new_tokens: int
    stop: tuple[int, ...] = ()
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        good = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "min_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k is None or self.top_k >= 1,
        }
        if bad := [name for name, ok in good.items() if not ok]:
            raise ConfigError(f"{bad[0]} is {getattr(self, bad[0])!r}, which is out of range")

    @property
    def pure(self) -> bool:
        """Whether tokens come from the model's own distribution, so that both log-probabilities are the same."""
        return (
            self.temperature == 1 and self.top_p == 1 and self.top_k is None and not (self.min_new_tokens or self.never)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One response to one prompt, R tokens.

    ``ids`` [R] include the stop token, if any. ``sampling_logps`` [R] are the log-probabilities under the distribution
    that was drawn from (0 for greedy), ``logps`` [R] those under the model, at temperature 1 and without truncation.
    ``finished``: it ended with a stop token.
    """

    ids: IntArray
    sampling_logps: FloatArray
    logps: FloatArray
    finished: bool

    @property
    def tokens(self) -> int:
        """The number of tokens, the stop token included."""
        return len(self.ids)

    @property
    def logp(self) -> float:
        """Log-probability of the response under the model, in nats."""
        return float(self.logps.sum())

    @property
    def sampling_logp(self) -> float:
        """Log-probability of the response under the distribution that was drawn from, in nats."""
        return float(self.sampling_logps.sum())

    @property
    def finish(self) -> str:
        """``stop``, or ``length`` where the sample was cut off."""
        return "stop" if self.finished else "length"


class ResponseSampler(Protocol):
    """Draws ``num`` samples for each prompt."""

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Sample]]:
        """``num`` samples of every prompt (token ids, at least one), in the order of the prompts.

        A sample depends on the seed, the prompt and its number alone. A repeated prompt gets other samples: ``streams``
        numbers the occurrences of each prompt (:func:`occurrences`), where not all are in this call. Raises
        :class:`prefopt.errors.UserError`.
        """
        ...


def occurrences(prompts: Sequence[Ids]) -> list[int]:
    """How often each prompt occurred before.

    >>> occurrences([[1, 2], [3], [1, 2]])
    [0, 0, 1]
    """
    seen: dict[bytes, int] = {}
    numbers = []
    for prompt in prompts:
        key = prompt.tobytes() if isinstance(prompt, PicturedIds) else np.asarray(prompt, np.int32).tobytes()
        numbers.append(seen.get(key, 0))
        seen[key] = numbers[-1] + 1
    return numbers


def group_of(prompt: Ids, samples: Sequence[Sample], row: int = 0) -> Group:
    """A prompt and its samples as a group without preferences, in which every sampled token is scored."""
    start = np.asarray(prompt, np.int32)
    wholes = [np.concatenate([start, sample.ids]) for sample in samples]
    sequences = [(ids, np.arange(len(ids)) >= len(start)) for ids in wholes]
    pictures = pictures_in(prompt)
    return Group.from_sequences(sequences, row=row, pairs=(), pictures=[pictures] * len(wholes) if pictures else ())


# -- drawing tokens --------------------------------------------------------------------------------------------

COUNTERS_PER_STEP = 2**32
"""Random numbers of one step of one sample: those of tokens from 0 on, those of blocks in the upper half."""
BLOCKS = 2**31
FIRST_SORTED = 256
"""Likeliest tokens that are sorted first to find the top-p set, which usually suffices."""


Step = int | torch.Tensor
"""Tokens that a sample has already; or those of each sample, [n] (int64)."""


class Choice(NamedTuple):
    """Tokens [n] with their log-probabilities, under the distribution drawn from and under the model."""

    token_n: torch.Tensor
    sampling_logp_n: torch.Tensor
    logp_n: torch.Tensor


def choose(z: torch.Tensor, params: SamplingParams, key_n: torch.Tensor, step: Step) -> Choice:
    """One token for each row of logits ``z`` [n, V] (float32 or float64), at ``step`` of samples with keys [n].

    Without top-p, nothing waits for the device.
    """
    w = masked(z, params, step)
    if params.temperature == 0:
        token_n = w.argmax(-1)
        logp_n = _at(z, token_n) - z.logsumexp(-1)
        return Choice(token_n, torch.zeros_like(logp_n), logp_n)
    total_n = None if w is z else z.logsumexp(-1)
    e = w.softmax(-1)
    token_n, sums = _draw(e, key_n, step)
    sampling_logp_n = _at(e, token_n).log_() - sums.sum(-1).log_()
    return Choice(token_n, sampling_logp_n, sampling_logp_n if total_n is None else _at(z, token_n) - total_n)


def masked(z: torch.Tensor, params: SamplingParams, step: Step) -> torch.Tensor:
    """Logits [n, V] of the distribution that is drawn from, ``z`` itself where that is the model's own; at temperature
    0 its argmax is taken."""
    w = z.clone() if params.never else z
    for never in params.never:
        w[:, never] = -math.inf
    if params.min_new_tokens and params.stop:
        w, early = w.clone(), torch.as_tensor(step, device=z.device) < params.min_new_tokens
        for stop in params.stop:
            w[:, stop].masked_fill_(early, -math.inf)
    if params.temperature == 0:
        return w
    if params.temperature != 1:
        w = w / params.temperature
    return _truncated(w, params)


def _draw(e: torch.Tensor, key_n: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """A token by weights ``e`` [n, V], in two stages of Gumbel-max: a block by its sum, a token of it. Returns tokens
    [n] and the sums of blocks [n, B]."""
    vocabulary = e.shape[1]
    width = 1 << round(math.log2(vocabulary) / 2)  # about the square root: both stages draw about as many numbers
    whole = vocabulary // width * width
    sums = e[:, :whole].unflatten(1, (-1, width)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, e[:, whole:].sum(-1, keepdim=True)], 1)
    every = torch.arange(sums.shape[1], device=e.device)
    block_n = (sums.log() + gumbel(key_n, step, every + BLOCKS)).argmax(-1)
    token = block_n[:, None] * width + torch.arange(width, device=e.device)
    inside = e.gather(1, token.clamp(max=vocabulary - 1)).masked_fill_(token >= vocabulary, 0)
    return _at(token, (inside.log_() + gumbel(key_n, step, token)).argmax(-1)), sums


def _truncated(w: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """``w`` [n, V] with tokens outside top-k and top-p at minus infinity."""
    vocabulary = w.shape[1]
    k = None if params.top_k is None else min(params.top_k, vocabulary)
    if params.top_p < 1:
        least_n = _least_of_nucleus(w, params.top_p, k)
    elif k is not None and k < vocabulary:
        least_n = w.topk(k, sorted=True).values[:, -1]
    else:
        return w
    return w.masked_fill(w < least_n[:, None], -math.inf)


def _least_of_nucleus(w: torch.Tensor, top_p: float, k: int | None) -> torch.Tensor:
    """The smallest logit [n] of the top-p set, within the k likeliest tokens where ``k`` is given."""
    vocabulary = w.shape[1]
    total_n = w.logsumexp(-1) if k is None else None
    size = min(vocabulary, FIRST_SORTED if k is None else k)
    least_n = w.new_empty(len(w))
    rows = torch.arange(len(w), device=w.device)
    while True:
        top = w[rows].topk(size, sorted=True).values
        whole = top.logsumexp(-1) if total_n is None else total_n[rows]
        held = (top - whole[:, None]).exp_().cumsum_(-1)
        last = k is not None or size == vocabulary
        # The first token at which the set is large enough; rounding may keep the last sum below.
        at = (held < top_p).sum(-1)
        enough = torch.ones_like(at, dtype=torch.bool) if last else at < size
        least_n[rows[enough]] = _at(top, at.clamp(max=size - 1))[enough]
        rows = rows[~enough]
        if not len(rows):
            return least_n
        size = min(vocabulary, 8 * size)


def _at(x: torch.Tensor, index_n: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index_n[:, None])[:, 0]


# -- random numbers --------------------------------------------------------------------------------------------


# As signed 64-bit integers.
_GOLDEN, _MIX1, _MIX2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(seed: int, prompt: Ids, stream: int, sample: int) -> int:
    """The key (64 bits, signed) of a prompt's ``sample``-th sample, of its ids and pictures; ``stream``: see
    :func:`occurrences`."""
    digest = hashlib.blake2b(np.asarray(prompt, "<i4").tobytes(), digest_size=8)
    for p in pictures_in(prompt):
        digest.update(p.picture.digest + p.start.to_bytes(8, "little"))
    digest.update(np.array([seed, stream, sample], "<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def gumbel(key_n: torch.Tensor, step: Step, counter: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers [n, m] for keys [n] (int64) at ``step``; ``counter`` [m] or [n, m], below 2**32."""
    return uniform(key_n, step, counter).log_().neg_().log_().neg_()


def uniform(key_n: torch.Tensor, step: Step, counter: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1) [n, m], float64 with 53 bits (float32 with 24 where the device has no float64)."""
    first = (torch.as_tensor(step, device=key_n.device) * COUNTERS_PER_STEP + 1) * _GOLDEN  # modulo 2**64
    x = counter * _GOLDEN + (first + key_n)[:, None]
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    x = x ^ _shifted(x, 31)
    narrow = x.device.type == "mps"
    bits = 24 if narrow else 53
    # The middle of its interval: never 0 nor 1, so that no Gumbel number is infinite.
    u: torch.Tensor = _shifted(x, 64 - bits).to(torch.float32 if narrow else torch.float64)
    return u.add_(0.5).mul_(2.0**-bits)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    right: torch.Tensor = (x >> bits) & ((1 << 64 - bits) - 1)
    return right


# Mean difference of a token's log-probability, in nats, that is rounding: a tenth of what the load check allows between
# two ways of scoring as root mean square.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}
TOKEN_BUDGET = 2048


@dataclass(frozen=True, slots=True)
class LogprobMismatch:
    """Mean and largest absolute difference over ``tokens`` of ``samples``, in nats. Beyond rounding it would bias
    importance ratios."""

    samples: int
    tokens: int
    mean: float
    largest: float

    def words(self, dtype: torch.dtype) -> str:
        """The line that a run prints."""
        line = (
            f"sampler and scorer differ by {self.mean:.1g} nats per token on average, {self.largest:.1g} at most"
            f" ({self.tokens:,} tokens of {self.samples} samples)"
        )
        if self.mean <= ROUNDING.get(dtype, 0.05):
            return line
        return f"{line}: more than rounding in {str(dtype).removeprefix('torch.')}; please report this architecture"


@torch.no_grad()
def compare_logprobs(scorer: Scorer, prompts: Sequence[Ids], samples: Sequence[Sequence[Sample]]) -> LogprobMismatch:
    """Score the samples of each prompt again and compare log-probabilities."""
    drawn = [sample.logps for many in samples for sample in many]
    if not drawn:
        return LogprobMismatch(0, 0, 0.0, 0.0)
    groups = [group_of(prompt, many) for prompt, many in zip(prompts, samples, strict=True) if many]
    device = next(scorer.model.parameters()).device
    batches = packed_batches(groups, scorer.layout, TOKEN_BUDGET, device)
    scored = np.concatenate([scorer(batch).double().cpu().numpy() for batch in batches])
    gaps = np.abs(scored - np.concatenate(drawn))
    return LogprobMismatch(len(drawn), len(gaps), float(gaps.mean()), float(gaps.max()))
