"""Tokens of packed rows go to the experts that they go to by the class's own forward, and each is counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from model.architectures import build
from model.families import FAMILIES, config_of
from model.oracle import groups_of_every_kind, oracle_logprobs
from model.test_families import built
from prefopt.errors import ConfigError
from prefopt.model.load import load_model
from prefopt.model.packing import PackedBatch, pack
from prefopt.model.precision import disable_dropout, steady_routers
from prefopt.model.routing import Routers, Routing, balancing_routers, logit_routers, routers_of
from prefopt.model.scorer import Scorer

GROUPS = groups_of_every_kind()[:6]
MIXTURES = {
    "mixtral": 2,
    "qwen2_moe": 2,
    "qwen3_moe": 2,
    "gpt_oss": 2,
    "olmoe": 2,
    "deepseek_v3": 1,  # groups of experts, chosen by sigmoids and a bias
    "glm4_moe": 1,
    "granitemoe": 2,
    "ernie4_5_moe": 1,
    "llama4": 2,  # scored apart; puts out no indices
    "dbrx": 2,  # puts out logits alone
    "jetmoe": 6,  # experts in its attention, too, whose routers transformers records twice
    "longcat_flash": 1,  # experts that compute nothing
    "zaya": 2,  # tokens that skip their experts
}
OTHERS = {
    **{"afmoe": 1, "aria_text": 2, "bailing_hybrid": 1, "cohere2_moe": 1, "deepseek_v2": 1, "dots1": 1},
    **{"exaone_moe": 1, "flex_olmo": 2, "glm4_moe_lite": 1, "granitemoehybrid": 2, "granitemoeshared": 2},
    **{"hunyuan_v1_moe": 2, "jamba": 1, "lfm2_moe": 1, "minimax": 2, "minimax_m2": 2, "phimoe": 2, "qwen3_5_moe": 2},
    **{"qwen3_next": 2, "solar_open": 2, "axk1": 1, "axk2": 1, "deepseek_v32": 1, "glm_moe_dsa": 1, "hy_v3": 1},
    **{"granitemoe_swa": 2, "kolibri1": 2, "laguna": 1, "mellum": 2, "mimo_v2_flash": 1, "minimax_m3_vl_text": 2},
}
"""Numbers of routers that record, by family."""
ALL = [*MIXTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def routers(model: torch.nn.Module) -> Routers:
    found = routers_of(model)
    assert found is not None
    return found


def recorded(scorer: Scorer) -> tuple[list[list[Routing]], PackedBatch]:
    batch = pack(GROUPS, scorer.layout)
    with torch.no_grad(), routers(scorer.model).recording() as calls:
        scorer(batch)
    return calls, batch


def whole(calls: list[list[Routing]]) -> list[Routing]:
    return [Routing(*map(torch.cat, zip(*one, strict=True))) for one in calls]


def places(share: bool) -> list[torch.Tensor]:
    """The tokens of each response, with its prompt, among those of all passes end to end."""
    found, at = [], 0
    for group in GROUPS:
        prefix, start = len(group.prefix), at
        for k, c in enumerate(group.continuations):
            if not share:
                found.append(torch.arange(at, at + prefix + len(c.ids)))
                at += prefix + len(c.ids)
                continue
            at += prefix if k == 0 else 0
            found.append(torch.cat([torch.arange(start, start + prefix), torch.arange(at, at + len(c.ids))]))
            at += len(c.ids)
    return found


def apart(model: Any) -> list[list[Routing]]:
    """What each router puts out for each response in a call of its own, by the model's own forward: logits as
    transformers gives them, and the experts that were chosen."""
    found = []
    for group in GROUPS:
        for k in range(len(group.continuations)):
            ids = torch.as_tensor(group.sequence(k)[0].copy()).long()[None]
            with torch.no_grad(), routers(model).recording() as calls:
                out = model(input_ids=ids, output_router_logits=True, use_cache=False)
            assert len(out.router_logits) == len(calls)
            # Of JetMoe, transformers gives them in another order.
            unordered = len(calls) > model.config.get_text_config().num_hidden_layers
            for own, (one,) in zip(out.router_logits, calls, strict=True):
                assert unordered or torch.equal(own.flatten(0, -2), one.logits_TE)
            found.append([one for (one,) in calls])
    return found


def once(calls: list[list[Routing]]) -> torch.Tensor:
    """Counts [L, E] of what :func:`apart` gives: a prompt of several responses with the first of them."""
    counts, at = [], 0
    for group in GROUPS:
        for k in range(len(group.continuations)):
            first = 0 if k == 0 else len(group.prefix)
            of = [np.bincount(one.chosen_TK[first:].flatten(), minlength=one.logits_TE.shape[1]) for one in calls[at]]
            counts.append(np.stack(of))
            at += 1
    return torch.from_numpy(np.sum(counts, 0))


@pytest.mark.parametrize("family", ALL)
def test_packed_tokens_are_routed_as_apart(family: str) -> None:
    model = built(family, torch.float64)
    scorer = Scorer(model)
    assert len(routers(model).modules) == {**MIXTURES, **OTHERS}[family]
    calls, batch = recorded(scorer)
    assert (len(batch.passes) == 1) == scorer.layout.share
    counts = routers(model).counts(calls, batch)
    z_sum = float(routers(model).z_sum(calls, batch))
    scorer.detach_hook()
    expected = apart(model)
    for at, one in zip(places(scorer.layout.share), expected, strict=True):
        for packed, own in zip(whole(calls), one, strict=True):
            torch.testing.assert_close(packed.logits_TE[at], own.logits_TE, rtol=1e-4, atol=1e-5)
            assert torch.equal(packed.chosen_TK[at].sort(-1).values, own.chosen_TK.sort(-1).values)
    assert torch.equal(counts, once(expected))
    positions = sum(group.tokens for group in GROUPS)
    assert counts.sum(1).tolist() == [positions * routers(model).chosen] * len(counts)
    logits = [torch.cat([one[layer].logits_TE for one in expected]) for layer in range(len(counts))]
    own_z = sum(float(router_z_loss_func(z.double()[None])) * len(z) for z in logits)
    assert z_sum == pytest.approx(own_z, rel=1e-6)


def test_passes_for_nothing_are_not_counted() -> None:
    """In shards a rank with fewer passes than others makes some more, of any length."""
    scorer = Scorer(build("qwen3_moe"), share=False)
    calls, batch = recorded(scorer)
    scorer.most_passes = lambda passes: passes + 2
    more, _ = recorded(scorer)
    found = routers(scorer.model)
    assert len(more[0]) == len(calls[0]) + 2
    for got, wanted in zip(found.sums(more, batch), found.sums(calls, batch), strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.equal(found.counts(more, batch), found.counts(calls, batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_router_that_an_adapter_replaces_is_read_once() -> None:
    from peft import LoraConfig, get_peft_model

    plain = build("mixtral")
    names = routers(plain).names
    wrapped = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))  # type: ignore[arg-type]
    found = routers(wrapped)
    assert [n.rpartition("model.")[2] for n in found.names] == [n.rpartition("model.")[2] for n in names]
    calls, batch = recorded(Scorer(wrapped))
    assert found.counts(calls, batch).shape == (2, 4)


def test_every_family_with_routers_is_tried() -> None:
    """But for those whose miniature has none that record: DeepSeek V4's first layers choose experts by token."""
    known = {"deepseek_v4", "nemotron_h", "doge", "gemma4", "gemma4_unified_text", "granitemoehybrid attention"}
    for family in FAMILIES:
        if "moe" in family or family in known:
            assert family in known or family in {**MIXTURES, **OTHERS}, family
        if family in known:
            assert routers_of(built(family, torch.float32)) is None


@pytest.mark.parametrize("name", ["mixtral", "latent attention"])
def test_a_position_counts_once_however_rows_are_packed(name: str) -> None:
    model = build(name)
    found = []
    for share in (True, False):
        scorer = Scorer(model, share=share)
        calls, batch = recorded(scorer)
        assert (len(batch.passes) > 1) != share
        assert batch.tokens == sum(
            g.tokens + (0 if share else len(g.prefix) * (len(g.continuations) - 1)) for g in GROUPS
        )
        found.append(routers(model).counts(calls, batch))
        scorer.detach_hook()
    assert torch.equal(*found)


def test_a_router_that_gives_probabilities_has_no_z_loss() -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    model = built("gemma4", torch.float64, **experts)
    calls, batch = recorded(Scorer(model))
    for one in whole(calls):  # what transformers calls logits sums to 1
        torch.testing.assert_close(one.logits_TE.sum(-1), torch.ones(batch.tokens), check_dtype=False)
        assert torch.equal(one.chosen_TK.sort(-1).values, one.logits_TE.topk(2, -1).indices.sort(-1).values)
    with pytest.raises(ConfigError, match=r"--router-z-loss-coef: the routers of Gemma4\w+ give probabilities"):
        logit_routers(model)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "longcat_flash"])
def test_all_others_give_logits(family: str) -> None:
    model = built(family, torch.float64)
    calls, _ = recorded(Scorer(model))
    assert all(not torch.allclose(one.logits_TE.sum(-1), one.logits_TE.new_ones(1)) for one in whole(calls))
    assert logit_routers(model).gives_logits


def test_models_without_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--router-aux-loss-coef: transformers computes no load-balancing loss"):
        balancing_routers(build("latent attention"))
    with pytest.raises(ConfigError, match="--router-z-loss-coef: transformers records no router logits for Llama"):
        logit_routers(build("llama"))


def test_tokens_that_skip_their_experts_count_for_the_class_that_stands_for_it() -> None:
    """Zaya's router names expert 0 for them, with weight 0."""
    model: Any = built("zaya", torch.float64)
    for module, _ in routers(model).modules:
        module.balancing_biases.fill_(-10.0)[-1] = 10.0
    calls, batch = recorded(Scorer(model))
    counts = routers(model).counts(calls, batch)
    assert counts[:, -1].tolist() == [sum(group.tokens for group in GROUPS)] * 2
    assert not counts[:, :-1].any()


@pytest.mark.parametrize("way", ["configuration", "model"])
@pytest.mark.parametrize("family", ["mixtral", "phimoe", "dbrx"])
def test_routers_draw_no_noise_in_training_and_choose_as_in_evaluation(family: str, way: str) -> None:
    noise: dict[str, Any] = {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5}
    if family == "dbrx":
        noise = {"ffn_config": {**FAMILIES["dbrx"][1]["ffn_config"], "moe_jitter_eps": 0.5}}

    def made(quiet: bool) -> Scorer:
        config = config_of(family, **noise)
        if quiet:
            disable_dropout(config)
        torch.manual_seed(0)
        return Scorer(AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32))

    scorer = made(False)
    batch = pack(GROUPS, scorer.layout)
    with torch.no_grad():
        calm = scorer.eval()(batch)
        assert not torch.equal(scorer.train()(batch), calm), "noise, which is taken out"
        scorer.detach_hook()
        if way == "model":
            disable_dropout(scorer.model)
            scorer.attach_hook()
        else:
            scorer = made(True)
            steady_routers(scorer.model)
        assert torch.equal(scorer.train()(batch), calm)
        assert torch.equal(scorer.eval()(batch), calm)


def test_a_loaded_phimoe_weighs_its_experts_as_its_class_does(tmp_path: Path) -> None:
    """By a threshold that is called noise in its configuration."""
    built("phimoe", torch.float32, router_jitter_noise=0.3).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tmp_path, router_jitter_noise=0.0, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = oracle_logprobs(plain, GROUPS)
        assert (oracle_logprobs(other, GROUPS) - expected).abs().max() > 1e-3, "the threshold counts"
        scorer = Scorer(model).train()
        torch.testing.assert_close(scorer(pack(GROUPS, scorer.layout)), expected, rtol=1e-4, atol=1e-4)
