"""From logits to tokens: temperature, top-k, top-p, and a draw that rounding hardly ever changes.

A token is drawn by the Gumbel-max trick: the largest of log p + g, with g standard Gumbel, is distributed as p. Unlike
a search in cumulative sums, where a rounding error anywhere moves the borders of every token, another choice needs two
tokens that come within a rounding error of one another. So that not every token of the vocabulary needs a random
number, the draw has two stages, which together are exact: first a block of tokens by the sums of their probabilities,
then a token of that block.

No generator is advanced, so that no draw depends on what was drawn elsewhere: not on the batch, its order, or on which
samples have ended. A place is a counter, hashed by the output function of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), which passes the usual batteries of tests on consecutive
counters. All devices give the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from prefopt.generate.sampler import Ids, Settings

_STEP = 2**32
"""Counters of one step of one sample: tokens from 0 on, blocks of tokens in the upper half."""
BLOCKS = 2**31


def _signed(x: int) -> int:
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _MIX1, _MIX2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(seed: int, prompt: Ids, stream: int, sample: int) -> int:
    """The 64 bits (signed) that name one sample of one prompt; ``stream`` counts the prompt's earlier occurrences."""
    digest = hashlib.blake2b(np.asarray(prompt, "<i4").tobytes(), digest_size=8)
    digest.update(np.array([seed, stream, sample], "<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def gumbel(key_n: torch.Tensor, step: int, counter: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers [n, m] for keys [n] (int64) at ``step``; ``counter`` [m] or [n, m], below 2**32."""
    u = uniform(key_n, step, counter)
    return u.log_().neg_().log_().neg_()


def uniform(key_n: torch.Tensor, step: int, counter: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1) [n, m], float64 with 53 bits (float32 with 24 where the device has no float64)."""
    x = (counter + step * _STEP + 1) * _GOLDEN + key_n[:, None]
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    x = x ^ _shifted(x, 31)
    narrow = x.device.type == "mps"
    bits = 24 if narrow else 53
    # The middle of its interval: never 0 nor 1, so that no Gumbel number is infinite.
    u: torch.Tensor = _shifted(x, 64 - bits).to(torch.float32 if narrow else torch.float64)
    return u.add_(0.5).mul_(2.0**-bits)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Bits to the right, as of an unsigned number."""
    right: torch.Tensor = (x >> bits) & ((1 << 64 - bits) - 1)
    return right


FIRST_SORTED = 256
"""Likeliest tokens that are sorted to find the set of top-p; most of the time they hold it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens [n] with their log-probabilities, under the distribution drawn from and under the model."""

    token_n: torch.Tensor
    sampling_logp_n: torch.Tensor
    logp_n: torch.Tensor


def choose(z: torch.Tensor, settings: Settings, key_n: torch.Tensor, step: int) -> Choice:
    """One token for each row of logits ``z`` [n, V] (float32 or float64); ``step`` counts the tokens before it.

    ``z`` is used up: the largest tensor of a step is not worth a second one beside it.
    """
    w = z
    if step < settings.min_new_tokens and settings.stop:
        w = z.index_fill(1, torch.tensor(settings.stop, device=z.device), -math.inf)
    if settings.temperature == 0:
        token_n = w.argmax(-1)
        logp_n = _at(z, token_n) - z.logsumexp(-1)
        return Choice(token_n, torch.zeros_like(logp_n), logp_n)
    if settings.temperature != 1:
        w = w / settings.temperature
    w = _truncated(w, settings)
    total_n = None if w is z else z.logsumexp(-1)
    e = w.sub_(w.amax(-1, keepdim=True)).exp_()
    sums = _block_sums(e)
    token_n = _draw(e, sums, key_n, step)
    sampling_logp_n = _at(e, token_n).log_() - sums.sum(-1).log_()
    return Choice(token_n, sampling_logp_n, sampling_logp_n if total_n is None else _at(z, token_n) - total_n)


def _width(vocabulary: int) -> int:
    """Tokens of a block: about the square root, so that both stages draw about as many numbers."""
    return 1 << round(math.log2(vocabulary) / 2)


def _block_sums(e: torch.Tensor) -> torch.Tensor:
    """The sum of each block of tokens [n, B]."""
    vocabulary = e.shape[1]
    width = _width(vocabulary)
    whole = vocabulary // width * width
    sums = e[:, :whole].unflatten(1, (-1, width)).sum(-1)
    return sums if whole == vocabulary else torch.cat([sums, e[:, whole:].sum(-1, keepdim=True)], 1)


def _draw(e: torch.Tensor, sums: torch.Tensor, key_n: torch.Tensor, step: int) -> torch.Tensor:
    """A token by weights ``e`` [n, V], in two stages of Gumbel-max: a block by ``sums`` [n, B], a token of it."""
    vocabulary = e.shape[1]
    width = _width(vocabulary)
    every = torch.arange(sums.shape[1], device=e.device)
    block_n = (sums.log() + gumbel(key_n, step, every + BLOCKS)).argmax(-1)
    token = block_n[:, None] * width + torch.arange(width, device=e.device)
    inside = e.gather(1, token.clamp(max=vocabulary - 1)).masked_fill_(token >= vocabulary, 0)
    return _at(token, (inside.log_() + gumbel(key_n, step, token)).argmax(-1))


def _truncated(w: torch.Tensor, settings: Settings) -> torch.Tensor:
    """``w`` [n, V] with what top-k and top-p leave out at minus infinity."""
    vocabulary = w.shape[1]
    k = None if settings.top_k is None else min(settings.top_k, vocabulary)
    if settings.top_p < 1:
        least_n = _least_of_nucleus(w, settings.top_p, k)
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
