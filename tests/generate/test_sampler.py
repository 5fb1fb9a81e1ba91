"""The sampler: samples depend on seed, prompt and number alone, and their log-probabilities are the scorer's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import POSITIONS, VOCABULARY, build
from prefopt.errors import Interrupted, ModelError, RunError
from prefopt.generate import batch as sample_batch
from prefopt.generate.decode import WholeDecoder
from prefopt.generate.sampler import Sample, SamplingParams, group_of
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer

STOP = (7, 11, 12, 13, 14)
SETTINGS = SamplingParams(16, stop=STOP)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n).tolist() for n in lengths]


PROMPTS = prompts(3, 9, 1, 30, 9, 4, 3)


def plain(found: list[list[Sample]]) -> list[list[tuple[list[int], bool]]]:
    return [[(s.ids.tolist(), s.finished) for s in many] for many in found]


@pytest.fixture(scope="module")
def llama() -> Scorer:
    return Scorer(build("llama"))


def scored(scorer: Scorer, given: list[list[int]], found: list[list[Sample]]) -> torch.Tensor:
    """Every token's log-probability by the scorer, prompt by prompt, sample by sample."""
    groups = [group_of(prompt, samples) for prompt, samples in zip(given, found, strict=True)]
    with torch.no_grad():
        return torch.cat([scorer(pack([group], scorer.layout)) for group in groups])


TRUNCATED = SamplingParams(16, STOP, 4, temperature=0.8, top_p=0.9, seed=5)
GREEDY = SamplingParams(16, STOP, temperature=0.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", SETTINGS),
        ("llama", TRUNCATED),
        ("llama", GREEDY),
        ("gemma2", TRUNCATED),
        ("bloom", GREEDY),
        ("qwen3.5", SETTINGS),
    ],
)
def test_samples_are_the_same_in_any_batch_and_order(name: str, settings: SamplingParams) -> None:
    scorer = Scorer(build(name))
    whole = plain(TransformersSampler(scorer, rows=256).sample(PROMPTS, 3, settings))
    assert {finished for many in whole for _, finished in many} == {True, False} or not settings.temperature
    for rows in (1, 7):
        assert plain(TransformersSampler(scorer, rows=rows).sample(PROMPTS, 3, settings)) == whole
    sampler = TransformersSampler(scorer)
    order = [5, 2, 6, 0]
    assert plain(sampler.sample([PROMPTS[i] for i in order], 3, settings)) == [whole[i] for i in order]
    assert plain(sampler.sample(PROMPTS, 2, settings)) == [many[:2] for many in whole]
    assert plain(sampler.sample(PROMPTS, 5, settings))[3][:3] == whole[3]
    assert list(sampler.stream(PROMPTS[3], settings, sample=2)) == whole[3][2][0]


def test_seeds_and_repeated_prompts_draw_other_samples(llama: Scorer) -> None:
    sampler = TransformersSampler(llama)
    given = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    found = plain(sampler.sample(given, 2, SETTINGS))
    every = [ids for many in found for ids, _ in many]
    assert len({tuple(ids) for ids in every}) == len(every)
    assert plain(sampler.sample([PROMPTS[1]], 2, SETTINGS, streams=[2])) == [found[3]]
    assert plain(sampler.sample(given, 2, SamplingParams(16, STOP, seed=1)))[0] != found[0]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "granite", "bloom", "mamba"])
def test_log_probabilities_are_the_scorers(name: str) -> None:
    scorer = Scorer(build(name))
    for settings in (SETTINGS, SamplingParams(16, STOP, temperature=0.7, top_k=20)):
        found = TransformersSampler(scorer, rows=12).sample(PROMPTS, 3, settings)
        samples = [s for many in found for s in many]
        expected = scored(scorer, PROMPTS, found)
        logps = torch.from_numpy(np.concatenate([s.logps for s in samples]))
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
        same = all(np.array_equal(s.logps, s.sampling_logps) for s in samples)
        assert same == settings.pure
        assert all(s.logp == pytest.approx(s.logps.sum()) and s.tokens == len(s.ids) for s in samples)


def test_samples_end_at_a_stop_token_at_the_limit_and_at_the_end_of_the_context(llama: Scorer) -> None:
    given = prompts(POSITIONS - 1, POSITIONS - 5, 4)
    found = TransformersSampler(llama).sample(given, 8, SamplingParams(10, STOP, 2))
    for many, most in zip(found, (1, 5, 10), strict=True):
        for s in many:
            assert s.finished == (s.ids[-1] in STOP) and s.finish == ("stop" if s.finished else "length")
            assert s.tokens == most or (s.finished and s.tokens < most)
            assert not np.isin(s.ids[:2], STOP).any() and not np.isin(s.ids[:-1], STOP).any()


def test_prompts_that_cannot_be_answered_are_refused(llama: Scorer) -> None:
    for given, said in (([[]], "prompt 1 "), ([[5], [5] * POSITIONS], "prompt 2 has 128 tokens"), ([[97]], "token 97")):
        with pytest.raises(ModelError, match=said):
            TransformersSampler(llama).sample(given, 1, SETTINGS)


def test_nothing_to_sample_gives_nothing(llama: Scorer) -> None:
    assert TransformersSampler(llama).sample([], 3, SETTINGS) == []
    assert plain(TransformersSampler(llama).sample([[3, 4]], 0, SETTINGS)) == [[]]


def test_weights_that_give_no_numbers_are_an_error() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        TransformersSampler(Scorer(model)).sample([[3]], 1, SETTINGS)


def test_the_model_is_given_back_as_it_was(llama: Scorer) -> None:
    llama.model.train()
    before = llama.model.config._attn_implementation
    stream = TransformersSampler(llama).stream(PROMPTS[1], SamplingParams(5))
    next(stream)
    assert llama.model.training and llama.model.config._attn_implementation == before and torch.is_grad_enabled()
    stream.close()

    def stop(ended: int, drawn: int) -> None:
        raise Interrupted("enough", 2)

    with pytest.raises(Interrupted):
        TransformersSampler(llama).sample(PROMPTS, 2, SETTINGS, progress=stop)
    assert llama.model.training and llama.model.config._attn_implementation == before
    llama.model.eval()


def test_progress_counts_every_sample_and_token(llama: Scorer) -> None:
    told: list[tuple[int, int]] = []
    found = TransformersSampler(llama, rows=8).sample(
        PROMPTS, 3, SETTINGS, progress=lambda ended, drawn: told.append((ended, drawn))
    )
    ended, drawn = (sum(x) for x in zip(*told, strict=True))
    assert ended == 21 and drawn == sum(s.tokens for many in found for s in many)


def test_where_memory_ends_batches_are_halved(
    llama: Scorer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(TransformersSampler(llama).sample(PROMPTS, 5, SETTINGS))
    sizes: list[int] = []
    choose = sample_batch.choose
    most = 6

    def limited(z: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(z))
        if len(z) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return choose(z, *rest)

    monkeypatch.setattr(sample_batch, "choose", limited)
    sampler = TransformersSampler(llama, rows=23)
    told: list[int] = []
    with caplog.at_level(logging.WARNING):
        found = sampler.sample(PROMPTS, 5, SETTINGS, progress=lambda ended, _: told.append(ended))
    assert plain(found) == expected and sum(told) == 5 * len(PROMPTS)
    assert sampler.rows == 5 and [n for n in sizes if n > most] == [20, 10] and "going on with" in caplog.text
    most = 0
    with pytest.raises(RunError, match="one sample does not fit"):
        sampler.sample(PROMPTS, 5, SETTINGS)


def test_across_longropes_limit_whole_sequences_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [1.0, 1.3, 1.7, 2.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": factors,
        "original_max_position_embeddings": 32,
    }
    scorer = Scorer(build("phi3", rope_parameters=rope, original_max_position_embeddings=32))
    assert scorer.layout.rope_limit == 32
    used: list[str] = []
    start = WholeDecoder.start
    monkeypatch.setattr(WholeDecoder, "start", lambda self, p: used.append(f"{len(p[0])}") or start(self, p))
    given = prompts(3, 5, 20, 20, 25, 40, 50)
    settings = SamplingParams(12)
    found = TransformersSampler(scorer).sample(given, 2, settings)
    assert used == ["25"] or used == ["25", "20"] or set(used) == {"25", "20"}
    for prompt, many in zip(given, found, strict=True):
        for s in many:
            ids = torch.tensor([[*prompt, *s.ids.tolist()]])
            with torch.no_grad(), scorer.attention_by(None):
                for t in (0, len(s.ids) - 1):  # each token as the model gives it, on that side of the limit
                    logits = scorer.model(input_ids=ids[:, : len(prompt) + t], use_cache=False).logits[0, -1]
                    logp = torch.log_softmax(logits, -1)[s.ids[t]]
                    assert float(logp) == pytest.approx(s.logps[t], abs=1e-5)
