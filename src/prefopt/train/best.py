"""The weights of the best evaluation, kept beside the checkpoints as long as one of them or the run names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from prefopt.disk.write import output_errors
from prefopt.errors import RunError
from prefopt.train.checkpoint import write_tensors


def save_best(folder: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Keep the weights of the best evaluation beside the checkpoints, in a file that its step names."""
    path = _best(folder, step)
    aside = folder / ".best.safetensors"
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(aside, weights)
        aside.replace(path)


def forget_bests(folder: Path, step: int | None) -> None:
    """Remove the weights of earlier bests that neither the run nor a checkpoint still names."""
    named = {step}
    for state in folder.glob("step-*/state.json"):
        try:
            named.add(json.loads(state.read_text())["progress"]["best_step"])
        except Exception:
            return  # a damaged checkpoint: what it named is not known
    for path in folder.glob("best-*.safetensors"):
        if path not in {_best(folder, n) for n in named if n is not None}:
            path.unlink()


def load_best(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of evaluation ``step``. Raises :class:`RunError` where they are not there."""
    path = _best(folder, step)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: the best weights cannot be read ({error}); the last ones are in the checkpoint beside it"
        ) from error


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"
