"""Sweeps on a tiny world."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.sweeping import write_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and prompts that nobody changes."""
    return write_place(tmp_path_factory.mktemp("sweep"))
