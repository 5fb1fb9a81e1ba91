"""Sampling from really trained models: a published text, and the same samples in every batch in float32."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from prefopt.generate.model_io import SampledModel, decode
from prefopt.generate.sampler import SamplingParams, compare_logprobs
from prefopt.generate.transformers_sampler import TransformersSampler


def test_greedy_decoding_gives_the_published_text(shared: Path) -> None:
    model = SampledModel(str(shared / "models/stories260k"), device="cpu", dtype="float32")
    settings = SamplingParams(200, temperature=0.0)
    (sample,) = TransformersSampler(model.scorer).sample([[model.tokenizer.bos_token_id]], 1, settings)[0]
    assert decode(model.tokenizer, sample.ids) == (shared / "data/stories260k/golden_greedy_200.txt").read_text("utf-8")


@pytest.mark.slow
def test_a_trained_model_draws_the_same_in_every_batch(shared: Path) -> None:
    model = SampledModel(str(shared / "models/tiny-imdb"), device="cpu", dtype="float32")
    with gzip.open(shared / "data/imdb/test.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 40)]
    prompts = [model.tokenizer(text)["input_ids"][: 2 + n % 7] for n, text in enumerate(texts)]
    for settings in (SamplingParams(48, (0,)), SamplingParams(48, (0,), temperature=0.8, top_p=0.9)):
        whole = TransformersSampler(model.scorer, rows=160).sample(prompts, 4, settings)
        parts = TransformersSampler(model.scorer, rows=9).sample(prompts[::-1], 4, settings)[::-1]
        drawn = [[[s.ids.tolist() for s in many] for many in found] for found in (whole, parts)]
        assert drawn[0] == drawn[1] and len({tuple(ids) for many in drawn[0] for ids in many}) == 160
        gaps = compare_logprobs(model.scorer, prompts, whole)
        assert gaps.largest < 1e-4 and gaps.mean < 1e-5
