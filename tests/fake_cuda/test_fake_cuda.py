"""Runs the other modules of this folder in a process of their own: the fake device has to be there before torch is."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = ("traces", "steps", "loads", "counted")
FIRST = [f"{HERE}/{name}" for name in ("traces.py::test_shared[llama-checkpointed]", "steps.py::test_losses[dpo]")]


def built_for_cuda() -> bool:
    """Whether torch has CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return re.search(r"^cuda\b.*= None$", Path(found.origin).with_name("version.py").read_text(), re.M) is None


pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fake device is compiled for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs the compiler g++"),
    pytest.mark.skipif(built_for_cuda(), reason="this torch has a CUDA device of its own; install one for the CPU"),
]


def run(*arguments: str, timeout: int) -> None:
    """Run pytest here, and show what it says where it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, *arguments], cwd=HERE.parents[1], env=environment, timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert " passed" in done.stdout


@pytest.mark.timeout(600)
def test_one_architecture_and_one_loss() -> None:
    run(*FIRST, timeout=600)


@pytest.mark.timeout(600)
def test_other_quick_ones() -> None:
    left_out = [word for name in FIRST for word in ("--deselect", str(Path(name).relative_to(HERE.parents[1])))]
    run("-m", "not slow", *left_out, *(str(HERE / f"{name}.py") for name in MODULES), timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("which", MODULES)
def test_all_others(which: str) -> None:
    run("-m", "slow", str(HERE / f"{which}.py"), timeout=3000)
