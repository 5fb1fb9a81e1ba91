"""What scoring must equal: the model class's own forward, eager attention, one sequence per call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model.architectures import VOCABULARY, WINDOW
from prefopt.data.group import Group

Gradients = dict[str, torch.Tensor]


class Draw:
    """Random groups, reproducible."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def tokens(self, n: int) -> np.ndarray:
        return self.rng.integers(3, VOCABULARY, n)

    def group(self, prefix: int, *responses: int) -> Group:
        """A prompt and its responses, by their lengths, all of every response trained."""
        start = self.tokens(prefix)
        ids = [np.concatenate([start, [3 + k], self.tokens(n - 1)]) for k, n in enumerate(responses)]
        return Group.from_sequences([(x, np.arange(len(x)) >= prefix) for x in ids], row=1)

    def spans(self, prefix: int, *spans: Sequence[tuple[int, int]]) -> Group:
        """Responses of several turns: for each the (untrained, trained) lengths that follow the prompt."""
        start = self.tokens(prefix)
        sequences = []
        for k, turns in enumerate(spans):
            mask = np.concatenate([np.zeros(prefix), *(np.repeat([0, 1], turn) for turn in turns)]).astype(bool)
            ids = np.concatenate([start, [3 + k], self.tokens(len(mask) - prefix - 1)])
            sequences.append((ids, mask))
        return Group.from_sequences(sequences, row=1)

    def steps(self, prefix: int, *responses: Sequence[Sequence[tuple[int, int]]]) -> Group:
        """The same, for responses of several steps, each with spans of its own."""
        one_by_one = self.spans(prefix, *(spans for steps in responses for spans in steps))
        sequences = [one_by_one.sequence(k) for k in range(len(one_by_one.continuations))]
        pairs = tuple((0, k) for k in range(1, len(responses)))
        return Group.from_sequences(sequences, row=1, pairs=pairs, steps=list(map(len, responses)))


def groups_of_every_kind(seed: int = 0) -> list[Group]:
    """One to four responses, prompts of none, one and many tokens, several turns, several steps, and every side of
    a window of 8."""
    draw = Draw(seed)
    return [
        draw.group(13, 7, 9),
        draw.group(5, 20, 3, 11),
        draw.group(1, 1, 2),
        draw.group(0, 5, 6),
        draw.group(30, 6),
        draw.group(20, 1, 2, 12, 1),
        draw.group(WINDOW - 1, 1, 2),  # the window is filled exactly, and overrun by one
        draw.group(WINDOW, 1, WINDOW),
        draw.group(WINDOW - 2, 1, 2, 3),
        draw.spans(9, [(0, 3), (4, 2)], [(2, 5), (3, 1), (1, 1)]),
        draw.spans(0, [(1, 3), (4, 2)], [(2, 5)]),
        draw.steps(6, [[(0, 3)], [(4, 2), (3, 2)]], [[(2, 5)]], [[(0, 1)], [(WINDOW, 2)], [(2 * WINDOW, 1)]]),
    ]


def oracle_logprobs(model: torch.nn.Module, groups: Sequence[Group]) -> torch.Tensor:
    """Token log-probabilities [M], in the order that the packer gives them."""
    parts = []
    for group in groups:
        for ids, trained in (one for k in range(len(group.continuations)) for one in group.sequences(k)):
            tokens = torch.tensor(ids, dtype=torch.long)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
            where = torch.from_numpy(np.nonzero(trained)[0])
            parts.append(logp[where - 1, tokens[where]])
    return torch.cat(parts)


def gradients(logp_M: torch.Tensor, model: torch.nn.Module) -> Gradients:
    """Gradients of a random combination of token log-probabilities, by parameter name."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(logp_M), generator=generator, dtype=torch.float64).to(logp_M)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logp_M * upstream).sum(), list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


def assert_same(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Every value within ``rtol``, relative to the largest."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * float(expected.detach().abs().max()))


def assert_same_gradients(found: Gradients, expected: Gradients, rtol: float) -> None:
    """Every parameter's gradient within ``rtol`` of that parameter's largest.

    Gradients that only rounding keeps from zero (a key's bias, which every softmax ignores) are measured against the
    largest of all.
    """
    assert found.keys() == expected.keys()
    top = max(float(g.abs().max()) for g in expected.values())
    assert top > 0
    for name, e in expected.items():
        scale = max(float(e.abs().max()), 1e-2 * top)
        worst = float((found[name] - e).abs().max()) / scale
        assert worst <= rtol, f"{name}: {worst:.1e}"
