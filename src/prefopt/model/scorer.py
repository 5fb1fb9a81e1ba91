"""The scorer: the root module whose forward pass returns token log-probabilities of packed batches.

All scoring goes through its forward, so that wrappers (activation checkpointing, sharding) see one call, and nothing
uses the head from outside. Shared prefixes are encoded once and nothing is padded. :class:`PackedModel` computes the
last hidden states; :mod:`prefopt.model.scalar` reads rewards and values from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from prefopt.errors import ModelError, UserError, first_line
from prefopt.model.architectures import (
    attention_shapes,
    body_of,
    causal_model,
    class_logits,
    head_weights,
    layers_of,
    rope_limit,
    sharing_obstacle,
)
from prefopt.model.costs import Purpose, count_pass, out_of_memory
from prefopt.model.kernels import flash, varlen
from prefopt.model.kernels.attention import HOOK, TRIAL, HookReached, UnshareableError, gather_plan, kernel_for
from prefopt.model.kernels.divergence import Divergence
from prefopt.model.kernels.head import (
    FORWARD,
    Compared,
    Distributions,
    TokenScores,
    head_logits,
    head_scores,
    logit_scores,
    module_logprobs,
    token_logprobs,
    transformed,
    vocabulary_of,
    wide_dtype,
)
from prefopt.model.kernels.head_class import Head, head_of
from prefopt.model.kernels.shared import segments_tensor
from prefopt.model.offload import HeldElsewhere, HostActivations
from prefopt.model.packing import ForwardPass, PackedBatch, PackLayout
from prefopt.model.pictures import VisionInputs, attention_configs, own_attention
from prefopt.model.recurrence.mixers import mask_for, mixers_of, share_prefixes

if TYPE_CHECKING:
    from prefopt.model.compiled import CompiledLayers


def version_of(dtype: torch.dtype) -> int:
    """Part of the key of cached values computed in ``dtype``: raised whenever they change beyond rounding."""
    return 1 if dtype == wide_dtype(dtype) else 2


class PackedModel(torch.nn.Module):
    """Last hidden states of packed batches, by a transformers model or one wrapped by PEFT.

    ``attention`` is ``auto`` or ``loop`` (the plain kernel). ``share=False`` encodes every response in a row of its
    own with the model's own attention, as for models that cannot share a prefix. ``pictures``: some rows have them.
    """

    def __init__(
        self, model: torch.nn.Module, *, attention: str = "auto", share: bool = True, pictures: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        causal = causal_model(model)
        if getattr(causal.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(causal).__name__} is an encoder-decoder; prefopt trains causal language models")
        config = causal.config.get_text_config()
        self.reason = sharing_obstacle(causal, config) if share else "sharing is switched off"
        self.pictures, self.cut_towers = pictures, False  # the latter set where towers are cut into shards
        self.layout = PackLayout(self.reason is None, rope_limit(config))
        self.attention = attention
        self.compiled: CompiledLayers | None = None
        self.compute_dtype: torch.dtype | None = None  # set where weights are gathered in another dtype than they have
        self.shards: HeldElsewhere | None = None  # set where parameters have their values within ``gathered`` alone
        self.outer_weights: Callable[[], AbstractContextManager[None]] = nullcontext  # set by weights in shards
        self.most_passes: Callable[[int], int] | None = None
        """Where every pass must be made by all ranks (shards): the largest of their numbers of passes."""
        self.offload: HostActivations | None = None  # set where activations wait for backward in host memory
        self._configs, self._tower_configs = attention_configs(causal)
        self._attention_before = [getattr(c, "_attn_implementation", None) for c in self._configs]
        self.recurrent = sorted(type(m).__name__ for m in mixers_of(causal))
        """Classes of the recurrent layers that share prefixes."""
        self.attach_hook()
        if self.layout.share and (reason := self._try_hook()):
            self.separate(reason)
        self.choose_flash()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """In this block the parameters have their values, so that the model may be called past this scorer. They always
        do, unless they are held in ``shards`` or cut themselves (then layers gather theirs as they are called): all
        ranks enter and leave the block together, and no other pass is made."""
        with self.outer_weights() if self.shards is None else self.shards.gathered():
            yield

    @cached_property
    def vision(self) -> VisionInputs:
        """What the model is given for rows with pictures. Raises :class:`ModelError` where it takes none."""
        return VisionInputs(causal_model(self.model))

    def separate(self, reason: str) -> None:
        """Encode every response in a row of its own from now on, for this reason."""
        self.detach_hook()
        self.layout, self.reason = PackLayout(False, self.layout.rope_limit), reason

    def choose_flash(self) -> None:
        """Switch on the best flash attention for the device that the weights are on: again where they have moved."""
        device = next(self.model.parameters()).device
        try:
            if self.kernel != "varlen":
                return
            shapes = attention_shapes(causal_model(self.model).config)
        except Exception:  # of any kind, from the model's configuration
            return
        fitting = [s for s in shapes if varlen.takes(s.key_width, s.value_width)]
        windows = [s.window for s in fitting if s.window is not None]
        heads = sorted({(s.heads, s.key_heads, varlen.padded_width(s.key_width, s.value_width)) for s in fitting})
        flash.activate(device, self.dtype, heads, min(windows, default=None))

    @property
    def flash_takes_all(self) -> bool:
        """Whether flash attention computes every layer of packed rows; FlexAttention and plain code take the others."""
        config = causal_model(self.model).config.get_text_config()
        if self.kernel != "varlen" or getattr(config, "attn_logit_softcapping", None):
            return False
        return all(varlen.takes(s.key_width, s.value_width) for s in attention_shapes(config))

    def compile_layers(self, *, backend: str = "inductor") -> str:
        """Compile the layers from now on. Returns a line that says so, or why not."""
        if not self.layout.share:
            return f"layers are not compiled: each response is scored separately, since {self.reason}"
        if self.all_recurrent:
            return f"layers are not compiled: all are recurrent ({self.recurrent[0]})"
        if self.compiled is None:
            from prefopt.model.compiled import CompiledLayers  # the compiler takes a second to import

            self.compiled = CompiledLayers(self.model, backend=backend)
        which = "layers" if not self.recurrent else f"layers without {self.recurrent[0]}"
        return f"{which}: compiled (torch.compile, {backend}) when they are first used, which takes a minute or two"

    def release(self) -> None:
        """Restore the model's own attention and layers, for its owner."""
        self.detach_hook()
        if self.compiled is not None:
            self.compiled.release()
            self.compiled = None

    def _try_hook(self) -> str | None:
        """Why the first attention layer cannot take shared prefixes, in one line; None where it can. Two tokens are
        computed up to that layer. Raises :class:`NotCausalError`, and :class:`ModelError` where even that fails."""
        model = causal_model(self.model)
        device = next(model.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        extra: dict[str, Any] = {"prefix_segments": ((0, 2, 0, 0),), "prefix_kernel": TRIAL}
        extra |= mask_for(body_of(model), extra["prefix_segments"])
        if self.recurrent:  # others make a cache, as for sampling: what has none is found here
            extra["use_cache"] = False
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of checkpointing without gradients
                body_of(model)(input_ids=ids, position_ids=torch.arange(2, device=device)[None], **extra)
        except HookReached:
            return None
        except UnshareableError as refusal:
            return str(refusal)
        except UserError:
            raise
        except Exception as error:  # any class: it depends on config.json
            if out_of_memory(error):
                raise
            raise ModelError(
                f"{type(model).__name__} cannot compute two tokens ({first_line(error)}); is its config.json as saved?"
            ) from error
        if len(self.recurrent) == len(layers_of(model)):
            return None  # it has no attention, and every layer was computed
        return f"{type(model).__name__} never calls the attention hook of transformers"

    @property
    def all_recurrent(self) -> bool:
        """Whether there is a recurrent layer that shares prefixes in every block."""
        return bool(self.recurrent) and all(mixers_of(layer) for layer in layers_of(self.model))

    @property
    def path(self) -> str:
        """``shared`` or ``separate``: part of the key of cached values."""
        return "shared" if self.layout.share else "separate"

    @property
    def kernel(self) -> str:
        """The attention kernel in use: part of the key of cached values."""
        if not self.layout.share:
            return str(self._attention_before[0])
        return kernel_for(next(self.model.parameters()).device, self.dtype, self.attention)

    @property
    def kernel_version(self) -> str:
        """The kernel with the implementation behind it, where there are several: part of the key of cached values."""
        return f"varlen, {flash.implementation()}" if self.kernel == "varlen" else self.kernel

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        weight: torch.Tensor = causal_model(self.model).get_input_embeddings().weight
        return weight.dtype

    def attach_hook(self) -> None:
        """Use shared-prefix attention, where the model can share."""
        if self.layout.share:
            self._set_attention([HOOK] * len(self._configs))

    def detach_hook(self) -> None:
        """Use the model's own attention, for generation or for its owner."""
        self._set_attention(self._attention_before)

    @contextmanager
    def attention_by(self, hook: str | None) -> Iterator[None]:
        """Use another attention in this block, by its name in transformers; None: the model's own."""
        before = [getattr(c, "_attn_implementation", None) for c in self._configs]
        try:
            self._set_attention(self._attention_before if hook is None else [hook] * len(before))
            yield
        finally:
            self._set_attention(before)

    def _set_attention(self, names: Sequence[str | None]) -> None:
        with own_attention(self._tower_configs):
            for config, name in zip(self._configs, names, strict=True):
                config._attn_implementation = name
        if self.recurrent:
            share_prefixes(self.model, names[0] == HOOK)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Last hidden states [T, H] of all passes, end to end, as ``batch.read`` and ``batch.last`` index them."""
        return self._of_passes(batch, self._hidden)

    def _of_passes(self, batch: PackedBatch, compute: Callable[[ForwardPass], torch.Tensor]) -> torch.Tensor:
        """``compute`` of all passes of a batch, end to end; more passes, for nothing, where another rank has more."""
        several = not self.layout.share or self.layout.rope_limit is not None
        idle = self.most_passes(len(batch.passes)) - len(batch.passes) if self.most_passes and several else 0
        pictured = any(row.pictures for row in batch.passes) and not batch.passes[0].ids.is_meta
        cut = self.most_passes if self.cut_towers else None
        with self.vision.encoding(batch.passes, cut) if pictured or cut else nullcontext():
            # First, since routers are read from the last passes.
            nothing = [0 * compute(batch.passes[0]).sum() for _ in range(idle)]
            return sum(nothing, torch.cat([compute(row) for row in batch.passes]))

    def count(self, row: ForwardPass) -> None:
        """Count a forward pass in :mod:`prefopt.model.costs`."""
        purpose: Purpose = "train" if torch.is_grad_enabled() else "score"
        count_pass(causal_model(self.model), row.ids.numel(), purpose)

    def _hidden(self, row: ForwardPass) -> torch.Tensor:
        self.count(row)
        body = body_of(causal_model(self.model))
        extra: dict[str, Any] = {}
        compiled = self.compiled if self.compiled is not None and self.compiled.failure is None else None
        if self.layout.share:
            kernel = self.kernel
            extra = {"position_ids": row.positions[None], "prefix_segments": row.segments, "prefix_kernel": kernel}
            if compiled is not None:
                extra["prefix_segments"] = segments_tensor(row.segments)
            elif kernel == "varlen":
                extra["prefix_gather"] = gather_plan(row.segments, row.ids.device)
            extra |= mask_for(body, row.segments)
        if row.pictures and not row.ids.is_meta:
            extra |= self.vision.arguments(row, shared=self.layout.share)
        saving = self.offload.saving() if self.offload is not None and torch.is_grad_enabled() else nullcontext()
        with compiled.settings() if compiled is not None else nullcontext(), saving:
            out = body(input_ids=row.ids[None], use_cache=False, return_dict=True, **extra)
        return cast(torch.Tensor, out.last_hidden_state[0])


class ScoreRequest(NamedTuple):
    """Values that a forward pass returns beside log-probabilities: the log of summed ``squares`` of probabilities, the
    ``divergence`` from a ``reference``, its own ``distributions``, and the ``hidden`` states."""

    squares: bool = False
    reference: Compared | None = None
    distributions: bool = False
    hidden: bool = False
    divergence: Divergence = FORWARD


class Scorer(PackedModel):
    """Token log-probabilities of packed batches by a causal language model, or one wrapped by PEFT. Arguments as of
    :class:`PackedModel`. ``head``: how logits are computed; None: found out (see :mod:`prefopt.model.kernels.head`)."""

    def __init__(self, model: torch.nn.Module, *, head: Head | None = None, **how: Any) -> None:
        super().__init__(model, **how)
        causal = causal_model(model)
        self.head = head_of(causal) if head is None else head
        if self.head.kind == "model" and self.layout.share:
            self.separate(f"{type(causal).__name__} does not tell its layers from its head")

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """In this block logits are divided by ``temperature``. After a soft-cap c that is c / T tanh(z / c): another
        scale and another cap."""
        before = self.head
        cap = None if before.softcap is None else before.softcap / temperature
        self.head = replace(before, scale=before.scale / temperature, softcap=cap)
        try:
            yield
        finally:
            self.head = before

    def forward(self, batch: PackedBatch, request: ScoreRequest | None = None) -> torch.Tensor | TokenScores:
        """Log-probability [M] of every scored token, float32 (float64 for a float64 model); more with ``request``."""
        head, how = self._head_module(), self.head
        # Mamba ends with its residual in float32, whatever its weights are in.
        hidden = self._own_logits(batch) if how.kind == "model" else batch.read_from(self.hidden(batch)).to(self.dtype)
        fused, squares = how.kind == "fused", request is not None and request.squares
        options = {"bias": head.bias, "scale": how.scale, "softcap": how.softcap} if fused else {}
        if request is not None and request.reference is not None:
            if fused:
                options |= {"divergence": request.divergence}
                scores = head_scores(hidden, head.weight, batch.target, request.reference, **options)
            else:
                scores = logit_scores(self.logits, hidden, batch.target, request.reference, request.divergence)
            return self._complete(scores, hidden, request)
        if fused:
            logp_M, square_M = token_logprobs(hidden, head.weight, batch.target, squares=squares, **options)
        else:
            logp_M, square_M = module_logprobs(self.logits, hidden, batch.target, self._vocabulary, squares=squares)
        if request is None:
            return logp_M
        return self._complete(TokenScores(logp_M, square_M if squares else None), hidden, request)

    def _complete(self, scores: TokenScores, hidden: torch.Tensor, request: ScoreRequest) -> TokenScores:
        """Add hidden states and distributions where they are requested."""
        if request.hidden:
            scores = scores._replace(hidden_M=hidden)
        if not request.distributions:
            return scores
        kept, frozen = hidden.detach(), self._frozen_head()
        made = Distributions(self._vocabulary, lambda rows: self.logits(kept[rows], frozen).detach())
        return scores._replace(distributions=made)

    @property
    def _vocabulary(self) -> int:
        return vocabulary_of(self._head_module())

    def _head_module(self) -> Any:
        head: Any = causal_model(self.model).get_output_embeddings()
        assert head is not None
        return head

    def _frozen_head(self) -> dict[str, torch.Tensor]:
        """The current weights of the head, also after others are swapped in."""
        if self.head.kind == "class":
            return head_weights(causal_model(self.model))
        weights = {name: p.data for name, p in self._head_module().named_parameters()}
        if self.compute_dtype is not None:  # what was gathered for this pass will be forgotten
            weights = {name: w.clone() for name, w in weights.items()}
        return weights

    def logits(self, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [rows, V] of hidden [rows, H], float32 or wider, by the head, with other ``weights`` where given."""
        head, how = self._head_module(), self.head
        if how.kind == "fused":
            weight, bias = (weights or {}).get("weight", head.weight), (weights or {}).get("bias", head.bias)
            z = head_logits(hidden, weight, bias)
        elif how.kind == "class":
            z = class_logits(causal_model(self.model), hidden, weights)
        elif how.kind == "model":
            return hidden.clone()  # they are logits; kernels write into them
        else:
            z = head(hidden) if weights is None else torch.func.functional_call(head, weights, (hidden,))
        return transformed(z.to(wide_dtype(z.dtype)), how.scale, how.softcap)

    def _own_logits(self, batch: PackedBatch) -> torch.Tensor:
        """Logits [M, V] by the whole model, which are in memory: for models whose head is not separate."""

        def compute(row: ForwardPass) -> torch.Tensor:
            self.count(row)
            out = causal_model(self.model)(input_ids=row.ids[None], use_cache=False, return_dict=True)
            return cast(torch.Tensor, out.logits[0])

        z = self._of_passes(batch, compute).index_select(0, batch.read)
        return z.to(wide_dtype(z.dtype)) * self.head.scale


def response_sums(logp_M: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sum of each response's token log-probabilities [N], in float64 where the device has it."""
    wide = logp_M if logp_M.device.type == "mps" else logp_M.double()
    return wide.new_zeros(len(batch.length)).index_add(0, batch.owner, wide)
