"""Memory of a training pass, counted before it is made.

The model's own code is run on ``meta`` tensors, which have shapes and no contents: forward and backward, head and all,
with adapters, checkpointing and offloading as they are, for two layers of each kind, and a few more with offloading.
What every layer keeps for backward and needs for a moment is read off, and added up for the whole depth::

    peak = embedded + max( layers before + forward pass of the next,  all layers + head,
                           layers up to the i-th + backward pass of the i-th,  embedding's backward pass )

Gradients of weights are there from the start, as in all but the first micro-batch of a step. Memory that libraries take
for themselves and what an allocator loses to fragments is not counted.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from prefopt.data.group import Group
from prefopt.model.architectures import causal_model, towers_of
from prefopt.model.costs import uncounted
from prefopt.model.kernels.device import meta_as
from prefopt.model.offload import AHEAD
from prefopt.model.packing import pack
from prefopt.model.placeholders import is_placeholder
from prefopt.model.precision import MasterWeights
from prefopt.model.quantised import is_quantised
from prefopt.model.scorer import PackedModel

META = torch.device("meta")
AnyScorer = TypeVar("AnyScorer", bound=PackedModel)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made in this block on devices of one kind: ``live`` now, and the ``peak`` since the last
    :meth:`mark`. Tensors that were there before do not count."""

    def __init__(self, kind: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind, self.live, self.peak = kind, 0, 0
        self.marks: dict[str, tuple[int, int]] = {}
        """By name: bytes live at the mark, and the most since the mark before."""
        self._known: set[int] = set()
        self._awaited: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._awaited is not None:
            self.mark(self._awaited)
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):
            return out  # a view, or written in place
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.kind:
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def mark(self, name: str) -> None:
        """Begin another phase."""
        self._awaited = None
        if name not in self.marks:  # layers run again to be differentiated
            self.marks[name] = (self.live, self.peak)
            self.peak = self.live

    def mark_next(self, name: str) -> None:
        """Begin another phase with the next operation, when the arguments of the functions that end here are gone."""
        if name not in self.marks:
            self._awaited = name


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes of one training pass beside weights and their gradients: ``kept`` between forward and backward by all
    layers, ``workspace`` on top of that at the ``peak``, and ``head``, on top of what is kept, around the head."""

    kept: int
    head: int
    peak: int

    @property
    def workspace(self) -> int:
        """What is needed for a moment."""
        return self.peak - self.kept

    def after(self, tower: PassMemory) -> PassMemory:
        """The memory of this pass with features that ``tower`` computes before it."""
        kept = tower.kept + self.kept
        return PassMemory(kept, self.head, max(tower.peak, tower.kept + self.peak))


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model without contents: a ``scorer`` on ``meta`` with few layers. ``depth``: for every layer of the model the
    one of these that it is like. ``kind``: that of the device whose kernels are counted. ``dtype``: that of
    computation."""

    scorer: PackedModel
    depth: tuple[int, ...]
    kind: str
    dtype: torch.dtype

    @classmethod
    def of(cls, scorer: PackedModel, *, kind: str | None = None, dtype: torch.dtype | None = None) -> Blueprint:
        """The blueprint of a scorer, whose weights may be on ``meta`` themselves, or placeholders; ``kind`` is that of
        its device. Raises :class:`ValueError` where it cannot be counted."""
        if is_quantised(scorer.model):
            raise ValueError("packed weights have no kernels without contents")
        like, taken = _alike(scorer.model, 2 if scorer.offload is None else 2 + AHEAD)
        twin = _without_contents(scorer, taken)
        kind = kind or next(scorer.model.parameters()).device.type
        return cls(twin, tuple(like), kind, dtype or scorer.dtype)

    def gathered(self) -> int:
        """Bytes that a model in shards (FSDP2) puts together: the weights of two layers, and of what is in no layer;
        and gradients of one of these, also in float32, in which they are summed."""
        narrow, wide = self.dtype.itemsize, torch.promote_types(self.dtype, torch.float32).itemsize
        layers = [list(layer.parameters()) for layer in _layers(self.scorer.model)]
        within = {id(p) for layer in layers for p in layer}
        outside = [p for p in self.scorer.parameters() if id(p) not in within]
        sizes = [sum(p.numel() for p in some) for some in (*layers, outside)]
        trained = [sum(p.numel() for p in some if p.requires_grad) for some in (*layers, outside)]
        return narrow * (2 * max(sizes[:-1]) + sizes[-1]) + (narrow + wide) * max(trained)

    def count(self, groups: Sequence[Group]) -> PassMemory:
        """The memory of a training pass over ``groups``, scored together."""
        twin = self.scorer
        with meta_as(self.kind), uncounted(), torch.random.fork_rng(devices=[]), _AsOnDevice():
            weights = MasterWeights(twin.model, self.dtype)
            for parameter in weights.masters.values():
                parameter.grad = torch.zeros_like(parameter)
            batch = pack(groups, twin.layout).to(META)
            if len(batch.passes) > 1 and len(self.depth) > len(set(self.depth)):  # marks are of the first pass alone
                raise ValueError("responses take several passes")
            twin.train()
            try:
                with LiveBytes("meta") as live, _marked(twin, live):
                    found: Any = twin(batch)
                    found.sum().backward()
                    del found
                    live.mark("end")
            finally:
                weights.zero_grad()
                weights.release()
        return self._of_all_layers(live.marks)

    def _of_all_layers(self, marks: Mapping[str, tuple[int, int]]) -> PassMemory:
        few = max(self.depth) + 1
        before, _ = marks["embedded"]
        after = [before]
        after += [marks[f"forward {i}"][0] for i in range(few)]
        embedded, total, peak = before, 0, marks["end"][1]
        for i in self.depth:  # the layers of the model, each like one of the few
            peak = max(peak, embedded + total + marks[f"forward {i}"][1] - after[i])
            total += after[i + 1] - after[i]
            # Its backward pass ends where that of the layer before it begins, or that of the embedding.
            ends = next((n for n in (f"backward {i - 1}", "embedding") if n in marks), "end") if i else "embedding"
            begun = marks.get(ends, marks["end"])
            peak = max(peak, embedded + total + begun[1] - after[i + 1])
        last = marks.get(f"backward {few - 1}", marks["end"])
        head = last[1] - after[few]
        return PassMemory(embedded + total, head, max(peak, embedded + total + head))


@contextmanager
def _marked(twin: PackedModel, live: LiveBytes) -> Iterator[None]:
    """Marks where layers begin and end, forward and backward."""

    def reached(name: str, before: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if name not in live.marks and isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: live.mark(before))
            live.mark_next(name)

        return hook

    layers = _layers(twin.model)
    hooks = [layer.register_forward_hook(reached(f"forward {i}", f"backward {i}")) for i, layer in enumerate(layers)]

    def begins(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if "embedded" not in live.marks and isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: live.mark("embedding"))
        live.mark("embedded")

    hooks.append(layers[0].register_forward_pre_hook(begins, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _AsOnDevice(TorchFunctionMode):
    """What ``meta`` has not: scaled dot-product attention by a fused kernel, answers of tensors, and autocasting, which
    adapters on experts switch off. Models ask whether a row is one sequence (it is) and whether it holds a pad token
    (no)."""

    def __enter__(self) -> Any:
        self._autocast = torch.autocast
        torch.autocast = self._autocast_of_host  # type: ignore[misc, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.autocast = self._autocast  # type: ignore[misc]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _autocast_of_host(self, device_type: str, *given: Any, **options: Any) -> torch.autocast:
        return self._autocast("cpu" if device_type == "meta" else device_type, *given, **options)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func in (Tensor.__bool__, Tensor.__contains__) and args[0].is_meta:
            return func is Tensor.__bool__
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for x in (key, value))
    mask = attn_mask if attn_mask is None else attn_mask.to(query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return out


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a model. Raises :class:`ValueError` where they are in no list."""
    causal = causal_model(model)
    count = int(causal.config.get_text_config().num_hidden_layers)
    towers = {id(module) for tower in towers_of(causal) for module in tower.modules()}
    for module in causal.modules():
        if id(module) not in towers and isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(causal).__name__} has no list of {count} layers")


def _alike(model: torch.nn.Module, few: int) -> tuple[list[int], list[int]]:
    """For every layer the number of a layer like it, of those taken; and the places of these: the first ``few`` of each
    kind. Two at least, since the first layer of all has fewer gradients to compute; more where what layers have saved
    comes back ahead of its use, from as many layers as it may be saved in."""
    kinds = getattr(causal_model(model).config.get_text_config(), "layer_types", None)
    places: dict[Any, list[int]] = {}
    layers = _layers(model)
    keys = []
    for i, layer in enumerate(layers):
        shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
        keys.append((kinds[i] if kinds else "", shapes))
        some = places.setdefault(keys[-1], [])
        if len(some) < few:
            some.append(i)
    taken = sorted(i for some in places.values() for i in some)
    number = {place: n for n, place in enumerate(taken)}
    return [number.get(i, number[places[key][-1]]) for i, key in enumerate(keys)], taken


def _without_contents(scorer: AnyScorer, taken: Sequence[int]) -> AnyScorer:
    """A copy on ``meta`` with the layers at the places ``taken``."""
    layers = _layers(scorer.model)
    count = len(layers)
    memo: dict[int, Any] = {}
    for tensor in (*scorer.parameters(), *scorer.buffers()):
        if is_placeholder(tensor):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
        else:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    memo[id(layers)] = torch.nn.ModuleList(copy.deepcopy(layers[i], memo) for i in taken)
    if scorer.compiled is not None:  # the same operations, uncompiled
        memo[id(scorer.compiled)] = META
    twin = copy.deepcopy(scorer, memo)
    twin.compiled = None
    for number, place in enumerate(taken):
        if scorer.compiled is not None and any(layers[place] is layer for layer in scorer.compiled.layers):
            vars(memo[id(layers)][number]).pop("forward", None)
        for module in memo[id(layers)][number].modules():
            if getattr(module, "layer_idx", None) == place:
                module.layer_idx = number
    configs: list[Any] = [m.config for m in twin.modules() if isinstance(m, PreTrainedModel)]
    for config in {id(c): c for whole in configs for c in (whole, whole.get_text_config())}.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(config, name, [value[i] for i in taken])
        if hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = len(taken)
    return twin
