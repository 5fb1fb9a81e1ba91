"""One response asked of a rollout server, and its answer, of which nothing is taken on trust.

Token ids go in and come out; text is never tokenised again. The fields are those of vLLM's ``/v1/completions``:
``prompt`` as token ids, ``return_token_ids``, ``logprobs``, ``seed``, ``stop_token_ids``, ``request_id``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.core.dispatch import ServerFailed
from prefopt.data.group import IntArray
from prefopt.generate.sampler import FloatArray, SamplingParams

HIGHEST_LOGP = 1e-3
"""A log-probability is at most 0, but for rounding."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A response to ``prompt`` of at most ``max_tokens`` tokens, drawn with ``seed``."""

    prompt: tuple[int, ...]
    seed: int
    max_tokens: int

    def request(self, model: str, params: SamplingParams, name: str) -> dict[str, Any]:
        """The body of a request of this ``name``."""
        return {
            "model": model,
            "prompt": [*self.prompt],
            "request_id": name,
            "n": 1,
            "max_tokens": self.max_tokens,
            "min_tokens": min(params.min_new_tokens, self.max_tokens),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            # Servers add what a model's generation_config.json says, unless it is said here.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "stop_token_ids": [*params.stop],
            "ignore_eos": True,  # params.stop alone ends a response
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": False,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """A response [R] with its ``reported`` log-probabilities [R], as drawn by weights of ``version`` on the server of
    this ``place``. ``fresh``: the version is the one that was asked for."""

    ids: IntArray
    reported: FloatArray
    finished: bool
    version: str
    place: str
    fresh: bool


def read_completion(
    body: Mapping[str, Any], wanted: Wanted, params: SamplingParams
) -> tuple[IntArray, FloatArray, bool]:
    """Token ids [R], log-probabilities [R], and whether a stop token ended them. Raises :class:`ServerFailed`."""
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise flawed("incomplete", "an answer without the response that was asked for")
    choice = choices[0]
    if "token_ids" not in choice or "prompt_token_ids" not in choice:
        raise flawed("incomplete", NO_IDS)
    if choice["prompt_token_ids"] != [*wanted.prompt]:
        raise flawed("misdirected", "the answer to another prompt")
    ids = _integers(choice["token_ids"])
    logps = _numbers((choice.get("logprobs") or {}).get("token_logprobs"))
    if ids is None or logps is None or len(ids) != len(logps) or not len(ids):
        raise flawed("incomplete", "a response without a log-probability for each of its tokens")
    if len(ids) > wanted.max_tokens:
        raise flawed("misdirected", f"{len(ids)} tokens, more than the {wanted.max_tokens} asked for")
    if not (np.isfinite(logps).all() and float(logps.max()) <= HIGHEST_LOGP):
        raise flawed("incomplete", f"log-probabilities of up to {logps.max():.4g}")
    ends = np.flatnonzero(np.isin(ids, params.stop))
    ends = ends[ends >= params.min_new_tokens]
    finished = bool(len(ends)) and int(ends[0]) == len(ids) - 1
    if not finished and len(ids) < wanted.max_tokens:
        raise flawed("incomplete", f"a response cut off after {len(ids)} of {wanted.max_tokens} tokens")
    if len(ends) and not finished:
        raise flawed("misdirected", "a response that goes on after its end token")
    return ids, logps, finished


def flawed(kind: str, what: str) -> ServerFailed:
    """An answer that cannot be used. ``kind``: ``incomplete``, ``misdirected``, ``duplicated`` or ``stale``."""
    return ServerFailed(what, kind)


NO_IDS = "its answers lack token ids (return_token_ids), which this needs; use vLLM 0.10.2 or newer"


def _integers(value: Any) -> IntArray | None:
    good = isinstance(value, list) and all(type(x) is int and 0 <= x < 2**31 for x in value)
    return np.array(value, np.int32) if good else None


def _numbers(value: Any) -> FloatArray | None:
    good = isinstance(value, list) and all(isinstance(x, int | float) and not math.isnan(x) for x in value)
    return np.array(value, np.float64) if good else None
