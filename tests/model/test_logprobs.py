"""The head: token log-probabilities and their gradients, without the logits of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.architectures import build
from model.oracle import Draw
from prefopt.model.kernels import head as logprobs
from prefopt.model.kernels import head_device
from prefopt.model.kernels.head import module_logprobs, token_logprobs, transformed
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer

M, H, V = 37, 6, 11  # several tiles of 16 rows, the last one short
TRANSFORMS = {"plain": {}, "scale": {"scale": 0.3}, "softcap": {"softcap": 2.0}, "both": {"scale": 1.7, "softcap": 3.0}}
WAYS = ("frozen", "kept", "recomputed")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(M, H), normal(V, H), normal(V), torch.randint(V, (M,), generator=generator)


def plainly(hidden: Any, weight: Any, target: Any, bias: Any, scale: float = 1.0, softcap: float = 0.0) -> Any:
    """The formula, as everybody writes it."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * scale
    z = torch.tanh(z / softcap) * softcap if softcap else z
    return torch.log_softmax(z, -1)[torch.arange(len(target)), target]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How backward gets its probabilities; with tiles small enough that there are three."""
    monkeypatch.setattr(head_device, "tile_elements", lambda _: V * 16)
    if request.param == "recomputed":
        monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_values_and_gradients_are_those_of_the_formula(way: str, transform: str, biased: bool) -> None:
    hidden, weight, bias, target = inputs()
    if way == "frozen":
        weight.requires_grad_(False)
        bias.requires_grad_(False)
    options = TRANSFORMS[transform]
    leaves = [x for x in (hidden, weight, *([bias] if biased else [])) if x.requires_grad]
    upstream = torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    found = token_logprobs(hidden, weight, target, bias=bias if biased else None, **options)[0]
    node: Any = found.grad_fn
    assert (node.slope is not None) == (way == "frozen")
    assert (node.kept is not None) == (way == "kept" and "softcap" not in options)
    expected = plainly(hidden, weight, target, bias if biased else None, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(found, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(found, leaves, upstream)
    for got, twice, wanted in zip(grads, again, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(twice, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_are_those_of_finite_differences(way: str, transform: str, biased: bool) -> None:
    hidden, weight, bias, target = inputs()
    if way == "frozen":
        weight.requires_grad_(False)
        bias.requires_grad_(False)

    def score(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return token_logprobs(h, w, target, bias=b if biased else None, **TRANSFORMS[transform])[0]

    # A second backward pass computes the probabilities again, which the first has used up.
    assert torch.autograd.gradcheck(score, (hidden, weight, bias), fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_module_head_gives_the_same(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_device, "tile_elements", lambda _: V * 16)
    hidden, weight, bias, target = inputs()
    head = torch.nn.Linear(H, V, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    how = {"scale": 1.0, "softcap": None, **TRANSFORMS[transform]}
    found, _ = module_logprobs(lambda h: transformed(head(h), **how), hidden, target, V)
    expected = plainly(hidden, head.weight, target, head.bias, **TRANSFORMS[transform])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [hidden, head.weight, head.bias]
    upstream = torch.linspace(-1, 2, M, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
def test_only_what_is_trained_gets_a_gradient(trained: tuple[str, ...]) -> None:
    hidden, weight, bias, target = inputs()
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    token_logprobs(hidden, weight, target, bias=bias)[0].sum().backward()
    found = {n: t.grad for n, t in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    plainly(hidden, weight, target, bias).sum().backward()
    for name, tensor in tensors.items():
        if name in trained:
            torch.testing.assert_close(found[name], tensor.grad, rtol=1e-12, atol=1e-12)
        else:
            assert found[name] is None


def test_bfloat16_sums_in_float32(way: str) -> None:
    """Products are rounded to bfloat16 on a CPU; nothing after them is."""
    hidden, weight, _, target = inputs(torch.bfloat16)
    if way == "frozen":
        weight.requires_grad_(False)
    found = token_logprobs(hidden, weight, target)[0]
    assert found.dtype == torch.float32
    z = (hidden @ weight.T).double()
    expected = torch.log_softmax(z, -1)[torch.arange(M), target]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    found.sum().backward()
    assert hidden.grad is not None
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plainly(wide[0], wide[1], target, None).sum().backward()
    assert wide[0].grad is not None
    worst = (hidden.grad.double() - wide[0].grad).abs().max() / wide[0].grad.abs().max()
    assert worst < 2**-6  # a few roundings of 8 bits


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that anything computed."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("head", ["fused", "frozen", "module"])
def test_the_logits_of_a_batch_are_never_held(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 3000
    monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)
    monkeypatch.setattr(head_device, "tile_elements", lambda _: 20 * vocabulary)
    model = build("llama", torch.float32, vocab_size=vocabulary)
    scorer = Scorer(model)
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    if head == "module":
        model.set_output_embeddings(type("Other", (torch.nn.Linear,), {})(32, vocabulary, bias=False))
        scorer = Scorer(model)
        assert scorer.head.kind == "module"
    batch = pack([Draw().group(10, 60, 50), Draw(1).group(3, 70, 40)], scorer.layout)
    with LargestTensor() as seen:
        scorer(batch).sum().backward()
    assert len(batch.target) == 220
    weights = 32 * vocabulary  # and as large a gradient
    assert weights <= seen.elements < 0.2 * len(batch.target) * vocabulary


@pytest.mark.parametrize("p", [0.96, 0.99, 0.999])
def test_confident_tokens_have_gradients_in_bfloat16(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 - p of a p that was rounded is rounding alone: what is kept must be the difference."""
    torch.manual_seed(0)
    rows, width, vocabulary = 128, 128, 2000
    weight = torch.randn(vocabulary, width) / width**0.5
    target = torch.randint(0, vocabulary, (rows,))
    direction = weight[target] / weight[target].norm(dim=1, keepdim=True)
    noise = torch.randn(rows, width) * 0.5
    low, high = 0.0, 60.0
    for _ in range(40):  # how far along its target's row a hidden state must lie for this probability
        middle = (low + high) / 2
        z = (noise + middle * direction) @ weight.t()
        found = (z.gather(1, target[:, None])[:, 0] - z.logsumexp(1)).exp().median()
        low, high = (middle, high) if found < p else (low, middle)
    hidden, weight = (noise + low * direction).bfloat16(), weight.bfloat16()

    def gradients(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        token_logprobs(h, w, target)[0].sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad.double(), w.grad.double()

    truth = gradients(hidden.double(), weight.double())
    kept = gradients(hidden, weight)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)
    again = gradients(hidden, weight)
    for right, found, other in zip(truth, kept, again, strict=True):
        errors = [((x - right).norm(dim=1) / right.norm(dim=1).clamp_min(1e-30)).median() for x in (found, other)]
        assert errors[0] <= errors[1] * 1.001
    hidden_error = ((kept[0] - truth[0]).norm(dim=1) / truth[0].norm(dim=1)).median()
    assert hidden_error < 0.03
