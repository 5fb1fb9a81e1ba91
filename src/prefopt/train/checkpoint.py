"""Checkpoints: written aside, checked, renamed; a damaged one is told by its checksums and the one before it used.

A checkpoint is a folder ``step-00000010`` of ``weights.safetensors`` (the float32 masters of what is trained),
``optimizer.safetensors``, ``state.json`` and, where the reference moves, ``reference.safetensors``, where a step of
reinforcement learning has begun, ``rollouts.safetensors``, with ``manifest.json`` that holds the SHA-256 of each.
Random states and numbers live in ``state.json``; nothing is pickled.

One of a run that was stopped within a step, after three of its updates, is ``step-00000010-0003``: its weights have
left those of step 10, which may be wanted for themselves and stay as they are.
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
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
REFERENCE = "reference.safetensors"
ROLLOUTS = "rollouts.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on: ``state`` is plain JSON data."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    reference: dict[str, torch.Tensor] | None = None
    rollouts: dict[str, torch.Tensor] | None = None


def save(
    folder: Path,
    weights: Tensors,
    optimizer: Tensors,
    state: dict[str, Any],
    *,
    keep_last: int,
    done: int = 0,
    reference: Tensors | None = None,
    rollouts: Tensors | None = None,
) -> Path:
    """Write the checkpoint of ``state["step"]`` and remove all but the newest ``keep_last``.

    ``done``: the updates made since, of a run that is stopped within the step after; that checkpoint is kept besides,
    until the next is written. ``reference``: the weights of a reference that moves; ``rollouts``: the responses that a
    step learns from.
    """
    more = {name: tensors for name, tensors in ((REFERENCE, reference), (ROLLOUTS, rollouts)) if tensors is not None}
    path = _path(folder, state["step"], done)
    aside = aside_of(path)
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        aside.mkdir()
        write_tensors(aside / "weights.safetensors", weights)
        write_tensors(aside / "optimizer.safetensors", optimizer)
        for name, tensors in more.items():
            write_tensors(aside / name, tensors)
        write_flushed(aside / "state.json", json.dumps(state).encode())
        sums = {name: _sha256(aside / name) for name in (*FILES, *more)}
        write_flushed(aside / "manifest.json", json.dumps(sums).encode())
        if path.exists():  # the same weights without what the step has come to since, or damaged
            path.rename(_replaced(path))
        aside.rename(path)
        sync_folder(folder)
        # Later ones are damaged and passed over by the run that is here now: they must not count as kept.
        whole_steps = sorted(p for p in folder.glob("step-*") if not _within(p) and p.name <= path.name)
        for other in set(folder.glob("step-*")) - {*whole_steps[-keep_last:], path}:
            remove_folder(other)
        shutil.rmtree(_replaced(path), ignore_errors=True)
    return path


def whole(folder: Path) -> Iterator[tuple[Path, Checkpoint]]:
    """The checkpoints that are whole, newest first; damaged ones are named in the log and passed over."""
    for left in folder.glob(".step-*.replaced"):  # its successor was about to take its name when the process was killed
        path = folder / left.name[1:].removesuffix(".replaced")
        if not path.exists():
            left.rename(path)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            found = _read(path)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s): the one before it is used", path, error)
            continue
        yield path, found


def newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """The first of them, where there is one."""
    return next(whole(folder), None)


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of the very weights of ``step``. Raises :class:`RunError` where it is not there, or damaged."""
    path = _path(folder, step)
    try:
        found = _read(path)
        if found.state["progress"].get("done"):
            raise ValueError("an earlier version wrote weights from within the next step there")
        return found
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"checkpoint {path} cannot be read ({error}); remove the run's folder and train again") from None


def _path(folder: Path, step: int, done: int = 0) -> Path:
    return folder / (f"step-{step:08d}-{done:04d}" if done else f"step-{step:08d}")


def _within(path: Path) -> bool:
    return path.name.count("-") > 1


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _read(path: Path) -> Checkpoint:
    sums = parsed((path / "manifest.json").read_bytes())
    for name in {*FILES, *sums}:
        if _sha256(path / name) != sums[name]:
            raise ValueError(f"{name} is not what was written")
    state = json.loads((path / "state.json").read_text())
    weights, optimizer = (load_file(path / name) for name in FILES[:2])
    more = (load_file(path / name) if name in sums else None for name in (REFERENCE, ROLLOUTS))
    return Checkpoint(weights, optimizer, state, *more)


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file, on the disk when this returns."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state, flat: ``INDEX.NAME`` in the order of its parameters."""
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
    """The states of torch's generators, the only ones that training draws from, as JSON data."""
    cuda = [_text(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {"torch": _text(torch.get_rng_state()), "cuda": cuda}


def restore_random(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(_tensor(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_tensor(s) for s in states["cuda"]])


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def joined(parts: Mapping[str, Iterable[tuple[str, torch.Tensor]] | Tensors]) -> dict[str, torch.Tensor]:
    """The tensors of all networks under one another's names: ``actor.NAME``; a policy alone has no prefix."""
    return {_prefix(part) + key: value for part, tensors in parts.items() for key, value in dict(tensors).items()}


def part_of(name: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """What :func:`joined` was given for one network."""
    prefix = _prefix(name)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _prefix(name: str) -> str:
    return "" if name == "policy" else f"{name}."


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
