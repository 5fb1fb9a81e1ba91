"""docs/memory.md says what the code computes, and 8 billion weights fit one card of 80 GB."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_memory", DOCS / "make_memory.py")
    assert spec is not None and spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_up_to_date(page: ModuleType) -> None:
    text = (DOCS / "memory.md").read_text("utf-8")
    assert page.written(text) == text, "run docs/make_memory.py"


def test_shapes_are_those_of_the_models_named(page: ModuleType) -> None:
    found = {name: page.numbers(name, False)["trained"] for name in ("Qwen2.5 0.5B", "Llama 3.1 8B")}
    assert found == {"Qwen2.5 0.5B": 494_032_768, "Llama 3.1 8B": 8_030_261_248}


def test_all_weights_of_8_billion_fit_80_gb(page: ModuleType) -> None:
    """With AdamW they need 145 GB before activations; without masters, gradients and moments 16."""
    name = "Llama 3.1 8B"
    weights, to_come, _ = page.state(name, page.Way())
    assert weights + to_come == 18 * 8_030_261_248
    assert page.tokens(name, page.Way(), 80) == "–"
    assert float(page.tokens(name, page.Way(offload=("optimizer",)), 80).rstrip("*")) > 4
