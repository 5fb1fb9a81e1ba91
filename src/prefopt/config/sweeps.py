"""What ``prefopt methods`` and ``prefopt frontier`` read: many models trained on the same data.

>>> config = MethodsConfig(model="m", prompts="p.txt", reward="vader", output="out", rate_factors=["0.5", "2"])
>>> config.factors
[0.5, 2.0]
>>> frontier = FrontierConfig(model="m", prompts="p.txt", reward="vader", output="out", methods=["dpo:beta=0.1,1"])
>>> [(t.method, t.setting, t.seed) for t in frontier.trainings()]
[('dpo', 'beta=0.1', 0), ('dpo', 'beta=1', 0)]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import METHODS, MethodConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.training import MachineOptions
from prefopt.core.options import check_all, flag, from_dict, nearest, option, parse_given, parse_value, to_dict
from prefopt.errors import ConfigError

GIVEN = {"dpo": "dpo", "sft": "sft", "reward": "reward_model", "ppo": "ppo"}
"""The option that holds what differs from the defaults of a command."""
# What the sweep decides, so that no training may be given it.
DECIDED = (
    *("model", "data", "prompts", "output", "adapter", "resume", "dry_run", "seed", "epochs", "max_steps"),
    *("save_every", "keep_last", "eval_data", "eval_fraction", "lines", "on_bad_row", "pairs", "loss"),
    *("reference", "reference_adapter", "from_scratch", "train_tokenizer", "device", "dtype", "threads", "progress"),
)
OF_PPO = ("reward", "max_new_tokens", "temperature", "schedule")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(MachineOptions):
    """Part of the config of ``prefopt frontier`` and ``prefopt methods``."""

    model: str = option(
        help="model that every method begins at: a folder, or the name of one on the Hugging Face Hub", group="model"
    )

    prompts: list[str] = option(
        help="files, folders, globs or Hub data sets with prompts, in any layout; or .txt, a prompt in every line",
        group="data",
    )
    lines: Literal["auto", "user", "text"] = option(
        "auto",
        "what the lines of a .txt are: the user's turns, or text to continue; auto: turns if there is a chat template",
        group="data",
    )
    prefix_min: int | None = option(
        None,
        "cut prompts that are text to continue to their beginning: so many tokens at least, with --prefix-max",
        group="data",
        default_text="prompts are taken whole",
        at_least=1,
    )
    prefix_max: int | None = option(
        None, "and so many at most; the number is drawn for each prompt", group="data", at_least=1
    )
    held_out: int = option(
        32, "different prompts to measure on, dealt by the seed; the others are trained on", group="data", at_least=2
    )
    data: list[str] | None = option(
        None,
        "files, folders, globs or Hub data sets of preferences",
        group="data",
        default_text="the model's own samples, as the true reward orders them",
    )
    samples: int = option(4, "where data are made: samples of a prompt that are compared", group="data", at_least=2)
    rounds: int = option(
        1, "where data are made: how often a prompt is sampled so, each time anew", group="data", at_least=1
    )
    labels: Literal["order", "bradley-terry"] = option(
        None,
        "where data are made: the true reward's order of all samples of a prompt; or pairs of them, of which the better"
        " one is drawn with the probability sigmoid(difference of rewards)",
        group="data",
        default_text="order",
    )

    reward: str = option(
        help="the true reward: a rule (vader, length), MODULE:FUNCTION of prompts and responses, or the folder or Hub"
        " name of a reward model",
        group="reward",
    )
    num: int = option(4, "samples of a held-out prompt that each policy is measured on", group="reward", at_least=1)
    max_new_tokens: int = option(
        48, "tokens of a sample at most, in the data, in PPO and in measuring", group="reward", at_least=1
    )

    responses: int = option(
        4096, "responses that each training learns from, repetitions counted", group="stages", at_least=1
    )
    dpo: list[str] | None = option(
        None,
        "options of prefopt dpo, NAME=VALUE, for all its trainings",
        group="stages",
        default_text="its own defaults",
    )
    sft: list[str] | None = option(None, "the same of prefopt sft", group="stages", default_text="its own defaults")
    reward_model: list[str] | None = option(
        None, "the same of prefopt reward", group="stages", default_text="its own defaults"
    )
    ppo: list[str] | None = option(None, "the same of prefopt ppo", group="stages", default_text="its own defaults")

    output: str = option(help="folder to write to: a folder for every training in it", group="output")
    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )
    seed: int = option(
        0,
        "seed of the prompts held out, of all samples, and of the first training",
        group="machine",
        at_least=0,
        at_most=2**31,
    )

    def check_sweep(self) -> None:
        """Types, ranges, contradictions. Raises ``ConfigError``."""
        check_all(self)
        self.check_machine()
        if (self.prefix_min is None) != (self.prefix_max is None):
            raise ConfigError("--prefix-min and --prefix-max go together: from so many tokens to so many")
        if self.prefix_min is not None and self.prefix_max is not None and self.prefix_min > self.prefix_max:
            raise ConfigError(f"--prefix-min {self.prefix_min} is more than --prefix-max {self.prefix_max}")
        if self.data is not None:
            for name in ("samples", "rounds", "labels"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(
                        f"{flag(name)} is for data that are made here, and --data gives some: leave it out"
                    )
        elif self.labels is None:
            object.__setattr__(self, "labels", "order")

    def training(self, kind: str, output: Path, given: Mapping[str, object], *, each: float, seed: int) -> MethodConfig:
        """The config of one training of ``kind`` (a name of :data:`METHODS`) that learns from ``responses`` responses.

        ``given`` are options that the sweep sets (``model``, ``data`` and so on); ``each``: responses of a row of its
        data. What a person gave goes before both. Raises ``ConfigError``.
        """
        place = flag(GIVEN[kind])
        own = parse_given(GIVEN[kind], getattr(self, GIVEN[kind]) or ())
        for name in own:
            if name in DECIDED or (kind == "ppo" and name in OF_PPO):
                raise ConfigError(f"{place} {name}: the sweep decides it; leave it out")
            if name in given:
                raise ConfigError(f"{place} {name}: it is what is swept; leave it out")
        ours: dict[str, Any] = {"output": str(output), "seed": seed, "max_steps": 1, "epochs": 1e9}
        ours |= {name: getattr(self, name) for name in ("device", "dtype", "threads", "progress")}
        if kind == "ppo":
            # A rate that falls to zero would end every rise: then a plateau says nothing.
            ours |= {"max_new_tokens": self.max_new_tokens, "schedule": "constant", "lines": self.lines}
        else:
            ours["on_bad_row"] = "skip"  # samples may be empty, or all equally good
        found = from_dict(METHODS[kind].config, ours | own | dict(given), place)
        per_step = found.batch_size * (found.num if isinstance(found, PpoConfig) else each)
        steps = max(1, round(self.responses / per_step))
        return from_dict(METHODS[kind].config, found.to_dict() | {"max_steps": steps}, place)

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> Self:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return from_dict(cls, values, place)


def evenly(steps: int, parts: int) -> list[int]:
    """So many of the steps from 1 on, as evenly as whole numbers are, the last one at the end; all, where they are few.

    >>> evenly(128, 2), evenly(5, 3), evenly(2, 3)
    ([64, 128], [2, 3, 5], [1, 2])
    """
    parts = min(parts, steps)
    return [round(k * steps / parts) for k in range(1, parts + 1)]


FACTORS = ("0.5", "1", "2")
STAGES = {"dpo": ("sft", "dpo"), "ppo": ("sft", "reward", "ppo")}
"""Stages of each method that ``prefopt methods`` compares."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(SweepOptions):
    """DPO against reward model and PPO: what each costs, and what it gives. Construction raises ``ConfigError``."""

    seeds: int = option(3, "trainings of every stage, seed after seed", group="stages", at_least=1)
    rate_factors: list[str] | None = option(
        None,
        "DPO and PPO are trained at their learning rate times each of these: how much their end depends on it",
        group="stages",
        default_text=" ".join(FACTORS),
    )
    perplexity: list[str] | None = option(
        None,
        "data whose best responses the perplexity before and after is measured on (the alignment tax)",
        group="data",
        default_text="it is not measured",
    )
    isolate: bool = option(
        True,
        "each training in a process of its own, so that its peak memory is its own; false: all in this one, and peak"
        " memory is not told",
        group="machine",
    )

    def __post_init__(self) -> None:
        self.check_sweep()
        if self.rate_factors is None:
            object.__setattr__(self, "rate_factors", list(FACTORS))
        if len(set(self.factors)) < len(self.factors):
            raise ConfigError("--rate-factors: one stands there twice")
        if parse_given("sft", self.sft or ()).get("lora"):
            raise ConfigError("--sft lora: the stages after it begin at a whole model; leave it out")
        for stage in ("sft", "reward", "dpo", "ppo"):  # a mistake in the last one is told before the first has run
            self.stage(stage, self.seed, self.factors[-1], data=["data"], prompts="prompts", each=2.0)

    @property
    def factors(self) -> list[float]:
        """``rate_factors`` as numbers. Raises ``ConfigError``."""
        return [_factor(text) for text in self.rate_factors or ()]

    def stage(
        self, stage: str, seed: int, factor: float, *, data: list[str], prompts: str, each: float
    ) -> MethodConfig:
        """The config of one training; ``factor`` is of ``dpo`` and ``ppo`` alone. Raises ``ConfigError``."""
        given: dict[str, Any] = {"model": self.model if stage == "sft" else str(self.folder("sft", seed))}
        given |= {"prompts": [prompts]} if stage == "ppo" else {"data": data}
        if stage == "ppo":
            given["reward"] = str(self.folder("reward", seed))
        rows = 1.0 if stage == "sft" else each
        folder = self.folder(stage, seed, factor if stage in STAGES else None)
        found = self.training(stage, folder, given, each=rows, seed=seed)
        if stage not in STAGES:
            return found
        assert found.learning_rate is not None
        rates = {name: getattr(found, name, None) for name in ("learning_rate", "critic_learning_rate")}
        moved = {name: rate * factor for name, rate in rates.items() if rate is not None}
        return type(found).from_dict(found.to_dict() | moved, f"--{GIVEN[stage]}")

    def folder(self, stage: str, seed: int, factor: float | None = None) -> Path:
        """Where a training is."""
        rate = "" if factor is None else f"-rate{factor:g}"
        return Path(self.output) / stage / f"seed{seed}{rate}"


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ConfigError(f"--rate-factors {text}: it must be a number above 0, such as 0.5")
    return factor


# The sweeps of the DPO paper (Rafailov et al. 2023, section 6.1) for DPO, PPO and unlikelihood. It varied the seed of
# fine-tuning; here it is the learning rate.
DEFAULT_SWEEPS = (
    "dpo:beta=0.05,0.1,1,5",
    "ppo-true:kl_target=3,6,9,12",
    "ppo-learned:kl_target=3,6,9,12",
    "sft:learning_rate=5e-6,1e-5,2e-5,4e-5",
    "unlikelihood:alpha=0.05,0.1,0.5,1",
    "best-of:n=2,4,8,16",
)
TRAINED_BY = {
    "dpo": "dpo",
    "ppo-true": "ppo",
    "ppo-learned": "ppo",
    "sft": "sft",
    "unlikelihood": "dpo",
    "best-of": None,
}
"""The command that trains each method; best-of-n trains nothing."""
FEWEST_STEPS = 3
"""Of PPO: with fewer there is none two thirds of the way."""


@dataclass(frozen=True, slots=True)
class Training:
    """One policy to be made: ``value`` of the option ``name``. ``kind`` is the command, none for best-of."""

    method: str
    name: str
    value: object
    text: str
    seed: int

    @property
    def kind(self) -> str | None:
        """The command that trains it."""
        return TRAINED_BY[self.method]

    @property
    def setting(self) -> str:
        """What was swept."""
        return f"{self.name}={self.text}"

    @property
    def folder(self) -> str:
        """Where it is, below the output."""
        setting = re.sub(r"[^\w.=+-]", "_", self.setting)
        return f"{self.method}/{setting}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepOptions):
    """Expected reward against divergence, over methods and settings. Construction raises ``ConfigError``."""

    methods: list[str] | None = option(
        None,
        "methods with the option that each sweeps and its values, METHOD:NAME=VALUE,VALUE: dpo, ppo-true (the true"
        " reward), ppo-learned (a reward model of the same data), sft, unlikelihood and best-of; each with as many"
        " values",
        group="stages",
        default_text=" ".join(DEFAULT_SWEEPS),
    )
    seeds: int = option(1, "trainings of every setting, seed after seed", group="stages", at_least=1)
    checkpoints: int = option(
        1, "points of each training of dpo, sft and unlikelihood, evenly over its steps", group="stages", at_least=1
    )

    plateau_share: float = option(
        0.2,
        "a training of PPO counts where what the true reward gained in the last third of its steps is surely below this"
        " share of its whole climb; one that rises evenly gains a third of it",
        group="stages",
        above=0,
        at_most=0.3,
    )

    def __post_init__(self) -> None:
        self.check_sweep()
        if self.methods is None:
            object.__setattr__(self, "methods", list(DEFAULT_SWEEPS))
        trainings = list(self.trainings())
        for one in trainings:  # a mistake in the last one is told before the first has run
            if one.kind is not None:
                self.config_of(one, data=["data"], prompts="prompts", each=2.0)
        if any(t.method == "ppo-learned" for t in trainings):
            self.reward_config(0, data=["data"], each=2.0)

    def trainings(self) -> Iterator[Training]:
        """All trainings, seed by seed, in the order of the methods. Raises ``ConfigError`` for an unknown method."""
        sweeps = [_sweep(text) for text in self.methods or ()]
        counts = {len(values) for _, _, values in sweeps}
        if len(counts) > 1:
            told = ", ".join(f"{method} {len(values)}" for method, _, values in sweeps)
            raise ConfigError(f"--methods: give all methods the same number of settings, for equal tuning: {told}")
        names = [method for method, _, _ in sweeps]
        if len(set(names)) < len(names):
            raise ConfigError("--methods names a method twice; give all its values at once")
        for seed in range(self.seed, self.seed + self.seeds):
            for method, name, values in sweeps:
                if method == "best-of" and seed != self.seed:
                    continue  # nothing is trained: another seed would only be another draw
                for text in values:
                    yield Training(method, name, parse_value(text), text, seed)

    def config_of(self, one: Training, *, data: list[str], prompts: str, each: float) -> MethodConfig:
        """The config that trains ``one``; ``each``: responses of a row of ``data``. Raises ``ConfigError``."""
        assert one.kind is not None
        given: dict[str, Any] = {"model": self.model}
        given |= {"prompts": [prompts]} if one.kind == "ppo" else {"data": data}
        if one.kind == "ppo":
            given["reward"] = self.reward if one.method == "ppo-true" else str(self.reward_folder(one.seed))
        if one.method == "unlikelihood" and one.name not in {f.name for f in fields(DpoConfig)}:
            given["loss_options"] = [f"{one.name}={one.text}"]
        else:
            given[one.name] = one.value
        if one.method == "unlikelihood":
            given["loss"] = "unlikelihood"
        # As many rows, not twice the steps: fine-tuning learns from the best response of a row alone.
        rows = 1.0 if one.kind == "sft" else each
        found = self.training(one.kind, Path(self.output) / one.folder, given, each=rows, seed=one.seed)
        steps = found.max_steps or 1
        # More checkpoints, those that are measured, are asked for at the steps of :meth:`marks`.
        every = max(1, steps // 3) if one.kind == "ppo" else steps
        return type(found).from_dict(found.to_dict() | {"save_every": every, "keep_last": steps})

    def marks(self, one: MethodConfig) -> list[int]:
        """The steps of a training whose policies are measured: of PPO the end, and two thirds of the way to it, which
        together show whether it had stopped rising."""
        steps = one.max_steps or 1
        if isinstance(one, PpoConfig):
            return [steps] if steps < FEWEST_STEPS else [2 * steps // 3, steps]
        return evenly(steps, self.checkpoints)

    def reward_folder(self, seed: int) -> Path:
        """Where the reward model of the methods that learn one is."""
        return Path(self.output) / f"reward-seed{seed}"

    def reward_config(self, seed: int, *, data: list[str], each: float) -> MethodConfig:
        """The config that trains it."""
        return self.training(
            "reward", self.reward_folder(seed), {"model": self.model, "data": data}, each=each, seed=seed
        )


def _sweep(text: str) -> tuple[str, str, list[str]]:
    """``dpo:beta=0.1,1`` taken apart."""
    method, _, sweep = text.partition(":")
    name, equals, values = sweep.partition("=")
    name, found = name.strip().replace("-", "_"), [v.strip() for v in values.split(",") if v.strip()]
    if method not in TRAINED_BY:
        raise ConfigError(
            f"--methods {text}: there is no method {method!r}{nearest(method, list(TRAINED_BY))}; there are"
            f" {', '.join(TRAINED_BY)}"
        )
    if not equals or not name or not found:
        raise ConfigError(f"--methods {text}: it should be METHOD:NAME=VALUE,VALUE, such as dpo:beta=0.05,0.1,1,5")
    if name in DECIDED or (TRAINED_BY[method] == "ppo" and name in OF_PPO):
        raise ConfigError(f"--methods {text}: the sweep decides {name}; sweep another option")
    if len(set(found)) < len(found):
        raise ConfigError(f"--methods {text}: a value is given twice")
    if method == "best-of" and (name != "n" or not all(v.isdigit() and int(v) > 1 for v in found)):
        raise ConfigError(f"--methods {text}: best-of sweeps n, whole numbers from 2 on")
    return method, name, found
