"""Decoders: three ways to feed a causal language model one token after another, the fastest it supports.

========  =========================================================================================================
slots     models with shared-prefix attention: prompts are encoded in one packed row, then every sample reads and
          extends its own row of a static cache (:mod:`prefopt.generate.slots`); lengths may differ
cache     models with a cache of their own (recurrent and hybrid layers, ALiBi): their cache and attention, for prompts
          of one length, so that nothing is padded
whole     the rest: the whole sequence again for every token, for prompts of one length
========  =========================================================================================================
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prefopt.data.group import pictures_in
from prefopt.data.table import IndexArray
from prefopt.generate.packed_linear import is_packed
from prefopt.generate.sampler import Ids
from prefopt.generate.slots import HOOK, Filling, Slots
from prefopt.model.architectures import body_of, causal_model
from prefopt.model.costs import count_pass, out_of_memory, uncounted
from prefopt.model.kernels.attention import gather_plan
from prefopt.model.kernels.head import transformed
from prefopt.model.packing import ForwardPass, Segment, split
from prefopt.model.scorer import Scorer

PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Prompt tokens encoded at once."""


class Decoder(ABC):
    """A batch of sequences that grow by a token at a time.

    ``start`` and ``step`` return a row for each sequence that :meth:`logits` turns into logits, so that the caller can
    take a few rows at a time and the logits of a large batch are never in memory together.
    """

    name: str
    same_length = True
    """Whether the prompts of a batch must have one length."""
    hook: str | None = None
    """The attention implementation to use while decoding; None: the model's own."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.model = causal_model(scorer.model)
        self.device = next(scorer.model.parameters()).device

    @abstractmethod
    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        """Encode prompts, a sequence for each."""

    @abstractmethod
    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        """Append a token to each sequence."""

    @abstractmethod
    def keep(self, index: torch.Tensor) -> None:
        """Continue with these sequences, in this order; one may occur several times. ``index`` is on the CPU."""

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of rows, float32 or float64."""
        return rows.to(torch.promote_types(self.scorer.dtype, torch.float32))


class SlotDecoder(Decoder):
    """Every sequence in a row of a static cache."""

    name = "slots"
    same_length = False
    hook = HOOK

    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        self.slots = Slots(np.zeros(len(prompts), np.int64), self.device)
        return self.join(prompts, [[n] for n in range(len(prompts))])

    def join(self, prompts: Sequence[Ids], rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Encode prompts, each once for all of its ``rows``, whose sequences have ended (:meth:`retire`); a row for
        each prompt, as of :meth:`start`."""
        lengths = [len(prompt) for prompt in prompts]
        self.slots.place([n for many in rows for n in many], np.repeat(lengths, [len(many) for many in rows]))
        parts = split(range(len(prompts)), lengths, PREFILL_TOKENS[self.device.type])
        return torch.cat([self._fill([prompts[i] for i in part], [rows[i] for i in part]) for part in parts])

    def _fill(self, prompts: Sequence[Ids], rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Encode prompts packed end to end, and put their keys and values into slots; hidden states of their last
        tokens."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = np.cumsum(lengths)
        segments = tuple((int(b - n), int(b), 0, 0) for n, b in zip(lengths, ends, strict=True))
        # The last slots of a row hold the last tokens of its prompt; slots left of a short prompt are masked.
        longest = int(lengths.max())
        at = np.maximum(np.repeat(ends, [len(many) for many in rows])[:, None] + np.arange(-longest, 0), 0)
        ids = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
        positions = np.concatenate([np.arange(n) for n in lengths])
        flat = np.array([n for many in rows for n in many])
        kernel = self.scorer.kernel
        gather = gather_plan(segments, self.device) if kernel == "varlen" else None
        on_device = [torch.from_numpy(x).to(self.device) for x in (ids, positions, flat, at, ends - 1)]
        filling = Filling(self.slots, segments, on_device[2], on_device[3], kernel, gather)
        given = self._with_pictures(prompts, rows, ids, segments, on_device[0])
        positions_T = given.pop("position_ids", on_device[1][None])
        return self._forward(on_device[0], positions_T, filling=filling, **given)[on_device[4]]

    def _with_pictures(
        self,
        prompts: Sequence[Ids],
        rows: Sequence[Sequence[int]],
        ids: IndexArray,
        segments: tuple[Segment, ...],
        ids_T: torch.Tensor,
    ) -> dict[str, Any]:
        """What the model is given for pictures in a row of prompts, whose slots get the positions that follow."""
        starts = [segment[0] for segment in segments]
        found = [p.moved(start) for prompt, start in zip(prompts, starts, strict=True) for p in pictures_in(prompt)]
        if not found:
            return {}
        row = ForwardPass(ids_T, ids_T, segments, pictures=tuple(found), host_ids=ids)
        given = self.scorer.vision.arguments(row, shared=True)
        if "position_ids" in given:
            highest = given["position_ids"].amax((0, 1)).cpu().numpy()
            for (start, stop, *_), of in zip(segments, rows, strict=True):
                self.slots.shifted(of, int(highest[start:stop].max()) + 1 - (stop - start))
        return given

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        self.slots.make_room()
        hidden = self._forward(token_n, self.slots.positions[None], slots=self.slots)
        self.slots.length += 1
        return hidden

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, **cache: Any) -> torch.Tensor:
        count_pass(self.model, ids.numel(), "decode")
        self.slots.called.clear()
        given = {"input_ids": ids[None], "position_ids": positions, "use_cache": False, "return_dict": True}
        out = body_of(self.model)(**given, **cache)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def keep(self, index: torch.Tensor) -> None:
        self.slots.keep(index)

    def retire(self, rows: IndexArray) -> None:
        """The sequences of ``rows`` have ended: they may be stepped on, for nothing, until prompts :meth:`join`."""
        self.slots.retire(rows)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        head, how = self.model.get_output_embeddings(), self.scorer.head
        rows = rows.to(self.scorer.dtype)
        wide = torch.promote_types(rows.dtype, torch.float32)
        if (
            how.kind == "fused" and is_packed(head) and (rows.dtype == wide or head.bias is None)
        ):  # added to wide logits
            return transformed(head(rows).to(wide), how.scale, how.softcap)
        return self.scorer.logits(rows)


class _OwnForward(Decoder):
    """The model's own forward on rows of one length, for the last token.

    A class computes logits in the model's dtype. Where that is narrower than float32, its layers alone are called, and
    logits are made of hidden states as the scorer makes them: what is drawn from must be no coarser.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer)
        narrow = scorer.dtype != torch.promote_types(scorer.dtype, torch.float32)
        self._by_scorer = narrow and scorer.head.kind != "model"
        known = inspect.signature(type(self.model).forward).parameters
        limits = not self._by_scorer and "logits_to_keep" in known
        self._options: dict[str, Any] = {"logits_to_keep": 1} if limits else {}

    def _ids(self, prompts: Sequence[Ids]) -> torch.Tensor:
        """Prompts of one length, [n, length]."""
        return torch.from_numpy(np.array([np.asarray(p, np.int64) for p in prompts])).to(self.device)

    def _forward(self, ids: torch.Tensor, **more: Any) -> Any:
        count_pass(self.model, ids.numel(), "decode")
        module = body_of(self.model) if self._by_scorer else self.model
        return module(input_ids=ids, return_dict=True, **self._options, **more)

    def _last(self, out: Any) -> torch.Tensor:
        """What :meth:`logits` takes of the last token of each row."""
        last: torch.Tensor = (out.last_hidden_state if self._by_scorer else out.logits)[:, -1]
        return last

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.scorer.logits(rows.to(self.scorer.dtype)) if self._by_scorer else super().logits(rows)


class CacheDecoder(_OwnForward):
    """The model's own cache, whatever it contains."""

    name = "cache"
    _next_N: torch.Tensor | None = None
    """The next position of each sequence, where a picture has more tokens than positions."""

    @staticmethod
    def fits(scorer: Scorer) -> bool:
        """Whether the model returns a cache that it continues from and whose rows can be selected, by trying it."""
        decoder = CacheDecoder(scorer)
        ids = torch.zeros(2, 3, dtype=torch.long, device=decoder.device)
        with torch.no_grad(), scorer.attention_by(None):
            try:
                decoder._take(decoder._forward(ids, use_cache=True))
                # Three rows of two: a part of the cache that is left as it was fits neither, nor is it broadcast.
                decoder.keep(torch.tensor([0, 1, 1], device=decoder.device))
                with uncounted():
                    decoder.step(ids[0])
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                return False  # no usable cache: whole sequences work for every architecture
        return True

    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        ids = self._ids(prompts)
        pictures = [pictures_in(prompt) for prompt in prompts]
        given = self.scorer.vision.of_prompts(ids.cpu().numpy(), pictures, self.device) if any(pictures) else {}
        if hasattr(body_of(self.model), "get_rope_index"):
            # Left out, they would be those of the prompts that the class was given last.
            counted = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
            positions = given.setdefault("position_ids", counted)
            self._next_N = positions.amax((0, 2)) + 1
        return self._take(self._forward(ids, use_cache=True, **given))

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        given = {self._argument: self.cache}
        if self._next_N is not None:
            given["position_ids"] = self._next_N[None, :, None].expand(3, -1, 1)
            self._next_N = self._next_N + 1
        return self._take(self._forward(token_n[:, None], use_cache=True, **given))

    def _take(self, out: Any) -> torch.Tensor:
        """Keep the cache, and the name of its argument; returns the last token's rows."""
        names = ("past_key_values", "cache_params")
        name = next((n for n in names if hasattr(getattr(out, n, None), "reorder_cache")), None)
        if name is None:
            raise TypeError("the model returns no cache to continue from")
        self._argument, self.cache = name, getattr(out, name)
        return self._last(out)

    def keep(self, index: torch.Tensor) -> None:
        index = index.to(self.device)
        self.cache.reorder_cache(index)
        self._next_N = None if self._next_N is None else self._next_N[index]


class WholeDecoder(_OwnForward):
    """No cache at all."""

    name = "whole"

    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        self.ids = self._ids(prompts)
        return self._last(self._forward(self.ids, use_cache=False))

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat([self.ids, token_n[:, None]], 1)
        return self._last(self._forward(self.ids, use_cache=False))

    def keep(self, index: torch.Tensor) -> None:
        self.ids = self.ids[index.to(self.device)]


def decoder_of(scorer: Scorer) -> tuple[type[Decoder], str | None]:
    """The fastest decoder that the model supports, and a line on what is slow where that is not the first."""
    if scorer.layout.share and not scorer.recurrent:
        return SlotDecoder, None
    if CacheDecoder.fits(scorer):
        why = scorer.reason or f"{scorer.recurrent[0]} keeps a state"
        return CacheDecoder, f"{why}: its own cache is used, and only prompts of one length share a batch"
    name = type(causal_model(scorer.model)).__name__
    return WholeDecoder, f"{name} returns no cache to continue from: every token encodes its whole sequence, slowly"
