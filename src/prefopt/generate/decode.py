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

from prefopt.generate.sampler import Ids
from prefopt.generate.slots import HOOK, Filling, Slots
from prefopt.model.architectures import body_of, causal_model
from prefopt.model.costs import count_pass, out_of_memory, uncounted
from prefopt.model.kernels.attention import gather_plan
from prefopt.model.packing import split
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
        """Continue with these sequences, in this order; one may occur several times."""

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of rows, float32 or float64."""
        return rows.to(torch.promote_types(self.scorer.dtype, torch.float32))


class SlotDecoder(Decoder):
    """Every sequence in a row of a static cache."""

    name = "slots"
    same_length = False
    hook = HOOK

    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        # The last token of every prompt is the first step: the head sees no other.
        before = [np.asarray(p, np.int64)[:-1] for p in prompts]
        lengths = [len(ids) for ids in before]
        longest = max(lengths)
        self.slots = Slots(torch.tensor([longest - n for n in lengths], device=self.device), longest)
        if longest:
            for part in split(range(len(before)), lengths, PREFILL_TOKENS[self.device.type]):
                self._fill([before[i] for i in part])
        return self.step(torch.tensor([int(p[-1]) for p in prompts], device=self.device))

    def _fill(self, prompts: Sequence[np.ndarray]) -> None:
        """Encode prompts packed end to end, and put their keys and values into slots."""
        ends = np.cumsum([len(ids) for ids in prompts])
        starts = [int(end) - len(ids) for end, ids in zip(ends, prompts, strict=True)]
        segments = tuple((a, int(b), 0, 0) for a, b in zip(starts, ends, strict=True) if b > a)
        # Slot j of a row holds token j - (length - end); slots left of a prompt are masked.
        index = torch.arange(self.slots.length) - self.slots.length + torch.from_numpy(ends)[:, None]
        kernel = self.scorer.kernel
        gather = gather_plan(segments, self.device) if kernel == "varlen" else None
        filling = Filling(self.slots, segments, index.clamp_(min=0).to(self.device), kernel, gather)
        positions = np.concatenate([np.arange(len(ids)) for ids in prompts])
        row = [torch.from_numpy(x).to(self.device) for x in (np.concatenate(prompts), positions)]
        self._forward(*row, filling=filling)

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        hidden = self._forward(token_n, self.slots.positions, slots=self.slots)
        self.slots.length += 1
        return hidden

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, **cache: Any) -> torch.Tensor:
        count_pass(self.model, ids.numel(), "decode")
        self.slots.called.clear()
        ids, positions = ids[None], positions[None]
        out = body_of(self.model)(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **cache)
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def keep(self, index: torch.Tensor) -> None:
        self.slots.keep(index)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        return self.scorer.logits(rows.to(self.scorer.dtype))


class _OwnForward(Decoder):
    """The model's own forward on rows of one length, for the last token's logits."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer)
        known = inspect.signature(type(self.model).forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def _ids(self, prompts: Sequence[Ids]) -> torch.Tensor:
        """Prompts of one length, [n, length]."""
        return torch.from_numpy(np.array([np.asarray(p, np.int64) for p in prompts])).to(self.device)

    def _forward(self, ids: torch.Tensor, **more: Any) -> Any:
        count_pass(self.model, ids.numel(), "decode")
        return self.model(input_ids=ids, return_dict=True, **self._last, **more)


class CacheDecoder(_OwnForward):
    """The model's own cache, whatever it contains."""

    name = "cache"

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
        return self._take(self._forward(self._ids(prompts), use_cache=True))

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        return self._take(self._forward(token_n[:, None], use_cache=True, **{self._argument: self.cache}))

    def _take(self, out: Any) -> torch.Tensor:
        """Keep the cache, and the name of its argument; returns logits of the last token."""
        names = ("past_key_values", "cache_params")
        name = next((n for n in names if hasattr(getattr(out, n, None), "reorder_cache")), None)
        if name is None:
            raise TypeError("the model returns no cache to continue from")
        self._argument, self.cache = name, getattr(out, name)
        last: torch.Tensor = out.logits[:, -1]
        return last

    def keep(self, index: torch.Tensor) -> None:
        self.cache.reorder_cache(index)


class WholeDecoder(_OwnForward):
    """No cache at all."""

    name = "whole"

    def start(self, prompts: Sequence[Ids]) -> torch.Tensor:
        self.ids = self._ids(prompts)
        return self._last_logits()

    def step(self, token_n: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat([self.ids, token_n[:, None]], 1)
        return self._last_logits()

    def _last_logits(self) -> torch.Tensor:
        last: torch.Tensor = self._forward(self.ids, use_cache=False).logits[:, -1]
        return last

    def keep(self, index: torch.Tensor) -> None:
        self.ids = self.ids[index]


def decoder_of(scorer: Scorer) -> tuple[type[Decoder], str | None]:
    """The fastest decoder that the model supports, and a line on what is slow where that is not the first."""
    if scorer.layout.share and not scorer.recurrent:
        return SlotDecoder, None
    if CacheDecoder.fits(scorer):
        why = scorer.reason or f"{scorer.recurrent[0]} keeps a state"
        return CacheDecoder, f"{why}: its own cache is used, and only prompts of one length share a batch"
    name = type(causal_model(scorer.model)).__name__
    return WholeDecoder, f"{name} returns no cache to continue from: every token encodes its whole sequence, slowly"
