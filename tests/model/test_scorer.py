"""The scorer against the model class's own forward: values and gradients of every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from model.architectures import SEPARATE, SHARED, Float64Throughout, build, with_exact_rotary
from model.oracle import (
    Draw,
    assert_same,
    assert_same_gradients,
    gradients,
    groups_of_every_kind,
    oracle_logprobs,
)
from prefopt.data.group import Group
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model
from prefopt.model.check import clone_difference, tiny_clone
from prefopt.model.packing import PackLayout, pack
from prefopt.model.scorer import Scorer, response_sums

KERNELS = {"auto": "flash-cpu", "loop": "loop"}


@pytest.mark.parametrize("name", SHARED)
def test_float64_scores_equal_the_models_own_forward(name: str) -> None:
    with Float64Throughout():
        compare_with_oracle(with_exact_rotary(build(name)), rtol=1e-9)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("llama", "gpt_oss", "gemma2") else pytest.mark.slow) for n in SHARED]
)
def test_float32_scores_equal_the_models_own_forward(name: str) -> None:
    compare_with_oracle(build(name, torch.float32), rtol=1e-5)


def compare_with_oracle(model: PreTrainedModel, rtol: float) -> None:
    groups = groups_of_every_kind()
    expected = oracle_logprobs(model, groups)
    expected_gradients = gradients(expected, model)
    for attention, kernel in KERNELS.items():
        scorer = Scorer(model, attention=attention)
        assert (scorer.path, scorer.kernel, scorer.reason) == ("shared", kernel, None)
        batch = pack(groups, scorer.layout)
        assert len(batch.passes) == 1
        found = scorer(batch)
        assert found.dtype == model.dtype
        assert_same(found, expected, rtol)
        assert_same_gradients(gradients(found, model), expected_gradients, rtol)
        scorer.detach_hook()


@pytest.mark.parametrize("name", SEPARATE)
def test_what_cannot_share_is_recognised_and_scored_in_rows_of_its_own(name: str) -> None:
    model = build(name)
    attention = model.config.get_text_config()._attn_implementation
    scorer = Scorer(model)
    assert scorer.path == "separate"
    assert scorer.reason is not None
    assert SEPARATE[name][2] in scorer.reason
    assert "\n" not in scorer.reason
    assert model.config.get_text_config()._attn_implementation == attention
    groups = groups_of_every_kind()[:4]
    batch = pack(groups, scorer.layout)
    assert len(batch.passes) == len(batch.length)
    with Float64Throughout():
        expected, found = oracle_logprobs(model, groups), scorer(batch)
        assert_same(found, expected, 1e-9)
        assert_same_gradients(gradients(found, model), gradients(expected, model), 1e-9)


# As their makers configure them: from these alone, before any weight is there, the twin of the load check is made.
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen3_5_text", {}),
        ("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12}),
        ("llama4_text", {}),
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        (
            "falcon",
            {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8},
        ),
        ("gemma3_text", {}),
        ("gpt_oss", {}),
        ("mixtral", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_full_size_configurations_have_a_twin_that_scores_exactly(kind: str, fields: dict[str, Any]) -> None:
    clone = tiny_clone(AutoConfig.for_model(kind, **fields))
    assert clone is not None
    kinds = getattr(clone.config, "layer_types", None)
    if kinds is not None:
        assert set(kinds) == set(AutoConfig.for_model(kind, **fields).layer_types)
    assert clone_difference(clone) < 1e-5


def test_switched_off_sharing_gives_the_same_values() -> None:
    model, groups = with_exact_rotary(build("mistral")), groups_of_every_kind()
    with Float64Throughout():
        plain = Scorer(model, share=False)
        assert (plain.path, plain.kernel) == ("separate", "eager")
        separate = plain(pack(groups, plain.layout))
        scorer = Scorer(model)
        shared = scorer(pack(groups, scorer.layout))
    assert_same(shared, separate, 1e-9)


def test_a_model_that_cannot_be_taken_apart_makes_its_own_logits() -> None:
    model, groups = build("gpt2"), groups_of_every_kind()[:4]
    expected = oracle_logprobs(model, groups)
    expected_gradients = gradients(expected, model)
    model.base_model_prefix = "nothing_of_this_name"
    model.get_output_embeddings = lambda: model.lm_head
    scorer = Scorer(model)
    assert (scorer.head.kind, scorer.path) == ("model", "separate")
    assert "does not tell its layers from its head" in str(scorer.reason)
    found = scorer(pack(groups, scorer.layout))
    assert_same(found, expected, 1e-12)
    assert_same_gradients(gradients(found, model), expected_gradients, 1e-12)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 5.0, 8.0, 20.0],
    "original_max_position_embeddings": 16,
}


def test_longrope_never_mixes_both_sides_of_its_threshold() -> None:
    model = build("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    draw = Draw()
    groups = [
        draw.group(8, 7, 3),
        draw.group(8, 9, 30),  # both beyond
        draw.group(8, 8, 9),  # 16 tokens, 17 tokens: one on either side
        draw.group(10, 40, 2),
        draw.group(12, 4, 1),  # 16 tokens exactly
        draw.group(17, 1),
        draw.group(30, 5, 6),
    ]
    scorer = Scorer(model)
    assert scorer.layout == PackLayout(share=True, rope_limit=16)
    batch = pack(groups, scorer.layout)
    assert len(batch.passes) == 2 + 2 * 2  # short, long, and two straddling groups with a row per response
    found = scorer(batch)
    found_gradients = gradients(found, model)
    mixed = scorer(pack(groups, PackLayout()))
    scorer.detach_hook()
    expected = oracle_logprobs(model, groups)
    assert_same(found, expected, 1e-6)
    assert_same_gradients(found_gradients, gradients(expected, model), 1e-6)
    with pytest.raises(AssertionError):  # the threshold matters to this model
        assert_same(mixed, expected, 1e-3)


def test_sums_are_per_response_and_in_float64() -> None:
    model = build("llama", torch.float32)
    scorer = Scorer(model)
    groups = groups_of_every_kind()
    batch = pack(groups, scorer.layout)
    with torch.no_grad():
        sums = response_sums(scorer(batch), batch)
        scorer.detach_hook()
        expected = [
            oracle_logprobs(model, [Group(g.prefix, (c,), 1)]).double().sum() for g in groups for c in g.continuations
        ]
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-6, atol=0)
    assert batch.length.tolist() == [int(c.trained.sum()) for g in groups for c in g.continuations]


def test_models_that_are_none_are_refused() -> None:
    with pytest.raises(ModelError, match="Linear is not a transformers model"):
        Scorer(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no language-model head"):
        Scorer(causal_model(build("llama")).model)
    config = AutoConfig.for_model("t5", vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        Scorer(AutoModelForSeq2SeqLM.from_config(config))
