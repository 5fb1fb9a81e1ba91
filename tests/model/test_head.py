"""The head is read from the configuration, tried on the class's own code, and left to that where no reading fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from model.architectures import build
from model.oracle import groups_of_every_kind
from model.test_families import built
from prefopt.model.architectures import class_logits
from prefopt.model.check import check_scoring, clone_difference
from prefopt.model.kernels.head_class import Head, head_of
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, ScoreRequest

GROUPS = groups_of_every_kind()[:6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("granite", {"logits_scaling": 1.1}, Head("fused", 1 / 1.1)),
        ("hyperclovax", {"logits_scaling": 1.1}, Head("fused", 1.1)),
        ("cohere", {}, Head("fused", 0.25)),
        ("falcon_h1", {"lm_head_multiplier": 0.25}, Head("fused", 0.25)),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, Head("fused", 1.0, 30.0)),
        ("xlstm", {"output_logit_soft_cap": 30.0}, Head("fused", 1.0, 30.0)),
        ("gemma3 soft-cap", {}, Head("fused", 1.0, 3.0)),
        ("phi", {}, Head("fused")),
        ("opt", {}, Head("fused")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_transforms_of_every_name(family: str, changes: dict[str, Any], expected: Head, dtype: torch.dtype) -> None:
    assert head_of(built(family, dtype, **changes)) == expected


def test_a_name_that_means_nothing_here_changes_nothing() -> None:
    """Llama reads no soft-cap from its configuration, whatever stands there."""
    assert head_of(build("llama", torch.float32, final_logit_softcapping=5.0, logit_scale=2.0)) == Head("fused")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    """A Llama whose class shifts its logits in a way of its own."""
    forward = modeling_llama.LlamaForCausalLM.forward

    def curved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = torch.asinh(out.logits * 1.5)
        return out

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", curved)
    return Scorer(build("llama"))


def test_a_head_that_nothing_explains_is_left_to_its_class(odd: Scorer) -> None:
    assert odd.head == Head("class")
    assert odd.path == "shared", "prefixes are shared all the same"
    assert clone_difference(build("llama")) < 1e-6
    check_scoring(odd, GROUPS)


def test_everything_that_is_asked_of_a_head_comes_from_its_class(odd: Scorer) -> None:
    batch = pack(GROUPS, odd.layout)
    with torch.no_grad():
        scores: Any = odd(batch, ScoreRequest(squares=True, distributions=True))
        logits = class_logits(odd.model, odd.hidden(batch).index_select(0, batch.read))  # type: ignore[arg-type]
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(scores.logp_M, logp.gather(-1, batch.target[:, None])[:, 0])
        torch.testing.assert_close(scores.square_M, (2 * logp).logsumexp(-1))
        kept = scores.distributions
        odd.model.lm_head.weight.data = odd.model.lm_head.weight * 2  # type: ignore[union-attr]
        torch.testing.assert_close(kept.logits(slice(0, 5)), logits[:5])
        compared: Any = odd(batch, ScoreRequest(reference=kept))
        assert (compared.divergence_M > 0).all()


def test_the_temperature_of_a_class_head(odd: Scorer) -> None:
    batch = pack(GROUPS, odd.layout)
    with torch.no_grad(), odd.at_temperature(2.0):
        logits = odd.logits(odd.hidden(batch).index_select(0, batch.read))
        torch.testing.assert_close(odd(batch), logits.log_softmax(-1).gather(-1, batch.target[:, None])[:, 0])
