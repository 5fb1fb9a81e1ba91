"""Models with a scalar head: reward models, and the value functions (critics) that start from them.

They are transformers' ``...ForSequenceClassification`` with one label, which read the score at the last token that is
not the pad token: the pad token must not be EOS.

::

    model = load_scalar(folder, dtype=..., device=..., tokenizer=tokenizer)   # an SFT model or a reward model
    scorer = ScalarScorer(model)
    reward_N = scorer(pack(groups, scorer.layout))                 # one per response, at its last scored token
    value_M = scorer(pack(groups, scorer.layout), tokens=True)     # one per scored token, in the state before it

:class:`ScalarScorer` subtracts ``prefopt_reward_shift`` of the configuration from its results: transformers' heads
have no bias, and their ``logits`` are the rewards before the shift.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.core.hub import import_bitsandbytes
from prefopt.core.model_folder import is_adapter, task_of
from prefopt.data.group import Group
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapter import add_adapter, grow_embedding, peft_warnings_off
from prefopt.model.architectures import architectures_of, body_of, causal_model, without_mtp
from prefopt.model.checkpoint import ScalarHead, origin_of, scalar_head, set_origin
from prefopt.model.kernels.head import wide_dtype
from prefopt.model.load import base_and_adapter, load_config, load_model, load_weights
from prefopt.model.merge import load_merged
from prefopt.model.packing import PackedBatch, pack, split
from prefopt.model.placeholders import FromFirst
from prefopt.model.quantised import chosen, copy_marks, dequantise, is_quantised
from prefopt.model.save import ids_of
from prefopt.model.scorer import PackedModel

SHIFT = "prefopt_reward_shift"
PAD = "<|pad|>"
"""The pad token that is added where a tokenizer has none but EOS."""


class ScalarScorer(PackedModel):
    """Rewards or values of packed batches by a model of :func:`load_scalar`, or one wrapped by PEFT."""

    def __init__(self, model: torch.nn.Module, **how: Any) -> None:
        """``how``: see :class:`PackedModel`. Raises :class:`ModelError` for a model without a scalar head."""
        check_scalar_model(causal_model(model))
        super().__init__(model, **how)

    @property
    def shift(self) -> float:
        """The reward shift, which is subtracted from every result."""
        return shift_of(causal_model(self.model))

    def forward(self, batch: PackedBatch, tokens: bool = False) -> torch.Tensor:
        """Rewards [N], read at the last scored token of each response, float32 (float64 for a float64 model).
        ``tokens``: values [M] of the state before each scored token, read at the token before it."""
        hidden = self.hidden(batch)
        hidden = batch.read_from(hidden) if tokens else hidden.index_select(0, batch.last)
        head: Any = causal_model(self.model).score
        wide = wide_dtype(hidden.dtype)
        weights = {name: p.to(wide) for name, p in head.named_parameters()}
        scores: torch.Tensor = torch.func.functional_call(head, weights, (hidden.to(wide),))
        return scores[:, 0] - self.shift


@torch.no_grad()
def response_rewards(
    scorer: ScalarScorer, groups: Sequence[Group], indices: Sequence[int], token_budget: int
) -> npt.NDArray[np.float64]:
    """Rewards [N] of the responses of ``groups[indices]`` in order, scored in batches within ``token_budget``."""
    device = next(scorer.model.parameters()).device
    costs = [scorer.layout.cost(groups[i]) for i in indices]
    order = sorted(range(len(indices)), key=costs.__getitem__)
    found: dict[int, npt.NDArray[np.float64]] = {}
    for part in split(order, [costs[n] for n in order], token_budget):
        batch = pack([groups[indices[n]] for n in part], scorer.layout).to(device)
        rewards = scorer(batch).double().cpu().numpy()
        counts = [len(g.continuations) for g in batch.groups]
        found.update(zip(part, np.split(rewards, np.cumsum(counts)[:-1]), strict=True))
    return np.concatenate([found[n] for n in range(len(indices))])


def load_scalar(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Tokenizer,
    seed: int = 0,
    quantise: str | None = None,
    from_first: FromFirst | None = None,
    pictures: bool = False,
) -> torch.nn.Module:
    """A model with a scalar head, dropout off, from any of these folders (or names on the Hub):

    - a causal language model: with a new head initialised from ``seed`` (:func:`scalar_from`)
    - a sequence classifier with one label, such as ``prefopt reward`` writes
    - a model with a scalar head of another trainer (:mod:`prefopt.model.checkpoint`)
    - an adapter of either kind, which is merged into its model

    ``quantise``: nf4 or int8, of a model that is no adapter. ``pictures``: it is to take them. ``from_first``: as of
    :func:`prefopt.model.load.load_weights`; a model that an adapter is merged into has all weights even so. Raises
    :class:`ModelError` for a folder that is damaged, has another number of labels, pads with EOS, or is of an
    architecture without such a class.
    """
    loaded = _load(name, dtype, device, tokenizer, seed, chosen(quantise, None), from_first, pictures)
    return cast(torch.nn.Module, loaded.to(device) if from_first is None else loaded)


def _load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Tokenizer,
    seed: int,
    quantise: str | None,
    from_first: FromFirst | None,
    pictures: bool,
) -> PreTrainedModel:
    if is_adapter(name):  # merged, all weights train
        if quantise is not None:
            raise ConfigError(
                f"--quantise {quantise}: {name} is an adapter, which is merged into its model to score; merge it by"
                " prefopt merge, and give the result"
            )
        return _adapted(name, dtype, device, tokenizer, seed).requires_grad_(True)
    config: Any = load_config(name)
    if not _names_classifier(config):
        if (head := scalar_head(name)) is not None:
            return _with_own_head(name, config, head, dtype, device, tokenizer, quantise, from_first)
        _class_of(config, "")
        bare = load_model(name, dtype=dtype, device=device, quantise=quantise, from_first=from_first, pictures=pictures)
        return scalar_from(bare, tokenizer, seed=seed)
    if config.num_labels != 1:
        raise ModelError(f"{name} has {config.num_labels} labels; a reward model has one, the reward")
    pad = config.get_text_config().pad_token_id
    if pad is not None and pad in end_ids(config, tokenizer):
        raise ModelError(
            f"{name}: its pad_token_id {pad} is EOS, so that transformers reads the score before EOS; set pad_token_id"
            " in its config.json to another token"
        )
    _class_of(config, f"{name}: ")
    kind = AutoModelForSequenceClassification
    loaded = load_weights(kind, name, config, dtype, device, quantise=quantise, from_first=from_first)
    check_scalar_model(loaded)
    return loaded


def has_scalar_head(name: str) -> bool:
    """Whether a folder or Hub name holds a model with a scalar head, by its class or its weights, or an adapter for
    one; else it is a language model."""
    if is_adapter(name):
        return task_of(name) == "SEQ_CLS" or scalar_head(name) is not None
    return _names_classifier(load_config(name)) or scalar_head(name) is not None


def _names_classifier(config: Any) -> bool:
    return any(a.endswith("ForSequenceClassification") for a in architectures_of(config))


def _with_own_head(
    name: str,
    config: Any,
    head: ScalarHead,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Tokenizer,
    quantise: str | None,
    from_first: FromFirst | None,
) -> PreTrainedModel:
    """The sequence classifier of a folder that names another class, with the head and bias in it."""
    _class_of(config, f"{name} holds a scalar head ({head.weight}); ")
    _one_label(config)
    values = head.read(config.get_text_config().hidden_size)
    kind, lacking = AutoModelForSequenceClassification, ("score.weight",)
    loaded = load_weights(kind, name, config, dtype, device, lacking=lacking, quantise=quantise, from_first=from_first)
    check_scalar_model(loaded)
    pad = config.get_text_config().pad_token_id
    if pad is None or pad in end_ids(config, tokenizer):
        pad = _pad_token(loaded, tokenizer)
    loaded.config.get_text_config().pad_token_id = loaded.config.pad_token_id = pad
    _set_head(loaded, *values)
    loaded.config.architectures = [type(loaded).__name__]
    if (origin := origin_of(loaded)) is not None and set(head.tensors) != {"score.weight"}:
        set_origin(loaded, origin.left_behind([*head.tensors, "lm_head.weight"]))
    return loaded


def _set_head(model: Any, weight: torch.Tensor, bias: float) -> None:
    model.score.weight.data.copy_(weight)
    set_shift(model, shift_of(model) - bias)


def _one_label(config: Any) -> None:
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}


def _adapted(name: str, dtype: torch.dtype, device: torch.device, tokenizer: Tokenizer, seed: int) -> PreTrainedModel:
    """An adapter merged into its base. A language model gets the head beside the adapter (of LLaMA-Factory), or a new
    one; a reward model keeps its own."""
    base, adapter = base_and_adapter(name)
    assert adapter is not None
    wide = torch.promote_types(dtype, torch.float32)
    if task_of(adapter) != "SEQ_CLS":
        made = scalar_from(load_merged(base, adapter, dtype=wide, device=device), tokenizer, seed=seed)
        if (head := scalar_head(adapter)) is not None:
            _set_head(made, *head.read(made.score.in_features))
        return made.to(dtype)
    bare = load_scalar(base, dtype=wide, device=device, tokenizer=tokenizer, seed=seed)
    merge: Any = add_adapter(bare, adapter).merge_and_unload
    with peft_warnings_off():
        return cast(PreTrainedModel, merge().to(dtype))


def scalar_from(model: torch.nn.Module, tokenizer: Tokenizer, *, seed: int = 0) -> PreTrainedModel:
    """The layers of a causal language model, the same objects, under a new scalar head.

    The head is initialised from N(0, 1 / (H + 1)) (Stiennon et al. 2020, appendix B.1). Where ``tokenizer`` pads with
    EOS, or not at all, it gets another pad token: BOS where that differs from EOS, else a new one, for which the
    embedding may grow. Raises :class:`ModelError` where transformers has no such class for the architecture.
    """
    causal = causal_model(model)
    kind = _class_of(causal.config)
    pad = _pad_token(causal, tokenizer)
    config = copy.deepcopy(causal.config)
    _one_label(config)
    without_mtp(config)
    config.get_text_config().pad_token_id = config.pad_token_id = pad
    with torch.device("meta"):
        made = kind(config)
    body, prefix = body_of(causal), made.base_model_prefix
    if type(getattr(made, prefix, None)) is not type(body) or not _has_head(made):
        raise _no_class(causal.config)
    setattr(made, prefix, body)
    width = made.score.in_features
    drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    weight: Any = causal.get_input_embeddings().weight
    made.score = torch.nn.Linear(width, 1, bias=False, device=weight.device, dtype=weight.dtype)
    made.score.weight.data.copy_(drawn)
    made.config.architectures = [kind.__name__]
    made.name_or_path = causal.name_or_path
    if (origin := origin_of(causal)) is not None:
        set_origin(made, origin.left_behind())
    copy_marks(causal, made)
    return made.eval()


def check_scalar_model(model: PreTrainedModel) -> None:
    """Raises :class:`ModelError` for a model without a linear scalar head."""
    if not _has_head(model) or body_of(model) is model:
        raise ModelError(
            f"{type(model).__name__} has no linear head named score on a causal model; prefopt takes reward models of"
            " such classes as LlamaForSequenceClassification"
        )
    if model.config.num_labels != 1:
        raise ModelError(f"{type(model).__name__} has {model.config.num_labels} labels; a reward model has one")


def shift_of(model: PreTrainedModel) -> float:
    """The reward shift in a model's configuration."""
    return float(getattr(model.config, SHIFT, None) or 0.0)


def set_shift(model: PreTrainedModel, shift: float) -> None:
    """Set the reward shift of ``model``, which is saved with it."""
    setattr(model.config, SHIFT, float(shift))


def merge_trained_adapter(
    model: torch.nn.Module, trained: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """An adapter merged into its base, head included, in ``dtype``; ``model`` is used up. ``trained``: the adapter's
    weights by name, in full precision. A quantised base is dequantised: the scores are those of training."""
    import_bitsandbytes()
    from peft import get_peft_model

    wrapped: Any = model
    if is_quantised(model):
        (config,) = wrapped.peft_config.values()
        plain = wrapped.unload()
        dequantise(plain, dtype)
        with peft_warnings_off():
            wrapped = get_peft_model(plain, config)
    wrapped.to(dtype)
    with torch.no_grad(), peft_warnings_off():
        for name, parameter in wrapped.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
        return cast(PreTrainedModel, wrapped.merge_and_unload())


def end_ids(config: Any, tokenizer: Tokenizer) -> set[int]:
    """End tokens of configuration and tokenizer."""
    return {*ids_of(config.get_text_config().eos_token_id), *ids_of(tokenizer.eos_token_id)}


def _pad_token(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """A pad token that is no end token; it is added to the tokenizer and the embedding where there is none."""
    ends = end_ids(model.config, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        if tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in ends:
            tokenizer.pad_token = tokenizer.bos_token
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    pad = int(tokenizer.pad_token_id)
    grow_embedding(model, pad + 1)
    return pad


def _has_head(model: torch.nn.Module) -> bool:
    head: Any = getattr(model, "score", None)
    head = getattr(head, "original_module", head)  # PEFT keeps a copy that it trains
    return isinstance(head, torch.nn.Linear)


def _class_of(config: Any, place: str = "") -> Any:
    """The sequence classifier of an architecture. Raises :class:`ModelError` where transformers has none."""
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        raise _no_class(config, place)
    return mapping[type(config)]


def _no_class(config: Any, place: str = "") -> ModelError:
    return ModelError(
        f"{place}transformers has no sequence classifier with a head on its last token for {config.model_type} models,"
        " so no reward model can be made of it; take another architecture, such as Llama or Qwen"
    )
