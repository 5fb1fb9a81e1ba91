"""Adapters on the model and on its head, against the wrapped model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from model.architectures import Float64Throughout, build, with_exact_rotary
from model.oracle import assert_same, assert_same_gradients, gradients, groups_of_every_kind, oracle_logprobs
from prefopt.errors import ConfigError
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer


def with_lora(model: torch.nn.Module, targets: list[str] | None = None) -> torch.nn.Module:
    """A policy whose adapter already does something."""
    torch.manual_seed(5)
    policy = new_lora(model, rank=4, alpha=8, dropout=0.0, targets=targets).double()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    return policy


def compare(policy: torch.nn.Module, kind: str) -> None:
    groups = groups_of_every_kind()
    with Float64Throughout():
        expected = oracle_logprobs(policy, groups)
        expected_gradients = gradients(expected, policy)
        scorer = Scorer(policy)
        assert (scorer.head.kind, scorer.path, scorer.kernel) == (kind, "shared", "flash-cpu")
        found = scorer(pack(groups, scorer.layout))
        assert_same(found, expected, 1e-9)
        assert_same_gradients(gradients(found, policy), expected_gradients, 1e-9)
    scorer.detach_hook()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe", "gpt_oss"])
def test_lora_policies_score_as_they_do_by_themselves(name: str) -> None:
    policy = with_lora(with_exact_rotary(build(name)))
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    compare(policy, "fused")


# A plain head, a soft-cap, a scale that divides and one that multiplies.
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_a_lora_on_the_head_is_not_bypassed(name: str) -> None:
    model = with_exact_rotary(build(name, tie_word_embeddings=False))
    policy = with_lora(model, ["q_proj", "lm_head"])
    assert any("lm_head" in n and "lora_B" in n and p.abs().max() > 0 for n, p in policy.named_parameters())
    compare(policy, "module")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
def test_a_head_that_is_trained_whole_beside_an_adapter_is_the_one_in_use() -> None:
    model = with_exact_rotary(build("llama", tie_word_embeddings=False))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    policy = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1.1)
    compare(policy, "module")


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("gemma2", {}), ("cohere", {}), ("head with bias", {})])
def test_a_frozen_head_passes_gradients_on_and_takes_none(name: str, changes: dict[str, Any]) -> None:
    model = with_exact_rotary(build(name, tie_word_embeddings=False, **changes))
    model.get_output_embeddings().requires_grad_(False)
    compare(model, "fused")


def test_without_its_adapter_a_policy_scores_like_its_base() -> None:
    model = build("llama")
    groups = groups_of_every_kind()[:4]
    scorer = Scorer(model)
    batch = pack(groups, scorer.layout)
    with torch.no_grad():
        base = scorer(batch)
        scorer.detach_hook()
        policy: Any = with_lora(model)
        scorer = Scorer(policy)
        adapted = scorer(batch)
        with policy.disable_adapter():
            assert torch.equal(scorer(batch), base)
        assert not torch.allclose(adapted, base, rtol=0, atol=1e-3)


def test_a_fresh_adapter_changes_nothing_and_checkpointing_reaches_it() -> None:
    model = build("llama")
    groups = groups_of_every_kind()[:4]
    with torch.no_grad():
        base = oracle_logprobs(model, groups)
    policy = new_lora(model, rank=4, alpha=8, dropout=0.0, targets=None).double()
    scorer = Scorer(policy)
    found = scorer(pack(groups, scorer.layout))
    assert_same(found, base, 1e-6)
    plain = gradients(found, policy)
    causal_model(policy).activation_checkpointing_enable()
    scorer.train()
    assert_same_gradients(gradients(scorer(pack(groups, scorer.layout)), policy), plain, 1e-12)


def test_targets_that_no_layer_has_are_named() -> None:
    with pytest.raises(ConfigError, match="--lora-targets q_prj"):
        new_lora(build("llama"), rank=4, alpha=8, dropout=0.0, targets=["q_prj"])
