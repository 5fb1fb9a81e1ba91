"""What ``prefopt frontier`` reads: which roads to measure, and at which settings of each.

>>> config = FrontierConfig(model="m", prompts="p.txt", reward="vader", output="out", roads=["dpo:beta=0.1,1"])
>>> [(t.road, t.setting, t.seed) for t in config.trainings()]
[('dpo', 'beta=0.1', 0), ('dpo', 'beta=1', 0)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import MethodConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.sweeps import DECIDED, OF_PPO, SweepOptions, evenly
from prefopt.core.options import nearest, option, parse_value
from prefopt.errors import ConfigError

# The sweeps of the DPO paper (Rafailov et al. 2023, section 6.1) for DPO, PPO and unlikelihood. It varied the seed of
# fine-tuning; here it is the learning rate.
DEFAULT_ROADS = (
    "dpo:beta=0.05,0.1,1,5",
    "ppo-true:kl_target=3,6,9,12",
    "ppo-learned:kl_target=3,6,9,12",
    "sft:learning_rate=5e-6,1e-5,2e-5,4e-5",
    "unlikelihood:alpha=0.05,0.1,0.5,1",
    "best-of:n=2,4,8,16",
)
ROADS = {"dpo": "dpo", "ppo-true": "ppo", "ppo-learned": "ppo", "sft": "sft", "unlikelihood": "dpo", "best-of": None}
"""A road, and the command that trains it."""
FEWEST_STEPS = 3
"""Of PPO: with fewer there is none two thirds of the way."""


@dataclass(frozen=True, slots=True)
class Training:
    """One policy to be made: ``value`` of the option ``name``. ``kind`` is the command, none for best-of."""

    road: str
    name: str
    value: object
    text: str
    seed: int

    @property
    def kind(self) -> str | None:
        """The command that trains it."""
        return ROADS[self.road]

    @property
    def setting(self) -> str:
        """What was swept."""
        return f"{self.name}={self.text}"

    @property
    def folder(self) -> str:
        """Where it is, below the output."""
        setting = re.sub(r"[^\w.=+-]", "_", self.setting)
        return f"{self.road}/{setting}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepOptions):
    """Expected reward against divergence, over roads and settings. Construction raises ``ConfigError``."""

    roads: list[str] | None = option(
        None,
        "roads with the option that each sweeps and its values, ROAD:NAME=VALUE,VALUE: dpo, ppo-true (the true"
        " reward), ppo-learned (a reward model of the same data), sft, unlikelihood and best-of; each with as many"
        " values",
        group="stages",
        default_text=" ".join(DEFAULT_ROADS),
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
        if self.roads is None:
            object.__setattr__(self, "roads", list(DEFAULT_ROADS))
        trainings = list(self.trainings())
        for one in trainings:  # a mistake in the last one is told before the first has run
            if one.kind is not None:
                self.config_of(one, data=["data"], prompts="prompts", each=2.0)
        if any(t.road == "ppo-learned" for t in trainings):
            self.reward_config(0, data=["data"], each=2.0)

    def trainings(self) -> Iterator[Training]:
        """All of them, in the order of the roads, seed after seed. Raises ``ConfigError`` for a road that is none."""
        sweeps = [_sweep(text) for text in self.roads or ()]
        counts = {len(values) for _, _, values in sweeps}
        if len(counts) > 1:
            told = ", ".join(f"{road} {len(values)}" for road, _, values in sweeps)
            raise ConfigError(f"--roads: all roads get as many settings, that none is tuned more than another: {told}")
        names = [road for road, _, _ in sweeps]
        if len(set(names)) < len(names):
            raise ConfigError("--roads names a road twice; give all its values at once")
        for seed in range(self.seed, self.seed + self.seeds):
            for road, name, values in sweeps:
                if road == "best-of" and seed != self.seed:
                    continue  # nothing is trained: another seed would only be another draw
                for text in values:
                    yield Training(road, name, parse_value(text), text, seed)

    def config_of(self, one: Training, *, data: list[str], prompts: str, each: float) -> MethodConfig:
        """The config that trains ``one``; ``each``: responses of a row of ``data``. Raises ``ConfigError``."""
        assert one.kind is not None
        given: dict[str, Any] = {"model": self.model}
        given |= {"prompts": [prompts]} if one.kind == "ppo" else {"data": data}
        if one.kind == "ppo":
            given["reward"] = self.reward if one.road == "ppo-true" else str(self.reward_folder(one.seed))
        if one.road == "unlikelihood" and one.name not in {f.name for f in fields(DpoConfig)}:
            given["loss_options"] = [f"{one.name}={one.text}"]
        else:
            given[one.name] = one.value
        if one.road == "unlikelihood":
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
        """Where the reward model of the roads that learn one is."""
        return Path(self.output) / f"reward-seed{seed}"

    def reward_config(self, seed: int, *, data: list[str], each: float) -> MethodConfig:
        """The config that trains it."""
        return self.training(
            "reward", self.reward_folder(seed), {"model": self.model, "data": data}, each=each, seed=seed
        )


def _sweep(text: str) -> tuple[str, str, list[str]]:
    """``dpo:beta=0.1,1`` taken apart."""
    road, _, sweep = text.partition(":")
    name, equals, values = sweep.partition("=")
    name, found = name.strip().replace("-", "_"), [v.strip() for v in values.split(",") if v.strip()]
    if road not in ROADS:
        raise ConfigError(
            f"--roads {text}: no road is called {road!r}{nearest(road, list(ROADS))}; there are {', '.join(ROADS)}"
        )
    if not equals or not name or not found:
        raise ConfigError(f"--roads {text}: it should be ROAD:NAME=VALUE,VALUE, such as dpo:beta=0.05,0.1,1,5")
    if name in DECIDED or (ROADS[road] == "ppo" and name in OF_PPO):
        raise ConfigError(f"--roads {text}: the sweep decides {name}; sweep another option")
    if len(set(found)) < len(found):
        raise ConfigError(f"--roads {text}: a value stands there twice")
    if road == "best-of" and (name != "n" or not all(v.isdigit() and int(v) > 1 for v in found)):
        raise ConfigError(f"--roads {text}: best-of sweeps n, whole numbers from 2 on")
    return road, name, found
