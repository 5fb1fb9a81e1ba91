"""Log-probabilities of stored prompts before and after an export, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import ChatTemplate
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.model_io import read_prompt_set, renderer_for

Floats = npt.NDArray[np.float64]

STORED = "prefopt:export/prompts.txt"
COUNT = 32
LONGEST = 512
"""Tokens of a prompt that are scored."""


@dataclass(frozen=True)
class Prompts:
    """Prompts as they are scored: ``ids`` [prompts][tokens]; ``texts`` are what they are the tokens of, without a
    leading BOS; ``chat``: whether a chat template wrote them."""

    ids: list[list[int]]
    texts: list[str]
    chat: bool


def stored_prompts(names: Sequence[str] | None, tokenizer: Tokenizer, context: int | None) -> Prompts:
    """The first 32 prompts of a file, or of the one that ships with prefopt; turns of a user where the tokenizer has a
    chat template. Raises :class:`prefopt.errors.DataError` for rows that cannot be read."""
    renderer: Renderer = renderer_for(tokenizer)
    found = read_prompt_set(names or [STORED], renderer, context=None, lines="auto")
    template = ChatTemplate(tokenizer, renderer.rendering)
    most = min(LONGEST, context or LONGEST)
    rows, ids = found.rows[:COUNT], [[int(i) for i in ids[:most]] for ids in found.ids[:COUNT]]
    texts = [r.prompt[0].content if r.text else template.apply(r.prompt, r.tools, generation=True) for r in rows]
    return Prompts(ids, texts, not rows[0].text)


@torch.no_grad()
def token_logprobs(model: Any, ids: Sequence[Sequence[int]]) -> list[Floats]:
    """Log-probability of every token but the first, one sequence a call, by the model's own forward pass."""
    device = next(model.parameters()).device
    found = []
    for row in ids:
        tokens = torch.tensor([row], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        found.append(picked(logits.cpu().numpy(), row))
    return found


def picked(logits: npt.NDArray[Any], row: Sequence[int]) -> Floats:
    """Log-probabilities [n - 1] of tokens ``row`` [n] behind the first, from logits [n - 1, V]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    norm = np.log(np.exp(wide - top).sum(axis=1)) + top[:, 0]
    return np.asarray(wide[np.arange(len(row) - 1), list(row[1:])] - norm, np.float64)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of values after an export from those before: the largest and the mean, in nats per token, or of rewards."""

    count: int
    largest: float
    mean: float

    @classmethod
    def between(cls, before: Sequence[Floats], after: Sequence[Floats]) -> Difference:
        """NaN where a value is."""
        apart = np.abs(np.concatenate(list(after)) - np.concatenate(list(before)))
        return cls(len(apart), float(apart.max()), float(apart.mean()))


@dataclass(frozen=True, slots=True)
class Scored:
    """A comparison of an export. ``by``: what computed the values after. ``rounding``: the largest difference that
    rounding of the weights to the format's type explains, where that was measured; ``same``: whether what is left is
    within ``allowed``. ``tokenised``: prompts of which the server's tokenizer makes the same tokens."""

    by: str
    of: str
    difference: Difference
    allowed: float
    same: bool
    rounding: float | None = None
    tokenised: int | None = None
    prompts: int = COUNT

    def line(self) -> str:
        """The line that is printed."""
        found = self.difference
        parts = [f"{self.of} of {self.prompts} prompts ({found.count} values), scored before and after by {self.by}"]
        parts.append(f"largest difference {found.largest:.2g}, mean {found.mean:.2g}")
        if self.rounding is not None:
            parts.append(f"rounding of the weights explains {self.rounding:.2g}")
        if self.tokenised is not None:
            parts.append(f"the same tokens for {self.tokenised} of {self.prompts}")
        return ": ".join(parts[:2]) + "".join(f"; {part}" for part in parts[2:])

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)
