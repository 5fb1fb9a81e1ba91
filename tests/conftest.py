"""What every test may count on: one thread, no network, a cache of its own, Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or transformers. One thread also keeps sums in one order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidia0").exists():  # Triton's kernels are interpreted where there is no GPU to run them
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

from shortcuts import quick_runs

# A suite that a script starts in the background inherits that Ctrl-C is ignored, and so would the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("prefopt", deadline=None, print_blob=True)
hypothesis.settings.load_profile("prefopt")

ROOT = Path(__file__).resolve().parents[1]
TRAINING = {
    "evaluate",
    "methods",
    "pipeline",
    "train",
    "test_adapter_folders",
    "test_api",
    "test_card",
    "test_readme_commands",
}
"""Folders and modules whose tests train small models by the hundred."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--auto-dtype bfloat16`` runs the tests as on a processor that has it; left out, all machines test the same."""
    parser.addoption("--auto-dtype", choices=["float32", "bfloat16"], default="float32")


def pytest_configure(config: pytest.Config) -> None:
    """Of the programs that tests start, too."""
    os.environ["PREFOPT_DTYPE"] = config.getoption("--auto-dtype")


def pytest_collection_finish() -> None:
    """What is there when the tests begin stays: the collector does not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets, tokenizers and models that tests may read: ``PREFOPT_SHARED``, or beside the clone."""
    folder = Path(os.environ.get("PREFOPT_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: {folder} is not there; set PREFOPT_SHARED")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shortcuts for the tests that train; what a module makes for all of its tests is already made with them."""
    if request.path.parent.name in TRAINING or request.path.stem in TRAINING:
        with pytest.MonkeyPatch.context() as patch:
            quick_runs(patch)
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty cache, and undo what the one before did to torch's threads. Files are not flushed to the
    disk, which a test could tell only by cutting the power; programs that tests start do flush them."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(os, "fsync", os.fstat)  # which takes the same handles
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
