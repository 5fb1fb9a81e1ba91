"""Identity of a reference model and of the space of its values: all that log-probabilities depend on.

Two identities are equal only if weights, adapter, configuration and quantisation are. The converse does not hold: the
same weights in other shards count as another model. A value computed twice is better than a wrong one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefopt.core.cache_folder import file_hashes
from prefopt.core.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    is_adapter,
    quantisation_on_record,
    read_adapter,
    read_object,
    vet_folder,
    weight_files,
)
from prefopt.data.chat.pictures import processor_digest
from prefopt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.model.quantised import BACKEND, chosen, identity_fields
from prefopt.model.scorer import Scorer, version_of
from prefopt.model.supported import library_versions
from prefopt.reference.cache import Identity, SpaceKey, json_digest

# Fields of config.json without effect on the logits of a forward pass in evaluation mode, without cache. All others
# count, known or not. Dtype and attention kernel are part of the space's key by themselves.
_IRRELEVANT = frozenset(
    """
    transformers_version _name_or_path name_or_path _commit_hash transformers_weights use_cache torch_dtype dtype
    _attn_implementation attn_implementation _attn_implementation_internal _attn_implementation_autoset
    gradient_checkpointing output_attentions output_hidden_states return_dict use_return_dict torchscript
    bos_token_id eos_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    temperature top_p typical_p do_sample min_length max_new_tokens num_beams num_beam_groups
    diversity_penalty early_stopping length_penalty repetition_penalty no_repeat_ngram_size bad_words_ids
    num_return_sequences suppress_tokens begin_suppress_tokens exponential_decay_length_penalty remove_invalid_values
    task_specific_params id2label label2id problem_type finetuning_task
    attention_dropout hidden_dropout activation_dropout dropout attn_pdrop embd_pdrop resid_pdrop classifier_dropout
""".split()
)
_ADAPTER_IRRELEVANT = frozenset(
    """
    base_model_name_or_path revision inference_mode task_type auto_mapping peft_version lora_dropout runtime_config
""".split()
)


def space_of(identity: Identity, scorer: Scorer, device: torch.device) -> SpaceKey:
    """The space of the values that ``scorer`` gives for the reference ``identity``."""
    if scorer.pictures:  # pixel values are the processor's
        processor = processor_digest(str(causal_model(scorer.model).name_or_path))
        identity = replace(identity, config=json_digest([identity.config, processor]))
    dtype = str(scorer.dtype).removeprefix("torch.")
    kernel, kind = scorer.kernel_version, device.type
    if device.type == "cuda":
        kernel, kind = f"{kernel} of torch {torch.__version__}", f"cuda, {torch.cuda.get_device_name(device)}"
    return SpaceKey(identity, dtype, scorer.path, kernel, kind, version_of(scorer.dtype))


def identity_of_folder(
    path: str | Path, *, adapter: str | Path | None = None, quantise: str | None = None, root: Path | None = None
) -> Identity:
    """The identity of a model folder as transformers loads it, with a PEFT ``adapter`` folder on top, quantised as
    :func:`prefopt.model.load.load_model` would. File hashes are kept under ``root``. Raises ``ModelError`` where the
    folder is incomplete or holds only pickled weights."""
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not (folder / "config.json").exists():
        if (folder / ADAPTER_CONFIG).exists():
            raise ModelError(f"{folder} is an adapter, not a model: name its base model, and give this as the adapter")
        raise ModelError(f"{folder}: no config.json; download or copy the model again")
    vet_folder(folder)
    config = read_object(folder / "config.json")
    hashes = file_hashes(weight_files(folder, config), root)
    on_top = ""
    if adapter is not None:
        relevant = _relevant(read_adapter(adapter), _ADAPTER_IRRELEVANT)
        weights = Path(adapter) / ADAPTER_WEIGHTS
        if not weights.exists():
            raise ModelError(f"adapter {adapter}: no {weights.name} (pickles are not opened); save it as safetensors")
        on_top = json_digest([*file_hashes([weights], root), relevant])
    return Identity(
        weights=json_digest(sorted(hashes)),
        config=json_digest(_relevant(config, _IRRELEVANT)),
        adapter=on_top,
        quantization=_quantization(config, chosen(quantise, None if adapter is None else str(adapter))),
        name=str(folder) if adapter is None else f"{folder} + {adapter}",
    )


def identity_of_model(model: torch.nn.Module, *, name: str = "") -> Identity:
    """The identity of a transformers model in memory, adapters included: name, type, shape and bytes of every tensor.
    Raises ``ModelError`` where a tensor has no data (on the meta device)."""
    whole = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # extra state, of quantised layers for instance
            whole.update(f"{key}:{tensor!r};".encode())
            continue
        if tensor.is_meta:
            raise ModelError(f"{name or type(model).__name__}: {key} has no data; load the weights first")
        whole.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    adapters = {
        str(key): _relevant(value.to_dict(), _ADAPTER_IRRELEVANT)
        for key, value in sorted((getattr(model, "peft_config", None) or {}).items())
    }
    # Adapters that are active, merged or switched off, in each layer.
    switches = ("active_adapters", "merged_adapters", "disable_adapters")
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    states = {repr([getattr(layer, switch, None) for switch in switches]) for layer in layers}
    return Identity(
        weights=whole.hexdigest(),
        config=json_digest([type(model).__name__, _relevant(fields, _IRRELEVANT)]),
        adapter=json_digest([adapters, sorted(states)]) if adapters else "",
        quantization=_quantization(fields),
        name=name or str(getattr(config, "_name_or_path", "") or type(model).__name__),
    )


def _relevant(config: Mapping[str, Any], irrelevant: frozenset[str]) -> dict[str, Any]:
    """Without irrelevant keys, also in nested configs; sets of names, as PEFT saves them, are sorted."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in irrelevant or key == "quantization_config":
            continue
        if key.endswith("_config") and isinstance(value, Mapping):
            value = _relevant(value, irrelevant)
        elif isinstance(value, (set, frozenset)) or key in ("target_modules", "modules_to_save"):
            value = value if isinstance(value, str) or value is None else sorted(value)
        kept[str(key)] = value
    return kept


def _quantization(config: Mapping[str, Any], quantise: str | None = None) -> str:
    """Of the checkpoint, and ``quantise`` at loading: method, settings, and the version of its library, on which
    dequantised weights depend."""
    saved: Any = config.get("quantization_config")
    saved = saved.to_dict() if hasattr(saved, "to_dict") else saved
    if not saved and quantise is None:
        return ""
    method = str((saved or {}).get("quant_method") or BACKEND)
    return json_digest([saved, identity_fields(quantise) or library_versions(method)])


def adapter_line(name: str, adapter: str | None = None, quantise: str | None = None) -> str | None:
    """A line on a name that is an adapter's, and on a base that is quantised as in its training."""
    source = local_folder(name)
    named = source if is_adapter(source) else adapter and local_folder(adapter)
    recorded = quantisation_on_record(named) if named else None
    how = f"the base is quantised to {recorded}, as in training" if recorded and recorded == quantise else ""
    if named == source:
        return f"{name} is an adapter on {base_of(source)}: both are loaded{how and ', ' + how}"
    return f"{adapter}: {how} (--quantise none: as it is)" if how else None


def identity_of_name(name: str, adapter: str | None = None, quantise: str | None = None) -> Identity:
    """The identity of a model by name, with ``adapter`` on it, or where it is an adapter itself; ``quantise`` as in
    :func:`prefopt.model.load.load_model`."""
    base, own = base_and_adapter(name, adapter)
    return identity_of_folder(base, adapter=own, quantise=quantise)


def tokenizer_of_name(name: str, adapter: str | None = None) -> Tokenizer:
    """The tokenizer in an adapter's folder, which may have more tokens, else that of its model."""
    base, own = base_and_adapter(name, adapter)
    return load_tokenizer(own if own is not None and has_tokenizer(own) else base)
