"""What PPO and online losses maximise: rewards with weights, a language model as judge, scaled scores, and what is
watched beside them.

>>> [t.name for t in reward_terms(["quality=org/reward*0.7", "brevity=my_rewards:brief*-0.1", "length"])]
['quality', 'brevity', 'length']
>>> reward_term("quality=org/reward*0.7")
RewardTerm(name='quality', source='org/reward', weight=0.7)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefopt.config.judges import LLM, JudgeServerOptions
from prefopt.config.scoring import is_model_reward
from prefopt.core.files import expanded
from prefopt.core.options import Config, option
from prefopt.errors import ConfigError

JUDGE_PATTERN = r"\[\[\s*([-+]?\d+(?:\.\d+)?)\s*\]\]"
OF_SCORES = ("judge_prompt", "judge_pattern")
"""What the judge reads of how it gives scores."""
WATCH_TIMES = 10
"""Evaluations of a run without ``--eval-every``."""
_NAMED = re.compile(r"([A-Za-z][\w-]*)=(.+)")
_WEIGHTED = re.compile(r"(.+)\*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One component of the reward: ``weight`` times what ``source`` gives. ``name`` is that of its metrics."""

    name: str
    source: str
    weight: float = 1.0

    @property
    def is_model(self) -> bool:
        """Whether it is a reward model."""
        return is_model_reward(self.source)


def reward_term(text: str, option: str = "--reward") -> RewardTerm:
    """``[NAME=]REWARD[*WEIGHT]`` of ``option``. A folder of that whole name is one. Raises ``ConfigError``."""
    if expanded(text).is_dir():
        return RewardTerm(_name_of(text), text)
    named, weight = _NAMED.fullmatch(text), 1.0
    name, source = (named[1], named[2]) if named else ("", text)
    if weighted := _WEIGHTED.fullmatch(source):
        source, weight = weighted[1], float(weighted[2])
        if not weight:
            raise ConfigError(f"{option} {text}: a weight of 0 leaves nothing of it; leave it out")
    return RewardTerm(name or _name_of(source), source, weight)


def reward_terms(texts: str | Sequence[str]) -> list[RewardTerm]:
    """The components of ``--reward``. Raises ``ConfigError`` for a name that occurs twice."""
    found = [reward_term(text) for text in ([texts] if isinstance(texts, str) else texts)]
    names = [term.name for term in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--reward: two components are called {twice}; name them, such as other={found[-1].source}")
    return found


def _name_of(source: str) -> str:
    """The last part of a path, of a Hub name, or the function of a module, as the name of a metric."""
    last = re.split(r"[/\\:]", source.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.-]+", "_", last) or "reward"


@dataclass(frozen=True, kw_only=True)
class ComponentOptions(Config):
    """Rewards with names and weights, which are added up."""

    reward: str | list[str] = option(
        help="score of a response: a rule (vader, length), MODULE:FUNCTION of prompts and responses, the folder or Hub"
        " name of a reward model with one label and this model's tokenizer, or llm (with --judge-url). Several"
        " are summed: NAME=REWARD*WEIGHT each, where name and weight (1) may be left out",
        group="reward",
    )
    missing_eos_penalty: float | None = option(
        None, "subtracted from the score of a response without an end token", above=0
    )
    missing_eos_score: float | None = option(
        None, "score of a response without an end token, instead of its own; -1 is usual"
    )

    @property
    def reward_terms(self) -> list[RewardTerm]:
        """The components of ``reward``."""
        return reward_terms(self.reward)

    @property
    def true_term(self) -> RewardTerm | None:
        """What is measured beside ``reward``, and never trained on."""
        return None

    @property
    def reward_words(self) -> str:
        """``reward`` in one line."""
        return self.reward if isinstance(self.reward, str) else " + ".join(self.reward)

    def check(self) -> None:
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ConfigError("--missing-eos-penalty and --missing-eos-score exclude each other: give one of them")


@dataclass(frozen=True, kw_only=True)
class RewardOptions(JudgeServerOptions, ComponentOptions):
    """The reward, and how its scores are scaled. Construction raises ``ConfigError``."""

    normalise_scores: Literal["none", "running", "reference"] = option(
        "none",
        "scale scores to mean 0 and deviation 1, so that beta means the same for every reward: running, by all scores"
        " of the run so far; reference, by those of the reference's own responses, drawn before training",
        group="reward",
    )
    missing_eos_penalty: float | None = option(
        None, "subtracted from the score of a response without an end token, after --normalise-scores", above=0
    )
    missing_eos_score: float | None = option(
        None,
        "score of a response without an end token, instead of its own, as it is after --normalise-scores; -1 is usual",
    )
    judge_prompt: str | None = option(
        None,
        "text file with the instructions of the reward llm; it must ask for a score that --judge-pattern finds",
        group="judge",
        default_text="quality from 1 to 10, as [[7]] in the last line",
    )
    judge_pattern: str | None = option(
        None,
        "regular expression whose first group is the score; the last match in the answer counts",
        default_text="a number in [[ ]]",
    )
    true_reward: str | None = option(
        None,
        "true reward, in the form that --reward takes: measured on responses to --eval-prompts, never trained on",
        group="reward",
    )
    eval_prompts: list[str] | None = option(
        None,
        "held-out prompts to answer and score every --eval-every steps, in any layout, or .txt",
        default_text="nothing is held out",
    )
    eval_every: int | None = option(
        None,
        "steps between evaluations on --eval-prompts",
        needs="eval_prompts",
        default_text=f"{WATCH_TIMES} evaluations, evenly",
        at_least=1,
    )

    keep_samples: int = option(
        4, "prompts of every step whose responses are kept with their scores in samples.jsonl of the output", at_least=0
    )

    @property
    def true_term(self) -> RewardTerm | None:
        """What ``--true-reward`` names."""
        return reward_term(self.true_reward, "--true-reward") if self.true_reward is not None else None

    def check(self) -> None:
        sources = [term.source for term in self.reward_terms]
        if self.true_term is not None:
            if self.eval_prompts is None:
                raise ConfigError("--true-reward is measured on held-out prompts: add --eval-prompts")
            sources.append(self.true_term.source)
        self.check_judge(LLM in sources, "--reward llm", OF_SCORES)
        if self.judge_pattern is not None:
            try:
                groups = re.compile(self.judge_pattern).groups
            except re.error as error:
                raise ConfigError(f"--judge-pattern {self.judge_pattern}: no regular expression ({error})") from None
            if groups < 1:
                raise ConfigError(f"--judge-pattern {self.judge_pattern}: the score must be in a group, in ( )")
