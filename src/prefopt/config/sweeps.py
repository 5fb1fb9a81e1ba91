"""What ``prefopt methods`` and ``prefopt frontier`` read: many models trained on the same data.

>>> config = MethodsConfig(model="m", prompts="p.txt", reward="vader", output="out", rate_factors=["0.5", "2"])
>>> config.factors
[0.5, 2.0]
>>> frontier = FrontierConfig(model="m", prompts="p.txt", reward="vader", output="out", methods=["dpo:beta=0.1,1"])
>>> [(t.method, t.setting, t.seed) for t in frontier.trainings()]
[('dpo', 'beta=0.1', 0), ('dpo', 'beta=1', 0)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import PromptOptions, positive
from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import METHODS, MethodConfig, stage_options
from prefopt.config.ppo import PpoConfig
from prefopt.config.training import MachineOptions, ProgressOptions
from prefopt.core.options import flag, nearest, option, parse_given, parse_value
from prefopt.errors import ConfigError

GIVEN = {"dpo": "dpo", "sft": "sft", "reward": "reward_model", "ppo": "ppo"}
"""The option that holds what differs from the defaults of a command."""
# Options that the sweep sets itself.
DECIDED = (
    *("model", "data", "prompts", "output", "adapter", "resume", "overwrite", "dry_run", "seed", "epochs", "max_steps"),
    *("save_every", "keep_last", "eval_data", "eval_fraction", "lines", "on_bad_row", "pairs", "loss"),
    *("reference", "reference_adapter", "from_scratch", "train_tokenizer", "device", "dtype", "threads", "progress"),
)
OF_PPO = ("reward", "max_new_tokens", "temperature", "schedule")


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
    prefix_max: int | None = option(None, "and to this many at most; the number is drawn for each prompt", at_least=1)
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
    max_new_tokens: int = option(48, "most tokens of a sample, in the data, in PPO and in evaluation", at_least=1)

    responses: int = option(
        4096, "responses that each training learns from, with repetitions", group="stages", at_least=1
    )
    dpo: list[str] | None = stage_options("dpo")
    sft: list[str] | None = stage_options("sft")
    reward_model: list[str] | None = stage_options("reward")
    ppo: list[str] | None = stage_options("ppo")

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
                raise ConfigError(f"{flag(name)} is about generated data, and --data gives some: leave it out")

    def training(self, kind: str, output: Path, given: Mapping[str, object], *, each: float, seed: int) -> MethodConfig:
        """The config of one training of ``kind`` (a name of :data:`METHODS`) that learns from ``responses`` responses.

        ``given``: options that the sweep sets (``model``, ``data`` and so on). ``each``: responses per row of its
        data. Raises ``ConfigError``.
        """
        place = flag(GIVEN[kind])
        own = parse_given(GIVEN[kind], getattr(self, GIVEN[kind]) or ())
        for name in own:
            if name in DECIDED or (kind == "ppo" and name in OF_PPO):
                raise ConfigError(f"{place} {name}: the sweep sets it; leave it out")
            if name in given:
                raise ConfigError(f"{place} {name}: the sweep varies it; leave it out")
        ours: dict[str, Any] = {"output": str(output), "seed": seed, "max_steps": 1, "epochs": 1e9}
        ours |= {name: getattr(self, name) for name in ("device", "dtype", "threads", "progress")}
        if kind == "ppo":
            # Under a learning rate that falls to zero every reward ends in a plateau.
            ours |= {"max_new_tokens": self.max_new_tokens, "schedule": "constant", "lines": self.lines}
        else:
            ours["on_bad_row"] = "skip"  # samples may be empty, or all equally good
        found: MethodConfig = METHODS[kind].config.from_dict(ours | own | dict(given), place)
        per_step = found.batch_size * (found.num if isinstance(found, PpoConfig) else each)
        steps = max(1, round(self.responses / per_step))
        return found.from_dict(found.to_dict() | {"max_steps": steps}, place)


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
    perplexity: list[str] | None = option(
        None,
        "data to measure perplexity on before and after, over their best responses (the alignment tax)",
        group="data",
        default_text="not measured",
    )
    isolate: bool = option(
        True,
        "run each training in its own process, to measure its peak memory; false: all in this one, without peak memory",
        group="machine",
    )

    def check(self) -> None:
        if len(set(self.factors)) < len(self.factors):
            raise ConfigError(f"--rate-factors {' '.join(self.rate_factors)}: a factor is a duplicate; remove it")
        if parse_given("sft", self.sft or ()).get("lora"):
            raise ConfigError("--sft lora: the stages after it need a whole model; leave it out")
        for stage in ("sft", "reward", "dpo", "ppo"):
            self.stage(stage, self.seed, self.factors[-1], data=["data"], prompts="prompts", each=2.0)

    @property
    def factors(self) -> list[float]:
        """``rate_factors`` as numbers. Raises ``ConfigError``."""
        return [positive(text, f"--rate-factors {text}: it") for text in self.rate_factors]

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
        rates = {name: getattr(found, name, None) for name in ("learning_rate", "critic_learning_rate")}
        moved = {name: rate * factor for name, rate in rates.items() if rate is not None}
        return found.from_dict(found.to_dict() | moved, f"--{GIVEN[stage]}")

    def folder(self, stage: str, seed: int, factor: float | None = None) -> Path:
        rate = "" if factor is None else f"-rate{factor:g}"
        return Path(self.output) / stage / f"seed{seed}{rate}"


# Sweeps of the DPO paper (Rafailov et al. 2023, section 6.1) for DPO, PPO and unlikelihood. Of fine-tuning it varied
# the seed; here the learning rate varies.
DEFAULT_SWEEPS = (
    "dpo:beta=0.05,0.1,1,5",
    "ppo-true:kl_target=3,6,9,12",
    "ppo-learned:kl_target=3,6,9,12",
    "sft:learning_rate=5e-6,1e-5,2e-5,4e-5",
    "unlikelihood:alpha=0.05,0.1,0.5,1",
    "best-of:n=2,4,8,16",
)
TRAINED_BY = {"dpo": "dpo", "ppo-true": "ppo", "ppo-learned": "ppo", "sft": "sft", "unlikelihood": "dpo"}
"""A method of the sweep, and the command that trains it."""
FEWEST_STEPS = 3
"""Fewest steps of PPO with one at two thirds of the way."""


@dataclass(frozen=True, slots=True)
class Training:
    """One policy to train, with ``value`` for the option ``name``."""

    method: str
    name: str
    value: object
    text: str
    seed: int

    @property
    def kind(self) -> str | None:
        """The command that trains it; None for best-of."""
        return TRAINED_BY.get(self.method)

    @property
    def setting(self) -> str:
        return f"{self.name}={self.text}"

    @property
    def folder(self) -> str:
        setting = re.sub(r"[^\w.=+-]", "_", self.setting)
        return f"{self.method}/{setting}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepOptions):
    """Expected reward versus KL, over methods and settings. Construction raises ``ConfigError``."""

    methods: list[str] = option(
        help="methods with an option to vary and its values, METHOD:NAME=VALUE,VALUE: dpo, ppo-true (the true reward),"
        " ppo-learned (a reward model of the same data), sft, unlikelihood and best-of; each with as many values",
        group="stages",
        computed=lambda c: list(DEFAULT_SWEEPS),
        default_text=" ".join(DEFAULT_SWEEPS),
    )
    seeds: int = option(1, "trainings of every setting, seed after seed", at_least=1)
    checkpoints: int = option(
        1, "points of each training of dpo, sft and unlikelihood, evenly spaced over its steps", at_least=1
    )

    plateau_share: float = option(
        0.2,
        "a PPO training has converged if its gain of true reward over the last third of its steps is, with confidence,"
        " below this fraction of its total gain; a training that rises evenly gains a third",
        above=0,
        at_most=0.3,
    )

    def check(self) -> None:
        trainings = list(self.trainings())
        for one in trainings:
            if one.kind is not None:
                self.config_of(one, data=["data"], prompts="prompts", each=2.0)
        if any(t.method == "ppo-learned" for t in trainings):
            self.reward_config(0, data=["data"], each=2.0)

    def trainings(self) -> Iterator[Training]:
        """All trainings, in the order of the methods, seed by seed. Raises ``ConfigError`` for an unknown method."""
        sweeps = [_sweep(text) for text in self.methods]
        counts = {len(values) for _, _, values in sweeps}
        if len(counts) > 1:
            found = ", ".join(f"{method} {len(values)}" for method, _, values in sweeps)
            raise ConfigError(f"--methods: all methods need equally many settings, for a fair comparison: {found}")
        names = [method for method, _, _ in sweeps]
        if len(set(names)) < len(names):
            raise ConfigError("--methods names a method twice; give all its values at once")
        for seed in range(self.seed, self.seed + self.seeds):
            for method, name, values in sweeps:
                if method == "best-of" and seed != self.seed:
                    continue  # no training that depends on the seed
                for text in values:
                    yield Training(method, name, parse_value(text), text, seed)

    def config_of(self, one: Training, *, data: list[str], prompts: str, each: float) -> MethodConfig:
        """The config that trains ``one``; ``each``: responses per row of ``data``. Raises ``ConfigError``."""
        kind = TRAINED_BY[one.method]
        given: dict[str, Any] = {"model": self.model}
        if kind == "ppo":
            reward = self.reward if one.method == "ppo-true" else str(self.reward_folder(one.seed))
            given |= {"prompts": [prompts], "reward": reward}
        else:
            given["data"] = data
        if one.method == "unlikelihood":
            given["loss"] = "unlikelihood"
        if one.method == "unlikelihood" and one.name not in {f.name for f in fields(DpoConfig)}:
            given["loss_options"] = [f"{one.name}={one.text}"]
        else:
            given[one.name] = one.value
        # Fine-tuning learns from the best response of each row: as many rows, not as many responses.
        rows = 1.0 if kind == "sft" else each
        found = self.training(kind, Path(self.output) / one.folder, given, each=rows, seed=one.seed)
        steps = found.max_steps or 1
        # The checkpoints to measure are requested at the steps of :meth:`marks`.
        every = max(1, steps // 3) if kind == "ppo" else steps
        return found.from_dict(found.to_dict() | {"save_every": every, "keep_last": steps})

    def marks(self, one: MethodConfig) -> list[int]:
        """Steps to measure; for PPO two thirds of the way and the end, which together show whether it converged."""
        steps = one.max_steps or 1
        if isinstance(one, PpoConfig):
            return [steps] if steps < FEWEST_STEPS else [2 * steps // 3, steps]
        return evenly(steps, self.checkpoints)

    def reward_folder(self, seed: int) -> Path:
        return Path(self.output) / f"reward-seed{seed}"

    def reward_config(self, seed: int, *, data: list[str], each: float) -> MethodConfig:
        return self.training(
            "reward", self.reward_folder(seed), {"model": self.model, "data": data}, each=each, seed=seed
        )


def _sweep(text: str) -> tuple[str, str, list[str]]:
    """Method, option and values of ``dpo:beta=0.1,1``."""
    method, _, sweep = text.partition(":")
    name, equals, values = sweep.partition("=")
    name, found = name.strip().replace("-", "_"), [v.strip() for v in values.split(",") if v.strip()]
    if method not in (known := [*TRAINED_BY, "best-of"]):
        raise ConfigError(
            f"--methods {text}: no method {method!r}{nearest(method, known)}; there are {', '.join(known)}"
        )
    if not equals or not name or not found:
        raise ConfigError(f"--methods {text}: write METHOD:NAME=VALUE,VALUE, such as dpo:beta=0.05,0.1,1,5")
    if name in DECIDED or (TRAINED_BY.get(method) == "ppo" and name in OF_PPO):
        raise ConfigError(f"--methods {text}: the sweep sets {name}; vary another option")
    if len(set(found)) < len(found):
        raise ConfigError(f"--methods {text}: a value is a duplicate; remove it")
    if method == "best-of" and (name != "n" or not all(v.isdigit() and int(v) > 1 for v in found)):
        raise ConfigError(f"--methods {text}: best-of varies n, with whole numbers from 2")
    return method, name, found
