"""What the server of :mod:`forked` does once, before it forks. It passes over errors here; ``tests/test_forked.py``
finds them."""

from __future__ import annotations

import importlib
import io
import pkgutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

import prefopt
from shortcuts import quick_runs

# Of the rooms that training needs, all modules, and what they import late.
ROOMS = ("config", "core", "data", "losses", "methods", "parallel", "reference", "rl", "runs", "train")
LATE = ["peft", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.llama.modeling_llama"]
LATE += ["prefopt.model.environment", "prefopt.generate.transformers_sampler"]


def prepare() -> None:
    """Import everything, and check the architecture of the tiny model, as every run of it would."""
    folders = [(room, [f"{folder}/{room}" for folder in prefopt.__path__]) for room in ROOMS]
    names = [module.name for room, places in folders for module in pkgutil.iter_modules(places, f"prefopt.{room}.")]
    for name in (*names, *LATE):
        importlib.import_module(name)
    quick_runs(pytest.MonkeyPatch())
    if Path("/dev/nvidia0").exists():
        return  # with a GPU, autograd starts threads, and a process that has them cannot fork
    from transformers import AutoModelForCausalLM

    from prefopt.model import check
    from prefopt.model.scorer import Scorer
    from train.small import write_model

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(write_model(Path(folder)), dtype=torch.float32)
        check._checked_clone(Scorer(model))


torch.set_num_threads(1)
with redirect_stderr(io.StringIO()):  # what imports and progress bars say is no test's own
    prepare()
READY = True
