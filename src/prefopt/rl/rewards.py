"""The rewards that a run names: those of texts, which are found before a model is loaded, and reward models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from prefopt.config.judges import LLM
from prefopt.config.rewards import ComponentOptions, RewardOptions, RewardTerm
from prefopt.data.tokenizer import Tokenizer
from prefopt.generate.judged import LlmScores
from prefopt.generate.rewards import (
    RewardModelScorer,
    RewardScorer,
    TextRewardScorer,
    WeightedRewards,
    load_reward_scorer,
)
from prefopt.model.card import portable
from prefopt.reference.identity import identity_of_name
from prefopt.rewards import Function, Reward, load_reward

TRUE = "true_reward"
GIVEN = "function given in Python"
"""The source of a function that no name leads to."""


@dataclass(frozen=True, slots=True)
class Rewards:
    """The components of ``--reward`` and ``--true-reward``. ``texts`` holds those that read texts, by source."""

    terms: Sequence[RewardTerm]
    true: RewardTerm | None
    texts: Mapping[str, Reward]

    @classmethod
    def of(cls, config: ComponentOptions, given: Function | None = None) -> Rewards:
        """Find the functions and ask the server of a judge. ``given`` replaces ``config.reward``, whose words may be
        the name of another reward. Raises :class:`prefopt.errors.UserError`."""
        true = config.true_term
        terms = config.reward_terms if given is None else [RewardTerm("reward", GIVEN)]
        texts = {GIVEN: Reward(config.reward_words, given)} if given is not None else {}
        for term in [*terms, *([true] if true else [])]:
            if term.source not in texts and not term.is_model:
                texts[term.source] = _llm(config) if term.source == LLM else load_reward(term.source)
        return cls(terms, true, texts)

    @property
    def first_model(self) -> str | None:
        """The first reward model among the components, which a critic may start from."""
        return next((term.source for term in self.terms if term.source not in self.texts), None)

    def models(self) -> list[str]:
        """The names of all reward models, each once."""
        every = [*self.terms, *([self.true] if self.true else [])]
        return list(dict.fromkeys(term.source for term in every if term.source not in self.texts))

    def scorers(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: str,
        longest: int,
        pictures: bool = False,
    ) -> tuple[RewardScorer, RewardScorer | None]:
        """What scores responses for training, and what measures the true reward. A model that several components name
        is loaded once. Raises as :func:`prefopt.generate.rewards.load_reward_scorer`."""
        loaded: dict[str, TextRewardScorer | RewardModelScorer] = {
            source: TextRewardScorer(reward, tokenizer, stop) for source, reward in self.texts.items()
        }

        def scorer(term: RewardTerm, option: str) -> TextRewardScorer | RewardModelScorer:
            if term.source not in loaded:
                loaded[term.source] = load_reward_scorer(
                    term.source,
                    tokenizer,
                    stop,
                    dtype=dtype,
                    device=device,
                    attention=attention,
                    longest=longest,
                    option=option,
                    pictures=pictures,
                )
            return loaded[term.source]

        parts: dict[str, tuple[float, RewardScorer]]
        parts = {term.name: (term.weight, scorer(term, "--reward")) for term in self.terms}
        single = len(self.terms) == 1 and self.terms[0].weight == 1
        training: RewardScorer = parts[self.terms[0].name][1] if single else WeightedRewards(parts)
        if self.true is None:
            return training, None
        true: RewardScorer = scorer(self.true, "--true-reward")
        return training, true if self.true.weight == 1 else WeightedRewards({self.true.name: (self.true.weight, true)})

    def same(self) -> dict[str, tuple[str, str]]:
        """What a resumed run must not change of the rewards: names in ``run.json`` to (digest, words)."""
        found: dict[str, tuple[str, str]] = {}
        if len(self.terms) == 1 and self.terms[0].weight == 1:
            if (one := self._digest(self.terms[0])) is not None:
                found["reward"] = (one, self._words(self.terms[0], "--reward"))
        else:
            parts = [(term.name, term.weight, self._digest(term) or term.source) for term in self.terms]
            digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
            found["reward"] = (digest, "a component of --reward, its weight, its model or its code,")
        if self.true is not None and (digest := self._digest(self.true) or ""):
            found[TRUE] = (digest, self._words(self.true, "--true-reward"))
        return found

    def _digest(self, term: RewardTerm) -> str | None:
        if term.source not in self.texts:
            return identity_of_name(term.source).digest
        function = self.texts[term.source].function
        return function.digest() if isinstance(function, LlmScores) else self.texts[term.source].digest()

    def _words(self, term: RewardTerm, option: str) -> str:
        if term.source not in self.texts:
            return "the reward model" if option == "--reward" else f"the model of {option}"
        if term.source == LLM:
            return f"the judge of {option}"
        return f"the code of {option} {self.texts[term.source].name}"


def reward_in_words(config: ComponentOptions) -> str:
    """The components of the reward for a card, without folders of this machine."""
    terms = config.reward_terms
    if len(terms) == 1 and terms[0].weight == 1:
        return f"`{portable(terms[0].source)}`"
    return " + ".join(f"{term.weight:g} times `{portable(term.source)}` ({term.name})" for term in terms)


def _llm(config: ComponentOptions) -> Reward:
    assert isinstance(config, RewardOptions)  # elsewhere it compares
    scores = LlmScores(config)
    return Reward(scores.name, scores)
