"""What ``prefopt online`` reads. The command line, a YAML file and ``prefopt.online(...)`` fill it.

>>> given = {"model": "m", "prompts": "prompts.txt", "reward": "vader", "output": "out"}
>>> OnlineConfig(**given).num, OnlineConfig(**given, loss="grpo").num, OnlineConfig(**given, loss="dapo").clip_high
(2, 8, 0.28)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prefopt.config import dpo, sft
from prefopt.config.data import PromptOptions, RowOptions, TemplateOptions
from prefopt.config.dpo import LossOptions
from prefopt.config.judges import COMPARERS, LLM, JudgeServerOptions
from prefopt.config.rates import AUTO, SMALL_RATE
from prefopt.config.rewards import ComponentOptions, RewardTerm, reward_terms
from prefopt.config.rollouts import StaleOptions
from prefopt.config.training import ModelOptions, RouterOptions, RunOptions, TrainingOptions
from prefopt.core.options import beside, flag, option
from prefopt.errors import ConfigError


class Gradient(NamedTuple):
    """The defaults of a policy-gradient loss, as its authors have them. ``average``: None where the ratio is that of
    whole responses."""

    clip: float
    clip_high: float
    average: str | None
    advantage_std: bool
    beta: float
    kl: str
    dynamic_sampling: bool


# RLOO: Ahmadian et al. 2024; GRPO: Shao et al. 2024; DAPO: Yu et al. 2025; GSPO: Zheng et al. 2025, section 5.1.
GRADIENTS = {
    "rloo": Gradient(0.2, 0.2, None, False, 0.05, "reward", False),
    "grpo": Gradient(0.2, 0.2, "rows", True, 0.04, "loss", False),
    "dapo": Gradient(0.2, 0.28, "tokens", True, 0.0, "reward", True),
    "gspo": Gradient(3e-4, 4e-4, None, True, 0.0, "reward", False),
}
BEST_OF = "best_of_k"
LEARNING_RATE = {False: 1e-6, True: 1e-5}
NUM, NUM_OF_GRADIENTS, NUM_OF_BEST = 2, 8, 4
MAX_KL = 100.0
PARALLEL = 8
MOST_FOR_PEOPLE = 9

OF_PREFERENCES = ("loss_options", "label_smoothing", "divergence", "divergence_alpha", "weighting", "pairs", "labels")
OF_GRADIENTS = ("clip", "clip_high", "advantage_std", "kl", "dynamic_sampling", "overlong_buffer")
OF_PEOPLE = ("study", "overlap")


def of_gradient(name: str, help: str, **limits: Any) -> Any:
    """An option of the policy-gradient losses, each of which has its own default."""
    shown = {loss: str(getattr(g, name)).lower() for loss, g in GRADIENTS.items() if getattr(g, name) is not None}
    values = dict.fromkeys(shown.values())
    text = ", ".join(f"{value} for {' and '.join(n for n, v in shown.items() if v == value)}" for value in values)
    return option(
        help=help, computed=lambda c: getattr(c.gradient, name) if c.gradient else None, default_text=text, **limits
    )


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(JudgeServerOptions, ComponentOptions):
    """Who judges the responses of a round."""

    reward: str | list[str] = option(
        help="what judges responses: a rule (vader, length), MODULE:FUNCTION, or a reward model's folder or Hub name;"
        " several are added up: NAME=REWARD*WEIGHT each, name and weight (1) may be left out. Or what compares them:"
        " llm, behind --judge-url, or people, in --study",
        group="reward",
    )
    judge_parallel: int | None = option(
        help="concurrent requests to the judge llm",
        group="judge",
        computed=lambda c: PARALLEL if c.judge == "llm" else None,
        default_text=f"{PARALLEL}",
        at_least=1,
    )
    study: str | None = option(
        help="study in which people vote, created if absent; the run waits until every item has its votes",
        computed=lambda c: f"{c.output}.db" if c.judge == "people" else None,
        default_text="the output folder's name and .db",
    )
    overlap: int | None = option(
        help="annotators per item of a new study",
        computed=lambda c: 1 if c.judge == "people" else None,
        default_text="1",
        at_least=1,
    )

    @property
    def judge(self) -> str | None:
        """``llm`` or ``people``, who compare responses; None for rewards, which score them."""
        terms = reward_terms(self.reward)
        return terms[0].source if len(terms) == 1 and terms[0].source in COMPARERS else None

    @property
    def reward_terms(self) -> list[RewardTerm]:
        """The components of ``reward``; none where responses are compared."""
        return [] if self.judge is not None else reward_terms(self.reward)

    def check(self) -> None:
        for term in reward_terms(self.reward):
            if term.source in COMPARERS and (self.judge is None or term != RewardTerm(term.source, term.source)):
                raise ConfigError(
                    f"--reward {term.source} compares responses, and gives no score that could be weighted or added:"
                    " name it alone"
                )
        self.check_judge(self.judge == LLM, "--reward llm", ("judge_parallel",))
        if self.judge != "people":
            _refuse(self, OF_PEOPLE, "belongs to --reward people; leave it out")
        if self.judge is not None:
            why = f"applies to scores, and --reward {self.judge} compares; leave it out"
            _refuse(self, ("missing_eos_penalty", "missing_eos_score"), why)


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(
    LossOptions,
    StaleOptions,
    JudgeOptions,
    TrainingOptions,
    RouterOptions,
    RunOptions,
    TemplateOptions,
    PromptOptions,
    RowOptions,
    ModelOptions,
):
    """One run of a loss on fresh responses of the policy. Construction raises ``ConfigError``."""

    shuffle: bool = option(True, "shuffle the prompts every epoch, by the seed", group="data")
    num: int = option(
        help="responses per prompt, K; they share its encoding",
        group="sampling",
        computed=lambda c: NUM_OF_GRADIENTS if c.gradient else NUM_OF_BEST if c.imitates else NUM,
        default_text=f"{NUM}, for {BEST_OF} {NUM_OF_BEST}, for policy gradients {NUM_OF_GRADIENTS}",
        at_least=2,
    )
    max_new_tokens: int = option(128, "maximum tokens of a response", at_least=1)
    temperature: float = option(
        1.0,
        "sampling temperature, which divides the logits, also in all log-probabilities of policy and reference",
        above=0,
    )

    loss: str = option(
        "dpo",
        "loss on the responses of a round: one that prefopt losses lists, a weighted sum of them, or your own as"
        f" module:function; {', '.join(GRADIENTS)}, policy gradients; or {BEST_OF}, SFT on the best response of each"
        " prompt",
        group="loss",
    )
    beta: float | None = option(
        help="KL penalty coefficient: larger keeps the policy closer to the reference; 0 only for policy gradients",
        computed=lambda c: c.gradient.beta if c.gradient else None,
        default_text="that of the loss, see prefopt losses; 0.05 for rloo, 0.04 for grpo, 0 for dapo and gspo",
        at_least=0,
    )
    kl: Literal["reward", "loss"] | None = of_gradient(
        "kl",
        "where beta counts, of policy gradients: reward, beta times a response's log-ratio is subtracted from"
        " its score;"
        " loss, beta times k3 of every token is added to the loss",
    )
    reference: str | None = option(
        None, "reference model of the KL and of log-ratios", group="model", default_text="the model before training"
    )
    ref_model_sync_steps: int | None = option(
        None,
        "rounds between updates of the reference towards the policy: iterative DPO, whose papers update it every"
        " round, or every few rounds",
        group="loss",
        default_text="the reference is fixed",
        at_least=1,
    )
    ref_model_mixup_alpha: float | None = beside(
        "ref_model_sync_steps",
        1.0,
        "reference = alpha * policy + (1 - alpha) * reference at every update; 1 copies the policy",
        above=0,
        at_most=1,
    )
    max_kl: float | None = option(
        help="KL from the reference in nats per response at which the run stops; the last good weights are saved as a"
        " model; not with --ref-model-sync-steps, which updates the reference",
        computed=lambda c: MAX_KL if c.ref_model_sync_steps is None else None,
        default_text=f"{MAX_KL:g}",
        above=0,
    )
    labels: Literal["hard", "soft"] | None = option(
        None,
        "labels of pairs: hard, the response with the higher score or most votes is better; soft, it is better"
        " with the probability 1 / (1 + exp(-difference of scores)), or the fraction of"
        " votes",
        default_text="hard",
    )
    desirable_above: float | None = option(
        None,
        "score above which a response is desirable, for losses on labels",
        default_text="the mean of the responses to its prompt",
    )
    clip: float | None = of_gradient(
        "clip",
        "clip range of policy gradients: probability ratios are clipped to [1 - clip, 1 + clip-high]",
        above=0,
        below=1,
    )
    clip_high: float | None = of_gradient(
        "clip_high", "upper clip range; larger than --clip it is DAPO's clip-higher", above=0
    )
    advantage_std: bool | None = of_gradient(
        "advantage_std", "divide the advantages of a prompt's responses by their standard deviation"
    )
    average: Literal["rows", "tokens", "constant"] | None = option(
        help="mean of the losses of tokens: rows, over responses of the mean of each; tokens, over all tokens;"
        " constant, of each response the sum by --max-new-tokens (Dr. GRPO), for policy gradients alone",
        computed=lambda c: c.gradient.average if c.gradient else "tokens" if c.imitates else None,
        default_text=f"rows for grpo, tokens for dapo and {BEST_OF}",
    )
    dynamic_sampling: bool | None = of_gradient(
        "dynamic_sampling", "skip, and count, prompts whose responses all have the same score"
    )
    overlong_buffer: int | None = option(
        None,
        "DAPO's overlong shaping: in this many tokens before --max-new-tokens, a penalty that rises from 0 to 1"
        " is subtracted from the score",
        default_text="no such penalty",
        at_least=1,
    )

    epochs: float = option(1.0, "passes over the prompts", group="optimiser", above=0)
    max_steps: int | None = option(None, "stop after this many rounds, even if the epochs are longer", at_least=1)
    batch_size: int = option(64, "prompts per round", at_least=1)
    passes: int = option(1, "passes over the responses of a round", at_least=1)
    minibatches: int = option(1, "optimiser steps per pass; each takes an equal share of the prompts", at_least=1)
    learning_rate: float | Literal["auto"] = option(
        AUTO,
        f"peak learning rate; auto: the usual one for large models, {dpo.LEARNING_RATE[False]:g} and with LoRA"
        f" {dpo.LEARNING_RATE[True]:g} ({LEARNING_RATE[True]:g} for policy gradients), of {BEST_OF}"
        f" {sft.LEARNING_RATE[False]:g} and {sft.LEARNING_RATE[True]:g}, and more for models below half a billion"
        " weights",
        above=0,
    )
    warmup: float = option(
        0.0, "fraction of the steps in which the learning rate warms up, linearly from 0", at_least=0, below=1
    )

    @property
    def published_rate(self) -> float:
        """The learning rate of the loss that is usual for models of billions of weights."""
        rates = sft.LEARNING_RATE if self.imitates else LEARNING_RATE if self.gradient else dpo.LEARNING_RATE
        return rates[self.lora or self.named_adapter is not None]

    @property
    def small_rate(self) -> float:
        """The most that is suggested for a small model."""
        return SMALL_RATE[self.lora or self.named_adapter is not None]

    @property
    def own_losses(self) -> tuple[str, ...]:
        """Losses that are not on preferences."""
        return (*GRADIENTS, BEST_OF)

    @property
    def gradient(self) -> Gradient | None:
        """The defaults of the policy-gradient loss; None for another loss."""
        return GRADIENTS.get(self.loss)

    @property
    def imitates(self) -> bool:
        """Whether the best responses are imitated."""
        return self.loss.replace("-", "_") == BEST_OF

    @property
    def prefers(self) -> bool:
        """Whether the loss is one on preferences."""
        return not (self.gradient or self.imitates)

    def check(self) -> None:
        if self.lora_dropout:
            raise ConfigError("--lora-dropout: ratios and log-ratios must not be random: leave it out")
        if self.gradient is None:
            _refuse(
                self,
                OF_GRADIENTS,
                f"applies to policy gradients, and --loss {self.loss} is not one of them: leave it out",
            )
            if self.stale == "correct":
                raise ConfigError(
                    f"--stale correct weights the advantages of policy gradients, and --loss {self.loss} has none:"
                    " leave it out"
                )
        if not self.prefers:
            _refuse(
                self,
                OF_PREFERENCES,
                f"applies to losses on preferences, and --loss {self.loss} is not one of them: leave it out",
            )
            _refuse(
                self,
                ("desirable_above",),
                f"applies to losses on labels, and --loss {self.loss} is not one of them: leave it out",
            )
        self._check_loss_options()
        if self.ref_model_sync_steps is not None and self.reference is not None:
            raise ConfigError(
                "--reference: with --ref-model-sync-steps the reference starts as a copy of the policy; leave one out"
            )
        if self.ref_model_sync_steps is not None and self.max_kl is not None:
            raise ConfigError(
                "--max-kl: with --ref-model-sync-steps the reference follows the policy, and the KL from it does not"
                " say how far that went; leave one out"
            )
        if self.batch_size < self.minibatches:
            raise ConfigError(
                f"--minibatches {self.minibatches} is more than the {self.batch_size} prompts of --batch-size: lower it"
            )
        if self.judge == "people" and self.num > MOST_FOR_PEOPLE:
            raise ConfigError(f"--num {self.num}: people compare at most {MOST_FOR_PEOPLE} responses; lower it")

    def _check_loss_options(self) -> None:
        """Refuse options that the loss does not read."""
        why = f"--loss {self.loss}"
        if self.imitates:
            _refuse(
                self,
                ("beta", "ref_model_sync_steps"),
                f"applies to losses with a reference, and {why} has none: leave it out",
            )
            if self.average == "constant":
                raise ConfigError(
                    f"--average constant applies to policy gradients, and {why} is not one of them: use tokens or rows"
                )
        if self.average is not None and (self.prefers or (self.gradient and self.gradient.average is None)):
            raise ConfigError(
                f"--average applies to losses per token, and {why} is computed per response: leave it out"
            )
        if self.beta == 0 and not self.gradient:
            raise ConfigError(
                f"--beta 0 works for policy gradients alone, and {why} is not one of them; give a value above 0"
            )
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            raise ConfigError(
                f"--overlong-buffer {self.overlong_buffer} is more than --max-new-tokens {self.max_new_tokens}: lower"
                " it"
            )


def _refuse(config: Any, names: Sequence[str], why: str) -> None:
    """Refuse options that the run would not read."""
    for name in names:
        if getattr(config, name) is not None:
            raise ConfigError(f"{flag(name)} {why}")
