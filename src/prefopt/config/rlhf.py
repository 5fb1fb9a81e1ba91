"""What ``prefopt reward`` and ``prefopt rlhf`` read, and the table of methods.

>>> RewardConfig(model="sft", data="pairs.jsonl", output="out").centre
0.01
>>> config = RlhfConfig(model="m", data="pairs.jsonl", output="out", ppo=["beta=0.02", "critic=head"])
>>> config.stage("ppo").beta, config.stage("reward").eval_fraction, config.stage("sft").output
(0.02, 0.1, 'out/sft')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prefopt.config.data import READING, RowOptions, TemplateOptions
from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.sft import SftConfig
from prefopt.config.training import MachineOptions, MethodOptions, ProgressOptions, rate_option
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import RENAMED, from_dict, option, parse_given
from prefopt.errors import ConfigError

# Full training: InstructGPT's 9e-6 and Llama 2's 5e-6 to 1e-5. LoRA: about ten times as much.
LEARNING_RATE = {False: 1e-5, True: 1e-4}


@dataclass(frozen=True, kw_only=True)
class RewardConfig(MethodOptions):
    """One run that trains a reward model. Construction raises ``ConfigError``."""

    model: str = option(
        help="model to start from: a language model, best the fine-tuned one, or a reward model to continue training",
        group="model",
    )
    batch_size: int = option(16, "prompts per optimiser step, each with all its pairs", group="optimiser", at_least=1)
    learning_rate: float = rate_option(LEARNING_RATE, "; 5e-6 to 1e-5 is usual, with LoRA 5e-5 to 2e-4")
    pairs: Literal["all", "best-worst"] = option(
        "all",
        "pairs of three and more responses: all of them, with weights that sum to 1 per prompt, or best and worst only",
        group="loss",
    )
    margin: float | None = option(
        None,
        "margin of reward per point of difference between the data's scores (Llama 2)",
        group="loss",
        default_text="no margin",
        above=0,
    )
    centre: float = option(
        0.01, "weight of the squared sum of a pair's rewards, which keeps them near 0", group="loss", at_least=0
    )
    zero: Literal["chosen", "all", "none"] = option(
        "chosen",
        "responses of the training data whose mean reward is shifted to 0 after training",
        group="loss",
    )


StageName = Literal["sft", "reward", "ppo"]
StageConfig: TypeAlias = SftConfig | RewardConfig | PpoConfig
STAGES: dict[StageName, type[StageConfig]] = {"sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}
# Options that the chain sets itself.
OF_THE_CHAIN = ("model", "data", "prompts", "output", "adapter", "resume", "dry_run", "from_scratch", "train_tokenizer")


def stage_options(command: str, example: str = "") -> list[str] | None:
    """An option with options of another command."""
    such = f", such as {example}" if example else ""
    given: list[str] | None = option(
        None, f"options of prefopt {command}, NAME=VALUE{such}", group="stages", default_text="its own defaults"
    )
    return given


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(MachineOptions, ProgressOptions, TemplateOptions, RowOptions):
    """Supervised fine-tuning, reward model and PPO, one after another. Construction raises ``ConfigError``."""

    model: str = option(help="model to start from: a folder, or the name of one on the Hugging Face Hub", group="model")
    lora: bool = option(False, "train LoRA adapters instead of all weights, in every stage", group="model")
    data: list[str] = option(
        help="files, folders, globs or Hub data sets of preferences: SFT trains on their best responses, the reward"
        " model on all of them, and PPO answers their prompts",
        group="data",
    )
    prompts: list[str] | None = option(
        None, "prompts of PPO, in any layout, or .txt", group="data", default_text="the prompts of the data"
    )
    eval_fraction: float = option(
        0.1,
        "fraction of the prompts that SFT and reward model are evaluated on instead of trained",
        group="data",
        at_least=0,
        below=1,
    )
    max_length: int | None = option(
        None,
        "most tokens of prompt and response together; longer rows are truncated and counted",
        group="data",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    max_new_tokens: int = option(128, "most tokens of a response of PPO", group="stages", at_least=1)
    sft: list[str] | None = stage_options("sft", "epochs=2")
    reward: list[str] | None = stage_options("reward", "centre=0")
    ppo: list[str] | None = stage_options("ppo", "kl_target=6")
    output: str = option(help="folder to write a folder of each stage to: sft, reward and ppo", group="output")
    seed: int = option(0, "seed of every stage", group="machine", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        """Refuse a mistake in any stage before the first one runs."""
        super().check()
        for name in STAGES:
            self.stage(name)

    def stage(self, name: StageName, *, resume: bool = False) -> StageConfig:
        """The config of one stage. Raises ``ConfigError`` for an unknown option."""
        kind = STAGES[name]
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {f.name for f in fields(kind)}
        ours: dict[str, Any] = {n: mine[n] for n in known & mine.keys() - set(STAGES) if mine[n] is not None}
        ours |= {"output": str(self.folder(name)), "resume": resume}
        if name != "sft":
            ours["model"] = str(self.folder("tuned" if self.adapts else "sft"))
        if name == "ppo":
            if self.prompts is not None:  # --format and the like are about the data
                ours = {n: value for n, value in ours.items() if n not in READING}
            ours |= {"prompts": self.prompts or self.data, "reward": str(self.folder("reward"))}
        given = parse_given(name, getattr(self, name) or ())
        place = f"--{name}"
        for option_name in given:
            if option_name in OF_THE_CHAIN or (name == "ppo" and option_name == "reward"):
                raise ConfigError(f"{place} {option_name}: the chain sets it; leave it out")
        return from_dict(kind, ours | given, place)

    @property
    def adapts(self) -> bool:
        """Whether SFT trains an adapter, which is merged before the other stages."""
        return self.lora or is_adapter(self.model)

    def folder(self, name: str) -> Path:
        """Output folder of a stage. ``tuned``: the fine-tuned model with its adapter merged."""
        return Path(self.output) / name


METHODS: Mapping[str, type[Any]] = {"dpo": DpoConfig, "sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}


def method_of(config: object) -> str | None:
    """The command of a config."""
    return next((name for name, kind in METHODS.items() if type(config) is kind), None)


def read_options(method: str, values: Mapping[str, Any]) -> Any:
    """The config in a run's record. Raises ``ConfigError`` where this version has other options."""
    given = {RENAMED.get(name, name): value for name, value in values.items() if value is not None}
    return from_dict(METHODS[method], given)
