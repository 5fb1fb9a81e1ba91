"""Sweeps on a tiny world."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.sweeping import write_place


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than most runs here."""
    monkeypatch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and prompts that nobody changes."""
    return write_place(tmp_path_factory.mktemp("sweep"))
