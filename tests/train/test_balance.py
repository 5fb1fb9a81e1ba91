"""Losses on the routers of a mixture of experts are those of transformers on unpadded sequences, however cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

import prefopt
from data.small import small_tokenizer
from model.architectures import VOCABULARY, build
from model.oracle import groups_of_every_kind
from prefopt.data.group import Group
from prefopt.errors import ConfigError
from prefopt.model.architectures import checkpoint_activations
from prefopt.model.packing import pack
from prefopt.model.routing import balancing_routers
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch, micro_batches
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.routing import RoutedObjective, RouterLosses, balance_coefficient
from prefopt.train.step import Differentiator
from train.small import QUICK, pairs, steps, weights

CPU = torch.device("cpu")
LOSSES: dict[str, tuple[float | None, float | None]] = {
    "balance": (0.7, None),
    "z": (None, 0.3),
    "balance and z": (0.7, 0.3),
}
METRICS = ("router/aux_loss", "router/z_loss")
FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "pad_token_id": 0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {},
    "granitemoe": {},
    "olmoe": {},
    "phimoe": {},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "head_dim": 8},
}
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def router_logits(model: Any, groups: list[Group]) -> tuple[torch.Tensor, ...]:
    """Logits of every layer over the tokens of all responses, each in a call of its own, by the model itself."""
    calls = []
    for group in groups:
        for k in range(len(group.continuations)):
            ids = torch.as_tensor(group.sequence(k)[0].copy()).long()[None]
            calls.append(model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits)
    return tuple(torch.cat([x.flatten(0, -2) for x in layer]) for layer in zip(*calls, strict=True))


def z_oracle(model: Any, groups: list[Group]) -> torch.Tensor:
    """The router z loss of transformers' Switch Transformer, averaged over layers as its model does."""
    logits = router_logits(model, groups)
    loss: torch.Tensor = torch.stack([router_z_loss_func(layer[None]) for layer in logits]).mean()
    return loss


def oracle(model: Any, groups: list[Group]) -> torch.Tensor:
    logits = router_logits(model, groups)
    function = sys.modules[type(model).__module__].load_balancing_loss_func  # type: ignore[attr-defined]
    loss: torch.Tensor = function(logits, logits[0].shape[-1], model.config.num_experts_per_tok)
    return loss


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("token_budget", [10_000, 60], ids=["one pass", "cut"])
@pytest.mark.parametrize(
    ("name", "losses"),
    [
        pytest.param(name, losses, marks=() if name == "mixtral" or losses == "balance and z" else pytest.mark.slow)
        for name in MIXTURES
        for losses in LOSSES
    ],
)
def test_value_and_gradient_are_those_of_transformers(name: str, losses: str, token_budget: int, share: bool) -> None:
    model = build(name)
    groups = groups_of_every_kind()[:6]
    scorer = Scorer(model, share=share)
    plain = LikelihoodObjective("tokens", device=CPU)
    objective = RoutedObjective(plain, balancing_routers(model), RouterLosses(*LOSSES[losses]))
    assert objective.whole_batch == ("balance" in losses)
    batch = Batch(groups)
    assert (len(list(micro_batches(scorer, batch, token_budget))) > 1) == (token_budget == 60)
    Differentiator(scorer, plain).gradients(batch, token_budget)
    without = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    found = Differentiator(scorer, objective).gradients(batch, token_budget)
    held = Differentiator(scorer, objective).evaluate(batch, token_budget).means()
    scorer.detach_hook()
    expected = torch.zeros((), dtype=torch.float64)
    for metric, weight, of in zip(METRICS, LOSSES[losses], (oracle, z_oracle), strict=True):
        means = found.sums.means()
        assert (metric in means) == (metric in held) == (weight is not None)
        if weight is not None:
            value = of(model, groups)
            assert means[metric] == pytest.approx(float(value.detach()), rel=1e-6)
            assert held[metric] == pytest.approx(float(value.detach()), rel=1e-6)
            expected = expected + weight * value
    assert found.sums.means()["loss"] == pytest.approx(float(-found.values["logp_N"].sum() / batch.length_N.sum()))
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(expected, list(weights.values()), allow_unused=True)
    moved = 0
    for (weight_name, weight), slope in zip(weights.items(), slopes, strict=True):
        wanted = without[weight_name]
        if slope is not None:
            wanted = slope + (0 if wanted is None else wanted)
            moved += bool(slope.abs().max() > 1e-6)
        if wanted is None:
            assert weight.grad is None
            continue
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-6)
    assert moved > 4


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = build("mixtral")
    groups = groups_of_every_kind()[:4]
    scorer = Scorer(model)
    plain = LikelihoodObjective("tokens", device=CPU)
    objective = RoutedObjective(plain, balancing_routers(model), RouterLosses(0.7, 0.3))
    found = []
    for again in (False, True):
        if again:
            checkpoint_activations(model)
        scorer.train()
        model.zero_grad()
        Differentiator(scorer, objective).gradients(Batch(groups), 60)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    scorer.detach_hook()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "latent attention"])
def test_a_model_without_that_loss_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--router-aux-loss-coef: transformers computes no load-balancing loss"):
        balancing_routers(build(name))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_give_what_their_own_forward_gives(kind: str) -> None:
    wide = {name: size for name, size in FIELDS.items() if hasattr(AutoConfig.for_model(kind), name)}
    config = AutoConfig.for_model(kind, **wide, **OTHERS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    group = groups_of_every_kind()[0]
    scorer = Scorer(model, share=False)
    batch = pack([group], scorer.layout)
    routers = balancing_routers(model)
    with torch.no_grad(), routers.recording() as calls:
        scorer(batch)
    found = routers.sums(calls, batch).loss()
    with torch.no_grad():
        expected = oracle(model, [group])
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_auto_is_what_the_configuration_says() -> None:
    assert balance_coefficient("auto", balancing_routers(build("mixtral", router_aux_loss_coef=0.02))) == 0.02
    with pytest.raises(ConfigError, match="auto: the model's configuration has no"):
        balance_coefficient("auto", balancing_routers(build("mixtral", router_aux_loss_coef=0.0)))


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_runs_train_with_it_and_tell_of_it(method: str, tmp_path: Path) -> None:
    build("mixtral", vocab_size=len(small_tokenizer())).float().save_pretrained(tmp_path / "m")
    small_tokenizer().save_pretrained(tmp_path / "m")
    rows = pairs(8) if method == "dpo" else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(8)]

    def run(name: str, **options: Any) -> Path:
        getattr(prefopt, method)(tmp_path / "m", rows, output=tmp_path / name, **{**QUICK, **options})
        return tmp_path / name

    plain, cut, auto = (
        run("a"),
        run("b", router_aux_loss_coef=0.5, token_budget=1),
        run("c", router_aux_loss_coef="auto"),
    )
    assert not any("router/aux_loss" in line for line in steps(plain))
    first = [steps(folder)[0] for folder in (plain, cut, auto)]
    assert first[1]["router/aux_loss"] == pytest.approx(first[2]["router/aux_loss"], rel=1e-5)
    assert first[1]["router/aux_loss"] > 1
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    moved = [weights(folder)[next(n for n in weights(folder) if n.endswith("gate.weight"))] for folder in (plain, cut)]
    assert not torch.allclose(*moved, rtol=0, atol=1e-7)
