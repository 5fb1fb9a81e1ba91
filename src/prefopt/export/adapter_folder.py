"""A LoRA adapter as vLLM loads it beside its model.

vLLM reads one rank and one alpha for all layers, matrices A and B of linear layers, and nothing else. Layers with ranks
or alphas of their own are rewritten: A and B are filled up with zeros to the largest rank, and B is scaled. What is no
LoRA of linear layers is refused, since vLLM would refuse it when it starts.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prefopt.core.files import expanded, output_errors, write_json
from prefopt.core.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, is_own, read_adapter, task_of
from prefopt.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, tokenizer_digest
from prefopt.errors import ModelError
from prefopt.model.save import apply_umask

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank``."""
NOT_SERVED = ("gpt2", "gpt_neox")
"""Model types to which vLLM puts no LoRA."""
CHAT_TEMPLATE = "chat_template.jinja"
_BESIDE = ("*.jinja", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "generation_config.json")
_FLAGS = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA",
    "modules_to_save": "whole layers in it (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
    "target_parameters": "LoRA on fused experts",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "eva_config": "EVA",
}
_SIDES = (".lora_A.weight", ".lora_B.weight")


def why_not_served(folder: str, config: Any) -> str | None:
    """Why vLLM cannot load the adapter in ``folder`` on a model of ``config``; None where it can."""
    about = read_adapter(folder)
    if str(about.get("peft_type")).upper() != "LORA":
        return f"it is {about.get('peft_type')}, not LoRA"
    if task_of(folder) == "SEQ_CLS":
        return "it is on a reward model, whose head vLLM does not take from an adapter; --to reward-server merges it"
    if about.get("bias", "none") != "none":
        return f"it has biases (bias: {about['bias']})"
    if own := next((words for flag, words in _FLAGS.items() if about.get(flag)), None):
        return f"it has {own}"
    if config.model_type in NOT_SERVED:
        return f"vLLM puts no LoRA on {config.model_type} models"
    return None


def write_adapter(folder: str, output: Path, wrapped: Any) -> tuple[int, bool]:
    """Write the adapter in ``folder``, which ``wrapped`` has on its model, to ``output``; returns its rank and whether
    it was rewritten to one rank. Raises :class:`ModelError` where vLLM cannot load it."""
    tensors = load_file(Path(folder) / ADAPTER_WEIGHTS)
    if others := [name for name in tensors if not name.endswith(_SIDES)]:
        raise ModelError(f"{folder} holds {others[0]}, which vLLM does not load: merge it (--to merged)")
    about = dict(read_adapter(folder))
    ranks = {value.shape[0] for name, value in tensors.items() if name.endswith(_SIDES[0])}
    if max(ranks) > RANKS[-1]:
        raise ModelError(f"{folder} has rank {max(ranks)}, and vLLM loads {RANKS[-1]} at most: merge it (--to merged)")
    rewritten = bool(about.get("rank_pattern") or about.get("alpha_pattern"))
    if rewritten:
        tensors, about = _of_one_rank(tensors, about, _scaling(wrapped), max(ranks))
    about["base_model_name_or_path"] = _base_name(folder)
    about["target_modules"] = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    with output_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(output / ADAPTER_CONFIG, about)
        for pattern in _BESIDE:
            for file in sorted(Path(folder).glob(pattern)):
                if is_own(file):
                    shutil.copyfile(file, output / file.name)
        apply_umask(output)
    return int(about["r"]), rewritten


def max_rank(rank: int) -> int:
    """The least ``--max-lora-rank`` that admits a rank."""
    return next(most for most in RANKS if most >= rank)


def text_options(base: str, output: Path, tokenizer: Tokenizer) -> list[str]:
    """The options of vLLM for the text of an adapter written to ``output``, which was trained with ``tokenizer``: vLLM
    takes chat template and tokenizer from the model that it serves, ``base``, where no others are named."""
    template, words = tokenizer.chat_template, list[str]()
    theirs = load_tokenizer(base) if has_tokenizer(base) else None
    if theirs is not None and theirs.chat_template == template and _same_ids(theirs, tokenizer):
        return []
    if isinstance(template, str) and (theirs is None or theirs.chat_template != template):
        path = output / CHAT_TEMPLATE
        with output_errors(path):
            path.write_text(template, "utf-8")
        words += ["--chat-template", str(path)]
    if not words or theirs is None or not _same_ids(theirs, tokenizer):
        words += ["--tokenizer", str(output)]
    return words


def _same_ids(theirs: Tokenizer, ours: Tokenizer) -> bool:
    """Whether two tokenizers differ in the chat template at most."""
    bare = [copy.deepcopy(tokenizer) for tokenizer in (theirs, ours)]
    for tokenizer in bare:
        tokenizer.chat_template = None
    return tokenizer_digest(bare[0]) == tokenizer_digest(bare[1])


def _base_name(folder: str) -> str:
    """The model of an adapter: a name on the Hub, or a folder in full, since the adapter moves."""
    base = base_of(folder)
    return str(expanded(base).resolve()) if expanded(base).exists() else base


def _scaling(wrapped: Any) -> dict[str, float]:
    """alpha / rank of every layer with an adapter, by the end of its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = ((name, layer) for name, layer in wrapped.named_modules() if isinstance(layer, BaseTunerLayer))
    return {name: float(next(iter(layer.scaling.values()))) for name, layer in layers}


def _of_one_rank(
    tensors: Mapping[str, torch.Tensor], about: dict[str, Any], scaling: Mapping[str, float], rank: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter with one rank and one alpha: the commonest factor stays as it is, B of the others is scaled."""
    factors = {name: _factor(name, scaling) for name in tensors}
    usual = Counter(factors.values()).most_common(1)[0][0]
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(_SIDES[0]):
            found[name] = _filled(value, (rank, value.shape[1]))
        else:
            scaled = (value.float() * (factors[name] / usual)).to(value.dtype) if factors[name] != usual else value
            found[name] = _filled(scaled, (value.shape[0], rank))
    alpha = usual * rank
    plain = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    return found, {**about, **plain, "rank_pattern": {}, "alpha_pattern": {}}


def _factor(name: str, scaling: Mapping[str, float]) -> float:
    module = name.rpartition(".lora_")[0].removeprefix("base_model.model.")
    found = next((value for key, value in scaling.items() if f".{key}".endswith(f".{module}")), None)
    if found is None:  # under the names of a checkpoint that holds the language model inside
        inner = module.partition("layers.")[2]
        found = next((value for key, value in scaling.items() if inner and key.endswith(f"layers.{inner}")), None)
    if found is None:
        raise ModelError(f"{name} belongs to no layer of the model: merge the adapter (--to merged)")
    return found


def _filled(value: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """``value`` [rows, columns] in the corner of zeros."""
    found = value.new_zeros(shape)
    found[: value.shape[0], : value.shape[1]] = value
    return found
