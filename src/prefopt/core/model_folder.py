"""Checks of a model or adapter folder before any library opens it.

Folders are untrusted. Weights must be safetensors files in the folder itself, since other formats run code; sizes in
the config must match the weights, since a config with a billion layers would be built for days before the first weight
is read. Only JSON and the headers of weight files are read here.

Links are followed: in the Hub's cache every file is one, with another name. Only files of the folder itself are copied,
see :func:`is_own`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.files import expanded, one_below, parsed
from prefopt.core.hub import fetched
from prefopt.errors import ModelError

MODEL_INDEX, ADAPTER_CONFIG = "*.safetensors.index.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
LAYERS, EXPERTS = 1024, 1 << 15
"""Layers and experts that a config may have without a tensor each. (Doge configs name 16,384 experts.)"""
RANK = 4096
"""Rank that an adapter may have without a tensor with such a side."""
# Config fields that count modules.
_REPEATED = re.compile(r"layers?$|blocks?$|depth$|experts?$|^n_layer|heads?$|replication|num_virtual_tokens|stages$")
# Fields of an adapter that PEFT matches as regular expressions, and what makes such a match backtrack; then fields by
# which it imports a module (LoRA of Megatron) or loads other adapters (X-LoRA) and models.
_PATTERNS = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")
_REPEATS = re.compile(r"[*+{]")
_FOREIGN = ("megatron_config", "adapters", "shadow_model", "prompt_tuning_init_state_dict_path")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PLAIN = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def vet_folder(name: str | Path) -> None:
    """Raises :class:`ModelError` for a model or adapter folder with foreign files, or sizes unlike its weights.

    Of a name on the Hub only the config is checked: its weights are later loaded from a folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        path = None if folder.exists() else fetched(str(name), "config.json")
        if path is not None:
            _check_counts(path, read_object(path), None)
        return
    for index in sorted(folder.glob(MODEL_INDEX)):
        shard_names(index)
    config = read_object(folder / "config.json")
    named = config.get("transformers_weights")
    if named is not None and not (isinstance(named, str) and _PLAIN.fullmatch(named.removesuffix(".index.json"))):
        raise ModelError(f"{folder / 'config.json'}: transformers_weights is {named!r:.80}; {_REMEDY}")
    _check_counts(folder / "config.json", config, held_by(sorted(folder.glob("*.safetensors"))))
    _vet_adapter(folder)


def is_own(file: Path) -> bool:
    """Whether a file belongs to its folder: no link to another name, except to a digest in the Hub's cache.

    A stranger's LICENSE might link to a private key, which would be published.
    """
    target = file.resolve()
    return file.is_file() and (target.name == file.name or _DIGEST.fullmatch(target.name) is not None)


_REMEDY = "weights must be *.safetensors files in the folder itself: do not use this folder, or save it again"


def shard_names(index: Path) -> list[str]:
    """The weight files of an index, sorted. Raises :class:`ModelError` for one outside its folder."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: no weight_map; download or copy the model again")
    for weight, name in shards.items():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise ModelError(f"{index}: the file of {weight!r:.80} is {name!r:.80}; {_REMEDY}")
    names = sorted(set(shards.values()))
    for path in (index.parent / name for name in names):
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: is no file; {_REMEDY}")
    return names


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none. Raises :class:`ModelError` for anything else."""
    try:
        value = parsed(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"{path.parent}: {path.name} cannot be read ({why}); download or copy the model again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent}: {path.name} is not a JSON object; download or copy the model again")
    return value


@dataclass(frozen=True, slots=True)
class Held:
    """The number of tensors in weight files, and their longest side."""

    tensors: int = 0
    longest: int = 0


def held_by(files: Iterable[Path]) -> Held | None:
    """The tensors of safetensors files; None without files, or for a damaged one (loading reports it)."""
    shapes: list[list[int]] = []
    seen = False
    for path in files:
        seen = True
        try:
            shapes += _shapes(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
    if not seen:
        return None
    return Held(len(shapes), max((side for shape in shapes for side in shape), default=0))


def _shapes(path: Path) -> list[list[int]]:
    if not path.is_file():  # a pipe would block
        raise ValueError
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError
        header = json.loads(file.read(length))
    return [[int(side) for side in tensor["shape"]] for name, tensor in header.items() if name != "__metadata__"]


def _check_counts(path: Path, config: dict[str, Any], held: Held | None) -> None:
    """Refuse more modules than there are tensors."""
    # Experts that are fused, and heads, are a side of a tensor; a vocabulary's side says nothing of either.
    most = max(LAYERS, held.tensors, held.longest if held.longest < 1 << 16 else 0) if held else LAYERS
    for key, value in _numbers(config):
        if _REPEATED.search(key) and value > (max(most, EXPERTS) if "expert" in key else most):
            found = f"the weights are {held.tensors:,} tensors" if held else f"more than {most:,} are not built"
            raise ModelError(f"{path}: {key} is {value:,}, and {found}; they do not belong together")


def _vet_adapter(folder: Path) -> None:
    """Refuse an adapter that imports or loads anything else, or whose ranks do not match its weights."""
    path = folder / ADAPTER_CONFIG
    config = read_object(path)
    if foreign := [field for field in _FOREIGN if config.get(field) is not None]:
        raise ModelError(
            f"{path}: {foreign[0]} names code or weights outside this folder, which are not opened; it cannot be loaded"
        )
    for field in _PATTERNS:
        value = config.get(field)
        for word in value if isinstance(value, (list, dict)) else [value]:
            # PEFT itself writes .*\.NAME for the weights of experts, which goes back over a name only once.
            if isinstance(word, str) and _REPEATS.search(word.removeprefix(r".*\.")):
                raise ModelError(
                    f"{path}: {field} has the pattern {word[:60]!r}, which can take very long to match; write"
                    " the names of the modules instead"
                )
    weights = folder / ADAPTER_WEIGHTS
    held = held_by([weights] if weights.exists() else [])
    most = max(RANK, held.longest if held else 0)
    ranks = {key: config.get(key) for key in ("r", "rank_pattern", "num_virtual_tokens", "layer_replication")}
    for key, value in _numbers(ranks):
        if value > most:
            raise ModelError(f"{path}: {key} is {value:,}, which no weight of it has; it is not an adapter to load")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a config, with the nearest key above it."""
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value if isinstance(inner, (dict, list, int, float))]
        elif isinstance(value, float) and value.is_integer():
            yield key, int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The weight files that transformers loads, by its order: named in the config, single, sharded."""
    named = config.get("transformers_weights")
    for candidate in (folder / n for n in (named, _SINGLE, _INDEX) if n):
        if not candidate.exists():
            continue
        if candidate.suffix != ".json":
            return [candidate]
        files = [folder / name for name in shard_names(candidate)]
        if lacking := [file.name for file in files if not file.exists()]:
            raise ModelError(f"{folder}: {', '.join(lacking)} missing; download or copy the model again")
        return files
    if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        raise ModelError(
            f"{folder}: the weights are pickles, which can run code and are not opened; if you trust them,"
            " convert them to safetensors (model.save_pretrained)"
        )
    raise ModelError(f"{folder}: no {_SINGLE} or {_INDEX}; download or copy the model again")


WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def is_adapter(name: str | Path) -> bool:
    """Whether a local folder holds an adapter without the weights of a whole model."""
    folder = expanded(name)
    return (folder / ADAPTER_CONFIG).is_file() and not any(file for pattern in WHOLE for file in folder.glob(pattern))


def refuse_both(name: str | Path) -> None:
    """Raises :class:`ModelError` for a folder with a whole model and an adapter.

    transformers would combine them on loading, which neither the name nor a saved copy of the model would show.
    """
    if (Path(name) / ADAPTER_CONFIG).is_file() and not is_adapter(name):
        raise ModelError(
            f"{name} holds a whole model and an adapter: remove {ADAPTER_CONFIG}, or put each into its own folder and"
            " give --model and --adapter"
        )


def base_of(folder: str | Path) -> str:
    """The base model of an adapter: a folder, also relative to the adapter's, or a name on the Hub.

    Raises :class:`ModelError` where the adapter names none.
    """
    name = read_adapter(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder} does not name its base model; give --model BASE --adapter {folder}")
    beside = expanded(folder) / name
    return str(beside) if not expanded(name).exists() and beside.exists() else name


def task_of(folder: str | Path) -> str | None:
    """PEFT's task type of an adapter, or None; ``SEQ_CLS`` has a scalar head."""
    found = read_adapter(folder).get("task_type") if (expanded(folder) / ADAPTER_CONFIG).is_file() else None
    return found if isinstance(found, str) else None


QUANTISED, NOT_QUANTISED = ("nf4", "int8"), "none"
"""Values of ``--quantise``."""


def quantisation_on_record(folder: str | Path) -> str | None:
    """How the base of an adapter was quantised in its training, by the ``run.json`` beside it; None where it was not,
    or nothing tells."""
    try:
        found = read_object(expanded(folder) / "run.json").get("options")
    except ModelError:  # of another program, or damaged
        return None
    quantise = found.get("quantise") if isinstance(found, dict) else None
    return quantise if quantise in QUANTISED else None


def require_adapter(folder: str | Path) -> None:
    """Raises :class:`ModelError` for a local folder that holds no PEFT adapter."""
    path = expanded(folder)
    if not path.exists() or (path / ADAPTER_CONFIG).is_file():
        return
    whole = "it is a whole model; give it as --model"
    what = whole if (path / "config.json").is_file() else f"it is not a PEFT adapter{one_below(path)}"
    raise ModelError(f"--adapter {folder} holds no {ADAPTER_CONFIG}: {what}")


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of a folder. Raises :class:`ModelError` where it is missing or damaged."""
    require_adapter(folder)
    return read_object(expanded(folder) / ADAPTER_CONFIG)
