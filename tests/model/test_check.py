"""The load check passes what is right and stops what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from model.architectures import build
from model.oracle import Draw, groups_of_every_kind
from prefopt.errors import ModelError
from prefopt.model import check
from prefopt.model.check import check_scoring
from prefopt.model.kernels import flash_cpu
from prefopt.model.kernels.attention import HOOK
from prefopt.model.kernels.flash_cpu import Tile
from prefopt.model.kernels.shared import KERNELS
from prefopt.model.scorer import Scorer


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma2", torch.float64),
        ("gpt2", torch.float32),
        ("gpt_oss", torch.float32),
        ("qwen3.5", torch.float32),
        ("falcon", torch.float32),
    ],
    ids=str,
)
def test_models_that_are_right_pass(name: str, dtype: torch.dtype) -> None:
    scorer = Scorer(build(name, dtype))
    state = torch.random.get_rng_state()
    report = check_scoring(scorer, groups_of_every_kind())
    assert torch.equal(torch.random.get_rng_state(), state), "the run's random numbers depend on the check"
    assert report.clone_error is not None
    assert report.clone_error < 1e-6
    assert report.noise > 0
    assert report.tolerance(100) < {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 5.0}[dtype]
    if scorer.path == "shared":
        assert scorer.model.config._attn_implementation == HOOK, "the hook was not put back"
    else:
        assert report.sharing_error == 0


@pytest.fixture
def llama() -> Scorer:
    return Scorer(build("llama", torch.float32))


@pytest.fixture(params=["twin", "no twin"])
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is wrong must show on the twin, and on the real model where no twin can be built."""
    if request.param == "no twin":
        monkeypatch.setattr(check, "tiny_clone", lambda config: None)
    return str(request.param)


def refused(scorer: Scorer) -> str:
    draw = Draw()
    with pytest.raises(ModelError) as caught:
        check_scoring(scorer, [draw.group(9, 12, 13), draw.group(20, 8, 6), draw.group(4, 9, 9)])
    line = str(caught.value)
    assert line.startswith("LlamaForCausalLM: ")
    assert "\n" not in line
    return line


def test_no_twin_is_reported_as_none(llama: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "tiny_clone", lambda config: None)
    assert check_scoring(llama, groups_of_every_kind()).clone_error is None


def test_a_response_that_sees_the_other_is_stopped(llama: Scorer, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = flash_cpu.tiles_of

    def leaking(segments: Any, window: Any) -> tuple[list[Tile], list[Tile]]:
        own, _ = right(segments, window)
        after = [(start, stop, origin) for start, stop, origin, prefix in segments if prefix]
        return own, [Tile(slice(start, stop), slice(origin, start)) for start, stop, origin in after]

    monkeypatch.setattr(flash_cpu, "tiles_of", leaking)  # everything since the prompt began
    assert ("small copy" if twin == "twin" else "shared and separate") in refused(llama)


def test_a_response_that_misses_its_prompt_is_stopped(
    llama: Scorer, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = flash_cpu.tiles_of
    monkeypatch.setattr(flash_cpu, "tiles_of", lambda segments, window: (right(segments, window)[0], []))
    assert refused(llama)


def test_groups_that_see_each_other_are_stopped(llama: Scorer, twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = flash_cpu.tiles_of

    def leaking(segments: Any, window: Any) -> tuple[list[Tile], list[Tile]]:
        own, prefixes = right(segments, window)
        before = [(start, stop, origin if prefix else start) for start, stop, origin, prefix in segments]
        return own, prefixes + [Tile(slice(start, stop), slice(0, first)) for start, stop, first in before if first]

    monkeypatch.setattr(flash_cpu, "tiles_of", leaking)
    assert refused(llama)


def test_a_head_with_a_transform_that_we_do_not_know_is_stopped(
    llama: Scorer, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaForCausalLM.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", louder)
    assert ("small copy" if twin == "twin" else "own logits") in refused(llama)


def test_a_wrong_gradient_is_stopped(llama: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are right, and every gradient through attention is a little too large."""
    right = KERNELS["flash-cpu"]
    louder = right._replace(backward=lambda *given: tuple(x * 1.001 for x in right.backward(*given)))
    monkeypatch.setitem(KERNELS, "flash-cpu", louder)
    assert "small copy" in refused(llama)


def test_positions_that_a_model_makes_up_itself_are_stopped(
    llama: Scorer, twin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaModel.forward

    def counting(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, position_ids=None, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", counting)
    assert refused(llama)
