"""Saving a model, whoever saves it: as the checkpoint that it came from, with what it did not touch as it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from prefopt.core.files import output_errors, write_json
from prefopt.core.model_folder import is_own
from prefopt.data.tokenizer import Tokenizer
from prefopt.model.checkpoint import Checkpoint, Origin, origin_of
from prefopt.model.packed_model import causal_model

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


def _whole_config(model: Any, origin: Origin | None, dtype: torch.dtype) -> Any:
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


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], origin: Origin) -> None:
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


def _read(names: list[str], tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
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


def share_weights(folder: Path) -> None:
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
