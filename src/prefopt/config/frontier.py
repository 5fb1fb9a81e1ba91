"""What ``prefopt frontier`` reads: methods, their settings, and how their rates are chosen.

>>> frontier = FrontierConfig(model="m", prompts="p.txt", reward="vader", output="out", methods=["dpo:beta=0.1,1"])
>>> [(t.method, t.setting, t.seed) for t in frontier.trainings()]
[('dpo', 'beta=0.1', 0), ('dpo', 'beta=1', 0)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prefopt.config.data import positive
from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import MethodConfig, stage_options
from prefopt.config.ppo import PpoConfig
from prefopt.config.sweeps import DECIDED, GIVEN, OF_PPO, SweepOptions, at_rate, evenly, factors_of
from prefopt.core.options import flag, nearest, option, parse_value
from prefopt.errors import ConfigError

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
TRAINED_BY = {"dpo": "dpo", "ppo-true": "ppo", "ppo-learned": "ppo", "rloo-true": "rloo", "rloo-learned": "rloo"}
TRAINED_BY |= {"sft": "sft", "unlikelihood": "dpo"}
"""A method of the sweep, and what trains it: a command, or the algorithm RLOO of ``prefopt ppo``."""
LEARNED = "-learned"
"""Ends the names of methods that maximise a reward model."""
ONLINE = ("ppo", "rloo")
"""What draws its own responses."""
READ_BY = {GIVEN[kind]: tuple(m for m, by in TRAINED_BY.items() if by == kind) for kind in TRAINED_BY.values()}
READ_BY |= {
    "reward_model": tuple(m for m in TRAINED_BY if m.endswith(LEARNED)),
    "plateau_share": tuple(m for m, by in TRAINED_BY.items() if by in ONLINE),
    "checkpoints": tuple(m for m, by in TRAINED_BY.items() if by not in ONLINE),
}
"""An option that only some methods read, and these."""
KL_AT = ("1", "2", "4", "8")
FEWEST_STEPS = 3
"""Fewest steps of PPO with one at two thirds of the way."""


@dataclass(frozen=True, slots=True)
class Training:
    """One policy to train, with ``value`` for the option ``name``, at ``factor`` times its learning rate."""

    method: str
    name: str
    value: object
    text: str
    seed: int
    factor: float = 1.0

    @property
    def kind(self) -> str | None:
        """What trains it, see :data:`TRAINED_BY`; None for best-of."""
        return TRAINED_BY.get(self.method)

    @property
    def setting(self) -> str:
        return f"{self.name}={self.text}"

    @property
    def folder(self) -> str:
        setting = re.sub(r"[^\w.=+-]", "_", self.setting)
        rate = "" if self.factor == 1 else f"-rate{self.factor:g}"
        return f"{self.method}/{setting}-seed{self.seed}{rate}"

    @property
    def learned(self) -> bool:
        """Whether it maximises a reward model of the sweep's preferences."""
        return self.method.endswith(LEARNED)


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(SweepOptions):
    """Expected reward versus KL, over methods and settings. Construction raises ``ConfigError``."""

    methods: list[str] = option(
        help="methods with an option to vary and its values, METHOD:NAME=VALUE,VALUE: dpo, ppo-true and rloo-true (the"
        " true reward), ppo-learned and rloo-learned (a reward model of the same data), sft, unlikelihood and best-of;"
        " each with the same number of values",
        group="stages",
        computed=lambda c: list(DEFAULT_SWEEPS),
        default_text=" ".join(DEFAULT_SWEEPS),
    )
    seeds: int = option(1, "trainings of every setting, seed after seed", at_least=1)
    seconds: float | None = option(
        None,
        "processor seconds of each training, with those of its reward model, which --responses still sets: a few steps"
        " of each setting are timed, and it makes as many as fit; on CPUs",
        default_text="the same number of responses",
        above=0,
    )
    rloo: list[str] | None = stage_options("ppo with --algorithm rloo")
    rate_factors: list[str] = option(
        help="train every setting with the first seed at its learning rate times each of these; all trainings of a"
        " method then use its best one, chosen on the prompts of --tune",
        computed=lambda c: ["1"],
        default_text="1: rates are as given",
    )

    plateau_share: float = option(
        0.2,
        "a PPO training has converged if its gain of true reward over the last third of its steps is, with confidence,"
        " below this fraction of its total gain; a training that rises evenly gains a third",
        above=0,
        at_most=0.3,
    )
    judge: str | None = option(
        None,
        "a second reward, named as --reward is, that nothing is trained on or chosen by: it scores the samples of every"
        " policy too, and where it stops rising with the true reward, that one is over-optimised",
        group="reward",
        default_text="none",
    )
    kl_at: list[str] = option(
        help="KLs in nats to compare methods at; the largest bounds the area under a method's frontier",
        computed=lambda c: list(KL_AT),
        default_text=" ".join(KL_AT),
    )
    tune: int | None = option(
        None,
        "distinct prompts to choose rates on, which are neither trained on nor reported; with a single rate they are"
        " set aside, so that the sweep may go on with several --rate-factors",
        group="data",
        at_least=2,
    )
    task: list[str] | None = option(
        None,
        "multiple-choice questions, as rows of preferences whose best answer is right: every policy answers them by"
        " log-probability per token, and the change against the model before is the alignment tax",
        group="data",
        default_text="not measured",
    )
    report_only: bool = option(
        False, "measure and train nothing: report what is finished in --output, and what is missing", group="output"
    )
    checkpoints: int = option(
        1, "points of each training of dpo, sft and unlikelihood, evenly spaced over its steps", at_least=1
    )

    def check(self) -> None:
        if self.judge == self.reward:
            raise ConfigError(f"--judge {self.judge} is the reward of --reward: name another, or leave it out")
        if self.seconds is not None and self.is_given("responses") and not any(t.learned for t in self.trainings()):
            raise ConfigError("--responses: --seconds sets the steps of all methods; leave one of them out")
        if len(self.factors) > 1 and self.tune is None:
            raise ConfigError("--rate-factors: several are chosen from on prompts of their own: give --tune too")
        _ = self.targets
        trainings = list(self.trainings())
        for one in trainings:
            if one.kind is not None:
                self.config_of(one, data=["data"], prompts="prompts", each=2.0)
        if any(t.learned for t in trainings):
            self.reward_config(0, data=["data"], each=2.0)
        if ignored := [name for name in READ_BY if name in self.unread and self.is_given(name)]:
            readers = " or ".join(READ_BY[ignored[0]])
            raise ConfigError(
                f"{flag(ignored[0])} is read by {readers}, and --methods has none of them: add one, or leave"
                f" {flag(ignored[0])} out"
            )

    @property
    def unread(self) -> set[str]:
        """Options that none of these methods reads."""
        methods = {one.method for one in self.trainings()}
        return {name for name, readers in READ_BY.items() if methods.isdisjoint(readers)}

    @property
    def factors(self) -> list[float]:
        """``rate_factors`` as numbers. Raises ``ConfigError``."""
        return factors_of(self.rate_factors)

    @property
    def targets(self) -> tuple[float, ...]:
        """``kl_at`` as numbers, increasing. Raises ``ConfigError``."""
        return tuple(sorted({positive(text, f"--kl-at {text}: it") for text in self.kl_at}))

    def trials(self) -> Iterator[Training]:
        """Trainings to choose rates by: all settings at all rates, with the first seed. None for a single rate."""
        for factor in self.factors if len(self.factors) > 1 else ():
            for one in self.trainings(dict.fromkeys(TRAINED_BY, factor)):
                if one.kind is not None and one.seed == self.seed:
                    yield one

    def trainings(self, rates: Mapping[str, float] | None = None) -> Iterator[Training]:
        """All trainings, in the order of the methods, seed by seed, at these factors of their learning rates, by
        method; by default the first. Raises ``ConfigError`` for an unknown method."""
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
                    factor = 1.0 if method == "best-of" else (rates or {}).get(method, self.factors[0])
                    yield Training(method, name, parse_value(text), text, seed, factor)

    def config_of(
        self, one: Training, *, data: list[str], prompts: str, each: float, steps: int | None = None
    ) -> MethodConfig:
        """The config that trains ``one``, in so many ``steps`` if they are given; ``each``: responses per row of
        ``data``. Raises ``ConfigError``."""
        kind = TRAINED_BY[one.method]
        given: dict[str, Any] = {"model": self.model}
        if kind in ONLINE:
            reward = str(self.reward_folder(one.seed)) if one.learned else self.reward
            given |= {"prompts": [prompts], "reward": reward, "algorithm": kind}
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
        found = self.training(kind, Path(self.output) / one.folder, given, each=rows, seed=one.seed, steps=steps)
        found = at_rate(found, one.factor, f"--{GIVEN[kind]}")
        steps = found.max_steps or 1
        # The checkpoints to measure are requested at the steps of :meth:`marks`.
        every = max(1, steps // 3) if kind in ONLINE else steps
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
    if name in DECIDED or (TRAINED_BY.get(method) in ONLINE and name in OF_PPO):
        raise ConfigError(f"--methods {text}: the sweep sets {name}; vary another option")
    if len(set(found)) < len(found):
        raise ConfigError(f"--methods {text}: a value is a duplicate; remove it")
    if method == "best-of" and (name != "n" or not all(v.isdigit() and int(v) > 1 for v in found)):
        raise ConfigError(f"--methods {text}: best-of varies n, with whole numbers from 2")
    return method, name, found
