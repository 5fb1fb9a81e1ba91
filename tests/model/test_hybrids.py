"""Recurrent layers on the shared path: equal to the class's own forward, one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from model.architectures import HYBRIDS, Float64Throughout, build, with_exact_rotary
from model.families import FAMILIES
from model.oracle import Draw, assert_same, assert_same_gradients, gradients, groups_of_every_kind, oracle_logprobs
from model.test_families import built
from prefopt.data.group import Group
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations
from prefopt.model.packing import PackLayout, pack
from prefopt.model.recurrence import mixers
from prefopt.model.recurrence.mixers import MIXERS, Mixer, mixers_of
from prefopt.model.scorer import Scorer

# Every class of the list, by a family that has it.
CLASSES = {
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "lfm3": "Lfm3ShortConv",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "mamba2": "Mamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "mamba": "MambaMixer",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
    "bailing_hybrid": "BailingHybridDeltaAttention",
    "kimi_linear": "KimiLinearDeltaAttention",
    "minimax": "MiniMaxLightningAttention",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the recurrent layers that computed a row with shared prefixes, call by call."""
    called: list[str] = []

    def spied(name: str, mixer: Mixer) -> Mixer:
        def run(*given: Any) -> Any:
            called.append(name)
            return mixer.run(*given)

        return mixer._replace(run=run)

    monkeypatch.setattr(mixers, "MIXERS", {name: spied(name, mixer) for name, mixer in MIXERS.items()})
    return called


def compare(model: PreTrainedModel, groups: list[Group], rtol: float, runs: list[str]) -> None:
    """Values and gradients of all groups in one row, on the shared path."""
    expected = oracle_logprobs(model, groups)
    expected_gradients = gradients(expected, model)
    scorer = Scorer(model)
    assert (scorer.path, scorer.reason) == ("shared", None)
    batch = pack(groups, scorer.layout)
    assert len(batch.passes) == 1
    assert batch.tokens < pack(groups, PackLayout(share=False)).tokens
    del runs[:]
    found = scorer(batch)
    assert sorted(runs) == scorer.recurrent, "each recurrent layer computes the row once"
    assert_same(found, expected, rtol)
    assert_same_gradients(gradients(found, model), expected_gradients, rtol)
    scorer.detach_hook()


def test_every_class_of_the_list_is_tested() -> None:
    assert sorted(CLASSES.values()) == sorted(MIXERS)
    assert set(CLASSES) <= set(FAMILIES)


@pytest.mark.parametrize("name", HYBRIDS)
def test_float64_scores_equal_the_models_own_forward(name: str, runs: list[str]) -> None:
    with Float64Throughout():
        compare(with_exact_rotary(build(name)), groups_of_every_kind(), 1e-9, runs)


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_every_class_at_the_edges_of_chunks(family: str, runs: list[str]) -> None:
    """Chunks are of 16 and 64 tokens, those of the miniatures of 8, windows of 8, convolutions of 3 and 4."""
    draw = Draw(1)
    edges = [15, 16, 17, 63, 64, 65]
    groups = [draw.group(prefix, *responses) for prefix in edges for responses in ((1, 2), (16, 3, 17))]
    groups += [draw.group(prefix, 2, 9, 5) for prefix in (0, 1, 2, 3, 4, 7, 8)]
    groups += [draw.group(2, 64, 63, 1), draw.group(30, 50)]
    with Float64Throughout():
        model = with_exact_rotary(built(family, torch.float64))
        compare(model, groups, 1e-8, runs)
    assert set(runs) == {CLASSES[family]}


@pytest.mark.parametrize("name", HYBRIDS)
def test_nothing_leaks_between_sequences(name: str) -> None:
    model = build(name)
    scorer = Scorer(model)
    draw = Draw(2)
    groups = [draw.group(3, 4, 5), draw.group(2, 6, 3, 4), draw.group(0, 3, 2), draw.group(5, 4)]

    def changed(k: int) -> list[Group]:
        """The groups with other tokens in response k of the second."""
        one = groups[1]
        sequences = [one.sequence(n) for n in range(len(one.continuations))]
        ids, trained = sequences[k]
        other = ids.copy()
        other[len(one.prefix) + 1 :] = 3 + (other[len(one.prefix) + 1 :] + 5) % 90
        sequences[k] = other, trained
        return [groups[0], Group.from_sequences(sequences, row=1), *groups[2:]]

    batch = pack(groups, scorer.layout)
    before = scorer(batch).detach()
    assert (batch.owner == 2).any()
    for k in range(3):
        after = scorer(pack(changed(k), scorer.layout)).detach()
        own = batch.owner == 2 + k
        assert_same(after[~own], before[~own], 1e-12)
        assert float((after - before)[own].abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name", [n if n in ("lfm2", "qwen3.5", "jamba") else pytest.param(n, marks=pytest.mark.slow) for n in HYBRIDS]
)
def test_bfloat16_is_as_near_to_the_truth_as_separate_rows(name: str) -> None:
    """Values and gradients; in mixtures of experts rounding sends some tokens elsewhere."""
    model, groups = build(name, torch.bfloat16), groups_of_every_kind()
    exact = copy.deepcopy(model).float()
    results = [oracle_logprobs(m, groups) for m in (exact, model)]
    scorer = Scorer(model)
    assert scorer.path == "shared"
    results.append(scorer(pack(groups, scorer.layout)))
    weights = [exact, model, model]
    flat = [
        torch.cat([g.flatten().double() for g in gradients(x, m).values()])
        for x, m in zip(results, weights, strict=True)
    ]
    for truth, usual, found in ([x.detach().double() for x in results], flat):
        assert float((found - truth).norm()) < 1.5 * float((usual - truth).norm())


@pytest.mark.parametrize("name", ["qwen3.5", "jamba", "mamba"])
def test_recomputed_activations_and_training_mode_change_nothing(name: str) -> None:
    """Of two rows, so that one is recomputed after the other was computed."""
    model = build(name)
    scorer, draw = Scorer(model), Draw(3)
    batches = [pack([draw.group(*shape)], scorer.layout) for shape in ((7, 4, 5, 3), (2, 9, 3))]
    expected = [gradients(scorer(batch), model) for batch in batches]
    checkpoint_activations(model)
    model.train()
    together = [scorer(batch) for batch in batches]
    for found, wanted in zip(together, expected, strict=True):
        assert_same_gradients(gradients(found, model), wanted, 1e-10)


@pytest.mark.parametrize("name", ["qwen3.5", "granite hybrid"])
def test_adapters_train_as_in_the_models_own_forward(name: str) -> None:
    with Float64Throughout():
        model = new_lora(with_exact_rotary(build(name)), rank=2, alpha=4, dropout=0.0, targets=None)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.double()
        groups = groups_of_every_kind()[:5]
        wanted = oracle_logprobs(model, groups)
        expected = gradients(wanted, model)
        scorer = Scorer(model)
        assert scorer.path == "shared"
        found = scorer(pack(groups, scorer.layout))
        assert_same(found, wanted, 1e-9)
        assert_same_gradients(gradients(found, model), expected, 1e-9)
        assert any("lora" in n and float(g.abs().max()) > 0 for n, g in expected.items())


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_a_model_is_given_back_as_it_was(name: str) -> None:
    model = build(name)
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids, use_cache=False).logits
    scorer = Scorer(model)
    assert any("forward" in vars(m) for m in model.modules())
    with scorer.attention_by(None):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    twin = copy.deepcopy(model)
    own = {id(m) for m in twin.modules()}
    bound = [vars(m)["forward"].__self__ for m in twin.modules() if "forward" in vars(m)]
    assert bound and all(id(m) in own for m in bound), "a copy computes with its own weights"
    scorer.release()
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_a_class_that_is_not_in_the_list_or_has_changed_is_scored_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = build("qwen3.5"), groups_of_every_kind()[:4]
    assert mixers_of(causal_model(model))
    other = {"Qwen3_5GatedDeltaNet": MIXERS["Qwen3_5GatedDeltaNet"]._replace(calls=("no_such_function",))}
    for known, said in (({}, "layers of type linear_attention"), (other, "Qwen3_5GatedDeltaNet of this transformers")):
        monkeypatch.setattr(mixers, "MIXERS", known)
        scorer = Scorer(model)
        assert scorer.path == "separate"
        assert scorer.reason is not None
        assert said in scorer.reason
        assert not any("forward" in vars(m) for m in model.modules())
        with torch.no_grad():
            assert_same(scorer(pack(groups, scorer.layout)), oracle_logprobs(model, groups), 1e-6)


def test_layers_with_attention_alone_are_compiled() -> None:
    torch._dynamo.reset()
    model = build("jamba", num_local_experts=1, num_experts=1)
    scorer = Scorer(model)
    batch = pack(groups_of_every_kind()[:3], scorer.layout)
    before = scorer(batch)
    expected = gradients(before, model)
    assert scorer.compile_layers(backend="eager").startswith("layers without JambaMambaMixer: compiled")
    after = scorer(batch)
    assert scorer.compiled is not None
    assert scorer.compiled.failure is None
    assert [type(layer).__name__ for layer in scorer.compiled.layers] == ["JambaAttentionDecoderLayer"]
    assert len(scorer.compiled._functions) == 1
    assert_same(after, before, 1e-12)
    assert_same_gradients(gradients(after, model), expected, 1e-12)
    scorer.release()
    assert not any("forward" in vars(m) for m in model.modules())
    assert "all are recurrent (MambaMixer)" in Scorer(build("mamba")).compile_layers()
