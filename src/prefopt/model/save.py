"""Saving a model, whoever saves it: as the checkpoint that it came from, with what it did not touch as it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from prefopt.core.files import output_errors, write_json
from prefopt.core.model_folder import is_own
from prefopt.data.tokenizer import Tokenizer
from prefopt.model.architectures import causal_model
from prefopt.model.checkpoint import ModelOrigin, WeightFiles, origin_of

SHARD_BYTES = 50 * 10**9
"""A file of weights is no larger, unless one tensor is: what transformers takes."""
_SIDE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "value_head.safetensors",  # beside a language model, as LLaMA-Factory writes it
    "LICENSE*",
    "NOTICE*",
)


def save_weights(folder: Path, model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write the weights ``state`` of ``model``, its configuration (of ``dtype``) and its generation configuration.

    A model that was loaded from a folder keeps that folder's names, and every tensor of it that is in no weight of the
    model, byte for byte; its configuration then names the class that it named there. Raises :class:`ModelError` where
    there are such tensors, and the folder is gone.
    """
    origin = origin_of(model)
    if origin is None or not origin.kept:
        model.save_pretrained(folder, state_dict=dict(state), safe_serialization=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        _write(folder, origin.stored(model, state), origin)
        copy_side_files(origin.checkpoint.folder, folder)
    _whole_config(model, origin, dtype).save_pretrained(folder)


def copy_side_files(source: Path, folder: Path) -> None:
    """What a processor reads, value heads, templates, licences, where ``folder`` has none; never code or pickles."""
    for pattern in _SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            if is_own(file) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def _whole_config(model: Any, origin: ModelOrigin | None, dtype: torch.dtype) -> Any:
    """The configuration to write: that of the checkpoint's own class with the model's in its place in it.

    Its type is that of the weights, not the one the model computes in, to which whoever loads the folder would round.
    """
    config = copy.deepcopy(model.config)
    if origin is not None and origin.kept:
        whole = copy.deepcopy(origin.config)
        parts = getattr(whole, "sub_configs", {})
        place = next((name for name in parts if type(getattr(whole, name, None)) is type(config)), None)
        if type(whole) is not type(config) and place is not None:
            config.architectures = None
            config.dtype = dtype
            setattr(whole, place, config)
            if hasattr(whole, "tie_word_embeddings"):
                whole.tie_word_embeddings = config.tie_word_embeddings
            config = whole
    config.dtype = dtype
    return config


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], origin: ModelOrigin) -> None:
    """Tensors, and those of the checkpoint that are in none of them, in files of SHARD_BYTES."""
    for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)
    checkpoint = origin.checkpoint
    sizes = {name: value.nbytes for name, value in tensors.items()}
    sizes |= {name: checkpoint.tensors[name].nbytes for name in origin.untouched}
    shards = list(_shards(sizes))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, shard in zip(names, shards, strict=True):
        save_file(_read(shard, tensors, checkpoint), folder / file, metadata={"format": "pt"})


def _read(names: list[str], tensors: Mapping[str, torch.Tensor], checkpoint: WeightFiles) -> dict[str, torch.Tensor]:
    """The tensors of one file; what two of them share is written twice, for a file has no other way."""
    found: dict[str, torch.Tensor] = {}
    places: set[tuple[Any, int]] = set()
    for name in names:
        value = tensors[name].contiguous() if name in tensors else checkpoint.tensor(name)
        place = (value.device, value.data_ptr())
        found[name] = value.clone() if place in places else value
        places.add(place)
    return found


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in turn, as many to a file as there is room."""
    shard: list[str] = []
    there = 0
    for name, count in sizes.items():
        if shard and there + count > SHARD_BYTES:
            yield shard
            shard, there = [], 0
        shard.append(name)
        there += count
    yield shard


CANNOT = "the model as it was given cannot be saved"


def repair_generation(model: Any) -> str | None:
    """Make a generation config such as transformers agrees to save; says what was changed, if anything.

    Some published models set a temperature without sampling, which loads but cannot be saved.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    try:
        config.validate(strict=True)
        return None
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
        return f"{CANNOT}: its generation config sets sampling options without sampling: do_sample is switched on"
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
        return f"{CANNOT}: its generation config is not valid: a plain one is saved"


def apply_umask(folder: Path) -> None:
    """Weights readable as other new files are: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


FILE = "generation_config.json"


def add_end_tokens(folder: Path, ends: Iterable[int], tokenizer: Tokenizer, model: Any) -> str | None:
    """Put the tokens ``ends`` into ``eos_token_id`` of a saved folder, behind those that are there; what to say of it.

    An adapter's folder has no such file of its own: it is given that of ``model``, the one that was saved, for servers
    and for ``prefopt merge``. Says nothing where every token was there already.
    """
    ends, plain = tuple(ends), causal_model(model)
    if not ends or not plain.can_generate():  # a reward model writes nothing
        return None
    path = folder / FILE
    said = getattr(plain, "generation_config", None)
    with output_errors(path):
        if not path.is_file():
            if said is None:
                return None
            said.save_pretrained(folder)
        document = json.loads(path.read_text("utf-8"))
        there = ids_of(document.get("eos_token_id"))
        new = [i for i in dict.fromkeys(ends) if i not in there]
        if not new:
            return None
        document.pop("_from_model_config", None)  # under it generate() may go back to what config.json says
        write_json(path, {**document, "eos_token_id": there + new if there else new})
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
    return f"answers end with {names}: added to eos_token_id of {FILE}"


def end_tokens(folder: str | Path) -> list[int] | None:
    """The ids that ``generation_config.json`` of a folder says; none where it has no such file, or a damaged one."""
    try:
        return ids_of(json.loads((Path(folder) / FILE).read_text("utf-8")).get("eos_token_id"))
    except Exception:  # none, or damaged in any way
        return None


def ids_of(said: Any) -> list[int]:
    """What ``eos_token_id`` holds: nothing, one id or several. What can be no token's id ends no answer either."""
    found = said if isinstance(said, (list, tuple)) else [said]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


ANY_CLASS = "PreTrainedTokenizerFast"


ONLY_NEW = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"}


NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


# Where transformers 4 has a name of its own for a field, by type of model.
RENAMED: dict[str, dict[str, str]] = {
    "gpt_neox": NEOX,
    "gpt_neox_japanese": NEOX,
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
}


FULL, SLIDING = "full_attention", "sliding_attention"


Json = dict[str, Any]


def write_transformers4_fields(folder: Path, tokenizer: Tokenizer) -> None:
    """Add to ``config.json`` and ``tokenizer_config.json`` of ``folder``, where it has them, what transformers 4 reads.

    Transformers 5 reads the same from them as before; what it would read differently is left out. ``tokenizer`` is the
    one that was saved: its class keeps the name that the folder it came from has for it.
    """
    with output_errors(folder):
        _change(folder / "tokenizer_config.json", lambda found: _older_tokenizer(found, tokenizer))
        _change(folder / "config.json", transformers4_config)


def _change(path: Path, change: Any) -> None:
    if not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))
    if (changed := change(found)) != found:
        write_json(path, changed)


def _older_tokenizer(found: Json, tokenizer: Tokenizer) -> Json:
    changed = dict(found)
    if found.get("tokenizer_class") in ONLY_NEW:
        changed["tokenizer_class"] = _class_before(tokenizer)
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has a dictionary of that name, and this list under another
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed


def _class_before(tokenizer: Tokenizer) -> str:
    """What the folder that a tokenizer was loaded from calls its class."""
    try:
        path = cached_file(tokenizer.name_or_path, "tokenizer_config.json", local_files_only=True)
        name = json.loads(Path(path).read_text("utf-8")).get("tokenizer_class") if path else None
    except (OSError, ValueError, AttributeError):  # it was made in memory, or its folder is gone
        name = None
    return name if isinstance(name, str) and name and name not in ONLY_NEW else ANY_CLASS


def transformers4_config(found: Json) -> Json:
    """The document of a ``config.json`` with the fields of transformers 4 beside those of transformers 5."""
    now = _parsed(found)
    for scaling in (True, False):
        changed = _with_older(found, scaling=scaling)
        if now is not None and _holds(_parsed(changed), now):
            return changed
    return found


def transformers_versions(folder: Path) -> str:
    """The versions of transformers that read a folder of :func:`write_transformers4_fields`, for its card."""
    path = folder / "config.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if found != _with_older(found):
        return "transformers 5: these rotary embeddings cannot be written for version 4"
    return "transformers 5, and version 4 (tried with 4.57) where it knows the architecture"


def _with_older(found: Json, *, scaling: bool = True) -> Json:
    """The fields added in every configuration of a document, nested ones too; ``scaling``: ``rope_scaling`` as well."""
    changed = {k: _with_older(v, scaling=scaling) if _is_config(k, v) else v for k, v in found.items()}
    older = {"torch_dtype": found["dtype"]} if isinstance(found.get("dtype"), str) else {}
    older |= _older_rope(found, scaling=scaling)
    names = RENAMED.get(str(found.get("model_type")), {})
    older |= {name: found[name] for name in names if name in found}
    for name, value in older.items():
        changed.setdefault(names.get(name, name), value)
    return changed


def _older_rope(config: Json, *, scaling: bool) -> Json:
    """Rotary embeddings in the fields of transformers 4; where layers differ, they are about full attention."""
    rope = config.get("rope_parameters")
    wide: Any = rope.get(FULL, rope) if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(wide, dict) or "rope_theta" not in wide:
        return {}
    older = {name: wide[name] for name in ("rope_theta", "partial_rotary_factor") if name in wide}
    narrow = rope.get(SLIDING)
    if isinstance(narrow, dict) and narrow.get("rope_theta") not in (None, wide["rope_theta"]):
        older["rope_local_base_freq"] = narrow["rope_theta"]
    if scaling and (rest := _scaling(wide, config)):
        older["rope_scaling"] = rest
    return older


def _scaling(rope: Json, config: Json) -> Json:
    """What transformers 4 calls ``rope_scaling``: empty for plain rotary embeddings."""
    kind = rope.get("rope_type", "default")
    rest = {k: v for k, v in rope.items() if k not in (FULL, SLIDING, "rope_theta", "partial_rotary_factor")}
    if kind == "longrope" and "original_max_position_embeddings" in config:  # Phi-3 takes these three and no other
        return {"type": kind, "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    return rest if kind != "default" or rest.keys() - {"rope_type", "type"} else {}


def _is_config(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, dict)


def _parsed(document: Json) -> Json | None:
    """What transformers 5 makes of the document; none where it knows no such model, or warns of a field."""
    known: Any = AutoConfig
    try:
        with warnings.catch_warnings(), _unheard():
            warnings.simplefilter("error")
            config: PreTrainedConfig = known.for_model(**copy.deepcopy(document))
            found: Json = config.to_dict()
    except Exception:  # whatever a class of transformers has against it
        return None
    return found


def _holds(more: Any, less: Any) -> bool:
    """Whether all that ``less`` says is in ``more``, with the same values."""
    if isinstance(less, dict) and isinstance(more, dict):
        return all(name in more and _holds(more[name], value) for name, value in less.items())
    return bool(more == less)


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what transformers logs: it said the same when the model was loaded."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
