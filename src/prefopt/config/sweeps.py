"""What ``prefopt methods`` reads, and what it shares with ``prefopt frontier``: many models trained on the same data.

>>> config = MethodsConfig(model="m", prompts="p.txt", reward="vader", output="out", rate_factors=["0.5", "2"])
>>> config.factors
[0.5, 2.0]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import PromptOptions, positive
from prefopt.config.methods import METHODS, MethodConfig, stage_options
from prefopt.config.ppo import PpoConfig
from prefopt.config.rates import AUTO
from prefopt.config.training import MachineOptions, ProgressOptions
from prefopt.core.options import flag, option, parse_given
from prefopt.errors import ConfigError

GIVEN = {"dpo": "dpo", "sft": "sft", "reward": "reward_model", "ppo": "ppo", "rloo": "rloo"}
"""The option that holds what differs from the defaults of a command; RLOO is the command ppo with its algorithm."""
# Options that the sweep sets itself.
DECIDED = (
    *("model", "data", "prompts", "output", "adapter", "resume", "overwrite", "dry_run", "seed", "epochs", "max_steps"),
    *("save_every", "keep_last", "eval_data", "eval_fraction", "samples", "lines", "on_bad_row", "pairs", "loss"),
    *("reference", "reference_adapter", "from_scratch", "train_tokenizer", "device", "dtype", "threads", "progress"),
)
OF_PPO = ("reward", "max_new_tokens", "temperature", "schedule", "algorithm")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(MachineOptions, ProgressOptions, PromptOptions):
    """Part of the config of ``prefopt frontier`` and ``prefopt methods``."""

    model: str = option(
        help="model that all trainings start from: a folder, or the name of one on the Hugging Face Hub", group="model"
    )

    prefix_min: int | None = option(
        None,
        "truncate prompts that are text to continue to this many tokens at least, with --prefix-max",
        group="data",
        default_text="prompts are not truncated",
        at_least=1,
    )
    prefix_max: int | None = option(None, "and to this many at most; the length is drawn for each prompt", at_least=1)
    held_out: int = option(
        32, "distinct prompts to evaluate on, drawn by the seed; the others are trained on", at_least=2
    )
    data: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets of preferences",
        default_text="the model's own samples, as the true reward orders them",
    )
    samples: int = option(4, "without --data: samples of a prompt to compare", at_least=2)
    rounds: int = option(1, "without --data: times that each prompt is sampled", at_least=1)
    labels: Literal["order", "bradley-terry"] | None = option(
        help="without --data: the true reward's order of all samples of a prompt; or pairs of them, with labels drawn"
        " with the probability sigmoid(difference of rewards)",
        computed=lambda c: "order" if c.data is None else None,
        default_text="order",
    )

    reward: str = option(
        help="the true reward: a rule (vader, length), MODULE:FUNCTION of prompts and responses, or the folder or Hub"
        " name of a reward model",
        group="reward",
    )
    num: int = option(4, "samples per held-out prompt to measure each policy on", at_least=1)
    max_new_tokens: int = option(48, "maximum tokens of a sample, in the data, in PPO and in evaluation", at_least=1)

    responses: int = option(
        4096, "responses that each training learns from, with repetitions", group="stages", at_least=1
    )
    dpo: list[str] | None = stage_options("dpo")
    sft: list[str] | None = stage_options("sft")
    reward_model: list[str] | None = stage_options("reward")
    ppo: list[str] | None = stage_options("ppo")
    perplexity: list[str] | None = option(
        None,
        "data to measure perplexity on before and after, over their best responses (the alignment tax)",
        group="data",
        default_text="not measured",
    )

    output: str = option(help="folder to write a folder for every training to", group="output")
    seed: int = option(
        0,
        "seed of the held-out prompts, of all samples, and of the first training",
        group="machine",
        at_least=0,
        at_most=2**31,
    )

    def check(self) -> None:
        if (self.prefix_min is None) != (self.prefix_max is None):
            raise ConfigError("--prefix-min and --prefix-max go together: give both")
        if self.prefix_min is not None and self.prefix_max is not None and self.prefix_min > self.prefix_max:
            raise ConfigError(f"--prefix-min {self.prefix_min} is more than --prefix-max {self.prefix_max}")
        for name in ("samples", "rounds", "labels"):
            if self.data is not None and self.is_given(name):
                raise ConfigError(f"{flag(name)} is for generated data, and --data gives the data: leave it out")

    @property
    def unread(self) -> set[str]:
        """Options that this sweep does not read, as it is; where it grows it may."""
        return set()

    def training(
        self,
        kind: str,
        output: Path,
        given: Mapping[str, object],
        *,
        each: float,
        seed: int,
        steps: int | None = None,
    ) -> MethodConfig:
        """The config of one training of ``kind`` (a name in :data:`GIVEN`) that learns from ``responses`` responses, or
        in so many ``steps``.

        ``given``: options that the sweep sets (``model``, ``data`` and so on). ``each``: responses per row of its
        data. Raises ``ConfigError``.
        """
        place, command = flag(GIVEN[kind]), "ppo" if kind == "rloo" else kind
        own = parse_given(GIVEN[kind], getattr(self, GIVEN[kind]) or ())
        for name in own:
            if name in DECIDED or (command == "ppo" and name in OF_PPO):
                raise ConfigError(f"{place} {name}: the sweep sets it; leave it out")
            if name in given:
                raise ConfigError(f"{place} {name}: the sweep varies it; leave it out")
        ours: dict[str, Any] = {"output": str(output), "seed": seed, "max_steps": 1, "epochs": 1e9}
        ours |= {name: getattr(self, name) for name in ("device", "dtype", "threads", "progress")}
        if command == "ppo":
            # Under a learning rate that falls to zero every reward ends in a plateau.
            ours |= {"max_new_tokens": self.max_new_tokens, "schedule": "constant", "lines": self.lines}
        else:
            ours["on_bad_row"] = "skip"  # samples may be empty, or all equally good
            ours["eval_fraction"] = 0.0  # methods learn from the same rows
        found: MethodConfig = METHODS[command].config.from_dict(ours | own | dict(given), place)
        if found.learning_rate == AUTO:  # which has no multiples
            found = found.from_dict(found.to_dict() | {"learning_rate": found.published_rate}, place)
        per_step = found.batch_size * (found.num if isinstance(found, PpoConfig) else each)
        steps = steps or max(1, round(self.responses / per_step))
        return found.from_dict(found.to_dict() | {"max_steps": steps}, place)


def at_rate(config: MethodConfig, factor: float, place: str) -> MethodConfig:
    """``config`` at ``factor`` times its learning rates."""
    rates = {name: getattr(config, name, None) for name in ("learning_rate", "critic_learning_rate")}
    moved = {name: rate * factor for name, rate in rates.items() if rate is not None}
    return config if factor == 1 else config.from_dict(config.to_dict() | moved, place)


def factors_of(texts: list[str]) -> list[float]:
    """``--rate-factors`` as numbers. Raises ``ConfigError``."""
    found = [positive(text, f"--rate-factors {text}: it") for text in texts]
    if len(set(found)) < len(found):
        raise ConfigError(f"--rate-factors {' '.join(texts)}: a factor is a duplicate; remove it")
    return found


def evenly(steps: int, parts: int) -> list[int]:
    """``parts`` of the steps from 1 on, evenly spaced, the last one at the end; all steps where they are fewer.

    >>> evenly(128, 2), evenly(5, 3), evenly(2, 3)
    ([64, 128], [2, 3, 5], [1, 2])
    """
    parts = min(parts, steps)
    return [round(k * steps / parts) for k in range(1, parts + 1)]


FACTORS = ("0.5", "1", "2")
STAGES = {"dpo": ("sft", "dpo"), "ppo": ("sft", "reward", "ppo")}
"""A method by its last stage, and all its stages."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(SweepOptions):
    """Cost and quality of DPO and of PPO with a reward model. Construction raises ``ConfigError``."""

    seeds: int = option(3, "trainings of every stage, seed after seed", group="stages", at_least=1)
    rate_factors: list[str] = option(
        help="train DPO and PPO at their learning rate times each of these",
        computed=lambda c: list(FACTORS),
        default_text=" ".join(FACTORS),
    )
    isolate: bool = option(
        True,
        "run each training in its own process, to measure its peak memory; false: all in this one, without peak memory",
        group="machine",
    )

    def check(self) -> None:
        if parse_given("sft", self.sft or ()).get("lora"):
            raise ConfigError("--sft lora: the stages after it need a whole model; leave it out")
        for stage in ("sft", "reward", "dpo", "ppo"):
            self.stage(stage, self.seed, self.factors[-1], data=["data"], prompts="prompts", each=2.0)

    @property
    def factors(self) -> list[float]:
        """``rate_factors`` as numbers. Raises ``ConfigError``."""
        return factors_of(self.rate_factors)

    def stage(
        self, stage: str, seed: int, factor: float, *, data: list[str], prompts: str, each: float
    ) -> MethodConfig:
        """The config of one training; ``factor`` counts for ``dpo`` and ``ppo`` only. Raises ``ConfigError``."""
        given: dict[str, Any] = {"model": self.model if stage == "sft" else str(self.folder("sft", seed))}
        given |= {"prompts": [prompts]} if stage == "ppo" else {"data": data}
        if stage == "ppo":
            given["reward"] = str(self.folder("reward", seed))
        rows = 1.0 if stage == "sft" else each
        folder = self.folder(stage, seed, factor if stage in STAGES else None)
        found = self.training(stage, folder, given, each=rows, seed=seed)
        if stage not in STAGES:
            return found
        return at_rate(found, factor, f"--{GIVEN[stage]}")

    def folder(self, stage: str, seed: int, factor: float | None = None) -> Path:
        rate = "" if factor is None else f"-rate{factor:g}"
        return Path(self.output) / stage / f"seed{seed}{rate}"
