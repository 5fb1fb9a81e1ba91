"""The scorer: the root module whose forward pass returns token log-probabilities.

Everything that needs a model's opinion goes through here, so that wrappers (activation checkpointing, sharding)
see one forward call and nothing ever reaches for the head from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from prefopt.model.kernels.distributions import Distributions, TokenScores, head_scores, logit_scores, squares
from prefopt.model.kernels.head import (
    Head,
    class_logits,
    head_logits,
    head_of,
    head_weights,
    module_logprobs,
    token_logprobs,
    token_logprobs_and_squares,
    transformed,
    vocabulary_of,
    wide_dtype,
)
from prefopt.model.packed_model import PackedModel, body_of, causal_model
from prefopt.model.packing import PackedBatch

__all__ = [
    "NARROW_VERSION",
    "VERSION",
    "Asked",
    "Head",
    "PackedModel",
    "Scorer",
    "body_of",
    "causal_model",
    "response_sums",
    "version_of",
]

VERSION = 1
"""Part of the key of every cached value: raised whenever the scorer's results change beyond rounding."""

NARROW_VERSION = 2
"""The same for values computed in bfloat16 or float16, whose rounding has changed where float32's has not."""


def version_of(dtype: torch.dtype) -> int:
    """Which of the two is part of the key of values computed in ``dtype``."""
    return VERSION if dtype == wide_dtype(dtype) else NARROW_VERSION


class Asked(NamedTuple):
    """What a forward pass shall tell beside log-probabilities: the logarithm of summed ``squares`` of probabilities,
    how far it is from the distributions ``against``, its own distributions, to ``keep``, and the ``hidden`` states that
    the tokens were predicted from."""

    squares: bool = False
    against: Distributions | None = None
    keep: bool = False
    hidden: bool = False


class Scorer(PackedModel):
    """Scores packed batches with a causal language model, or one wrapped by PEFT.

    ``attention`` is ``auto`` or ``loop`` (the plain kernel). ``share=False`` scores every response in a row of its
    own with the model's own attention, as is done for models that cannot share a prefix. ``head``: how logits are made;
    none: found out (see :mod:`prefopt.model.kernels.head`).
    """

    def __init__(
        self, model: torch.nn.Module, *, attention: str = "auto", share: bool = True, head: Head | None = None
    ) -> None:
        super().__init__(model, attention=attention, share=share)
        causal = causal_model(model)
        self.head = head_of(causal) if head is None else head
        if self.head.kind == "model" and self.layout.share:
            self.separate(f"{type(causal).__name__} does not tell its layers from its head")

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Inside this context log-probabilities are those of the logits divided by ``temperature``.

        After a soft-cap c that is c / T tanh(z / c): another scale and another cap.
        """
        before = self.head
        cap = before.softcap
        self.head = replace(
            before, scale=before.scale / temperature, softcap=None if cap is None else cap / temperature
        )
        try:
            yield
        finally:
            self.head = before

    def forward(self, batch: PackedBatch, asked: Asked | None = None) -> torch.Tensor | TokenScores:
        """Log-probability [M] of every scored token, float32 (float64 for a float64 model), or what is ``asked``."""
        if self.head.kind == "model":
            return self._by_own_logits(batch, asked)
        # Mamba ends with its residual in float32, whatever its weights are in.
        hidden = self.hidden(batch).index_select(0, batch.read).to(self.dtype)
        head, how = self._head_module(), self.head
        if asked is None or asked.against is None:
            logp_M, square_M = self._logprobs(hidden, batch.target, asked is not None and asked.squares)
            return logp_M if asked is None else self._also(TokenScores(logp_M, square_M), hidden, asked)
        if how.kind != "fused":
            scores = logit_scores(self.logits, hidden, batch.target, asked.against)
        else:
            scores = head_scores(
                hidden, head.weight, batch.target, asked.against, bias=head.bias, scale=how.scale, softcap=how.softcap
            )
        return self._also(scores, hidden, asked)

    def _logprobs(
        self, hidden: torch.Tensor, target: torch.Tensor, square: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head, how = self._head_module(), self.head
        if how.kind != "fused":
            logp_M = module_logprobs(self.logits, hidden, target, vocabulary_of(head))
            return logp_M, squares(self.logits, hidden, vocabulary_of(head)) if square else None
        options: dict[str, Any] = {"bias": head.bias, "scale": how.scale, "softcap": how.softcap}
        if square:
            return token_logprobs_and_squares(hidden, head.weight, target, **options)
        return token_logprobs(hidden, head.weight, target, **options), None

    def _also(self, scores: TokenScores, hidden: torch.Tensor, asked: Asked) -> TokenScores:
        """Hidden states, and the distributions themselves, where they are asked for."""
        if asked.hidden:
            scores = scores._replace(hidden_M=hidden)
        if not asked.keep:
            return scores
        kept, frozen = hidden.detach(), self._frozen_head()
        made = Distributions(vocabulary_of(self._head_module()), lambda rows: self.logits(kept[rows], frozen).detach())
        return scores._replace(distributions=made)

    def _head_module(self) -> Any:
        head: Any = causal_model(self.model).get_output_embeddings()
        assert head is not None
        return head

    def _frozen_head(self) -> dict[str, torch.Tensor]:
        """The head's weights as they are now, whatever stands in their place later."""
        if self.head.kind == "class":
            return head_weights(causal_model(self.model))
        return {name: p.data for name, p in self._head_module().named_parameters()}

    def logits(self, hidden: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits [rows, V] of hidden [rows, H], float32 or wider, by the head or with other ``weights`` in it."""
        head, how = self._head_module(), self.head
        if how.kind == "fused":
            weight, bias = (weights or {}).get("weight", head.weight), (weights or {}).get("bias", head.bias)
            z = head_logits(hidden, weight, bias)
        elif how.kind == "class":
            z = class_logits(causal_model(self.model), hidden, weights)
        else:
            z = head(hidden) if weights is None else torch.func.functional_call(head, weights, (hidden,))
        return transformed(z.to(wide_dtype(z.dtype)), how.scale, how.softcap)

    def _by_own_logits(self, batch: PackedBatch, asked: Asked | None) -> torch.Tensor | TokenScores:
        """For models whose head is not known: they make the logits of the batch, and those are held."""
        causal = causal_model(self.model)
        logits = []
        for row in batch.passes:
            self.count(row)
            logits.append(causal(input_ids=row.ids[None], use_cache=False, return_dict=True).logits[0])
        z = torch.cat(logits).index_select(0, batch.read)
        z = z.to(wide_dtype(z.dtype)) * self.head.scale
        if asked is None:
            return z.gather(-1, batch.target[:, None])[:, 0] - z.logsumexp(-1)
        if asked.against is not None:
            scores = logit_scores(lambda rows: rows, z, batch.target, asked.against)
        else:
            scores = TokenScores(z.gather(-1, batch.target[:, None])[:, 0] - z.logsumexp(-1))
            if asked.squares:
                scores = scores._replace(square_M=squares(lambda rows: rows, z, z.shape[1]))
        if asked.keep:
            kept = z.detach()
            scores = scores._replace(distributions=Distributions(z.shape[1], lambda rows: kept[rows].clone()))
        return scores


def response_sums(logp_M: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sum of each response's token log-probabilities [N], in float64 where the device has it."""
    wide = logp_M if logp_M.device.type == "mps" else logp_M.double()
    return wide.new_zeros(len(batch.length)).index_add(0, batch.owner, wide)
