"""The load check: before training or caching, scoring is checked to be exact for the model at hand.

A tiny float64 model of the architecture is scored packed and by the class's own forward, one sequence per call, values
and gradients. Then a few real groups are scored by the real model: shared, separately and in two packings, which also
measures the noise of the working dtype; and a few tokens by its own logits.

Variable-length flash attention does not take float64. On CUDA the tiny model is also scored in the run's dtype by both
kernels, and compared with the same rounded weights in float64.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefopt.data.group import Group
from prefopt.data.table import GroupTable
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model, transformers_log_level
from prefopt.model.costs import uncounted
from prefopt.model.kernels.head_class import Head
from prefopt.model.packing import pack
from prefopt.model.quantised import check_packed
from prefopt.model.scalar import ScalarScorer
from prefopt.model.scorer import PackedModel, Scorer
from prefopt.model.supported import language_class

VOCABULARY, WINDOW, CONTEXT = 61, 8, 128
_SMALL = (
    dict.fromkeys("intermediate_size ffn_dim ffn_hidden_size".split(), 48)
    | dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size".split(), 16)
    | dict.fromkeys("linear_key_head_dim linear_value_head_dim".split(), 8)
    | dict.fromkeys("num_local_experts num_experts n_routed_experts state_size".split(), 4)
    | dict.fromkeys("num_experts_per_tok linear_num_key_heads linear_num_value_heads".split(), 2)
)
LARGEST = 5_000_000
"""Parameters of the tiny model at most: the check takes about a second."""
_ALLOWED, _TIMES = 0.05, 4.0
"""Relative error of a kernel that rounding always explains, and beyond it as a multiple of the plain kernel's error."""
# Rotary tables are float32 even in a float64 model, so that the last digits differ between packings.
CLONE_TOLERANCE = 1e-5
HEAD_TOKENS = 32
"""Tokens whose full logits check the head: few, since a vocabulary can be large."""
# Root mean square difference of a token's log-probability, shared and separate, that is still rounding.
_GROSS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15}
_FLOOR = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 5e-3}


def tiny_clone(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A float64 model with random weights (norms too), one period of the layer types and a window of 8. None where the
    architecture cannot be built that small."""
    with transformers_log_level(logging.ERROR), torch.random.fork_rng(devices=[]):
        for heads_too in (True, False):
            with suppress(Exception):  # any class of error: the report states that the model is unchecked
                return _build(_shrunk(config, heads_too))
    return None


def _build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in language_class(config).from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = language_class(config).from_config(
        config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        model(input_ids=torch.arange(5)[None], use_cache=False)
    return model


def _shrunk(config: PreTrainedConfig, heads_too: bool) -> Any:
    whole: Any = copy.deepcopy(config)
    small: Any = whole.get_text_config()
    old_layers = small.num_hidden_layers
    kinds = getattr(small, "layer_types", None) or []
    # Until every type of layer has occurred, at least two where there are two.
    layers = max([min(2, len(kinds) or old_layers), *(kinds.index(kind) + 1 for kind in kinds)])
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == old_layers:
            setattr(small, name, value[:layers])
    _set(small, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        try:
            setattr(small, token, None)
        except Exception:  # some families must have one, and each kind of check has an error of its own
            setattr(small, token, 0)
    if getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW
    for name, value in _SMALL.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, min(value, getattr(small, name)))
    if heads_too:
        _shrink_heads(small)
    alone: Any = AutoModelForCausalLM._model_mapping
    return small if small is whole or type(small) in alone else _with_small_tower(whole)


def _with_small_tower(whole: Any) -> Any:
    """A configuration whose language model, small already, has no class of its own, with a tower as small."""
    text, tower = whole.get_text_config(), whole.vision_config
    _set(tower, depth=1, num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_heads=2, num_attention_heads=2)
    _set(tower, out_hidden_size=text.hidden_size, deepstack_visual_indexes=[0], fullatt_block_indexes=[0])
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict):  # three kinds of positions share the frequencies, as many as half a head is wide
        half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return whole


def _shrink_heads(small: Any) -> None:
    """Four query heads, with key heads as the model has them: one each, in groups, or one for all."""
    heads, width = small.num_attention_heads, 16
    shared = {name: getattr(small, name, None) for name in ("num_kv_heads", "num_key_value_heads")}  # Falcon, others
    _set(small, num_attention_heads=4, hidden_size=4 * width)
    for name, count in shared.items():
        if count is not None:
            setattr(small, name, 4 if count == heads else 2 if count > 1 else 1)
    if vars(small).get("head_dim") is not None:  # where it is a property (Falcon), it follows from the rest
        small.head_dim = width
    if getattr(small, "word_embed_proj_dim", None) is not None:
        small.word_embed_proj_dim = small.hidden_size


def _set(config: Any, **values: Any) -> None:
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)


def check_kernel(
    clone: PreTrainedModel, groups: Sequence[Group], device: torch.device, dtype: torch.dtype, head: Head | None
) -> None:
    """Raise :class:`ModelError` where values or gradients of the fast kernel are further from the truth than rounding
    explains. ``clone`` is the float64 model."""
    rounded = copy.deepcopy(clone).to(dtype)
    truth = _scored(copy.deepcopy(rounded).to(torch.float64), groups, "loop", head)
    loop, fast = (_scored(copy.deepcopy(rounded).to(device), groups, kernel, head) for kernel in ("loop", "auto"))
    for what, right, plain, found in zip(("values", "gradients"), truth, loop, fast, strict=True):
        error, allowed = _error(found, right), max(_ALLOWED, _TIMES * _error(plain, right))
        if not error <= allowed:
            raise ModelError(
                f"{type(clone).__name__}: {what} by the fast attention kernel differ by {error:.2g} (relative) from the"
                f" right ones on a small copy in {dtype}, where {allowed:.2g} is rounding; give --attention loop, and"
                " please report this device"
            )


def _scored(
    model: PreTrainedModel, groups: Sequence[Group], attention: str, head: Head | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradients of packed scoring; the model has its own attention again."""
    scorer = Scorer(model.eval(), attention=attention, head=head)
    device = next(model.parameters()).device
    found = _with_gradients(model, scorer(pack(groups, scorer.layout).to(device)))
    scorer.detach_hook()
    return found


def _with_gradients(model: PreTrainedModel, logp_M: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log-probabilities [M], and all gradients of a weighted sum of them in one vector, in float64."""
    weights = [p for p in model.parameters() if p.requires_grad]  # a router's bias may be frozen by its class
    upstream = torch.linspace(-1, 1, len(logp_M), dtype=logp_M.dtype, device=logp_M.device)
    grads = torch.autograd.grad((logp_M * upstream).sum(), weights, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]
    return logp_M.detach().double().cpu(), torch.cat([g.double().flatten().cpu() for g in flat])


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@dataclass(frozen=True, slots=True)
class CheckReport:
    """``clone_error``: largest relative difference on the tiny model (None: it could not be built). ``sharing_error``
    and ``noise``: root mean square difference of a token's log-probability, in nats, between shared and separate
    scoring and between two packings."""

    clone_error: float | None
    sharing_error: float
    noise: float
    unit: str = "nats per token"

    def tolerance(self, tokens: float) -> float:
        """Largest log-ratio, in nats, that rounding explains for a response with this many tokens."""
        return 10 * self.noise * math.sqrt(tokens)


def check_scoring(scorer: Scorer, groups: Sequence[Group]) -> CheckReport:
    """Check with a few of ``groups``. Raises :class:`ModelError` where scoring would be wrong."""
    model = causal_model(scorer.model)
    clone_error = _checked_clone(scorer)
    check_packed(model, scorer.dtype)
    sharing, noise = _real_differences(scorer, groups)
    gross, name = _GROSS[scorer.dtype], type(model).__name__
    if not max(sharing, noise) < gross:
        raise ModelError(
            f"{name}: log-probabilities differ by {max(sharing, noise):.2g} per token between shared and separate"
            f" scoring in {scorer.dtype} (up to {gross:g} is rounding); try --attention loop or --dtype float32"
        )
    head = _head_difference(scorer, groups[0])
    if not head < gross:
        raise ModelError(
            f"{name}: log-probabilities differ by {head:.2g} per token from those of the model's own logits in"
            f" {scorer.dtype} (up to {gross:g} is rounding); please report this architecture"
        )
    return CheckReport(clone_error, sharing, max(noise, _FLOOR[scorer.dtype]))


def check_scalars(scorer: ScalarScorer, groups: Sequence[Group]) -> CheckReport:
    """The same for rewards, against the class's own forward, one response per call. In the report ``sharing_error`` and
    ``noise`` are in units of the reward. Raises :class:`ModelError`."""
    model = causal_model(scorer.model)
    clone_error = _checked_clone(scorer)
    check_packed(model, scorer.dtype)
    device, some = next(scorer.model.parameters()).device, _typical(groups)
    with torch.no_grad():
        together = scorer(pack(some, scorer.layout).to(device))
        noise = _rms(together - torch.cat([scorer(pack([g], scorer.layout).to(device)) for g in some]))
        ends = [g.sequences(k)[-1] for g in some for k in range(len(g.continuations))]
        rows = [torch.from_numpy(ids[: int(np.flatnonzero(on)[-1]) + 1]).long().to(device)[None] for ids, on in ends]
        placed = [g.placed(k) for g in some for k in range(len(g.continuations))]
        more = [
            scorer.vision.own_arguments(x, [p.picture for p in ps]) if ps else {}
            for x, ps in zip(rows, placed, strict=True)
        ]
        with scorer.attention_by(None), scorer.gathered():
            own = [
                model(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False, **given).logits[0, 0]
                for x, given in zip(rows, more, strict=True)
            ]
    sharing = _rms(together + scorer.shift - torch.stack(own).to(together.dtype))
    gross = _GROSS[scorer.dtype] * max(1.0, float(together.abs().max()))
    if not max(sharing, noise) < gross:
        raise ModelError(
            f"{type(model).__name__}: rewards differ by {max(sharing, noise):.2g} between packed scoring and the"
            f" class's own forward in {scorer.dtype} (up to {gross:.2g} is rounding); try --attention loop or --dtype"
            " float32, and see that no response ends with the pad token"
        )
    return CheckReport(clone_error, sharing, max(noise, _FLOOR[scorer.dtype]), "of a reward")


def _checked_clone(scorer: PackedModel) -> float | None:
    """The error on the tiny model of the scorer's architecture; None where it cannot be built."""
    model, head = causal_model(scorer.model), getattr(scorer, "head", None)
    clone = tiny_clone(model.config)
    if clone is None:
        return None
    with uncounted():
        if (ahead := _sees_ahead(clone)) > CLONE_TOLERANCE:
            raise ModelError(
                f"{type(model).__name__} is not causal: on a small copy logits change by {ahead:.1e} (relative) with"
                " what comes after them; prefopt trains causal language models"
            )
        error = clone_difference(clone, scorer.attention, head=head)
        if not error < CLONE_TOLERANCE:
            raise ModelError(
                f"{type(model).__name__}: packed scoring differs from the model's own forward by {error:.1e}"
                " (relative) on a small copy; please report this architecture"
            )
        if scorer.layout.share and scorer.kernel in ("varlen", "flex"):
            check_kernel(clone, _random_groups(), next(model.parameters()).device, scorer.dtype, head)
    return error


def _typical(groups: Sequence[Group]) -> list[Group]:
    """A few groups of typical length, cheap enough for every start; with pictures, where there are some."""
    table = GroupTable.of(groups)
    order = np.argsort(np.abs(table.tokens_G - 300), kind="stable")
    if table.has_pictures:  # one with pictures comes first
        order = order[np.argsort(table.pictures_G[order] == 0, kind="stable")]
    return [groups[i] for i in order[:3].tolist()]


@torch.no_grad()
def _sees_ahead(clone: PreTrainedModel) -> float:
    """How far logits depend on later tokens, relative to the largest; 0 for a causal model."""
    ids = torch.arange(2, 14)[None] % VOCABULARY
    other = ids.clone()
    other[0, 8:] += 20
    one, two = (clone(input_ids=x, use_cache=False).logits[0, :8] for x in (ids, other))
    return float((one - two).abs().max() / one.abs().max())


def clone_difference(clone: PreTrainedModel, attention: str = "auto", *, head: Head | None = None) -> float:
    """Largest difference of values and of gradients, relative to the largest of each, on the tiny float64 model."""
    groups = _random_groups()
    expected = _with_gradients(clone, _separately(clone, groups))
    found = _scored(clone, groups, attention, head)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))


def _separately(model: PreTrainedModel, groups: Sequence[Group]) -> torch.Tensor:
    """Token log-probabilities [M] by the model's own forward, one sequence per call: the oracle."""
    device, parts = next(model.parameters()).device, []
    for ids, trained in _sequences(groups):
        ids = ids.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        where = trained.nonzero()[:, 0].to(device)
        parts.append(logp[where - 1, ids[where]])
    return torch.cat(parts)


def _sequences(groups: Sequence[Group]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and mask of every step of every response, prompt included."""
    for group in groups:
        for ids, trained in (one for k in range(len(group.continuations)) for one in group.sequences(k)):
            yield torch.from_numpy(np.asarray(ids)).long(), torch.from_numpy(np.asarray(trained))


def _random_groups() -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for prefix, *lengths in ((11, 7, 13), (3, 17, 2, 9), (1, 1, 5)):
        start = rng.integers(0, VOCABULARY, prefix)
        sequences = []
        for length in lengths:
            ids = np.concatenate([start, rng.integers(0, VOCABULARY, length)])
            sequences.append((ids, np.arange(len(ids)) >= prefix))
        groups.append(Group.from_sequences(sequences, row=0))
    return groups


@torch.no_grad()
def _real_differences(scorer: Scorer, groups: Sequence[Group]) -> tuple[float, float]:
    some = _typical(groups)
    device = next(scorer.model.parameters()).device
    together = scorer(pack(some, scorer.layout).to(device))
    apart = torch.cat([scorer(pack([g], scorer.layout).to(device)) for g in some])
    noise = _rms(together - apart)
    if not scorer.layout.share:
        return 0.0, noise
    with scorer.attention_by(None), scorer.gathered():
        plain = Scorer(scorer.model, share=False, head=scorer.head)
        separate = plain(pack(some[:1], plain.layout).to(device))
    return _rms(apart[: len(separate)] - separate), noise


@torch.no_grad()
def _head_difference(scorer: Scorer, group: Group) -> float:
    """The scorer compared with the model's own logits, on a few tokens."""
    ids = group.sequence(0)[0][:HEAD_TOKENS]
    start = [Group.from_sequences([(ids, np.arange(len(ids)) > 0)], row=0)]
    found = scorer(pack(start, scorer.layout).to(next(scorer.model.parameters()).device))
    with scorer.attention_by(None), scorer.gathered():
        return _rms(found - _separately(causal_model(scorer.model), start))


def _rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())
