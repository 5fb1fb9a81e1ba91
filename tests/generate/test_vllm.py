"""The vLLM sampler against a stand-in with the interface that vLLM documents, which really runs a small model."""

from __future__ import annotations

import copy
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import VOCABULARY, build
from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.generate.sampler import SamplingParams, compare_logprobs
from prefopt.generate.vllm import VllmSampler
from prefopt.model.scorer import Scorer

STOP = (7, 11, 12, 13, 14)
PROMPTS = [np.random.default_rng(n).integers(3, VOCABULARY, n).tolist() for n in (3, 9, 1, 9)]
CONTEXT = 20


@dataclass(kw_only=True)
class VllmParams:
    """The fields that are used, with vLLM's defaults; another keyword is an error, as it is there."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    index: int = 0


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Logprob] | None] | None


@dataclass
class FakeVllm:
    """What the stand-in was told; ``fails`` is what its engine raises."""

    model: Any = None
    engine: dict[str, Any] = field(default_factory=dict)
    lora: list[Any] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    fails: Exception | None = None


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeVllm) -> None:
    class LLM:
        def __init__(
            self,
            model: str,
            *,
            dtype: str = "auto",
            max_model_len: int | None = None,
            logprobs_mode: str = "raw_logprobs",
            enable_lora: bool = False,
            max_loras: int = 1,
            max_lora_rank: int = 16,
        ) -> None:
            fake.engine = {k: v for k, v in locals().items() if k not in ("self", "fake")}
            if model == "broken":
                raise ValueError("no such model\nand more")

        def generate(
            self, prompts: list[dict[str, Any]], params: Any, *, use_tqdm: bool = True, lora_request: Any = None
        ) -> list[Output]:
            assert not use_tqdm
            if fake.fails:
                raise fake.fails
            fake.lora.append(lora_request)
            many = params if isinstance(params, list) else [params] * len(prompts)
            return [one(p["prompt_token_ids"], q) for p, q in zip(prompts, many, strict=True)]

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = fake.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        return found

    def one(prompt: list[int], q: VllmParams) -> Output:
        assert len(prompt) < fake.engine["max_model_len"] and q.max_tokens and q.n == 1
        fake.seeds.append(q.seed)
        generator = torch.Generator().manual_seed(q.seed or 0)
        ids: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        stops = q.stop_token_ids or []
        while len(ids) < q.max_tokens and len(prompt) + len(ids) < fake.engine["max_model_len"]:
            z = logits([*prompt, *ids])[-1] / (q.temperature or 1.0)
            if len(ids) < q.min_tokens:
                z[stops] = -torch.inf
            if q.top_k > 0:
                z[z < z.topk(q.top_k).values[-1]] = -torch.inf
            processed = torch.log_softmax(z, -1)
            token = int(
                z.argmax() if q.temperature == 0 else torch.multinomial(processed.exp(), 1, generator=generator)
            )
            ids.append(token)
            logprobs.append({token: Logprob(float(processed[token]))})
            if token in stops:
                break
        raw = None
        if q.prompt_logprobs is not None:
            table = torch.log_softmax(logits(prompt), -1)
            raw = [None, *({t: Logprob(float(table[i, t]))} for i, t in enumerate(prompt[1:]))]
        finish = "stop" if ids[-1] in stops else "length"
        return Output(prompt, [Completion(ids, logprobs if q.logprobs is not None else None, finish)], raw)

    module, lora, request = (types.ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.LLM, module.SamplingParams = LLM, VllmParams  # type: ignore[attr-defined]
    request.LoRARequest = lambda name, number, path: (name, number, path)  # type: ignore[attr-defined]
    for name, made in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    found = FakeVllm(build("llama"))
    install(monkeypatch, found)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        SamplingParams(12, STOP),
        SamplingParams(12, STOP, 3, temperature=0.7, top_k=20),
        SamplingParams(12, STOP, temperature=0.0),
    ],
)
def test_samples_and_both_log_probabilities(settings: SamplingParams, fake: FakeVllm) -> None:
    told: list[tuple[int, int]] = []
    with VllmSampler("folder", context=CONTEXT) as sampler:
        found = sampler.sample(PROMPTS, 3, settings, progress=lambda ended, drawn: told.append((ended, drawn)))
    assert [len(many) for many in found] == [3] * 4 and fake.engine["logprobs_mode"] == "processed_logprobs"
    samples = [s for many in found for s in many]
    assert told == [(12, sum(s.tokens for s in samples))]
    for s in samples:
        assert s.finished == (s.ids[-1] in STOP) and len(s.ids) == len(s.logps) == len(s.sampling_logps)
        assert not np.isin(s.ids[: settings.min_new_tokens], STOP).any()
    # The scorer's values are the model's own, whatever was drawn from.
    assert compare_logprobs(Scorer(copy.deepcopy(fake.model)), PROMPTS, found).largest < 1e-5
    gaps = [np.abs(s.sampling_logps - s.logps).max() for s in samples]
    assert (max(gaps) == 0) == settings.pure
    if settings.temperature == 0:
        assert not any(s.sampling_logps.any() for s in samples)
    again = VllmSampler("folder", context=CONTEXT).sample(PROMPTS[:2], 3, settings)
    assert [[s.ids.tolist() for s in m] for m in again] == [[s.ids.tolist() for s in m] for m in found[:2]]


def test_every_sample_has_a_seed_of_its_own(fake: FakeVllm) -> None:
    sampler = VllmSampler("folder", context=CONTEXT)
    sampler.sample([PROMPTS[0], PROMPTS[0]], 3, SamplingParams(2))
    assert len(set(fake.seeds)) == 6 and all(s is not None and s >= 0 for s in fake.seeds)
    first = fake.seeds[3:6]
    sampler.sample([PROMPTS[0]], 3, SamplingParams(2), streams=[1])
    assert fake.seeds[6:] == first


def test_adapters_precision_and_context_reach_the_engine(fake: FakeVllm, tmp_path: Path) -> None:
    """The engine takes 16 by default, and only some ranks."""
    adapter = str(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 24, "rank_pattern": {"q_proj": 48}}))
    sampler = VllmSampler("folder", adapter=adapter, dtype="bfloat16", context=CONTEXT)
    sampler.sample([PROMPTS[0]], 1, SamplingParams(2))
    wanted = {
        "model": "folder",
        "dtype": "bfloat16",
        "max_model_len": CONTEXT,
        "enable_lora": True,
        "max_lora_rank": 64,
    }
    assert wanted.items() <= fake.engine.items() and fake.lora == [("adapter", 1, adapter)]
    with pytest.raises(ModelError, match="cannot be answered"):
        sampler.sample([[5] * CONTEXT], 1, SamplingParams(2))
    assert sampler.sample([], 2, SamplingParams(2)) == []


def test_errors_are_one_line(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"broken: .*\(no such model\).*--engine transformers"):
        VllmSampler("broken", context=CONTEXT)
    fake.fails = RuntimeError("engine died\ntrace")
    with pytest.raises(RunError, match="vLLM stopped: engine died; try"):
        VllmSampler("folder", context=CONTEXT).sample(PROMPTS, 1, SamplingParams(2))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"--engine vllm needs vllm.*pip install vllm"):
        VllmSampler("folder", context=CONTEXT)
