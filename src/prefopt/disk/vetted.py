"""A model folder looked over before a library opens anything of it: what it names, and what it would have built.

Folders come from strangers. Their weights must be safetensors files of the folder itself, for other formats run code;
and their sizes must be those of the weights, for a configuration of a billion layers is built for days before anybody
asks for the first weight. Only JSON and the headers of weight files are read here.

A link is followed like the file it leads to: in the Hub's cache every file is one, and its target has another name. But
what is copied on is a file of the folder itself, see :func:`is_own`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.disk.hub import fetched
from prefopt.errors import ModelError

MODEL_INDEX, ADAPTER_CONFIG = "*.safetensors.index.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADER_BYTES = 100_000_000
"""The longest header that safetensors itself reads."""
LAYERS, EXPERTS = 1024, 1 << 15
"""A configuration may have so many layers or experts, whatever the weights; beyond it, each needs a tensor. (Doge names
16,384 experts, which are pairs of keys, also where it has none.)"""
RANK = 4096
"""An adapter may have this rank, whatever its weights; beyond it, a tensor must have such a side."""
# Numbers of modules that are made one by one.
_REPEATED = re.compile(r"layers?$|blocks?$|depth$|experts?$|^n_layer|heads?$|replication|num_virtual_tokens|stages$")
# Fields of an adapter by which PEFT imports a module (LoRA of Megatron), or loads other adapters (X-LoRA) and models.
# Fields whose words PEFT matches against names as regular expressions, and what makes one go back over a name again
# and again. PEFT itself writes such as ".*\.gate_up_proj".
_PATTERNS = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")
_REPEATS = re.compile(r"[*+{]")
_FOREIGN = ("megatron_config", "adapters", "shadow_model", "prompt_tuning_init_state_dict_path")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PLAIN = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")


def vet_folder(name: str | Path) -> None:
    """Raises :class:`ModelError` where a model or adapter folder names foreign files, or sizes that nothing of it has.

    Of a name on the Hub only the configuration is looked at: its weights are loaded from a folder, which is vetted.
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
    if named is not None and not (isinstance(named, str) and _plain(named.removesuffix(".index.json"))):
        raise ModelError(f"{folder / 'config.json'}: transformers_weights is {_said(named)}; {_REMEDY}")
    _check_counts(folder / "config.json", config, held_by(sorted(folder.glob("*.safetensors"))))
    _vet_adapter(folder)


def is_own(file: Path) -> bool:
    """Whether a file can be taken for one of its folder: a link leads to a file of its own name, or to one of the Hub's
    cache, whose name is a digest. What a stranger's LICENSE leads to may be a private key, and would be published."""
    target = file.resolve()
    return file.is_file() and (target.name == file.name or _DIGEST.fullmatch(target.name) is not None)


_REMEDY = "weights must be *.safetensors files in the folder itself: do not use this folder, or save it again"


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names, sorted. Raises :class:`ModelError` where one is not beside it."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: no weight_map; download or copy the model again")
    for weight, name in shards.items():
        if not isinstance(name, str) or not _plain(name):
            raise ModelError(f"{index}: {_said(weight)} is said to lie in {_said(name)}; {_REMEDY}")
    names = sorted(set(shards.values()))
    for path in (index.parent / name for name in names):
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: is no file; {_REMEDY}")
    return names


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where there is no such file. Raises :class:`ModelError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.parent}: {path.name} cannot be read ({error}); download or copy the model again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent}: {path.name} is not a JSON object; download or copy the model again")
    return value


@dataclass(frozen=True, slots=True)
class Held:
    """What weight files hold: tensors, and the longest side of any."""

    tensors: int = 0
    longest: int = 0


def held_by(files: Iterable[Path]) -> Held | None:
    """What the headers of safetensors files say; None where there is no file, or one is damaged (loading says how)."""
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
    if not path.is_file():  # a pipe would be waited for
        raise ValueError
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError
        header = json.loads(file.read(length))
    return [[int(side) for side in tensor["shape"]] for name, tensor in header.items() if name != "__metadata__"]


def _check_counts(path: Path, config: dict[str, Any], held: Held | None) -> None:
    """Refuse numbers of modules that would be built one after another, and for which there is not even a tensor."""
    # Experts that are fused, and heads, are a side of a tensor; a vocabulary's side says nothing of either.
    most = max(LAYERS, held.tensors, held.longest if held.longest < 1 << 16 else 0) if held else LAYERS
    for key, value in _numbers(config):
        if _REPEATED.search(key) and value > (max(most, EXPERTS) if "expert" in key else most):
            found = f"the weights are {held.tensors:,} tensors" if held else f"more than {most:,} are not built"
            raise ModelError(f"{path}: {key} is {value:,}, and {found}; they do not belong together")


def _vet_adapter(folder: Path) -> None:
    """An adapter's own numbers, and what it would have imported or loaded from elsewhere."""
    path = folder / ADAPTER_CONFIG
    config = read_object(path)
    if foreign := [field for field in _FOREIGN if config.get(field) is not None]:
        raise ModelError(
            f"{path}: {foreign[0]} names code or weights that are not in this folder, and are not opened; it is not an"
            " adapter to load"
        )
    for field in _PATTERNS:
        value = config.get(field)
        for word in value if isinstance(value, (list, dict)) else [value]:
            if isinstance(word, str) and _REPEATS.search(word.removeprefix(".*")):
                raise ModelError(
                    f"{path}: {field} has the pattern {word[:60]!r}, which may take without end to match; name the"
                    " modules as they are"
                )
    weights = folder / ADAPTER_WEIGHTS
    held = held_by([weights] if weights.exists() else [])
    most = max(RANK, held.longest if held else 0)
    ranks = {key: config.get(key) for key in ("r", "rank_pattern", "num_virtual_tokens", "layer_replication")}
    for key, value in _numbers(ranks):
        if value > most:
            raise ModelError(f"{path}: {key} is {value:,}, which no weight of it has; it is not an adapter to load")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration, with the nearest key above it."""
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


def _plain(name: str) -> bool:
    return _PLAIN.fullmatch(name) is not None


def _said(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
