"""A sampler on vLLM, many times faster on a GPU for large sets of prompts (extra ``vllm``).

Unlike :class:`TransformersSampler`, samples may depend on the batch, as vLLM's kernels do; the same seed gives other
samples.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.core.model_folder import read_adapter, vet_folder
from prefopt.core.plugins import how_to_install
from prefopt.errors import ConfigError, ModelError, RunError, first_line
from prefopt.generate.sampler import FloatArray, Ids, ProgressCallback, Sample, SamplingParams, key_of, occurrences

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``."""


class VllmSampler:
    """A :class:`prefopt.generate.sampler.ResponseSampler`, and a context manager that frees the GPU's memory.

    vLLM returns log-probabilities of the distribution drawn from. Where that is not the model's own, a second pass over
    prompt and sample gives the model's; it draws one token that is dropped.
    """

    def __init__(self, model: str, *, adapter: str | None = None, context: int, dtype: str = "auto") -> None:
        """``model`` and ``adapter`` are folders; ``context`` bounds prompt and sample.

        Raises :class:`ConfigError` where vLLM is not installed, :class:`ModelError` where it cannot load the model.
        """
        self._vllm = _imported("vllm")
        for folder in filter(None, (model, adapter)):
            vet_folder(folder)
        options: dict[str, Any] = {"dtype": dtype, "max_model_len": context, "logprobs_mode": "processed_logprobs"}
        self._lora: Any = None
        if adapter is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _max_lora_rank(adapter)}
            self._lora = _imported("vllm.lora.request").LoRARequest("adapter", 1, adapter)
        try:
            self._engine: Any = self._vllm.LLM(model=model, **options)
        except Exception as error:  # its engine raises anything
            raise ModelError(
                f"{model}: vLLM cannot load it ({first_line(error)}); try --engine transformers"
            ) from error
        self.context = context

    def __enter__(self) -> VllmSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine = None
        gc.collect()  # the engine's process ends with its last reference

    def sample(
        self,
        prompts: Sequence[Ids],
        num: int,
        params: SamplingParams,
        *,
        streams: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
    ) -> list[list[Sample]]:
        """See the protocol; ``progress`` is called once. Raises :class:`RunError` if vLLM fails."""
        streams = occurrences(prompts) if streams is None else streams
        given, requests = [], []
        for prompt, stream in zip(prompts, streams, strict=True):
            ids = [int(i) for i in prompt]
            # The second pass draws one more token.
            room = self.context - len(ids) - (not params.pure)
            if not ids or room < 1:
                raise ModelError(f"a prompt of {len(ids)} tokens cannot be answered in a context of {self.context}")
            for k in range(num):
                given.append(ids)
                seed = key_of(params.seed, prompt, stream, k) & (2**63 - 1)
                requests.append(self._params(params, seed, min(room, params.max_new_tokens)))
        found = [request.outputs[0] for request in self._generate(given, requests)]
        ids_of = [np.array(out.token_ids, np.int32) for out in found]
        drawn = [_chosen(out.token_ids, out.logprobs) for out in found]
        own = drawn if params.pure else self._scored(given, ids_of)
        samples = [
            Sample(ids, np.zeros(len(ids)) if params.temperature == 0 else d, m, bool(ids[-1] in params.stop))
            for ids, d, m in zip(ids_of, drawn, own, strict=True)
        ]
        if progress is not None:
            progress(len(samples), sum(s.tokens for s in samples))
        return [samples[i : i + num] for i in range(0, len(samples), num)] if num else [[] for _ in prompts]

    def _params(self, params: SamplingParams, seed: int, max_tokens: int) -> Any:
        return self._vllm.SamplingParams(
            n=1,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=min(params.min_new_tokens, max_tokens),
            stop_token_ids=list(params.stop),
            ignore_eos=True,  # params.stop alone ends a sample
            logprobs=0,
            detokenize=False,
        )

    def _generate(self, given: list[list[int]], params: Any) -> Any:
        if not given:
            return []
        prompts = [{"prompt_token_ids": ids} for ids in given]
        more = {} if self._lora is None else {"lora_request": self._lora}
        try:
            return self._engine.generate(prompts, params, use_tqdm=False, **more)
        except Exception as error:  # its engine raises anything
            raise RunError(f"vLLM stopped: {first_line(error)}; try --engine transformers") from error

    def _scored(self, given: list[list[int]], samples: list[Any]) -> list[FloatArray]:
        """The model's own log-probabilities of the samples."""
        whole = [[*ids, *map(int, sample)] for ids, sample in zip(given, samples, strict=True)]
        params = self._vllm.SamplingParams(n=1, temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        return [
            _chosen(sample, request.prompt_logprobs[len(ids) :])
            for ids, sample, request in zip(given, samples, self._generate(whole, params), strict=True)
        ]


def _max_lora_rank(adapter: str) -> int:
    """The least ``max_lora_rank`` that admits an adapter: vLLM refuses one above its default of 16."""
    config = read_adapter(adapter)
    rank = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    return next((n for n in LORA_RANKS if n >= rank), rank)


def _chosen(ids: Sequence[int], logprobs: Any) -> FloatArray:
    """The log-probability of each token, from vLLM's dict by token id for every position."""
    return np.array([by_id[int(i)].logprob for i, by_id in zip(ids, logprobs, strict=True)], np.float64)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--engine vllm needs {name}, which cannot be imported ({first_line(error)}): {how_to_install('vllm')},"
            " or leave --engine out"
        ) from error
