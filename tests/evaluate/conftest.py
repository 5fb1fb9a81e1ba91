"""Runs of the whole method on tiny models."""

from __future__ import annotations

import pytest

from train.small import write_model


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than most runs here."""
    monkeypatch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that nobody changes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")
