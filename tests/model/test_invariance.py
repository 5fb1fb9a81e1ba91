"""What must not change a score: other responses, other groups, their order, and how memory is saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from model.architectures import Float64Throughout, build, with_exact_rotary
from model.oracle import Draw, assert_same, assert_same_gradients, gradients, groups_of_every_kind
from prefopt.data.group import Group
from prefopt.model.packing import pack, split
from prefopt.model.scorer import Scorer

KERNELS = ("auto", "loop")
# Full attention, windows, soft-caps, sinks with experts, ungrouped heads.
DIVERSE = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")


def score(model: PreTrainedModel, groups: Sequence[Group], attention: str = "auto") -> list[torch.Tensor]:
    """Token log-probabilities, one tensor per group."""
    scorer = Scorer(model, attention=attention)
    batch = pack(groups, scorer.layout)
    sizes = [sum(int(c.trained.sum()) for c in g.continuations) for g in groups]
    return list(scorer(batch).split(sizes))


def replaced(group: Group, k: int, ids: Sequence[int]) -> Group:
    """The group with other tokens as response k."""
    sequences = [group.sequence(j) for j in range(len(group.continuations))]
    whole = np.concatenate([group.prefix, ids])
    sequences[k] = (whole, np.arange(len(whole)) >= len(group.prefix))
    return Group.from_sequences(sequences, row=1)


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("name", DIVERSE)
def test_nothing_leaks_between_responses_or_groups(name: str, attention: str) -> None:
    model = with_exact_rotary(build(name, tie_word_embeddings=False))
    draw = Draw()
    before, group, after = draw.group(6, 4, 5), draw.group(13, 9, 12, 3), draw.group(10, 6, 6)
    lengths = [9, 12, 3]
    with Float64Throughout():
        first, scores, last = score(model, [before, group, after], attention)
        for k, n in enumerate(lengths):
            for longer in (0, 4):  # other tokens, and more of them, so that all that follows moves
                changed = replaced(group, k, [60 + k, *draw.tokens(n - 1 + longer)])
                a, b, c = score(model, [before, changed, after], attention)
                assert_same(a, first, 1e-13)
                assert_same(c, last, 1e-13)
                moved = b.split([m + longer * (i == k) for i, m in enumerate(lengths)])
                for i, expected in enumerate(scores.split(lengths)):
                    if i == k:
                        assert not torch.allclose(moved[i][:n], expected, rtol=0, atol=1e-3)
                    else:
                        assert_same(moved[i], expected, 1e-13)


@pytest.mark.parametrize("name", DIVERSE)
def test_no_gradient_reaches_a_step_from_another_of_its_response(name: str) -> None:
    model = build(name, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    prefix, ones, twos = (rng.integers(a, a + 20, 12) for a in (3, 23, 43))
    sequences = [(np.concatenate([prefix, step]), np.arange(24) >= 12) for step in (ones, twos)]
    scores = score(model, [Group.from_sequences(sequences, row=1, pairs=(), steps=[2])])[0]
    embedding = model.get_input_embeddings().weight
    for seen, unseen, logp in ((ones, twos, scores[:12]), (twos, ones, scores[12:])):
        (grad,) = torch.autograd.grad(logp.sum(), embedding, retain_graph=True)
        assert grad[seen[:-1]].any() and grad[prefix].any() and not grad[unseen].any()


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("name", DIVERSE)
def test_no_gradient_reaches_tokens_that_a_response_does_not_see(name: str, attention: str) -> None:
    model = build(name, tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    prefix, ones, twos, others = (rng.integers(a, a + 20, 12) for a in (3, 23, 43, 63))

    def made(*sequences: np.ndarray, context: int = 12) -> Group:
        return Group.from_sequences([(s, np.arange(len(s)) >= context) for s in sequences], row=1)

    group = made(np.concatenate([prefix, ones]), np.concatenate([prefix, twos]))
    scores = score(model, [made(others, others[::-1].copy(), context=3), group], attention)[1]
    embedding = model.get_input_embeddings().weight
    for seen, unseen, logp in ((ones, twos, scores[:12]), (twos, ones, scores[12:])):
        (grad,) = torch.autograd.grad(logp.sum(), embedding, retain_graph=True)
        # The last token of a response is scored and never read.
        assert all(bool(grad[token].any()) for token in {*prefix.tolist(), *seen[:-1].tolist()} - {int(seen[-1])})
        assert not grad[np.union1d(unseen, others)].any()


@pytest.mark.parametrize("name", [*DIVERSE, "mixtral"])
def test_packing_changes_neither_values_nor_gradients(name: str) -> None:
    model = with_exact_rotary(build(name))
    groups = groups_of_every_kind()
    order = np.random.default_rng(0).permutation(len(groups))
    with Float64Throughout():
        together = torch.cat(score(model, groups))
        expected = gradients(together, model)
        shuffled = score(model, [groups[i] for i in order])
        assert_same(torch.cat([shuffled[i] for i in np.argsort(order)]), together, 1e-12)
        for budget in (1, 60):
            runs = list(split(range(len(groups)), [g.tokens for g in groups], budget))
            assert len(runs) == len(groups) if budget == 1 else 1 < len(runs) < len(groups)
            parts = [[groups[i] for i in run] for run in runs]
            apart = torch.cat([x for part in parts for x in score(model, part)])
            assert_same(apart, together, 1e-12)
            assert_same_gradients(gradients(apart, model), expected, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [*DIVERSE, "qwen3_moe"])
def test_activation_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model = build(name)
    groups = groups_of_every_kind()[:6]
    plain = torch.cat(score(model, groups))
    expected = gradients(plain, model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    runs: list[bool] = []
    attention.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    checkpointed = torch.cat(score(model, groups))
    assert_same(checkpointed, plain, 1e-14)
    weights = dict(model.named_parameters())
    if reentrant:  # does not work with autograd.grad
        upstream = torch.randn(len(plain), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (checkpointed * upstream).sum().backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()}
    else:
        found = gradients(checkpointed, model)
    assert len(runs) == 3, "beside the scorer's look at it the layer runs twice"
    assert_same_gradients(found, expected, 1e-12)


def test_scores_move_with_the_weights_and_not_with_the_mode() -> None:
    """A scorer holds no copy of anything, and dropout is off in training mode too."""
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    scorer = Scorer(model)
    batch = pack(groups_of_every_kind()[:3], scorer.layout)
    with torch.no_grad():
        evaluated = scorer(batch)
        scorer.train()
        assert torch.equal(scorer(batch), evaluated)
        model.get_input_embeddings().weight.mul_(1.01)
        assert not torch.allclose(scorer(batch), evaluated, rtol=0, atol=1e-4)
