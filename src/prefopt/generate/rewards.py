"""What scores the responses of a policy as it trains: a function of texts, or a reward model on the very tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from prefopt.config.tools import is_model_reward
from prefopt.data.group import Group
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.errors import ModelError, RunError
from prefopt.generate.sampler import Ids, Sample, group_of
from prefopt.generate.text import continuation, without_stop
from prefopt.model.architectures import causal_model, context_length, vocabulary_size
from prefopt.model.load import local_folder
from prefopt.model.packing import pack, split
from prefopt.model.precision import freeze_and_cast
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar
from prefopt.records import Comparison
from prefopt.rewards import Reward, load_reward, prompt_text


class Judge(Protocol):
    """Scores the responses [N] of groups, whose prompts are ``rows``."""

    words: str

    def __call__(self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int) -> list[float]:
        """One finite number for each response. Raises :class:`RunError` that names the reward and the prompt."""
        ...


class TextJudge:
    """A rule or a function: it is given texts, cut at the first token that ends a response."""

    def __init__(self, reward: Reward, tokenizer: Tokenizer, stop: Sequence[int]) -> None:
        self._reward, self._tokenizer, self._stop = reward, tokenizer, stop
        self.words = f"{reward.name}, of the text"

    def __call__(self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int) -> list[float]:
        """See :class:`Judge`; the budget is of no matter here."""
        prompts = [prompt_text(row) for row, group in zip(rows, groups, strict=True) for _ in group.continuations]
        return self._reward(prompts, [t for row, g in zip(rows, groups, strict=True) for t in self.texts(row, g)])

    def texts(self, row: Comparison, group: Group) -> list[str]:
        """What the responses of one prompt say."""
        found = []
        for c in group.continuations:
            text = continuation(self._tokenizer, group.prefix, without_stop(c.ids, self._stop))
            found.append(text if row.text else text.strip())  # templates put white space around answers as they like
        return found


class ModelJudge:
    """A reward model: it reads the tokens themselves, packed, and its score at the last of each response."""

    def __init__(self, name: str, scorer: ScalarScorer) -> None:
        self.scorer, self._name = scorer.eval(), name
        self.words = f"{name}, a reward model"

    @torch.no_grad()
    def __call__(self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int) -> list[float]:
        """See :class:`Judge`."""
        device = next(self.scorer.model.parameters()).device
        costs = [self.scorer.layout.cost(g) for g in groups]
        found: list[float] = []
        for part in split(range(len(groups)), costs, token_budget):
            batch = pack([groups[i] for i in part], self.scorer.layout).to(device)
            found += self.scorer(batch).double().tolist()
        owners = [row for row, group in zip(rows, groups, strict=True) for _ in group.continuations]
        for row, score in zip(owners, found, strict=True):
            if not math.isfinite(score):
                raise RunError(
                    f"the reward model {self._name} gave {score} for a response to {prompt_text(row)[:60]!r}; it must"
                    " be a finite number: try --dtype float32, or check its weights"
                )
        return found


def load_judge(
    name: str,
    tokenizer: Tokenizer,
    stop: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    longest: int,
) -> Judge:
    """The rule or function of that name, else the reward model in that folder (or on the Hub).

    ``longest``: tokens of prompt and response together. Raises :class:`ModelError` for a model with another number of
    labels, another tokenizer or too short a context, and :class:`prefopt.errors.ConfigError` where there is nothing of
    that name.
    """
    if not is_model_reward(name):
        return TextJudge(load_reward(name), tokenizer, stop)
    source = local_folder(name)
    if not has_scalar_head(source):
        raise ModelError(
            f"--reward {name} is a language model, which gives no score: prefopt reward makes one that does"
        )
    same_tokenizer(name, load_tokenizer(source), tokenizer)
    model = load_scalar(source, dtype=dtype, device=device, tokenizer=tokenizer).requires_grad_(False)
    scorer = ScalarScorer(freeze_and_cast(model, dtype), attention=attention)
    context = context_length(causal_model(model).config)
    if context is not None and longest > context:
        raise ModelError(
            f"--reward {name}: its context is {context} tokens, but prompt and response may have {longest}; lower"
            " --max-new-tokens"
        )
    if vocabulary_size(causal_model(model)) < len(tokenizer):
        raise ModelError(
            f"--reward {name}: its vocabulary is smaller than the tokenizer's; they belong to different models"
        )
    return ModelJudge(name, scorer)


def same_tokenizer(name: str, its: Tokenizer, ours: Tokenizer) -> None:
    """A reward model reads the tokens that the policy wrote. Raises :class:`ModelError` where it has others."""
    theirs = its.get_vocab()
    for token, i in ours.get_vocab().items():
        if theirs.get(token) != i:
            there = f"token {theirs[token]}" if token in theirs else "none of its tokens"
            raise ModelError(
                f"--reward {name} has another tokenizer: {token!r} is token {i} of the policy, and {there}; take a"
                " reward model that was made from this policy"
            )


TOKENS = 8192
"""Tokens that a reward model encodes at once."""


class BestOf:
    """Keeps the best of every ``many`` samples, as ``judge`` scores them; of equals the first.

    The divergence from the model is at most log N - (N - 1) / N nats (Stiennon et al. 2020, section 4.3; an upper
    bound by Beirami et al. 2024, arXiv 2401.01879), whatever the reward: :attr:`kl`.
    """

    def __init__(self, judge: Judge, many: int) -> None:
        self._judge, self._many = judge, many

    @property
    def kl(self) -> float:
        """The bound, in nats per response."""
        return kl_bound(self._many)

    def keep(
        self, rows: Sequence[Comparison], prompts: Sequence[Ids], found: Sequence[Sequence[Sample]]
    ) -> list[tuple[list[Sample], list[float]]]:
        """What is kept for every prompt, with its scores: one of every ``many`` samples in turn.

        Raises :class:`prefopt.errors.RunError` where the reward fails.
        """
        groups = [group_of(prompt, samples) for prompt, samples in zip(prompts, found, strict=True)]
        scores = iter(self._judge(rows, groups, TOKENS))
        kept = []
        for samples in found:
            score_kN = np.array([next(scores) for _ in samples]).reshape(-1, self._many)
            best_k = score_kN.argmax(axis=1)
            chosen = [samples[k * self._many + int(n)] for k, n in enumerate(best_k)]
            kept.append((chosen, score_kN.max(axis=1).tolist()))
        return kept


def kl_bound(many: int) -> float:
    """What the divergence of the best of ``many`` samples from the model is at most, in nats: see :class:`BestOf`."""
    return math.log(many) - (many - 1) / many
