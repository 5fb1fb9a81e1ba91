"""Every way to decode gives the logits of the model's own forward, one sequence per call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.architectures import HYBRIDS, SEPARATE, SHARED, VOCABULARY, WINDOW, Float64Throughout, build
from prefopt.generate import slots
from prefopt.generate.decode import CacheDecoder, Decoder, SlotDecoder, WholeDecoder, decoder_of
from prefopt.generate.slots import GROWTH
from prefopt.model.scorer import Scorer

LENGTHS = (1, 5, WINDOW, WINDOW + 1, 2, 20)
STEPS = 2 * WINDOW + 1
EXPECTED: dict[str, type[Decoder]] = {
    **dict.fromkeys(SHARED, SlotDecoder),
    **dict.fromkeys([*HYBRIDS, *SEPARATE], CacheDecoder),
    # No cache, a state inside the layers, and a cache of which a part cannot be reordered.
    **dict.fromkeys(["xlstm", "recurrent gemma", "minimax"], WholeDecoder),
}


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n).tolist() for n in lengths]


def own_logits(scorer: Scorer, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad(), scorer.attention_by(None):
        logits: torch.Tensor = scorer.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def check_decoder(scorer: Scorer, decoder: Decoder, prompts: list[list[int]]) -> None:
    """Three sequences per prompt, of which some leave on the way, some of them twice in the batch."""
    sequences = [list(p) for p in prompts for _ in range(3)]
    rng = np.random.default_rng(1)

    def compare(rows: torch.Tensor) -> None:
        found = decoder.logits(rows)
        for row, ids in zip(found, sequences, strict=True):
            expected = own_logits(scorer, ids).double()
            torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    with torch.no_grad(), scorer.attention_by(decoder.hook), Float64Throughout():
        rows = decoder.start(prompts)
        index = torch.arange(len(prompts)).repeat_interleave(3)
        decoder.keep(index)
        compare(rows[index])
        for step in range(STEPS):
            if step % 5 == 4:  # all but one leave at last
                kept = rng.permutation(len(sequences))[: max(1, len(sequences) // 2)]
                decoder.keep(torch.from_numpy(kept))
                sequences = [list(sequences[i]) for i in kept]
            token = rng.integers(3, VOCABULARY, len(sequences))
            rows = decoder.step(torch.from_numpy(token))
            for ids, t in zip(sequences, token, strict=True):
                ids.append(int(t))
            if step % 4 == 0 or step == STEPS - 1:
                compare(rows)


KINDS = ["llama", "gpt_oss", "gemma2", "latent attention"]
"""Plain attention, sliding windows with sinks, soft-caps, and keys of another width: the others are slow."""
OF_SHARED = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in SHARED]


@pytest.mark.parametrize("name", [*OF_SHARED, *HYBRIDS, *SEPARATE])
def test_logits_are_those_of_the_models_own_forward(name: str) -> None:
    scorer = Scorer(build(name))
    kind, note = decoder_of(scorer)
    assert kind is EXPECTED[name] and (note is None) == (kind is SlotDecoder)
    lengths = LENGTHS if not kind.same_length else (9, 9)
    check_decoder(scorer, kind(scorer), draw(*lengths))


@pytest.mark.parametrize("name", OF_SHARED)
@pytest.mark.parametrize("part_rows", [1, 8])
def test_prompts_that_take_the_place_of_ended_rows_get_the_models_own_logits(
    name: str, part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are longer than anything in the batch, two rows share one prompt, and slots are used up between. Rows attend
    in blocks, or all together."""
    monkeypatch.setattr(slots, "PART_ROWS", part_rows)
    monkeypatch.setattr(slots, "PART_COST", 0)  # else blocks of so few rows are not worth their calls
    most = 0
    scorer = Scorer(build(name))
    decoder = SlotDecoder(scorer)
    rng = np.random.default_rng(3)
    first = draw(3, 7, 2, 5, 1)
    sequences = [list(p) for p in first]

    def compare(rows: torch.Tensor) -> None:
        for row, ids in zip(decoder.logits(rows), sequences, strict=True):
            expected = own_logits(scorer, ids).double()
            torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    with torch.no_grad(), scorer.attention_by(decoder.hook), Float64Throughout():
        compare(decoder.start(first))
        # Step, rows that end, lengths of prompts that take their place: the second one is for two rows.
        for step in range(GROWTH + 12):
            token = rng.integers(3, VOCABULARY, len(sequences))
            rows = decoder.step(torch.from_numpy(token))
            for ids, t in zip(sequences, token, strict=True):
                ids.append(int(t))
            most = max(most, len(decoder.slots.parts()))
            if step in (1, 9, GROWTH - 3, GROWTH + 6):
                ended = rng.permutation(len(sequences))[:3]
                decoder.retire(np.array(ended))
                fresh = draw(len(max(sequences, key=len)) + 2 if step == 1 else 2, 4, seed=step)
                taken = [[int(ended[0])], [int(n) for n in ended[1:]]]
                joined = decoder.join(fresh, taken)
                for prompt, new, many in zip(fresh, joined, taken, strict=True):
                    for row in many:
                        sequences[row] = list(prompt)
                        rows[row] = new
                compare(rows)
            elif step % 6 == 0 or step > GROWTH + 8:
                compare(rows)
        before = decoder.slots.length
        decoder.keep(torch.arange(len(sequences)))
        assert decoder.slots.length < before and not decoder.slots.start.min(), "slots that no row uses are dropped"
        token = rng.integers(3, VOCABULARY, len(sequences))
        sequences = [[*ids, int(t)] for ids, t in zip(sequences, token, strict=True)]
        compare(decoder.step(torch.from_numpy(token)))
    assert (most > 1) == (part_rows == 1)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_whole_sequences_need_no_cache(name: str) -> None:
    scorer = Scorer(build(name))
    check_decoder(scorer, WholeDecoder(scorer), draw(7, 7))


def test_logits_are_made_as_the_scorer_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 on CUDA those of the scorer are accumulated in float32; what is drawn from must be no coarser."""
    scorer = Scorer(build("granite", torch.bfloat16))
    monkeypatch.setattr(
        "prefopt.model.scorer.head_logits", lambda hidden, weight, bias: hidden.float() @ weight.float().t()
    )
    hidden = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        found = SlotDecoder(scorer).logits(hidden)
        weight = scorer.model.lm_head.weight  # type: ignore[union-attr]
        assert torch.equal(found, (hidden.float() @ weight.float().t()) * (1 / 3.0))  # type: ignore[operator]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "mamba", *(n for n in SEPARATE if n != "xlstm")])  # it has none
def test_so_are_those_of_a_models_own_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build(name, torch.bfloat16))
    kind, _ = decoder_of(scorer)
    assert kind is CacheDecoder
    monkeypatch.setattr(
        "prefopt.model.scorer.head_logits", lambda hidden, weight, bias: hidden.float() @ weight.float().t()
    )
    decoder, prompts = kind(scorer), draw(9, 9)
    with torch.no_grad(), scorer.attention_by(decoder.hook):
        decoder.start(prompts)
        found = decoder.logits(decoder.step(torch.tensor([5, 6])))
        expected = torch.stack([own_logits(scorer, [*p, t]) for p, t in zip(prompts, (5, 6), strict=True)]).float()
    assert (found != found.bfloat16().float()).any(), "rounded to bfloat16"
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05


def test_a_bfloat16_models_keys_are_cached_in_float32_on_the_cpu() -> None:
    """Attention over the cache rounds no score, and the estimate of rows counts the wider cache."""
    scorer = Scorer(build("llama", torch.bfloat16))
    decoder = SlotDecoder(scorer)
    with torch.no_grad(), scorer.attention_by(decoder.hook):
        decoder.start(draw(3, 7))
        found = decoder.step(torch.tensor([5, 6]))
    assert found.dtype == torch.bfloat16
    assert {x.dtype for pair in decoder.slots.layers.values() for x in pair} == {torch.float32}
    assert slots.cache_dtype(torch.float64, torch.device("cpu")) == torch.float64
    assert slots.cache_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
