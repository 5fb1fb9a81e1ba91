"""Which flash attention is behind the operators: found, tried, reported, and switched off where it is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention as registry

from model import flash as stand_in
from model.architectures import build
from prefopt.model import scorer as scorer_module
from prefopt.model.kernels import flash
from prefopt.model.scorer import Scorer

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not hasattr(registry, "activate_flash_attention_impl"), reason="this torch has no registry"
)


class Handle:
    def remove(self) -> None:
        pass


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A device of capability 9 whose FA3 is plain arithmetic; yields how often it was switched on."""
    stand_in.register()
    switched: list[str] = []

    def register(*_: Any) -> Handle:
        switched.append("FA3")
        return Handle()

    before = dict(registry._registry._FLASH_ATTENTION_IMPLS)
    registry.register_flash_attention_impl("FA3", register_fn=register)
    monkeypatch.setattr(flash, "_generation", lambda _: 9)
    monkeypatch.setattr(
        scorer_module, "kernel_for", lambda device, dtype, wish="auto": "loop" if wish == "loop" else "varlen"
    )
    monkeypatch.setattr(flash, "_refused", set())
    yield switched
    registry.restore_flash_attention_impl(_raise_warn=False)
    registry._registry._FLASH_ATTENTION_IMPLS.clear()
    registry._registry._FLASH_ATTENTION_IMPLS.update(before)


def test_the_best_one_is_switched_on_and_named(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash.importlib.metadata, "packages_distributions", lambda: {"flash_attn_interface": ["torch"]})
    assert flash.implementation() == "FA2"
    for _ in range(2):
        scorer = Scorer(build("mistral", torch.bfloat16))
    assert hopper == ["FA3"]
    assert scorer.kernel_version == f"varlen, FA3 {flash.importlib.metadata.version('torch')}"


def test_one_that_is_wrong_is_switched_off(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(stand_in.FAULTS, "gradients", 1.1)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        for _ in range(2):
            scorer = Scorer(build("llama", torch.bfloat16))
    assert hopper == ["FA3"]
    assert scorer.kernel_version == "varlen, FA2"
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("attention: FA3 is not used, FA2 takes its place: flash_attn_interface: it differs by 0.1")


def test_a_missing_package_says_nothing(hopper: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Handle:
        raise ImportError("No module named 'flash_attn_interface'")

    registry.register_flash_attention_impl("FA3", register_fn=missing)
    with caplog.at_level(logging.WARNING, logger="prefopt"):
        assert Scorer(build("llama", torch.bfloat16)).kernel_version == "varlen, FA2"
    assert not caplog.records


def test_what_the_user_switched_on_stays(hopper: list[str]) -> None:
    registry.register_flash_attention_impl("mine", register_fn=Handle)
    registry.activate_flash_attention_impl("mine")
    assert Scorer(build("llama", torch.bfloat16)).kernel_version == "varlen, mine"
    assert hopper == []


def test_the_cpu_names_its_kernel_alone() -> None:
    assert Scorer(build("llama", torch.float32)).kernel_version == "flash-cpu"
