"""Differences between families of architectures: places of layers and head, attention, logits, experts.

transformers adds the load-balancing loss of a mixture of experts to a model's own forward, which packed scoring does
not call. :class:`Routers` reads the router logits while a batch is scored. A token counts once for every response that
contains it, so that the sums are those of K separate rows also where a prompt is encoded once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from prefopt.errors import ConfigError, ModelError
from prefopt.model.packing import PackedBatch, Segment
from prefopt.model.recurrence.mixers import changed_classes, mixers_of

_SHAREABLE = {"full_attention", "sliding_attention", "sparse", "dense"}
_RECURRENT = {"linear_attention", "conv", "mamba", "recurrent", "hybrid"}
"""Types of layers that share where their class is in :data:`prefopt.model.recurrence.mixers.MIXERS`."""
_NO_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")
MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
"""Fields with the number of layers for multi-token prediction."""
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def weights_in(parameter: torch.Tensor) -> int:
    """Number of weights that a parameter holds: of those of 4 bits, bitsandbytes packs two into a number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(inner).__name__} is not a transformers model")
    return inner


def body_of(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head, which gives the last hidden state; the model itself where they are not separate."""
    body = model.base_model
    inner: torch.nn.Module = getattr(model, "model", model)
    return body if body is not model else inner


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that transformers never splits, without those inside another one: the layers of a model."""
    names = set(getattr(causal_model(model), "_no_split_modules", None) or ())
    found: dict[str, torch.nn.Module] = {}
    for place, module in model.named_modules():
        if type(module).__name__ in names and not place.startswith(tuple(f"{outer}." for outer in found)):
            found[place] = module
    return list(found.values())


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Recompute layers in the backward pass; transformers does so in training mode alone."""
    causal: Any = causal_model(model)
    # Older versions of transformers know only the second name, newer ones warn of it.
    enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def transformers_log_level(level: int) -> Iterator[None]:
    """Set the level of transformers' log in this block."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(level)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def architectures_of(config: Any) -> list[str]:
    """The classes that a configuration names; none where the field holds anything but a list."""
    named = getattr(config, "architectures", None)
    return [str(name) for name in named] if isinstance(named, list | tuple) else []


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def context_length(config: Any) -> int | None:
    """Positions of the model, where its configuration gives them."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    return next((int(value) for name in names if (value := getattr(text, name, None))), None)


def sharing_obstacle(model: PreTrainedModel, config: Any) -> str | None:
    """Why responses to one prompt cannot share its encoding, in one line; None where they can."""
    types = getattr(config, "layer_types", None)
    name, mixers = type(model).__name__, mixers_of(model)
    forking = _RECURRENT if len(mixers) >= sum(t in _RECURRENT for t in types or ()) else set()
    unshareable = sorted(set(types or ()) - _SHAREABLE - forking)
    if changed := changed_classes(model):
        return f"{', '.join(changed)} of this transformers mixes tokens in a way that prefopt does not know"
    if unshareable:
        return f"{name} has layers of type {', '.join(unshareable)}, whose state cannot fork at the end of a prompt"
    if getattr(model, "_is_stateful", False) and not types:  # a hybrid family may have attention in every layer
        return f"{name} is recurrent: its state cannot fork at the end of a prompt"
    if getattr(config, "attention_chunk_size", None):
        return f"{name} attends in chunks that only its own mask knows"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{name} adds ALiBi distances to its attention scores"
    if not mixers and not getattr(model, "_supports_attention_backend", False):  # hybrids have it and do not say so
        return f"{name} does not offer the attention hook of transformers"
    return None


def rope_limit(config: Any) -> int | None:
    """Length at which longrope changes its frequencies. The type ``dynamic`` changes them only beyond
    ``max_position_embeddings``, which no row may exceed."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    common = getattr(config, "original_max_position_embeddings", None)
    limits = [s.get("original_max_position_embeddings") or common for s in sets if s.get("rope_type") == "longrope"]
    return min((int(x) for x in limits if x), default=None)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer: query heads, key heads, their widths, and the sliding window (None: full attention)."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    window: int | None


def attention_shapes(config: Any) -> list[AttentionShape]:
    """A shape for every layer with attention."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types = getattr(text, "layer_types", None) or [default] * text.num_hidden_layers
    per_layer = getattr(text, "per_layer_config", None)  # where layers differ, the common fields must not be read
    return [
        _attention_shape(per_layer[n] if per_layer else text, window if layer == "sliding_attention" else None)
        for n, layer in enumerate(types)
        if layer not in _NO_ATTENTION
    ]


def _attention_shape(config: Any, window: int | None) -> AttentionShape:
    heads: int = getattr(config, "num_attention_heads", 0)
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads or 1
    if getattr(config, "qk_nope_head_dim", None) is not None:  # multi-head latent attention
        width: int = config.qk_nope_head_dim + config.qk_rope_head_dim
        return AttentionShape(heads, key_heads, width, config.v_head_dim, window)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return AttentionShape(heads, key_heads, width, width, window)


def logit_transforms(config: Any) -> list[tuple[float, float | None]]:
    """Scales and soft-caps of logits that the configuration may mean, the likeliest first."""
    scales: list[float] = []
    for name in SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:
            both = (float(value), 1.0 / float(value))
            scales += reversed(both) if name == "logits_scaling" else both
    found = [getattr(config, name, None) for name in SOFTCAPS]
    caps: list[float | None] = [float(cap) for cap in found if isinstance(cap, int | float) and cap]
    return list(product(dict.fromkeys([*scales, 1.0]), dict.fromkeys([*caps, None])))


def class_logits(
    model: PreTrainedModel, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits [rows, V] of hidden [rows, H] by the class's own forward, float32 or wider, with ``weights`` replaced."""
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    arguments = {"input_ids": ids, "use_cache": False, "return_dict": True}
    with _answering(model, hidden):
        out: Any = model(**arguments) if weights is None else torch.func.functional_call(model, weights, (), arguments)
    logits: torch.Tensor = out.logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The current values of all weights that :func:`class_logits` reads."""
    body = {id(m) for m in body_of(model).modules()}
    return {
        f"{prefix}.{name}" if prefix else name: parameter.data
        for prefix, module in model.named_modules()
        if id(module) not in body
        for name, parameter in module.named_parameters(recurse=False)
    }


class _Answer(BaseModelOutputWithPast):  # type: ignore[misc]
    """The output of a body: hidden states, and None for any other field."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    """In this block the layers of ``model`` compute nothing: their last hidden state is ``hidden`` [rows, H]."""
    decoder: Any = model.get_decoder()  # OPT calls it past the body
    body = body_of(model)
    inner = [body, *(m for m in body.modules() if m is decoder and m is not body)]
    asked = []

    def answer(*_: Any, **__: Any) -> _Answer:
        asked.append(True)
        return _Answer(last_hidden_state=hidden[None])

    for module in inner:
        module.forward = answer
    try:
        yield
        assert asked, "logits do not depend on these hidden states"
    finally:
        for module in inner:
            del module.forward


def without_mtp(config: Any) -> None:
    """Remove layers for multi-token prediction from a configuration."""
    for part, count in product((config, config.get_text_config()), MTP_COUNTS):
        if getattr(part, count, None):
            setattr(part, count, 0)


def expert_fraction(config: Any) -> float:
    """Fraction of a mixture's experts that one token is sent to; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), None)
    return config.num_experts_per_tok / experts if experts else 1.0


class RoutingSums(NamedTuple):
    """Sums over all tokens and layers: probability of each expert ``prob_E`` (with gradients), how often each was
    chosen ``count_E``, and ``rows``, the number of tokens; float64 where the device has it."""

    prob_E: torch.Tensor
    count_E: torch.Tensor
    rows: torch.Tensor

    def loss(self) -> torch.Tensor:
        """E sum_e f_e P_e, with f_e the average number of choices and P_e the average probability of expert e (Fedus et
        al. 2021, Switch Transformer, arXiv 2101.03961, equations 4 to 6). Gradients flow through P alone."""
        return len(self.prob_E) * (self.count_E / self.rows * (self.prob_E / self.rows)).sum()


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a model, each with the index of the logits in its output. ``chosen``: experts per token;
    ``coefficient``: of the load-balancing loss in the model's configuration."""

    modules: tuple[tuple[torch.nn.Module, int], ...]
    chosen: int
    coefficient: float

    @contextmanager
    def recording(self) -> Iterator[list[list[torch.Tensor]]]:
        """Record the logits of every call in this block, one list per router."""
        recorded: list[list[torch.Tensor]] = [[] for _ in self.modules]
        pairs = zip(self.modules, recorded, strict=True)
        hooks = [module.register_forward_hook(partial(_record, calls, index)) for (module, index), calls in pairs]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self, calls: Sequence[Sequence[torch.Tensor]], batch: PackedBatch) -> RoutingSums:
        """Sums of logits recorded while ``batch`` was scored. The last calls are the policy's: a reference that is the
        same model with other weights is scored before it."""
        device = batch.target.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        use_T = torch.cat([_responses_per_token(p.segments, len(p.ids)) for p in batch.passes]).to(device, wide)
        parts = []
        for logits in calls:
            z_TE = torch.cat([x.flatten(0, -2) for x in logits[-len(batch.passes) :]]).to(wide)
            prob_TE = z_TE.softmax(-1)
            picked = torch.zeros_like(prob_TE).scatter(-1, prob_TE.topk(self.chosen, -1).indices, 1.0)
            parts.append(torch.stack([use_T @ prob_TE, use_T @ picked.detach()]))
        prob_E, count_E = torch.stack(parts).sum(0)
        return RoutingSums(prob_E, count_E.detach(), use_T.sum() * len(parts))


def routers_of(model: torch.nn.Module) -> Routers:
    """The routers that a model's load-balancing loss is computed on. Raises :class:`ConfigError` where it has none."""
    causal: Any = causal_model(model)
    config: Any = causal.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)  # JetMoe
    modules = tuple(_router_modules(causal))
    has_loss = hasattr(sys.modules[type(causal).__module__], "load_balancing_loss_func")
    chosen = getattr(causal, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if not has_loss or not modules or not chosen:
        raise ConfigError(
            f"--router-aux-loss-coef: transformers computes no load-balancing loss for {type(causal).__name__};"
            " leave it out"
        )
    return Routers(modules, int(chosen), float(coefficient or 0.0))


def _responses_per_token(segments: Sequence[Segment], tokens: int) -> torch.Tensor:
    """How many responses contain each token of a row, [T]."""
    use_T = torch.ones(tokens)
    for _, _, start, length in segments:
        use_T[start : start + length] += 1
    return use_T


def _router_modules(causal: Any) -> Iterator[tuple[torch.nn.Module, int]]:
    """The modules that transformers records as ``router_logits``, in the order of the layers."""
    for owner in causal.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits")
        if recorders is None:
            continue
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            kind: Any = getattr(recorder, "target_class", recorder)
            index = getattr(recorder, "index", 0)
            place = getattr(recorder, "layer_name", None) or ""
            named = owner.named_modules()
            yield from ((module, index) for name, module in named if isinstance(module, kind) and place in name)
        return


def _record(calls: list[torch.Tensor], index: int, module: torch.nn.Module, args: Any, output: Any) -> None:
    calls.append(output[index] if isinstance(output, tuple) else output)
