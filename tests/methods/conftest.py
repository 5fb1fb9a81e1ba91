"""Runs of the whole method on tiny models."""

from __future__ import annotations

import pytest

from train.small import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that nobody changes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")
