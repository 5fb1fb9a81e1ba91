"""Random numbers that belong to a place: a function of seed, prompt, sample, step and token, and of nothing else.

No generator is advanced, so that no draw depends on what was drawn elsewhere: not on the batch, its order, or on which
samples have ended. A place is a counter, hashed by the output function of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), which passes the usual batteries of tests on consecutive
counters. All devices give the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from prefopt.generate.sample import Ids

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
