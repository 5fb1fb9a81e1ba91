"""What commands that train many models on the same data have in common: model, prompts, preferences and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from prefopt.config.dpo import DpoConfig
from prefopt.config.given import parse_given
from prefopt.config.machine import MachineOptions
from prefopt.config.option import check_all, flag, from_dict, option, to_dict
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.errors import ConfigError

AnyConfig: TypeAlias = DpoConfig | SftConfig | RewardConfig | PpoConfig
KINDS: dict[str, type[AnyConfig]] = {"dpo": DpoConfig, "sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}
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
        help="model that every road begins at: a folder, or the name of one on the Hugging Face Hub", group="model"
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

    def training(self, kind: str, output: Path, given: Mapping[str, object], *, each: float, seed: int) -> AnyConfig:
        """The config of one training of ``kind`` (a name of :data:`KINDS`) that learns from ``responses`` responses.

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
        found = from_dict(KINDS[kind], ours | own | dict(given), place)
        per_step = found.batch_size * (found.num if isinstance(found, PpoConfig) else each)
        steps = max(1, round(self.responses / per_step))
        return from_dict(KINDS[kind], found.to_dict() | {"max_steps": steps}, place)

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
