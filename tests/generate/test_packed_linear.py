"""Packed linear layers: the same products, for one block, where they are faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from model.architectures import build
from prefopt.generate import packed_linear, transformers_sampler
from prefopt.generate.decode import SlotDecoder
from prefopt.generate.packed_linear import is_packed, packed_linears
from prefopt.generate.sampler import SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.precision import native_bfloat16
from prefopt.model.scorer import Scorer


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(256, 128, True), (192, 515, False), (131, 129, True)])
def test_products_are_those_of_the_layer(inputs: int, outputs: int, bias: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=bias))
    rows = [torch.randn(*shape, inputs) for shape in ((1,), (7,), (1, 33), (2, 3, 5))]
    with torch.no_grad():
        expected = [torch.nn.functional.linear(x.double(), *(p.double() for p in model.parameters())) for x in rows]
        with packed_linears(model) as number:
            assert number == 1 and is_packed(model[0])
            for x, wanted in zip(rows, expected, strict=True):
                torch.testing.assert_close(model(x), wanted.float(), rtol=1e-5, atol=1e-5)
    assert not is_packed(model[0]) and model(rows[0]).requires_grad


@pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="without instructions for bfloat16 none is packed")
def test_products_in_bfloat16_are_the_layers_own_to_the_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 192, dtype=torch.bfloat16))
    rows = [torch.randn(*shape, 256).bfloat16() for shape in ((1,), (4,), (1, 33), (2, 3, 50))]
    with torch.no_grad():
        expected = [model(x) for x in rows]
        with packed_linears(model) as number:
            assert number == 1 and all(torch.equal(model(x), y) for x, y in zip(rows, expected, strict=True))


@pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="without instructions for bfloat16 none is packed")
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_a_packed_head_in_bfloat16_are_the_scorers(bias: bool) -> None:
    scorer = Scorer(build("llama", torch.bfloat16, hidden_size=256, vocab_size=515, num_attention_heads=4))
    head: Any = scorer.model.get_output_embeddings()  # type: ignore[operator]
    if bias:
        head.bias = torch.nn.Parameter(torch.randn(515).bfloat16())
    hidden = torch.randn(9, 256).bfloat16()
    with torch.no_grad():
        expected = scorer.logits(hidden)
        with packed_linears(scorer.model):
            assert is_packed(head)
            found = SlotDecoder(scorer).logits(hidden)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_what_is_no_plain_layer_is_left_alone() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layers = [Doubled(256, 256), torch.nn.Linear(256, 256).double(), torch.nn.Linear(8, 8), torch.nn.Linear(256, 256)]
    with packed_linears(torch.nn.ModuleList(layers)) as number:
        assert number == 1 and [is_packed(layer) for layer in layers] == [False, False, False, True]


def test_nothing_is_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    monkeypatch.setattr(packed_linear, "free_memory", lambda device: 2 * 2**18)
    with packed_linears(model) as number:
        assert number == 0 and not is_packed(model[0])


def test_the_sampler_packs_for_one_call_and_sees_weights_that_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(build("llama", torch.float32, hidden_size=128, intermediate_size=256, num_attention_heads=4))
    packed: list[int] = []
    real = packed_linears

    class Noted:
        def __init__(self, model: torch.nn.Module) -> None:
            self.inner = real(model)

        def __enter__(self) -> None:
            packed.append(self.inner.__enter__())

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)  # type: ignore[arg-type]

    monkeypatch.setattr(transformers_sampler, "packed_linears", Noted)
    params = SamplingParams(8)
    first = TransformersSampler(scorer).sample([[5, 6]], 4, params)
    assert packed and packed[-1] >= 4
    other = copy.deepcopy(scorer.model)
    with torch.no_grad():
        for model in (scorer.model, other):
            for weight in model.parameters():
                weight.mul_(1.5)
    changed = TransformersSampler(scorer).sample([[5, 6]], 4, params)
    assert [s.ids.tolist() for s in changed[0]] != [s.ids.tolist() for s in first[0]]
    fresh = TransformersSampler(Scorer(other)).sample([[5, 6]], 4, params)
    assert [s.ids.tolist() for s in changed[0]] == [s.ids.tolist() for s in fresh[0]]
    many = len(packed)
    TransformersSampler(scorer).sample([[5, 6]], 1, params)
    assert len(packed) == many, "one row is no faster"
