"""Checkpoints: written aside, verified by checksums, renamed. A damaged one is skipped for the one before it.

A checkpoint is a folder ``step-00000010`` of ``weights.safetensors`` (float32 masters of trained weights),
``optimizer.safetensors``, ``state.json``, ``reference.safetensors`` if the reference moves, ``rollouts.safetensors`` if
a step of reinforcement learning has begun, and ``manifest.json`` with the SHA-256 of each. Random states and numbers
are in ``state.json``; nothing is pickled.

A run that was stopped within a step, after three of its updates, writes ``step-00000010-0003``. Its weights are no
longer those of step 10, whose own checkpoint is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefopt.core.files import aside_of, output_errors, parsed, remove_folder, sync_folder, write_flushed
from prefopt.errors import RunError

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
STATE = "state.json"
REQUIRED, OPTIONAL = ("weights", "optimizer"), ("reference", "rollouts")  # fields, and names of files
DAMAGED = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a run needs to resume. ``state`` is plain JSON data: ``state["step"]`` counts complete steps,
    ``state["progress"]["done"]`` updates made since. ``reference``: the weights of a moving reference; ``rollouts``:
    the responses that the step at hand learns from.
    """

    weights: Tensors
    optimizer: Tensors
    state: dict[str, Any]
    reference: Tensors | None = None
    rollouts: Tensors | None = None


def save(folder: Path, found: Checkpoint, *, keep_last: int) -> Path:
    """Write a checkpoint and remove all but the newest ``keep_last``.

    One from within a step is kept in addition, until the next is written.
    """
    path = _path(folder, found.state["step"], found.state["progress"]["done"])
    aside, replaced = aside_of(path), path.with_name(f".{path.name}.replaced")
    files = {f"{name}.safetensors": getattr(found, name) for name in (*REQUIRED, *OPTIONAL)}
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        aside.mkdir()
        sums = {}
        for name, tensors in files.items():
            if tensors is not None:
                write_tensors(aside / name, tensors)
                sums[name] = _sha256(aside / name)
        write_flushed(aside / STATE, json.dumps(found.state).encode())
        sums[STATE] = _sha256(aside / STATE)
        write_flushed(aside / "manifest.json", json.dumps(sums).encode())
        if path.exists():  # the same weights at an earlier point of the step, or damaged
            path.rename(replaced)
        aside.rename(path)
        sync_folder(folder)
        # Later ones are damaged, and this run skipped them: they must not count as kept.
        complete = sorted(p for p in folder.glob("step-*") if p.name.count("-") == 1 and p.name <= path.name)
        for other in set(folder.glob("step-*")) - {*complete[-keep_last:], path}:
            remove_folder(other)
        shutil.rmtree(replaced, ignore_errors=True)
    return path


def whole(folder: Path) -> Iterator[tuple[Path, Checkpoint]]:
    """The undamaged checkpoints, newest first. Damaged ones are logged and skipped."""
    for left in folder.glob(".step-*.replaced"):  # the process was killed before its successor was renamed
        path = folder / left.name[1:].removesuffix(".replaced")
        if not path.exists():
            left.rename(path)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            found = _read(path)
        except DAMAGED as error:
            log.warning("checkpoint %s is damaged (%s): the one before it is used", path, error)
            continue
        yield path, found


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of the weights after ``step``. Raises :class:`RunError` if it is absent or damaged."""
    path = _path(folder, step)
    try:
        found = _read(path)
        if found.state["progress"].get("done"):
            raise ValueError("an earlier version wrote weights from within the next step there")
        return found
    except DAMAGED as error:
        raise RunError(f"checkpoint {path} cannot be read ({error}); remove the run's folder and train again") from None


def _path(folder: Path, step: int, done: int = 0) -> Path:
    return folder / (f"step-{step:08d}-{done:04d}" if done else f"step-{step:08d}")


def _read(path: Path) -> Checkpoint:
    sums = parsed((path / "manifest.json").read_bytes())
    for name in {*(f"{name}.safetensors" for name in REQUIRED), STATE, *sums}:
        if _sha256(path / name) != sums[name]:
            raise ValueError(f"{name} is not what was written")
    names = [name for name in (*REQUIRED, *OPTIONAL) if f"{name}.safetensors" in sums]
    tensors: dict[str, Any] = {name: load_file(path / f"{name}.safetensors") for name in names}
    return Checkpoint(state=json.loads((path / STATE).read_text()), **tensors)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file and flush it to disk."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state under names ``INDEX.NAME``, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states() -> dict[str, Any]:
    """The states of torch's generators as JSON data; training draws from no others."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    first, *cuda = [base64.b64encode(state.numpy().tobytes()).decode() for state in states]
    return {"torch": first, "cuda": cuda}


def restore_random(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    texts = [states["torch"], *states["cuda"]]
    first, *cuda = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in texts]
    torch.set_rng_state(first)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def joined(parts: Mapping[str, Iterable[tuple[str, torch.Tensor]] | Tensors]) -> dict[str, torch.Tensor]:
    """The tensors of all networks in one mapping, named ``actor.NAME``; a policy has no prefix."""
    return {_prefix(part) + key: value for part, tensors in parts.items() for key, value in dict(tensors).items()}


def part_of(name: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of one network in a mapping made by :func:`joined`."""
    prefix = _prefix(name)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _prefix(name: str) -> str:
    return "" if name == "policy" else f"{name}."


def save_best(folder: Path, step: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the weights of the best evaluation beside the checkpoints."""
    path = _best(folder, step)
    aside = folder / ".best.safetensors"
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(aside, weights)
        aside.replace(path)


def forget_bests(folder: Path, step: int | None) -> None:
    """Remove best weights other than those of ``step`` and of the best steps that checkpoints record."""
    named = {step}
    for state in folder.glob("step-*/state.json"):
        try:
            named.add(json.loads(state.read_text())["progress"]["best_step"])
        except Exception:
            return  # damaged: its best step is unknown
    for path in folder.glob("best-*.safetensors"):
        if path not in {_best(folder, n) for n in named if n is not None}:
            path.unlink()


def load_best(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The best weights, saved at ``step``. Raises :class:`RunError` where they cannot be read."""
    path = _best(folder, step)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: the best weights cannot be read ({error}); the last ones are in the checkpoint beside it"
        ) from error


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"
