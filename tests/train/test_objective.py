"""Losses on groups: gathered right, and the same however a batch is cut into parts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import Float64Throughout, with_exact_rotary
from model.oracle import oracle_logprobs
from prefopt.data.group import Group
from prefopt.data.table import GroupTable, keep_responses
from prefopt.errors import DataError
from prefopt.losses.declare import LOSSES
from prefopt.losses.parse import WeightedLoss
from prefopt.model.adapter import new_lora
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch, micro_batches
from prefopt.train.columns import mismatched, paired_of, preference_batch
from prefopt.train.data import DataBatches
from prefopt.train.objective import PreferenceObjective, check_rows
from prefopt.train.reference import without_values
from prefopt.train.step import Differentiator, Gradients, InMemoryColumns
from train.ranked import VOCABULARY, batches_of, columns_for, group, inputs_by_hand, mixed, pairs_only, terms
from train.small import tiny_llama

CPU = torch.device("cpu")
SORTING = [name for name, loss in LOSSES.items() if not loss.per_row]
DISTRIBUTIONS = [name for name, loss in LOSSES.items() if loss.needs_distributions]
WHOLE = [name for name, loss in LOSSES.items() if loss.whole_batch]
SUMS = ["dpo:1.0,nll:0.2", "ipo:0.5,nll:2,simpo:1", "bco:1,dpo:0.5"]
STATE = {
    "bco": {"mean": 0.3, "count": 5.0},
    "beta_dpo": {"mean": -0.7, "deviation": 0.4, "batches": 2.0},
    "bco_unpaired": {"desirable": 0.2, "desirable_count": 3.0, "undesirable": -0.4, "undesirable_count": 2.0},
}


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy and a reference that is not it, in float64."""
    policy, reference = (with_exact_rotary(tiny_llama(seed, vocab_size=VOCABULARY).double()) for seed in (0, 1))
    policy.set_attn_implementation("eager")
    with torch.no_grad():
        for a, b in zip(policy.parameters(), reference.parameters(), strict=True):
            b.copy_(a + 0.1 * (b - a))
    return policy, reference


def nested(values_M: torch.Tensor, groups: Sequence[Group]) -> list[list[torch.Tensor]]:
    """Token values by group and response."""
    parts = iter(values_M.split([int(c.trained.sum()) for g in groups for c in g.continuations]))
    return [[next(parts) for _ in g.continuations] for g in groups]


def prepared(
    chosen: Sequence[WeightedLoss], groups: GroupTable, reference: torch.nn.Module
) -> tuple[PreferenceObjective, DataBatches]:
    """The objective, and batches with reference values by the model class's own forward."""
    others = mismatched(groups, 64)[0] if any(t.loss.needs_mismatched for t in chosen) else None
    scored = groups + others if others else groups
    with torch.no_grad():
        values_M = oracle_logprobs(reference, scored).double()
    sums = [float(v.sum()) for g in nested(values_M, scored) for v in g]
    known = replace(without_values(scored, 0.0), sums_N=np.array(sums), token_values_M=values_M.numpy())
    objective = PreferenceObjective(chosen, device=CPU)
    for name, kept in STATE.items():
        if name in objective.state:
            objective.state[name] = {k: torch.tensor(v, dtype=torch.float64) for k, v in kept.items()}
    return objective, batches_of(groups, columns_for(chosen), known, others)


def differentiator(scorer: Scorer, objective: PreferenceObjective) -> Differentiator:
    """With the policy's values of mismatched responses, where there are any."""
    return Differentiator(scorer, objective, InMemoryColumns(None, compares=False, tokens=False))


def step(scorer: Scorer, objective: PreferenceObjective, batch: Batch, token_budget: int) -> Gradients:
    assert (len(list(micro_batches(scorer, batch, token_budget))) > 1) == (token_budget < 1000)
    return differentiator(scorer, objective).gradients(batch, token_budget)


def taken_grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    top = max(float(g.abs().max()) for g in expected.values())
    assert top > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=rtol * top, msg=name)


def by_hand(
    chosen: Sequence[WeightedLoss], groups: Sequence[Group], policy: Any, reference: Any, others: GroupTable | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch at once, from the models' own forward."""
    own = nested(oracle_logprobs(policy, groups).double(), groups)
    with torch.no_grad():
        ref = nested(oracle_logprobs(reference, groups).double(), groups)
        apart = [nested(oracle_logprobs(m, others or groups).double(), others or groups) for m in (policy, reference)]
    inputs, weight_R = inputs_by_hand(chosen[0].loss.kind, groups, own, ref, apart)
    loss: Any = 0.0
    for term in chosen:
        state = {n: {k: torch.tensor(v, dtype=torch.float64) for k, v in kept.items()} for n, kept in STATE.items()}
        output = term(inputs, state)
        loss = loss + term.weight * (output.numerator_R * weight_R).sum() / (output.weight_R * weight_R).sum()
    loss.backward()
    return float(loss.detach()), taken_grads(policy)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in DISTRIBUTIONS] + SUMS)
def test_the_loss_of_a_batch_is_that_of_one_on_a_blackboard_however_it_is_cut(name: str) -> None:
    policy, reference = models()
    chosen = terms(name)
    groups = pairs_only(7) if name in SORTING else mixed(7)
    indices = [4, 0, 6, 2, 3]
    with Float64Throughout():
        objective, source = prepared(chosen, groups, reference)
        some, batch = [groups[i] for i in indices], source.of(indices)
        others = GroupTable.of(batch.mismatched.groups) if batch.mismatched else None
        loss, grads = by_hand(chosen, some, policy, reference, others)
        scorer = Scorer(policy)
        told = []
        for token_budget in (1, 90, 100_000):
            found = step(scorer, objective, batch, token_budget)
            assert_close(taken_grads(policy), grads)
            told.append((found.sums.means(), found.state))
        with torch.no_grad():
            values = differentiator(scorer, objective).values(micro_batches(scorer, batch, 1))
            evaluated = objective(batch, values, objective.normaliser(batch))
    assert float(evaluated.total) == pytest.approx(loss, rel=1e-9)
    for record, state in told:
        assert record["loss"] == pytest.approx(loss, rel=1e-9)
        assert record == pytest.approx(told[0][0], rel=1e-8, abs=1e-12)
        if len(chosen) > 1:
            parts = [t.weight * record[f"loss/{t.loss.name}"] for t in chosen]
            assert sum(parts) == pytest.approx(loss)
        for one, kept in state.items():
            assert {k: float(v) for k, v in kept.items()} != pytest.approx(STATE[one]), "a batch moves the state"
            assert kept == {k: pytest.approx(float(v), rel=1e-9) for k, v in told[0][1][one].items()}


def test_two_passes_draw_the_same_dropout_and_leave_the_generator_where_one_does() -> None:
    chosen, groups = terms("dpo"), pairs_only(6)
    policy, reference = models()
    adapted = new_lora(copy.deepcopy(policy), rank=2, alpha=4, dropout=0.5, targets=None).double()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.2)
    objective, source = prepared(chosen, groups, reference)
    batch, scorer = source.of(range(6)), Scorer(adapted)
    scorer.train()
    found = []
    for whole in (False, True):
        objective.whole_batch = whole
        torch.manual_seed(3)
        step(scorer, objective, batch, 60)
        found.append((taken_grads(adapted), torch.get_rng_state()))
    assert_close(found[1][0], found[0][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.manual_seed(4)
    step(scorer, objective, batch, 60)
    other = taken_grads(adapted)
    assert any(not torch.allclose(other[n], found[0][0][n], rtol=1e-3) for n in other), "dropout does something here"


def test_mismatched_responses_follow_the_order_of_the_data() -> None:
    rng = np.random.default_rng(0)
    made = [group(i, lengths, range(len(lengths)), rng) for i, lengths in enumerate([(3, 4), (5,), (2, 6, 1), (4, 9)])]
    twin = Group.from_sequences([(np.append(made[0].prefix, [7, 8]), [0] * len(made[0].prefix) + [1, 1])], row=9)
    groups = [made[0], twin, *made[1:]]
    table, cut = mismatched(groups, 64)
    assert cut == 0 and len(table) == 5

    def taken(g: int) -> list[list[int]]:
        return [table[g].sequence(k)[0].tolist() for k in range(len(table[g].continuations))]

    def sequence(prompt: Group, g: int, k: int) -> list[int]:
        return [*prompt.prefix.tolist(), *groups[g].continuations[k].ids.tolist()]

    assert taken(0) == [sequence(made[0], 2, 0), sequence(made[0], 3, 0)]  # the row behind has the same prompt
    assert taken(3) == [sequence(groups[3], g, k) for g, k in ((4, 0), (4, 1), (0, 0))]  # and round to the first
    assert taken(4) == [sequence(groups[4], g, k) for g, k in ((0, 0), (0, 1))]
    for g in table:
        assert all(c.trained.all() and len(c.ids) for c in g.continuations)
    short, cut = mismatched(groups, max(len(g.prefix) for g in groups) + 2)
    assert cut > 0 and max(len(short[g].sequence(0)[0]) for g in range(5)) <= max(len(g.prefix) for g in groups) + 2
    with pytest.raises(DataError, match="every row has the same prompt"):
        mismatched([made[0], twin], 64)


def pairs_as_lists(groups: Sequence[Group], which: str = "all", *, merge: bool = False) -> dict[str, list[Any]]:
    """Chosen and rejected responses of a whole batch, weights and labels."""
    batch = preference_batch(groups, "pairs", which, merge=merge)
    at = {name: batch.at_N(f"{name}_P").tolist() for name in ("chosen", "rejected")}
    return at | {name: batch.columns[f"{name}_P"].tolist() for name in ("weight", "label")}


def test_votes_for_both_sides_are_one_pair_with_a_soft_label() -> None:
    rng = np.random.default_rng(0)
    split_vote = replace(group(1, (3, 4, 2), (2, 1, 0), rng), pairs=((0, 1), (1, 0), (0, 2)), weights=(3.0, 1.0, 4.0))
    plain = pairs_as_lists([split_vote])
    assert (plain["chosen"], plain["weight"]) == ([0, 1, 0], [0.375, 0.125, 0.5])
    merged = pairs_as_lists([split_vote, split_vote], merge=True)
    assert merged["chosen"] == [0, 0, 3, 3] and merged["rejected"] == [1, 2, 4, 5]
    assert merged["weight"] == [0.5] * 4 and merged["label"] == [0.75, 1, 0.75, 1]
    policy, reference = models()
    groups = GroupTable.of([split_vote, *mixed(2)])
    objective, source = prepared(terms("dpo"), groups, reference)
    scorer, batch = Scorer(policy), source.of([0])
    with torch.no_grad():
        values = differentiator(scorer, objective).values(micro_batches(scorer, batch, 1))
        soft = objective(batch, values, objective.normaliser(batch)).total
        hard, others = prepared(terms("hinge,robust"), groups, reference)  # neither reads labels: two pairs by weight
        two = others.of([0])
        assert float(hard(two, values, hard.normaliser(two)).shares["loss/hinge"]) != pytest.approx(float(soft))
        s = (values["logp_N"] - torch.from_numpy(batch.columns["ref_logp_N"])) * 0.1
        logistic = torch.nn.functional.logsigmoid
        by_votes = [(0.375, s[0] - s[1]), (0.125, s[1] - s[0]), (0.5, s[0] - s[2])]
        assert float(soft) == pytest.approx(sum(-w * float(logistic(h)) for w, h in by_votes))


def test_the_best_against_the_worst() -> None:
    rng = np.random.default_rng(0)
    tied = group(1, (3, 4, 2, 5), (9, 1, 9, 0), rng)
    found = pairs_as_lists([tied], "best-worst")
    assert (found["chosen"], found["rejected"], found["weight"]) == ([0, 2], [3, 3], [0.5, 0.5])
    votes = replace(tied, tiers=(), pairs=((0, 1), (1, 2), (2, 0), (3, 0)), weights=(1.0, 1.0, 1.0, 2.0))
    found = pairs_as_lists([votes], "best-worst")
    assert (found["chosen"], found["rejected"]) == ([3], [0])
    with pytest.raises(DataError, match="row 1: no response is preferred to all others"):
        pairs_as_lists([replace(votes, pairs=((0, 1), (1, 0)), weights=(1.0, 1.0))], "best-worst")


def test_responses_that_no_pair_holds_are_not_needed() -> None:
    rng = np.random.default_rng(0)
    ranked = [group(i, (3, 4, 2, 5), order, rng) for i, order in enumerate([(9, 1, 9, 0), (1, 2, 3, 4)], 1)]
    votes = replace(ranked[1], tiers=(), pairs=((0, 1), (2, 3), (2, 3)), weights=(1.0, 1.0, 1.0))
    many = GroupTable.of([*ranked, votes])
    read = paired_of(many, "best-worst")
    # Who is best of votes is told from all of them, also from those of others.
    assert read.tolist() == [*[True, False, True, True], *[True, False, False, True], *[True] * 4]
    fewer = keep_responses(many, read)
    before, after = pairs_as_lists(many, "best-worst"), pairs_as_lists(fewer, "best-worst")
    numbers = np.flatnonzero(read)
    assert numbers[after["chosen"]].tolist() == before["chosen"]
    assert numbers[after["rejected"]].tolist() == before["rejected"]
    assert after["weight"] == before["weight"]
    assert paired_of(many, "all").all()


def test_what_a_loss_cannot_be_computed_on_is_refused_by_row() -> None:
    rng = np.random.default_rng(0)
    made = [group(i, lengths, range(len(lengths)), rng) for i, lengths in enumerate([(3, 4), (5, 1, 2)], 1)]

    def check(name: str, *groups: Group, which: str = "all") -> None:
        check_rows(terms(name), groups, which)

    with pytest.raises(DataError, match=r"row 2: --loss aot sorts .* best-worst"):
        check("aot", *made)
    check("aot", *made, which="best-worst")
    with pytest.raises(DataError, match="row 2: --loss reward_aware needs a finite score"):
        check("reward_aware", made[0], replace(made[1], scores=None))
    with pytest.raises(DataError, match="row 2: its responses have no order"):
        check("plackett_luce", made[0], replace(made[1], tiers=()))
    with pytest.raises(DataError, match="row 2: its responses have no labels"):
        preference_batch([made[0], replace(made[1], labels=None)], "labels")
