"""Rewards of sampled responses: a function of their texts, or a reward model on their tokens; best-of-n."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from prefopt.config.scoring import is_model_reward
from prefopt.data.chat.pictures import same_processor
from prefopt.data.group import Group
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.errors import ModelError, RunError
from prefopt.generate.judged import LlmScores
from prefopt.generate.model_io import continuation, without_stop
from prefopt.generate.sampler import Ids, Sample, group_of
from prefopt.model.architectures import causal_model, context_length, vocabulary_size
from prefopt.model.load import local_folder
from prefopt.model.packing import packed_batches
from prefopt.model.precision import freeze_and_cast
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar
from prefopt.records import Comparison
from prefopt.rewards import Reward, load_reward, prompt_text

TOKEN_BUDGET = 8192
"""Tokens of a reward model's forward pass in best-of-n."""


Pause = Callable[[], None]


def never() -> None:
    """A pause that does not stop."""


class TextRewardScorer:
    """A rule or a function of texts, without their stop tokens; ``words`` names it in messages."""

    def __init__(self, reward: Reward, tokenizer: Tokenizer, stop: Sequence[int]) -> None:
        self._reward, self._tokenizer, self._stop = reward, tokenizer, stop
        self.words = f"{reward.name}, of the text"
        self.asked = reward.function if isinstance(reward.function, LlmScores) else None
        self.models: list[ScalarScorer] = []

    def gathered(self) -> AbstractContextManager[None]:
        """As :meth:`RewardModelScorer.gathered`: there is nothing to gather."""
        return nullcontext()

    def __call__(
        self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int, pause: Pause = never
    ) -> list[float]:
        """A finite number for each response [N] of groups whose prompts are ``rows``, or NaN where a language model
        that was ``asked`` gives none. ``pause`` is called now and then where this is slow, and may raise. Raises
        :class:`RunError`."""
        texts = response_texts(self._tokenizer, self._stop, rows, groups)
        prompts = [prompt_text(row) for row, many in zip(rows, texts, strict=True) for _ in many]
        said = [text for many in texts for text in many]
        return self._reward(prompts, said) if self.asked is None else self.asked(prompts, said, pause)


def response_texts(
    tokenizer: Tokenizer, stop: Sequence[int], rows: Sequence[Comparison], groups: Sequence[Group]
) -> list[list[str]]:
    """The texts of responses, without their stop tokens, of groups whose prompts are ``rows``."""
    found = []
    for row, group in zip(rows, groups, strict=True):
        texts = [continuation(tokenizer, group.prefix, without_stop(c.ids, stop)) for c in group.continuations]
        # White space around an answer is the template's.
        found.append(texts if row.text else [text.strip() for text in texts])
    return found


class RewardModelScorer:
    """A reward model, which reads the sampled tokens and scores the last one of each response; ``words`` names it in
    messages."""

    def __init__(self, name: str, scorer: ScalarScorer) -> None:
        self.scorer, self._name = scorer.eval(), name
        self.models = [self.scorer]
        self.asked: LlmScores | None = None
        self.words = f"{name}, a reward model"

    def gathered(self) -> AbstractContextManager[None]:
        """In this block the model has its weights, see :meth:`prefopt.model.scorer.PackedModel.gathered`."""
        return self.scorer.gathered()

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int, pause: Pause = never
    ) -> list[float]:
        """As :meth:`TextRewardScorer.__call__`."""
        device = next(self.scorer.model.parameters()).device
        batches = packed_batches(groups, self.scorer.layout, token_budget, device)
        scores: list[float] = [score for batch in batches for score in self.scorer(batch).double().tolist()]
        owners = [row for row, group in zip(rows, groups, strict=True) for _ in group.continuations]
        for row, score in zip(owners, scores, strict=True):
            if not math.isfinite(score):
                raise RunError(
                    f"the reward model {self._name} gave {score} for a response to {prompt_text(row)[:60]!r}; it must"
                    " be a finite number: try --dtype float32, or check its weights"
                )
        return scores


class WeightedRewards:
    """The weighted sum of several rewards, each with the name of its metrics."""

    def __init__(self, parts: Mapping[str, tuple[float, RewardScorer]]) -> None:
        """``parts``: weight and scorer of each component, by name."""
        self._parts = dict(parts)
        self.words: str = " + ".join(
            f"{weight:g} {name} ({part.words})" for name, (weight, part) in self._parts.items()
        )

    @property
    def models(self) -> list[ScalarScorer]:
        """The reward models among the components."""
        return [model for _, part in self._parts.values() for model in part.models]

    @property
    def asked(self) -> LlmScores | None:
        """The language model among the components."""
        return next((part.asked for _, part in self._parts.values() if part.asked is not None), None)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As :meth:`RewardModelScorer.gathered`, of all components."""
        with ExitStack() as stack:
            for _, part in self._parts.values():
                stack.enter_context(part.gathered())
            yield

    def components(
        self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int, pause: Pause = never
    ) -> dict[str, list[float]]:
        """What each component gives the responses [N], without its weight."""
        return {name: part(rows, groups, token_budget, pause) for name, (_, part) in self._parts.items()}

    def total(self, components: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum [N] of :meth:`components`."""
        weights = [weight for weight, _ in self._parts.values()]
        columns = [components[name] for name in self._parts]
        return [sum(w * x for w, x in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]

    def __call__(
        self, rows: Sequence[Comparison], groups: Sequence[Group], token_budget: int, pause: Pause = never
    ) -> list[float]:
        """As :meth:`TextRewardScorer.__call__`."""
        return self.total(self.components(rows, groups, token_budget, pause))


RewardScorer = TextRewardScorer | RewardModelScorer | WeightedRewards


def load_reward_scorer(
    name: str,
    tokenizer: Tokenizer,
    stop: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    longest: int,
    option: str = "--reward",
    pictures: bool = False,
) -> TextRewardScorer | RewardModelScorer:
    """The rule or function of that name, else the reward model in that folder (or on the Hub).

    ``longest``: tokens of prompt and response together; ``option`` gave the name; ``pictures``: prompts have some,
    which rules and functions are not shown. Raises :class:`ModelError` for a model with another number of labels,
    another tokenizer or processor, or too short a context, and :class:`prefopt.errors.ConfigError` for an unknown name.
    """
    if not is_model_reward(name):
        return TextRewardScorer(load_reward(name), tokenizer, stop)
    source = local_folder(name)
    if not has_scalar_head(source):
        what = "is a language model, which gives no score"
        raise ModelError(f"{option} {name} {what}: prefopt reward makes one that does")
    theirs = load_tokenizer(source).get_vocab()
    for token, i in tokenizer.get_vocab().items():
        if theirs.get(token) != i:
            there = f"token {theirs[token]} of its own" if token in theirs else "none of its own"
            raise ModelError(
                f"{option} {name} has another tokenizer: {token!r} is token {i} of the policy, and {there}; use a"
                " reward model that was made from this policy"
            )
    if pictures:
        same_processor(source, tokenizer.name_or_path, f"{option} {name}")
    how: dict[str, Any] = {"dtype": dtype, "device": device, "tokenizer": tokenizer, "pictures": pictures}
    model = load_scalar(source, **how).requires_grad_(False)
    scorer = ScalarScorer(freeze_and_cast(model, dtype), attention=attention, pictures=pictures)
    context = context_length(causal_model(model).config)
    if context is not None and longest > context:
        what = f"its context is {context} tokens, but prompt and response may have {longest}"
        raise ModelError(f"{option} {name}: {what}; lower --max-new-tokens")
    if vocabulary_size(causal_model(model)) < len(tokenizer):
        what = "its vocabulary is smaller than the tokenizer's"
        raise ModelError(f"{option} {name}: {what}; they belong to different models")
    return RewardModelScorer(name, scorer)


def best_of(
    n: int,
    scorer: RewardScorer,
    rows: Sequence[Comparison],
    prompts: Sequence[Ids],
    samples: Sequence[Sequence[Sample]],
) -> list[tuple[list[Sample], list[float]]]:
    """Best-of-n: the samples kept for every prompt with their rewards. Of every ``n`` in turn the one of highest reward
    is kept, of equals the first. Raises :class:`prefopt.errors.RunError` where the reward fails."""
    groups = [group_of(prompt, many) for prompt, many in zip(prompts, samples, strict=True)]
    scores = iter(scorer(rows, groups, TOKEN_BUDGET))
    kept = []
    for many in samples:
        score_kN = np.array([next(scores) for _ in many]).reshape(-1, n)
        best = [many[k * n + int(first)] for k, first in enumerate(score_kN.argmax(axis=1))]
        kept.append((best, score_kN.max(axis=1).tolist()))
    return kept


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best of n || model) in nats per response, whatever the reward: log n - (n - 1) / n (Stiennon et
    al. 2020, section 4.3; a bound by Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n
