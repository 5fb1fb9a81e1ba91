"""Checkpoints: written aside, verified by checksums, renamed. A damaged one is skipped for the one before it.

A checkpoint is a folder ``step-00000010`` of ``weights.safetensors`` (float32 masters of trained weights),
``optimizer.safetensors``, ``state.json``, ``reference.safetensors`` if the reference moves, ``rollouts.safetensors`` if
a step of reinforcement learning has begun, and ``manifest.json`` with the SHA-256 of each. Random states and numbers
are in ``state.json``; nothing is pickled. Of weights in shards each rank writes its part, ``weights-00001-of-00004``
and so on; a run of another number of processes puts them together.

A run that was stopped within a step, after three of its updates, writes ``step-00000010-0003``. Its weights are no
longer those of step 10, whose own checkpoint is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from prefopt.core.files import output_errors, parsed, remove_folder, sync_folder, write_flushed
from prefopt.errors import RunError
from prefopt.parallel.tensors import local_of, sharded_as, shards_of
from prefopt.parallel.world import ALONE, World
from prefopt.train.tensor_file import TensorFile, Tensors

log = logging.getLogger(__name__)

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


def begin(path: Path, aside: Path) -> None:
    """Create the folder ``aside`` in which the checkpoint ``path`` is written; removes what killed processes left."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".step-*"):
            shutil.rmtree(left)
        aside.mkdir()


def files_of(found: Checkpoint, world: World) -> dict[str, TensorFile]:
    """The files that this rank writes of a checkpoint, by name: its shards; of the first one also all that is whole."""
    files = {}
    for field in (*REQUIRED, *OPTIONAL):
        tensors = getattr(found, field)
        if tensors is None:
            continue
        # Of shards whose replicas are on other nodes, those of the first node are enough.
        parts = {n: local_of(t) for n, t in tensors.items() if world.rank < shards_of(t)}
        if parts or world.first:  # an optimiser that has not moved yet has no tensors
            ranks = max(map(shards_of, tensors.values()), default=1)
            shards = [n for n, t in tensors.items() if shards_of(t) > 1]
            files[_file(field, world.rank, ranks)] = TensorFile.of(parts, shards)
    return files


def commit(aside: Path, path: Path, state: dict[str, Any], keep_last: int, sums: dict[str, str]) -> None:
    """Write the manifest beside complete files, and rename their folder. All but the newest ``keep_last`` checkpoints
    are removed, and best weights that none of them names.

    A checkpoint from within a step is kept in addition, until the next is written.
    """
    folder, replaced = path.parent, path.with_name(f".{path.name}.replaced")
    with output_errors(path):
        data = json.dumps(state).encode()
        write_flushed(aside / STATE, data)
        sums = {**sums, STATE: hashlib.sha256(data).hexdigest()}
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
    forget_bests(folder, state["progress"].get("best_step"))


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


def newest(
    folder: Path, world: World = ALONE, good: Callable[[Checkpoint], bool] = lambda found: True
) -> tuple[Path, Checkpoint] | None:
    """The newest undamaged checkpoint that is ``good``, the same on every rank; None if there is none."""
    if world.alone:
        return next((found for found in whole(folder) if good(found[1])), None)
    path = world.on_first(lambda: next((path for path, found in whole(folder) if good(found)), None))

    def read() -> tuple[Path, Checkpoint] | None:
        if path is None:
            return None
        try:
            return path, _read(path, verify=False)  # the first rank has
        except DAMAGED as error:
            raise RunError(
                f"checkpoint {path} cannot be read on rank {world.rank} ({error}); --output must be a folder that all"
                " machines share"
            ) from error

    return world.together(read)


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of the weights after ``step``. Raises :class:`RunError` if it is absent or damaged."""
    path = path_of(folder, step)
    try:
        found = _read(path)
        if found.state["progress"].get("done"):
            raise ValueError("an earlier version wrote weights from within the next step there")
        return found
    except DAMAGED as error:
        raise RunError(f"checkpoint {path} cannot be read ({error}); remove the run's folder and train again") from None


def path_of(folder: Path, step: int, done: int = 0) -> Path:
    return folder / (f"step-{step:08d}-{done:04d}" if done else f"step-{step:08d}")


def _file(name: str, rank: int = 0, ranks: int = 1) -> str:
    """The file of one rank's tensors; as in the model folders of the Hub, where there are several."""
    return f"{name}.safetensors" if ranks == 1 else f"{name}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _files(name: str, sums: Mapping[str, str]) -> list[str]:
    """The files of a field: one, or one for each shard."""
    found = [re.fullmatch(rf"{name}-\d+-of-(\d+)\.safetensors", file) for file in sums]
    ranks = next((int(match[1]) for match in found if match), 1)
    return [_file(name, rank, ranks) for rank in range(ranks)]


def _read(path: Path, *, verify: bool = True) -> Checkpoint:
    sums = parsed((path / "manifest.json").read_bytes())
    files = {name: _files(name, sums) for name in (*REQUIRED, *OPTIONAL)}
    required = [file for name in REQUIRED for file in files[name]]
    for name in {*required, STATE, *sums} if verify else ():
        if name not in sums or _sha256(path / name) != sums[name]:
            raise ValueError(f"{name} is not what was written")
    tensors: dict[str, Any] = {
        name: load_file(path / some[0]) if len(some) == 1 else ShardedTensors([path / file for file in some])
        for name, some in files.items()
        if some[0] in sums
    }
    return Checkpoint(state=json.loads((path / STATE).read_text()), **tensors)


class ShardedTensors(Mapping[str, torch.Tensor]):
    """Tensors of which each of several files has consecutive rows, read and put together when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._shards = set(json.loads(self._files[0].metadata()["shards"]))
        self._names = list(self._files[0].keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._shards:
            whole: torch.Tensor = self._files[0].get_tensor(name)
            return whole
        return torch.cat([file.get_tensor(name) for file in self._files])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state under names ``INDEX.NAME``, in the order of its parameters."""
    return {
        f"{i}.{name}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for i, (parameter, _) in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if not name.startswith("qmap")  # of bitsandbytes: constants, which all parameters share
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = sharded_as(value, parameters[int(index)][0])
    own: Any = optimizer
    if not hasattr(own, "init_state"):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    for number, values in state.items():  # of bitsandbytes, whose paged memory only its own state has
        parameter, (group, place) = parameters[number]
        own.init_state(optimizer.param_groups[group], parameter, group, place)
        for name, before in values.items():
            there = optimizer.state[parameter][name]
            if isinstance(there, torch.Tensor):
                there.copy_(before)
            else:
                optimizer.state[parameter][name] = before.item()


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """The parameters of an optimiser in order, each with its group and its place there."""
    groups = enumerate(group["params"] for group in optimizer.param_groups)
    return [(parameter, (g, place)) for g, many in groups for place, parameter in enumerate(many)]


def random_states() -> dict[str, Any]:
    """The states of torch's generators as JSON data; training draws from no others."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    first, *cuda = [base64.b64encode(state.numpy().tobytes()).decode() for state in states]
    return {"torch": first, "cuda": cuda}


def states_of_ranks(world: World) -> dict[str, Any]:
    """The random states of all ranks, for ``state``."""
    first, *others = world.gather(random_states())
    return {"random": first, **({"random_of_other_ranks": others} if others else {})}


def restore_random(state: Mapping[str, Any], world: World = ALONE) -> str | None:
    """Set this rank's random states. Returns a line where a run of another number of processes wrote ``state``."""
    every = [state["random"], *state.get("random_of_other_ranks", [])]
    if len(every) != world.size:
        return f"written by {len(every)} processes, resumed by {world.size}: equal up to rounding, and other dropout"
    states = every[world.rank]
    texts = [states["torch"], *states["cuda"]]
    first, *cuda = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in texts]
    torch.set_rng_state(first)
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    return None


def joined(parts: Mapping[str, Iterable[tuple[str, torch.Tensor]] | Tensors]) -> dict[str, torch.Tensor]:
    """The tensors of all networks in one mapping, named ``actor.NAME``; a policy has no prefix."""
    return {_prefix(part) + key: value for part, tensors in parts.items() for key, value in dict(tensors).items()}


def part_of(name: str, tensors: Tensors) -> Tensors:
    """The tensors of one network in a mapping made by :func:`joined`."""
    prefix = _prefix(name)
    if not prefix:
        return tensors
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _prefix(name: str) -> str:
    return "" if name == "policy" else f"{name}."


def write_best(folder: Path, step: int, weights: TensorFile) -> None:
    """Write the weights of the best evaluation beside the checkpoints."""
    path = _best(folder, step)
    aside = folder / ".best.safetensors"
    with output_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        weights.write(aside)
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
