"""Adapters on experts and routers: trained on packed rows with the losses on routers as the class itself would, and
merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prefopt
from data.small import small_tokenizer
from model.architectures import build
from model.oracle import groups_of_every_kind, oracle_logprobs
from model.test_families import built
from model.test_lora_targets import adapted
from prefopt.cli import main
from prefopt.model.architectures import causal_model
from prefopt.model.packing import pack
from prefopt.model.routing import balancing_routers
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.routing import RoutedObjective, RouterLosses
from prefopt.train.step import Differentiator
from train.small import QUICK, pairs, steps, weights
from train.test_balance import router_logits, z_oracle

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
GROUPS = groups_of_every_kind()[:6]
BALANCE, Z = 0.7, 0.3
TARGETS = ["all-linear", "router"]


def class_loss(model: Any) -> torch.Tensor:
    """The likelihood and both losses on routers by the class's own forward, one response in a call."""
    logp_M, logits = oracle_logprobs(model, GROUPS), router_logits(model, GROUPS)
    function = sys.modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    balance = function(logits, logits[0].shape[-1], model.num_experts_per_tok)
    loss: torch.Tensor = -logp_M.double().mean() + BALANCE * balance + Z * z_oracle(model, GROUPS)
    return loss


@pytest.mark.parametrize("token_budget", [pytest.param(10_000, marks=pytest.mark.slow), 60], ids=["one pass", "cut"])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe", "minimax_m2"]
)
def test_gradients_on_packed_rows_are_those_of_the_class(family: str, token_budget: int) -> None:
    policy = adapted(built(family, torch.float64), TARGETS)
    routers = balancing_routers(policy)
    scorer = Scorer(policy)
    assert scorer.layout.share
    plain = LikelihoodObjective("tokens", device=torch.device("cpu"))
    objective = RoutedObjective(plain, routers, RouterLosses(BALANCE, Z))
    Differentiator(scorer, objective).gradients(Batch(GROUPS), token_budget)
    scorer.detach_hook()
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    kinds = {kind for kind in ("experts", "self_attn", "router", "gate") for n in trained if f".{kind}." in n}
    assert {"experts", "self_attn"} < kinds, "routers too, of either name"
    slopes = torch.autograd.grad(class_loss(causal_model(policy)), list(trained.values()))
    for (name, weight), slope in zip(trained.items(), slopes, strict=True):
        assert weight.grad is not None
        assert slope.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, slope, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_what_was_trained_is_merged(name: str, tmp_path: Path) -> None:
    base, tokens = tmp_path / "base", len(small_tokenizer())
    build(name, vocab_size=tokens).float().save_pretrained(base)
    small_tokenizer().save_pretrained(base)
    options: dict[str, Any] = {**QUICK, "lora": True, "lora_rank": 2, "lora_targets": TARGETS, "learning_rate": 1e-2}
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    prefopt.dpo(base, pairs(8), output=tmp_path / "out", **options, **losses, epochs=3)
    assert {"router/aux_loss", "router/z_loss", "router/entropy"} < steps(tmp_path / "out")[-1].keys()
    moved = [n for n, w in weights(tmp_path / "out").items() if "lora_B" in n and w.any()]
    assert {kind for kind in ("experts", "self_attn", "router", "gate") for n in moved if f".{kind}." in n} > {
        "experts",
        "self_attn",
    }
    assert (
        main(["merge", "--adapter", str(tmp_path / "out"), "--output", str(tmp_path / "merged"), "--device", "cpu"])
        == 0
    )
    groups = [g for g in GROUPS if max(int(g.sequence(k)[0].max()) for k in range(len(g.continuations))) < tokens]
    with torch.no_grad():
        alone, merged = (
            AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("base", "merged")
        )
        before, after = oracle_logprobs(alone, groups), oracle_logprobs(merged, groups)
        policy = PeftModel.from_pretrained(alone, tmp_path / "out").eval()
        adapter = oracle_logprobs(causal_model(policy), groups)
        scorer = Scorer(merged)
        packed = scorer(pack(groups, scorer.layout))
    assert (adapter - before).abs().max() > 0.05
    torch.testing.assert_close(after, adapter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, adapter, rtol=1e-4, atol=1e-4)
