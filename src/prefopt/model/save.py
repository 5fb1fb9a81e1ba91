"""Saving: a model folder under the names of the checkpoint that it came from, readable by transformers 4 and 5."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file

from prefopt.core.files import output_errors, write_json
from prefopt.core.model_folder import is_own, read_object
from prefopt.data.chat.pictures import FILES, processor_file
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model, transformers_log_level
from prefopt.model.checkpoint import ModelOrigin, WeightFiles, origin_of

Json = dict[str, Any]

SHARD_BYTES = 50 * 10**9
"""Largest file of weights, unless one tensor is larger: transformers' default."""
GENERATION_CONFIG = "generation_config.json"
# value_head.safetensors: beside a language model, as LLaMA-Factory writes it.
_SIDE_FILES = """
    preprocessor_config.json processor_config.json video_preprocessor_config.json feature_extractor_config.json
    audio_tokenizer_config.json chat_template.json additional_chat_templates/*.jinja value_head.safetensors
    LICENSE* NOTICE*
""".split()
ONLY_NEW = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"}
"""Tokenizer classes that transformers 4 does not have."""
# Fields with another name in transformers 4, by model type.
_RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def save_weights(
    folder: Path, model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype, frozen: Collection[str] = ()
) -> None:
    """Write the weights ``state`` of ``model``, its configuration (of ``dtype``) and its generation configuration. What
    is ``frozen`` is written as the checkpoint has it, not as it was rounded for computing.

    A model that was loaded from a folder keeps that folder's names and class, and byte for byte every tensor that is in
    no weight of the model. Raises :class:`ModelError` where there are such tensors, and the folder is gone.
    """
    origin = origin_of(model)
    if origin is None or not origin.kept:
        model.save_pretrained(folder, state_dict=dict(state), safe_serialization=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        _write_shards(folder, origin.stored(model, state, frozen), origin)
        copy_side_files(origin.checkpoint.folder, folder)
    _whole_config(model, origin, dtype).save_pretrained(folder)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy processor files, value heads, templates and licences that ``folder`` lacks; never code or pickles."""
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            if is_own(file) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def copy_processor(source: str, folder: Path) -> None:
    """Copy the settings of a processor of pictures from a model folder or Hub name to a folder that lacks them."""
    for name in FILES:
        file = processor_file(source, name)
        if file is not None and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def apply_umask(folder: Path) -> None:
    """Give weight files the permissions of other new files: safetensors makes them readable for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _whole_config(model: Any, origin: ModelOrigin | None, dtype: torch.dtype) -> Any:
    """The configuration to write: that of the checkpoint's class, with the model's in its place inside it. Its dtype is
    that of the weights, not the one the model computes in, to which a reader would round them."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if origin is None or not origin.kept or type(origin.config) is type(config):
        return config
    whole: Any = copy.deepcopy(origin.config)
    parts = getattr(whole, "sub_configs", {})
    place = next((name for name in parts if type(getattr(whole, name, None)) is type(config)), None)
    if place is None:
        return config
    config.architectures = None
    setattr(whole, place, config)
    whole.dtype = dtype
    if hasattr(whole, "tie_word_embeddings"):
        whole.tie_word_embeddings = config.tie_word_embeddings
    return whole


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], origin: ModelOrigin) -> None:
    """Write tensors, and the checkpoint's untouched ones, in files of at most SHARD_BYTES."""
    for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)
    checkpoint = origin.checkpoint
    sizes = {name: value.nbytes for name, value in tensors.items()}
    sizes |= {name: checkpoint.tensors[name].nbytes for name in origin.untouched}
    shards: list[list[str]] = [[]]
    used = 0
    for name, count in sizes.items():
        if shards[-1] and used + count > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += count
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, shard in zip(files, shards, strict=True):
        save_file(_shard(shard, tensors, checkpoint), folder / file, metadata={"format": "pt"})


def _shard(names: list[str], tensors: Mapping[str, torch.Tensor], checkpoint: WeightFiles) -> dict[str, torch.Tensor]:
    """The tensors of one file; shared memory is copied, since a file cannot share it."""
    found: dict[str, torch.Tensor] = {}
    places: set[tuple[Any, int]] = set()
    for name in names:
        value = tensors[name].contiguous() if name in tensors else checkpoint.tensors[name].read(name)
        place = (value.device, value.data_ptr())
        found[name] = value.clone() if place in places else value
        places.add(place)
    return found


def repair_generation(model: Any) -> str | None:
    """Repair a generation config that transformers would refuse to save; a line on what was changed, if anything. Some
    published models set a temperature without sampling, which loads but cannot be saved."""
    config = getattr(model, "generation_config", None)
    if config is None or _is_valid(config):
        return None
    config.do_sample = True
    if _is_valid(config):
        return "the generation config sets sampling options without sampling: do_sample is switched on"
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return "the generation config is not valid and cannot be saved: a plain one is saved"


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def add_end_tokens(folder: Path, ends: Iterable[int], tokenizer: Tokenizer, model: Any) -> str | None:
    """Append the tokens ``ends`` to ``eos_token_id`` of a saved folder; a line on it, None where all were there. An
    adapter's folder without a generation config gets that of ``model``, for servers and for ``prefopt merge``."""
    ends, plain = tuple(ends), causal_model(model)
    config: Any = getattr(plain, "generation_config", None)
    path = folder / GENERATION_CONFIG
    if not ends or not plain.can_generate() or (config is None and not path.is_file()):
        return None
    with output_errors(path):
        if not path.is_file():
            config.save_pretrained(folder)
        document = json.loads(path.read_text("utf-8"))
    before = ids_of(document.get("eos_token_id"))
    new = [i for i in dict.fromkeys(ends) if i not in before]
    if not new:
        return None
    document.pop("_from_model_config", None)  # with it generate() may go back to config.json
    write_json(path, {**document, "eos_token_id": before + new})
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
    return f"answers end with {names}: added to eos_token_id of {GENERATION_CONFIG}"


def end_tokens(folder: str | Path) -> list[int] | None:
    """End tokens in a folder's ``generation_config.json``; None where the file is absent or damaged."""
    try:
        return ids_of(json.loads((Path(folder) / GENERATION_CONFIG).read_text("utf-8")).get("eos_token_id"))
    except Exception:  # absent, or damaged in any way
        return None


def ids_of(value: Any) -> list[int]:
    """The token ids in a value of ``eos_token_id``: none, one or several; other values are ignored."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def write_transformers4_fields(folder: Path, tokenizer: Tokenizer) -> None:
    """Add what transformers 4 reads to ``config.json`` and ``tokenizer_config.json``, where transformers 5 reads the
    same as before. The class of ``tokenizer``, the saved one, keeps its original name. Raises :class:`RunError`."""
    changes: dict[str, Callable[[Json], Json]] = {
        "tokenizer_config.json": partial(_transformers4_tokenizer, tokenizer),
        "config.json": transformers4_config,
    }
    for name, change in changes.items():
        found = read_object(folder / name)
        if found and (changed := change(found)) != found:
            write_json(folder / name, changed)


def _transformers4_tokenizer(tokenizer: Tokenizer, found: Json) -> Json:
    changed = dict(found)
    if found.get("tokenizer_class") in ONLY_NEW:
        name = None
        with suppress(OSError, ValueError, ModelError):  # it was made in memory, or its folder is gone
            path = cached_file(tokenizer.name_or_path, "tokenizer_config.json", local_files_only=True)
            name = read_object(Path(path)).get("tokenizer_class") if path else None
        usable = isinstance(name, str) and name and name not in ONLY_NEW
        changed["tokenizer_class"] = name if usable else "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):  # in transformers 4 a dictionary has this name
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def transformers4_config(found: Json) -> Json:
    """A ``config.json`` with the fields of transformers 4 too, as far as version 5 still reads the same: all of them,
    all but the scaling of rotary embeddings, or none."""
    now = _as_parsed(found)
    for scaling in (True, False):
        changed = _with_older_fields(found, scaling=scaling)
        if now is not None and _contains(_as_parsed(changed), now):
            return changed
    return found


def transformers_versions(folder: Path) -> str:
    """The versions of transformers that read a folder of :func:`write_transformers4_fields`, for its card."""
    found = read_object(folder / "config.json")
    if found != _with_older_fields(found):
        return "transformers 5: these rotary embeddings cannot be written for version 4"
    return "transformers 5, and version 4 (tried with 4.57) where it knows the architecture"


def _with_older_fields(found: Json, *, scaling: bool = True) -> Json:
    """With older fields in every configuration of a document, nested ones too; ``scaling``: with ``rope_scaling``."""
    nested = {k: v for k, v in found.items() if k.endswith("_config") and isinstance(v, dict)}
    changed = found | {name: _with_older_fields(config, scaling=scaling) for name, config in nested.items()}
    older = {"torch_dtype": found["dtype"]} if isinstance(found.get("dtype"), str) else {}
    older |= _older_rope(found)
    if not scaling:
        older.pop("rope_scaling", None)
    names = _RENAMED.get(str(found.get("model_type")), {})
    older |= {name: found[name] for name in names if name in found}
    for name, value in older.items():
        changed.setdefault(names.get(name, name), value)
    return changed


def _older_rope(config: Json) -> Json:
    """Rotary embeddings in the fields of transformers 4; where layers differ, those of full attention."""
    rope = config.get("rope_parameters")
    wide: Any = rope.get(_FULL, rope) if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(wide, dict) or "rope_theta" not in wide:
        return {}
    older = {name: wide[name] for name in ("rope_theta", "partial_rotary_factor") if name in wide}
    narrow = rope.get(_SLIDING)
    if isinstance(narrow, dict) and narrow.get("rope_theta") not in (None, wide["rope_theta"]):
        older["rope_local_base_freq"] = narrow["rope_theta"]
    kind = wide.get("rope_type", "default")
    scaling = {k: v for k, v in wide.items() if k not in (_FULL, _SLIDING, "rope_theta", "partial_rotary_factor")}
    if kind == "longrope" and "original_max_position_embeddings" in config:  # Phi-3 takes these three and no other
        scaling = {"type": kind, "short_factor": wide.get("short_factor"), "long_factor": wide.get("long_factor")}
    if kind != "default" or scaling.keys() - {"rope_type", "type"}:
        older["rope_scaling"] = scaling
    return older


def _as_parsed(document: Json) -> Json | None:
    """The document as transformers 5 parses it; None where it does not know the model, or warns of a field."""
    config: Any = AutoConfig
    with suppress(Exception), warnings.catch_warnings(), transformers_log_level(logging.CRITICAL):
        warnings.simplefilter("error")
        return dict(config.for_model(**copy.deepcopy(document)).to_dict())
    return None


def _contains(more: Any, less: Any) -> bool:
    """Whether ``more`` has all values of ``less``."""
    if isinstance(less, dict) and isinstance(more, dict):
        return all(name in more and _contains(more[name], value) for name, value in less.items())
    return bool(more == less)
