"""What ``prefopt ppo`` reads. The command line, a YAML file and ``prefopt.ppo(...)`` fill it; it checks itself.

>>> PpoConfig(model="m", prompts="prompts.txt", reward="vader", output="out").learning_rate
3e-06
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.config.data import ReadOptions, TemplateOptions
from prefopt.config.training import ModelOptions, RunOptions
from prefopt.core import options as _options
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

# Full: Huang et al. 2024 (arXiv 2403.17031). LoRA, whose few weights start at no change, takes several times as much.
LEARNING_RATE = {False: 3e-6, True: 1e-5}
KL_FIXED, KL_ADAPTIVE, KL_HORIZON = 0.05, 0.15, 10_000.0
RUNAWAY, RUNAWAY_TARGETS = 100.0, 10.0
# Ouyang et al. 2022 took 27.8, and do not say what their two terms are averaged over. Where both are means over tokens,
# and advantages are whitened, a token of either moves the weights about as much at 1.
PTX_COEFFICIENT = 1.0

PPO_ONLY = {"critic": "auto", "gae_lambda": 0.95, "value_clip": 0.2, "value_coefficient": 0.1}
"""What RLOO, which has no critic, does not read."""
NUM = {"ppo": 1, "rloo": 4}
PPO_EPOCHS = {"ppo": 4, "rloo": 1}


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(TemplateOptions, ReadOptions):
    """What is written on, and how."""

    prompts: list[str] = option(
        help="files, folders, globs or Hub data sets with prompts, in any layout; or .txt, a prompt in every line",
        group="data",
    )
    lines: Literal["auto", "user", "text"] = option(
        "auto",
        "what the lines of a .txt are: the user's turns, or text to continue; auto: turns if there is a chat template",
        group="data",
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops the run, or is left out and counted", group="data"
    )
    shuffle: bool = option(
        True, "draw a new order of the prompts, and of --ptx-data, every epoch, from the seed", group="data"
    )
    num: int = option(
        None,
        "responses to every prompt of a batch; they share its encoding",
        group="sampling",
        default_text="1, with --algorithm rloo 4",
        at_least=1,
    )
    max_new_tokens: int = option(128, "tokens of a response at most", group="sampling", at_least=1)
    temperature: float = option(
        1.0,
        "divides the logits, in sampling and in every log-probability of the run, the reference's too",
        group="sampling",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What is maximised, and what holds it back."""

    reward: str = option(
        help="what gives a response its score: a rule (vader, length), MODULE:FUNCTION of prompts and responses, or the"
        " folder or Hub name of a reward model with one label and this model's tokenizer",
        group="reward",
    )
    missing_eos_penalty: float | None = option(
        None, "taken off the score of a response that did not end by itself", group="reward", above=0
    )
    missing_eos_score: float | None = option(
        None, "the score of a response that did not end by itself, in place of its own; -1 is usual", group="reward"
    )
    beta: float = option(
        None,
        "strength of the pull to the reference: each token costs beta times its log-ratio; with --kl-target where it"
        " starts",
        group="reward",
        default_text=f"{KL_FIXED}, with --kl-target {KL_ADAPTIVE}",
        at_least=0,
    )
    kl_target: float | None = option(
        None, "divergence in nats per response that beta is adapted to hold; 6 is usual", group="reward", above=0
    )
    kl_horizon: float = option(
        None,
        "responses over which beta is adapted",
        group="reward",
        default_text=f"{KL_HORIZON:g}, with --kl-target",
        above=0,
    )
    max_kl: float = option(
        None,
        "divergence in nats per response at which the run stops; the last good weights are left as a model",
        group="reward",
        default_text=f"{RUNAWAY:g}, or {RUNAWAY_TARGETS:g} times --kl-target",
        above=0,
    )
    reference: str | None = option(
        None, "model that the divergence is measured from", group="reward", default_text="the model before training"
    )


@dataclass(frozen=True, kw_only=True)
class PtxOptions:
    """What is kept likely beside what the reward asks for."""

    ptx_data: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets of chats, preferences (their best responses) or texts that stay likely:"
        " a term of negative log-likelihood in every update",
        group="reward",
        default_text="no such term",
    )
    ptx_coefficient: float = option(
        None,
        "weight of that term, which is a mean over its tokens as PPO's loss is one over the responses' tokens",
        group="reward",
        default_text=f"{PTX_COEFFICIENT:g}, with --ptx-data",
        above=0,
    )
    ptx_batch_size: int = option(
        None,
        "rows of --ptx-data per update",
        group="reward",
        default_text="as many as prompts",
        at_least=1,
    )

    def fill_ptx(self, prompts: int) -> None:
        """Defaults, for updates of so many prompts; called on construction. Raises ``ConfigError``."""
        if self.ptx_data is None:
            for name in ("ptx_coefficient", "ptx_batch_size"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{flag(name)} does nothing without --ptx-data: add it, or leave it out")
            return
        fill = object.__setattr__  # the dataclass is frozen for everyone else
        if self.ptx_coefficient is None:
            fill(self, "ptx_coefficient", PTX_COEFFICIENT)
        fill(self, "ptx_batch_size", self.ptx_batch_size or prompts)


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RunOptions, PtxOptions, RewardOptions, RolloutOptions, ModelOptions):
    """One run of PPO or RLOO. Construction checks types, ranges and contradictions, and raises ``ConfigError``.

    Defaults that depend on other options are filled in on construction.
    """

    algorithm: Literal["ppo", "rloo"] = option(
        "ppo",
        "ppo: token by token, with a critic; rloo: REINFORCE on whole responses, each compared with the others to its"
        " prompt, without a critic",
        group="optimiser",
    )
    epochs: float = option(1.0, "passes over the prompts", group="optimiser", above=0)
    max_steps: int | None = option(
        None, "stop after this many batches, where the epochs are longer", group="optimiser", at_least=1
    )
    batch_size: int = option(
        64, "prompts per step: responses to them are drawn, scored and learned from", group="optimiser", at_least=1
    )
    ppo_epochs: int = option(
        None,
        "passes over the responses of a step",
        group="optimiser",
        default_text=f"{PPO_EPOCHS['ppo']}, with --algorithm rloo {PPO_EPOCHS['rloo']}",
        at_least=1,
    )
    minibatches: int = option(1, "optimiser steps per pass: the prompts are dealt out", group="optimiser", at_least=1)
    learning_rate: float = option(
        None,
        "peak learning rate",
        group="optimiser",
        default_text=f"{LEARNING_RATE[False]:g}, with LoRA {LEARNING_RATE[True]:g}",
        above=0,
    )
    warmup: float = option(0.0, "part of the steps in which it rises from zero", group="optimiser", at_least=0, below=1)
    adam_epsilon: float = option(
        1e-5, "AdamW's epsilon; PPO wants more than the usual 1e-8", group="optimiser", above=0
    )
    clip: float = option(
        0.2, "ratios of new to old probability earn nothing beyond 1 -+ this", group="optimiser", above=0, below=1
    )
    whiten_advantages: bool = option(True, "give the advantages of a batch mean 0 and deviation 1", group="optimiser")
    whiten_rewards: bool = option(False, "give the rewards of a batch deviation 1, their mean kept", group="optimiser")
    gamma: float = option(1.0, "discount of rewards that come later", group="optimiser", above=0, at_most=1)

    critic: Literal["auto", "reward", "actor", "head"] = option(
        None,
        "reward, actor: a network of its own that starts as the reward model or as the actor; head: a head on the"
        " actor's own layers; auto: reward where that is a model, else actor (head, for a model object of Python's)",
        group="critic",
        default_text="auto",
    )
    critic_learning_rate: float = option(
        None, "the critic's peak learning rate", group="critic", default_text="--learning-rate", above=0
    )
    gae_lambda: float = option(
        None,
        "of advantage estimation: 1 trusts rewards, 0 the critic",
        group="critic",
        default_text="0.95",
        at_least=0,
        at_most=1,
    )
    value_clip: float = option(
        None, "values earn nothing beyond the old ones -+ this", group="critic", default_text="0.2", above=0
    )
    value_coefficient: float = option(None, "weight of the critic's loss", group="critic", default_text="0.1", above=0)

    def __post_init__(self) -> None:
        _options.check_all(self)
        self.check_adapter()
        self.check_run()
        self._check_reward()
        self.fill_adapter()
        if self.lora_dropout:
            raise ConfigError("--lora-dropout: PPO compares log-probabilities, which must not be random: leave it out")
        self._fill_algorithm()
        if self.num * self.batch_size < self.minibatches or self.batch_size < self.minibatches:
            raise ConfigError(
                f"--minibatches {self.minibatches} is more than the {self.batch_size} prompts of --batch-size: lower it"
            )
        self.fill_ptx(max(1, self.batch_size // self.minibatches))

    def _check_reward(self) -> None:
        fill = object.__setattr__
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ConfigError("--missing-eos-penalty and --missing-eos-score say two things: give one of them")
        if self.kl_target is None and self.kl_horizon is not None:
            raise ConfigError("--kl-horizon does nothing without --kl-target: add it, or leave --kl-horizon out")
        if self.beta is None:
            fill(self, "beta", KL_FIXED if self.kl_target is None else KL_ADAPTIVE)
        if self.kl_target is not None:
            fill(self, "kl_horizon", self.kl_horizon or KL_HORIZON)
        if self.max_kl is None:
            fill(self, "max_kl", RUNAWAY if self.kl_target is None else RUNAWAY_TARGETS * self.kl_target)

    def _fill_algorithm(self) -> None:
        fill = object.__setattr__
        for name, default in {"num": NUM, "ppo_epochs": PPO_EPOCHS}.items():
            if getattr(self, name) is None:
                fill(self, name, default[self.algorithm])
        if self.learning_rate is None:
            fill(self, "learning_rate", LEARNING_RATE[self.lora])
        if self.algorithm == "rloo":
            for name in (*PPO_ONLY, "critic_learning_rate"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{flag(name)} is the critic's, and --algorithm rloo has none: leave it out")
            if self.gamma != 1:
                raise ConfigError(
                    "--gamma: --algorithm rloo looks at whole responses and discounts nothing: leave it out"
                )
            if self.num < 2:
                raise ConfigError("--algorithm rloo compares responses to a prompt: give --num 2 or more")
            return
        for name, value in PPO_ONLY.items():
            if getattr(self, name) is None:
                fill(self, name, value)
        if self.critic_learning_rate is None and self.critic != "head":
            fill(self, "critic_learning_rate", self.learning_rate)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return _options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> PpoConfig:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return _options.from_dict(cls, values, place)
