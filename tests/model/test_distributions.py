"""Whole distributions at every token: divergences and sums of squares, against the naive formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.architectures import Float64Throughout, build, with_exact_rotary
from model.oracle import groups_of_every_kind
from model.test_logprobs import TRANSFORMS, LargestTensor, M, V, inputs
from prefopt.model.adapter import new_lora
from prefopt.model.kernels import head as logprobs
from prefopt.model.kernels import head_device
from prefopt.model.kernels.divergence import Divergence
from prefopt.model.kernels.head import FORWARD, Distributions, TokenScores, head_scores, logit_scores, token_logprobs
from prefopt.model.kernels.top_tokens import TopTokens
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, ScoreRequest

ARCHITECTURES = ["llama", "gemma2", "granite", "head with bias", "mamba"]  # plain, soft-cap, scale, bias, own logits

REVERSE, JSD = Divergence("reverse"), Divergence("jsd", 0.5)


def apart(logp: torch.Tensor, ref: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """The definitions, by :func:`torch.nn.functional.kl_div`."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if divergence.kind != "jsd":
        return kl(ref, logp) if divergence.kind == "forward" else kl(logp, ref)
    w = divergence.weight
    mixed = (w * ref.exp() + (1 - w) * logp.exp()).log()
    return w * kl(ref, mixed) + (1 - w) * kl(logp, mixed)


def naive(
    z: torch.Tensor, r: torch.Tensor, target: torch.Tensor, divergence: Divergence = FORWARD
) -> dict[str, torch.Tensor]:
    """The formulas, over logits that are held."""
    logp, ref = z.log_softmax(-1), r.log_softmax(-1)
    at = torch.arange(len(target))
    return {
        "logp_M": logp[at, target],
        "square_M": logp.exp().square().sum(-1).log(),
        "divergence_M": apart(logp, ref, divergence),
        "other_logp_M": ref[at, target],
    }


def transformed(z: torch.Tensor, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    z = z * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


@pytest.mark.parametrize("way", ["fused", "frozen", "module"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("divergence", [FORWARD, REVERSE, JSD, Divergence("jsd", 0.1)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(
    divergence: Divergence, way: str, transform: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_device, "tile_elements", lambda _: V * 16)
    hidden, weight, bias, target = inputs()
    r = torch.randn(M, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    other, options = Distributions(V, lambda rows: r[rows].clone()), TRANSFORMS[transform]
    if way == "frozen":
        weight.requires_grad_(False)
        bias.requires_grad_(False)
    used = bias if biased else torch.zeros_like(bias)
    leaves = [x for x in (hidden, weight, *([bias] if biased else [])) if x.requires_grad]
    if way == "module":
        found = logit_scores(lambda h: transformed(h @ weight.T + used, **options), hidden, target, other, divergence)
    else:
        options = {**options, "divergence": divergence}
        found = head_scores(hidden, weight, target, other, bias=bias if biased else None, **options)
    expected = naive(transformed(hidden @ weight.T + used, **TRANSFORMS[transform]), r, target, divergence)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-11, atol=1e-11)
    assert found.square_M is not None and not found.square_M.requires_grad
    upstream = [torch.randn(M, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2)]
    grads = [
        torch.autograd.grad([a, b], leaves, upstream)
        for a, b in ((found.logp_M, found.divergence_M), (expected["logp_M"], expected["divergence_M"]))
    ]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_squares_come_along_with_log_probabilities(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_device, "tile_elements", lambda _: V * 16)
    hidden, weight, bias, target = inputs()
    logp, square = token_logprobs(hidden, weight, target, bias=bias, squares=True, **TRANSFORMS[transform])
    z = transformed(hidden @ weight.T + bias, **TRANSFORMS[transform])
    expected = naive(z, z, target)
    torch.testing.assert_close(square, expected["square_M"], rtol=1e-11, atol=1e-11)
    found = torch.autograd.grad(logp.sum(), [hidden, weight, bias])
    for got, wanted in zip(found, torch.autograd.grad(expected["logp_M"].sum(), [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    assert not square.requires_grad


def held_logits(model: Any) -> torch.Tensor:
    """Logits [M, V] by the model's own forward, one sequence per call."""
    parts = []
    for group in groups_of_every_kind():
        for one in (one for k in range(len(group.continuations)) for one in group.sequences(k)):
            ids, trained = (torch.from_numpy(x.copy()) for x in one)
            parts.append(model(input_ids=ids.long()[None], use_cache=False).logits[0][trained.nonzero()[:, 0] - 1])
    return torch.cat(parts)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "adapter on the head"])
def test_a_model_against_another(name: str) -> None:
    """Values and gradients of a policy, compared with a reference of the same kind."""
    policy, reference = (with_exact_rotary(build(name.replace("adapter on the head", "llama"), seed=n)) for n in (0, 1))
    if name == "adapter on the head":
        policy = new_lora(policy, rank=2, alpha=4, dropout=0.0, targets=["lm_head", "q_proj"]).double()
        with torch.no_grad():
            for weight in policy.parameters():
                weight.normal_(std=0.3) if weight.requires_grad else None
    groups = groups_of_every_kind()
    with Float64Throughout():
        with torch.no_grad():
            r = held_logits(reference)
        scorers = [Scorer(policy), Scorer(reference)]
        batches = [pack(groups, s.layout) for s in scorers]
        with torch.no_grad():
            kept = scorers[1](batches[1], ScoreRequest(distributions=True)).distributions
        found: TokenScores = scorers[0](batches[0], ScoreRequest(squares=True, reference=kept))
        upstream = [torch.linspace(-1, 1, len(r)).double(), torch.linspace(2, -1, len(r)).double()]
        weights = [p for p in policy.parameters() if p.requires_grad]
        grads = torch.autograd.grad([found.logp_M, found.divergence_M], weights, upstream, allow_unused=True)
        scorers[0].detach_hook()
        expected = naive(held_logits(policy), r, batches[0].target)
        wanted = torch.autograd.grad(
            [expected["logp_M"], expected["divergence_M"]], weights, upstream, allow_unused=True
        )
    for word, value in expected.items():
        torch.testing.assert_close(getattr(found, word), value, rtol=1e-9, atol=1e-9)
    top = max(float(g.abs().max()) for g in wanted if g is not None)
    for got, right in zip(grads, wanted, strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            torch.testing.assert_close(got, right, rtol=0, atol=1e-9 * top)


def test_a_model_is_not_far_from_itself() -> None:
    scorer = Scorer(build("llama", torch.float32))
    batch = pack(groups_of_every_kind(), scorer.layout)
    with torch.no_grad():
        found = scorer(batch, ScoreRequest(reference=scorer(batch, ScoreRequest(distributions=True)).distributions))
    assert torch.equal(found.logp_M, found.other_logp_M) and float(found.divergence_M.abs().max()) < 1e-6
    torch.testing.assert_close(found.logp_M, scorer(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["fused", "module"])
def test_the_logits_of_a_batch_are_never_held(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 3000
    monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)
    monkeypatch.setattr(head_device, "tile_elements", lambda _: 20 * vocabulary)
    model = build("llama", torch.float32, vocab_size=vocabulary)
    if head == "module":
        model.set_output_embeddings(type("Other", (torch.nn.Linear,), {})(32, vocabulary, bias=False))
    scorer = Scorer(model)
    assert scorer.head.kind == head
    batch = pack(groups_of_every_kind(), scorer.layout)
    with LargestTensor() as seen:
        with torch.no_grad():
            kept = scorer(batch, ScoreRequest(distributions=True)).distributions
        scores = scorer(batch, ScoreRequest(squares=True, reference=kept))
        (scores.logp_M.sum() + scores.divergence_M.sum()).backward()
    assert 32 * vocabulary <= seen.elements < 0.3 * len(batch.target) * vocabulary


# -- of the other model the likeliest tokens alone are known -----------------------------------------------------------


def binned(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of some tokens and of all others together, one by one."""
    p, rows = z.softmax(-1), []
    for row, known in zip(p, ids.tolist(), strict=True):
        rest = [v for v in range(len(row)) if v not in known]
        rows.append(torch.stack([row[v] for v in known] + ([row[rest].sum()] if rest else [])))
    return torch.stack(rows).log()


@pytest.mark.parametrize("way", ["fused", "frozen", "module"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("many", [1, 5, V], ids=lambda k: f"top {k}")
@pytest.mark.parametrize("divergence", [FORWARD, REVERSE, Divergence("jsd", 0.3)], ids=str)
def test_top_tokens_and_the_rest_as_one_bin(
    divergence: Divergence, many: int, transform: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values by the definition on bins, gradients by finite differences."""
    monkeypatch.setattr(head_device, "tile_elements", lambda _: V * 16)
    hidden, weight, bias, target = inputs()
    weight.requires_grad_(way != "frozen")
    r = torch.randn(M, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    top = r.log_softmax(-1).topk(many)
    other = TopTokens(top.indices, top.values, r.log_softmax(-1)[torch.arange(M), target], V)
    options = TRANSFORMS[transform]
    generator = torch.Generator().manual_seed(2)
    of_apart, of_logp = (torch.randn(M, generator=generator, dtype=torch.float64) for _ in range(2))

    def scored(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> TokenScores:
        if way == "module":
            return logit_scores(lambda x: transformed(x @ w.T + b, **options), h, target, other, divergence)
        return head_scores(h, w, target, other, bias=b, divergence=divergence, **options)

    def total(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = scored(h, w, b)
        return (of_apart * found.divergence_M + of_logp * found.logp_M).sum()

    found, z = scored(hidden, weight, bias), transformed(hidden @ weight.T + bias, **options)
    expected = apart(binned(z, top.indices), binned(r, top.indices), divergence)
    torch.testing.assert_close(found.divergence_M, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.other_logp_M, r.log_softmax(-1)[torch.arange(M), target])
    whole = naive(z, r, target, divergence)["divergence_M"]
    assert (found.divergence_M <= whole + 1e-12).all()
    if many == V:
        torch.testing.assert_close(found.divergence_M, whole, rtol=1e-9, atol=1e-12)
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    slopes = torch.autograd.grad(total(hidden, weight, bias), leaves)
    with torch.no_grad():
        for leaf, slope in zip(leaves, slopes, strict=True):
            along, h = torch.randn(leaf.shape, generator=generator, dtype=torch.float64), 1e-5
            leaf += h * along
            above = total(hidden, weight, bias)
            leaf -= 2 * h * along
            below = total(hidden, weight, bias)
            leaf += h * along
            assert float((slope * along).sum()) == pytest.approx(float(above - below) / (2 * h), rel=1e-6, abs=1e-8)
