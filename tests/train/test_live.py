"""A reference in memory: scored with every batch, compared token by token, or moving behind the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model.architectures import Float64Throughout
from prefopt.core.cache_folder import cache_root
from prefopt.data.table import GroupTable
from prefopt.errors import ConfigError, ModelError
from prefopt.losses.parse import WeightedLoss, parse_losses
from prefopt.model.adapter import new_lora
from prefopt.model.packing import pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer, response_sums
from prefopt.reference.cache import ReferenceCache
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights, TrDpoUpdate
from prefopt.train.columns import preference_batch
from prefopt.train.objective import PreferenceObjective
from prefopt.train.step import Differentiator, InMemoryColumns
from train.ranked import mixed, pairs_only
from train.small import dpo, evaluations, pairs, steps, tiny_llama, weights, write_model
from train.test_objective import CPU, assert_close, models, taken_grads

ROWS = pairs(12)


def held_logits(model: Any, groups: GroupTable) -> list[torch.Tensor]:
    """Log-probabilities over the vocabulary [tokens, V] of each response, by the model's own forward."""
    found = []
    for group in groups:
        for k in range(len(group.continuations)):
            ids, trained = (torch.from_numpy(x.copy()) for x in group.sequence(k))
            logits = model(input_ids=ids.long()[None], use_cache=False).logits[0]
            found.append(logits[trained.nonzero()[:, 0] - 1].log_softmax(-1))
    return found


def by_hand(chosen: Sequence[WeightedLoss], groups: GroupTable, policy: Any, reference: Any) -> tuple[float, Any]:
    """Loss and gradients of all groups at once, from logits that are held."""
    own = held_logits(policy, groups)
    with torch.no_grad():
        ref = held_logits(reference, groups)
    target = [torch.from_numpy(c.ids[c.trained].copy()).long() for g in groups for c in g.continuations]
    of = {
        "logp": [x.gather(1, y[:, None]).sum() for x, y in zip(own, target, strict=True)],
        "ref_logp": [x.gather(1, y[:, None]).sum() for x, y in zip(ref, target, strict=True)],
        "kl": [(r.exp() * (r - x)).sum() for x, r in zip(own, ref, strict=True)],
        "wpo": [
            (x.gather(1, y[:, None])[:, 0] - (2 * x).logsumexp(1)).mean().detach()
            for x, y in zip(own, target, strict=True)
        ],
        "length": [torch.tensor(float(len(y))) for y in target],
    }
    batch = preference_batch(groups, "pairs")
    inputs = {}
    for side in ("chosen", "rejected"):
        for name, values in of.items():
            inputs[f"{side}_{name}_P"] = torch.stack([values[i] for i in batch.at_N(f"{side}_P").tolist()])
    weight, loss = torch.from_numpy(batch.columns["weight_P"]), torch.zeros((), dtype=torch.float64)
    for term in chosen:
        output = term(inputs)
        loss = loss + term.weight * (output.numerator_R * weight).sum() / (output.weight_R * weight).sum()
    loss.backward()
    return float(loss.detach()), taken_grads(policy)


@pytest.mark.parametrize(
    ("name", "options", "weighting"),
    [
        ("tdpo", ["version=1"], None),
        ("tdpo", ["version=2", "alpha=0.7"], None),
        ("dpo", [], "wpo"),
        ("tdpo:0.5,dpo:1", ["wpo.clip=true"], "wpo"),
        ("simpo", [], "wpo"),
    ],
)
def test_losses_on_distributions_are_those_on_a_blackboard(
    name: str, options: list[str], weighting: str | None
) -> None:
    policy, reference = models()
    chosen, groups = parse_losses(name, options, weighting=weighting), mixed(5)
    with Float64Throughout():
        loss, grads = by_hand(chosen, groups, policy, reference)
        live = InMemoryReference(Scorer(reference))
        objective = PreferenceObjective(chosen, device=CPU)
        batch = preference_batch(groups, "pairs")
        in_memory = InMemoryColumns(live, compares=objective.compares, tokens=False)
        found_by = Differentiator(Scorer(policy), objective, in_memory)
        for token_budget in (1, 90, 100_000):
            found = found_by.gradients(batch, token_budget)
            assert_close(taken_grads(policy), grads, 1e-8)
            assert found.sums.means()["loss"] == pytest.approx(loss, rel=1e-9)
        objective.whole_batch = True  # divergences go through the two passes too
        assert found_by.gradients(batch, 60).sums.means()["loss"] == pytest.approx(loss, rel=1e-9)
        assert_close(taken_grads(policy), grads, 1e-8)


@pytest.mark.parametrize("kind", ["full", "lora", "bfloat16"])
def test_held_weights_are_the_model_as_it_was_and_follow_it(kind: str) -> None:
    model: Any = tiny_llama()
    if kind == "lora":
        model = new_lora(model, rank=2, alpha=4, dropout=0.0, targets=None)
    masters = MasterWeights(model, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    scorer = Scorer(model)
    batch = pack(pairs_only(3), scorer.layout)
    held = SwappedWeights(masters, moves=True)
    live = InMemoryReference(scorer, held)
    with torch.no_grad():
        before = scorer(batch)
        first = {n: m.clone() for n, m in masters.masters.items()}
        for value in masters.masters.values():
            value.add_(torch.randn_like(value), alpha=0.05)
        masters.publish()
        after = scorer(batch)
    assert not torch.equal(before, after)
    assert torch.equal(live.logprobs(batch), before) and torch.equal(scorer(batch).detach(), after)
    moving = TrDpoUpdate(held, every=2, amount=0.25)
    expected = first
    for n in range(1, 5):
        with torch.no_grad():
            for value in masters.masters.values():
                value.mul_(1.01)
        masters.publish()
        moving.after(n, masters.saved())
        if n % 2 == 0:
            now = dict(masters.saved())
            expected = {name: 0.25 * now[name] + 0.75 * value for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(held.saved()[name], value, rtol=1e-6, atol=1e-7)
    TrDpoUpdate(held, every=1, amount=1.0).after(5, masters.saved())
    assert torch.equal(live.logprobs(batch), scorer(batch).detach())
    other = SwappedWeights(masters, moves=True)
    other.load({name: value.clone() for name, value in first.items()})
    assert torch.equal(InMemoryReference(scorer, other).logprobs(batch), before)
    sums = response_sums(scorer(batch), batch)
    sums.sum().backward()  # what was swapped in between left the graph alone
    assert all(m.grad is not None for m in masters.masters.values())


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the cache is not used")

    monkeypatch.setattr(ReferenceCache, "__init__", refused)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("lora", [False, True])
def test_tdpo_by_the_start_in_memory_or_by_another_model_is_the_same(
    lora: bool, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = write_model(tmp_path / "twin")
    options: dict[str, Any] = {"loss": "tdpo", "lora": lora, "learning_rate": 5e-3, "epochs": 2, "dtype": "float64"}
    dpo(model, ROWS, tmp_path / "start", progress="plain", token_budget=70, **options)
    out = capsys.readouterr().out
    assert "reference: scored with every batch and not cached, since tdpo compares whole distributions" in out
    assert "step 1: loss 0.693147, ln 2 = 0.693147" in out
    dpo(model, ROWS, tmp_path / "other", reference=twin, **options)
    for one, other in zip(steps(tmp_path / "start"), steps(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["kl/chosen"] == pytest.approx(other["kl/chosen"], rel=1e-4, abs=1e-9)
    assert steps(tmp_path / "start")[-1]["kl/chosen"] > 1e-3
    assert not (cache_root() / "reference").exists()


def test_distributions_over_other_tokens_cannot_be_compared(model: str, tmp_path: Path) -> None:
    larger = write_model(tmp_path / "larger", vocab_size=300)
    with pytest.raises(ModelError, match=r"it has 300 tokens and the model .* distributions cannot be compared"):
        dpo(model, ROWS, tmp_path / "out", loss="tdpo", reference=larger)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("options", [{}, {"lora": True, "learning_rate": 1e-2}, {"loss": "kto"}, {"loss": "ld_dpo"}])
def test_a_reference_that_is_copied_from_the_policy_makes_them_equal_again(
    options: dict[str, Any], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"epochs": 2, "token_budget": 70, "eval_fraction": 0.25, "progress": "plain", **options}
    dpo(model, ROWS, tmp_path / "out", ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, **given)
    told = [line["loss"] for line in steps(tmp_path / "out")]
    start = 0.5 if options.get("loss") == "kto" else math.log(2)
    close = [abs(loss - start) < 1e-5 for loss in told]
    assert close == [n % 2 == 0 for n in range(len(told))]
    out = capsys.readouterr().out
    assert "not cached, since it moves by 1 to the policy every 2 steps" in out
    assert "best so far" not in out and "are saved: the best" not in out
    assert evaluations(tmp_path / "out")


def test_a_reference_that_has_not_moved_yet_is_the_cached_one(model: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 2, "dtype": "float64", "learning_rate": 2e-3, "batch_size": 3}
    dpo(model, ROWS, tmp_path / "cached", **given)
    dpo(model, ROWS, tmp_path / "live", ref_model_sync_steps=100, **given)
    for one, other in zip(steps(tmp_path / "cached"), steps(tmp_path / "live"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
    found, expected = weights(tmp_path / "live"), weights(tmp_path / "cached")
    assert all(torch.allclose(found[n], expected[n], rtol=1e-6, atol=1e-9) for n in expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ref_model_mixup_alpha": 0.5}, "--ref-model-mixup-alpha does nothing without --ref-model-sync-steps"),
        ({"ref_model_sync_steps": 3, "reference": "m"}, "--reference: with --ref-model-sync-steps"),
        ({"ref_model_sync_steps": 3, "loss": "simpo"}, "--ref-model-sync-steps: simpo uses no reference"),
        ({"ref_model_sync_steps": 3, "early_stopping": 1, "eval_fraction": 0.2}, "--early-stopping compares losses"),
        ({"weighting": "wpo", "loss": "kto"}, "--weighting wpo weights pair by pair"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        dpo("no-model", ROWS, tmp_path / "out", **options)


def test_another_reference_with_another_layout_is_packed_its_own_way() -> None:
    policy, reference = models()
    groups = mixed(4)
    scorer, apart = Scorer(policy), Scorer(reference, share=False)
    batch = pack(groups, scorer.layout)
    expected = apart(pack(groups, apart.layout)).detach()
    live = InMemoryReference(apart)
    assert torch.equal(live.logprobs(batch), expected)
    assert live.distributions(batch).logits(slice(0, 3)).shape == (3, 50)
