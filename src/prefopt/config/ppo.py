"""What ``prefopt ppo`` reads. The command line, a YAML file and ``prefopt.ppo(...)`` fill it.

>>> PpoConfig(model="m", prompts="prompts.txt", reward="vader", output="out").learning_rate
'auto'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prefopt.config.data import PromptOptions, RowOptions, TemplateOptions
from prefopt.config.rates import AUTO, SMALL_RATE
from prefopt.config.rewards import RewardOptions
from prefopt.config.rollouts import StaleOptions
from prefopt.config.training import ModelOptions, RouterOptions, RunOptions, TrainingOptions, auto_rate_option
from prefopt.core.options import Config, beside, flag, option
from prefopt.errors import ConfigError

# Full training: Huang et al. 2024 (arXiv 2403.17031). LoRA needs several times as much.
LEARNING_RATE = {False: 3e-6, True: 1e-5}
KL_FIXED, KL_ADAPTIVE, KL_HORIZON = 0.05, 0.15, 10_000.0
MAX_KL, MAX_KL_TARGETS = 100.0, 10.0
# Ouyang et al. 2022 used 27.8, without saying what their two terms are averaged over. With both as means over tokens,
# and whitened advantages, a token of either moves the weights about as much at 1.
PTX_COEFFICIENT = 1.0

CRITIC_ONLY = ("critic", "critic_learning_rate", "gae_lambda", "value_clip", "value_coefficient")
"""What RLOO, which has no critic, does not read."""
NUM = {"ppo": 1, "rloo": 4}
PPO_EPOCHS = {"ppo": 4, "rloo": 1}


def by_algorithm(values: dict[str, int], help: str, group: str = "") -> Any:
    """An option whose default depends on the algorithm."""
    return option(
        help=help,
        group=group,
        computed=lambda c: values[c.algorithm],
        default_text=f"{values['ppo']}, with --algorithm rloo {values['rloo']}",
        at_least=1,
    )


def _critic_rate(config: PpoConfig) -> float | None:
    given = config.algorithm == "ppo" and config.critic != "head" and config.learning_rate != AUTO
    return float(config.learning_rate) if given else None


def of_critic(default: Any, help: str, **limits: Any) -> Any:
    """An option of the critic, which RLOO does without."""
    return option(
        help=help,
        group="critic",
        computed=lambda c: default if c.algorithm == "ppo" else None,
        default_text=str(default),
        **limits,
    )


@dataclass(frozen=True, kw_only=True)
class KlOptions(Config):
    """The KL penalty, and the term of PPO-ptx."""

    beta: float = option(
        group="reward",
        help="KL penalty coefficient: each token costs beta times its log-ratio; with --kl-target its initial value",
        computed=lambda c: KL_FIXED if c.kl_target is None else KL_ADAPTIVE,
        default_text=f"{KL_FIXED}, with --kl-target {KL_ADAPTIVE}",
        at_least=0,
    )
    kl_target: float | None = option(
        None, "adapt beta to keep the KL at this many nats per response; 6 is usual", above=0
    )
    kl_horizon: float | None = beside(
        "kl_target", KL_HORIZON, "responses over which beta adapts (horizon of the controller)", above=0
    )
    max_kl: float = option(
        help="KL in nats per response at which the run stops; the last good weights are saved as a model",
        computed=lambda c: MAX_KL if c.kl_target is None else MAX_KL_TARGETS * c.kl_target,
        default_text=f"{MAX_KL:g}, or {MAX_KL_TARGETS:g} times --kl-target",
        above=0,
    )
    reference: str | None = option(None, "reference model of the KL", default_text="the model before training")

    ptx_data: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets of chats, preferences (their best responses) or texts: adds their"
        " negative log-likelihood to every update (PPO-ptx)",
        default_text="no such term",
    )
    ptx_coefficient: float | None = beside(
        "ptx_data", PTX_COEFFICIENT, "weight of the --ptx-data term, a mean over its tokens", above=0
    )
    ptx_batch_size: int | None = option(
        help="rows of --ptx-data per update",
        needs="ptx_data",
        computed=lambda c: max(1, c.batch_size // c.minibatches) if c.ptx_data is not None else None,
        default_text="as many as prompts",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig(
    TrainingOptions,
    RouterOptions,
    RunOptions,
    KlOptions,
    RewardOptions,
    StaleOptions,
    TemplateOptions,
    PromptOptions,
    RowOptions,
    ModelOptions,
):
    """One run of PPO or RLOO. Construction raises ``ConfigError``."""

    shuffle: bool = option(True, "shuffle the prompts, and --ptx-data, every epoch, by the seed", group="data")
    num: int = by_algorithm(NUM, "responses per prompt; they share its encoding", group="sampling")
    max_new_tokens: int = option(128, "maximum tokens of a response", at_least=1)
    temperature: float = option(
        1.0,
        "sampling temperature, which divides the logits, also in all log-probabilities of policy and reference",
        above=0,
    )

    algorithm: Literal["ppo", "rloo"] = option(
        "ppo",
        "ppo: per token, with a critic; rloo: REINFORCE on whole responses, with the mean reward of the prompt's other"
        " responses as baseline, without a critic",
        group="optimiser",
    )
    epochs: float = option(1.0, "passes over the prompts", above=0)
    max_steps: int | None = option(None, "stop after this many batches, even if the epochs are longer", at_least=1)
    batch_size: int = option(64, "prompts per step", at_least=1)
    ppo_epochs: int = by_algorithm(PPO_EPOCHS, "passes over the responses of a step")
    minibatches: int = option(1, "optimiser steps per pass; each takes an equal share of the prompts", at_least=1)
    learning_rate: float | Literal["auto"] = auto_rate_option(LEARNING_RATE)
    warmup: float = option(
        0.0, "fraction of the steps in which the learning rate warms up, linearly from 0", at_least=0, below=1
    )
    adam_epsilon: float = option(1e-5, "AdamW's epsilon; PPO needs more than the usual 1e-8", above=0)
    clip: float = option(0.2, "PPO clip range: probability ratios are clipped to [1 - eps, 1 + eps]", above=0, below=1)
    max_update_kl: float | None = option(
        None,
        "KL in nats per token from the policy that drew the responses at which the updates of a step end; the rest of"
        " them are skipped and counted. 0.01 to 0.05 is usual",
        default_text="no limit",
        above=0,
    )
    whiten_advantages: bool = option(
        help="scale the advantages of a batch to mean 0 and deviation 1; the authors of RLOO do not",
        computed=lambda c: c.algorithm == "ppo",
        default_text="true, with --algorithm rloo false",
    )
    whiten_rewards: bool = option(False, "scale the rewards of a batch to deviation 1, mean kept")
    gamma: float = option(1.0, "gamma, the discount factor of later rewards", above=0, at_most=1)

    critic: Literal["auto", "reward", "actor", "head"] | None = of_critic(
        "auto",
        "reward, actor: a separate network, initialised from the reward model or the actor; head: a head on the"
        " actor's own layers; auto: reward where that is a model, else actor (head, for a model object in Python)",
    )
    critic_learning_rate: float | None = option(
        help="the critic's peak learning rate",
        computed=_critic_rate,
        default_text="--learning-rate",
        above=0,
    )
    gae_lambda: float | None = of_critic(
        0.95, "lambda of generalised advantage estimation: 1 relies on rewards, 0 on the critic", at_least=0, at_most=1
    )
    value_clip: float | None = of_critic(
        0.2, "clip range of the critic's values, around those before the update", above=0
    )
    value_coefficient: float | None = of_critic(0.1, "weight of the critic's loss", above=0)

    @property
    def published_rate(self) -> float:
        """The learning rate that is usual for models of billions of weights."""
        return LEARNING_RATE[self.lora]

    @property
    def small_rate(self) -> float:
        """The most that is suggested for a small model."""
        return SMALL_RATE[self.lora]

    def check(self) -> None:
        if self.lora_dropout:
            raise ConfigError("--lora-dropout: PPO compares log-probabilities, which must not be random: leave it out")
        if self.algorithm == "rloo":
            for name in CRITIC_ONLY:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{flag(name)} configures the critic, and --algorithm rloo has none: leave it out"
                    )
            if self.gamma != 1:
                raise ConfigError("--gamma: --algorithm rloo scores whole responses without discount: leave it out")
            if self.num < 2:
                raise ConfigError("--algorithm rloo compares responses to a prompt: give --num 2 or more")
        if self.batch_size < self.minibatches:
            raise ConfigError(
                f"--minibatches {self.minibatches} is more than the {self.batch_size} prompts of --batch-size: lower it"
            )
