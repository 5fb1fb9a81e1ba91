"""The table of training methods, and ``prefopt rlhf``, the chain of three of them.

The command line, ``prefopt.NAME``, sweeps, chains and reports follow from the table. To add a method: a config
dataclass in ``prefopt.config``, a module ``prefopt.methods.NAME`` with
``run(config, *, model, tokenizer, rows, callbacks)``, and a row of :data:`METHODS`.

>>> METHODS["dpo"].run_path, METHODS["ppo"].rows, method_of(METHODS["sft"].config(model="m", data=["d"], output="o"))
('prefopt.methods.dpo:run', 'prompts', 'sft')
>>> config = RlhfConfig(model="m", data="pairs.jsonl", output="out", ppo=["beta=0.02", "critic=head"])
>>> config.stage("ppo").beta, config.stage("reward").eval_fraction, config.stage("sft").output
(0.02, 0.1, 'out/sft')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from prefopt.config.data import READING, RowOptions, TemplateOptions
from prefopt.config.distil import DistilConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.config.training import MachineOptions, ProgressOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import RENAMED, option, parse_given
from prefopt.core.plugins import imported
from prefopt.errors import ConfigError

MethodConfig: TypeAlias = Any
"""A config of a method in :data:`METHODS`."""


@dataclass(frozen=True, slots=True)
class Method:
    """A training method. ``rows``: the option that names what it reads. ``run_path`` is imported when it runs."""

    name: str
    config: type[MethodConfig]
    help: str
    rows: str = "data"

    @property
    def run_path(self) -> str:
        """``module:function`` that takes the config."""
        return f"prefopt.methods.{self.name}:run"

    def run(self, config: MethodConfig, **objects: Any) -> Any:
        """Import the method and run it; ``objects`` replace what the config names: model, tokenizer, rows."""
        return imported(self.run_path)(config, **objects)


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("sft", SftConfig, "fine-tune a model on demonstrations, chosen responses of preferences, or raw text"),
        Method("distil", DistilConfig, "train a model to predict what a teacher does, on data or on its own responses"),
        Method("dpo", DpoConfig, "align a model with preferences by DPO or another loss"),
        Method("reward", RewardConfig, "train a reward model, which scores responses, on preferences"),
        Method("ppo", PpoConfig, "align a model with a reward by PPO or RLOO, on its own responses", rows="prompts"),
        Method(
            "online",
            OnlineConfig,
            "align a model by its own fresh responses, judged by a reward, a language model or people",
            rows="prompts",
        ),
    )
}


def method_of(config: object) -> str | None:
    """The name of the method that a config belongs to."""
    return next((m.name for m in METHODS.values() if type(config) is m.config), None)


def read_options(method: str, values: Mapping[str, Any]) -> MethodConfig:
    """The config that ``run.json`` holds. Raises ``ConfigError`` where this version has other options."""
    given = {RENAMED.get(name, name): value for name, value in values.items() if value is not None}
    return METHODS[method].config.from_dict(given)


STAGES = ("sft", "reward", "ppo")
"""Methods of the chain, in order."""
# Options that the chain sets itself.
OF_THE_CHAIN = (
    "model",
    "data",
    "prompts",
    "output",
    "adapter",
    "resume",
    "overwrite",
    "dry_run",
    "from_scratch",
    "train_tokenizer",
)


def stage_options(command: str, example: str = "") -> Any:
    """An option with options of another command."""
    such = f", such as {example}" if example else ""
    help = f"options of prefopt {command}, NAME=VALUE{such}"
    return option(None, help, group="stages", default_text="its own defaults")


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(MachineOptions, ProgressOptions, TemplateOptions, RowOptions):
    """Supervised fine-tuning, reward model and PPO, one after another. Construction raises ``ConfigError``."""

    model: str = option(help="model to start from: a folder, or the name of one on the Hugging Face Hub", group="model")
    lora: bool = option(False, "train LoRA adapters instead of all weights, in every stage")
    data: list[str] = option(
        help="files, folders, globs or Hub data sets of preferences: SFT trains on their best responses, the reward"
        " model on all of them, and PPO answers their prompts",
        group="data",
    )
    prompts: list[str] | None = option(
        None, "prompts of PPO, in any layout, or .txt", default_text="the prompts of the data"
    )
    eval_fraction: float = option(
        0.1,
        "fraction of the prompts that SFT and reward model are evaluated on instead of trained",
        at_least=0,
        below=1,
    )
    max_length: int | None = option(
        None,
        "maximum tokens of prompt and response together; longer rows are truncated and counted",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    max_new_tokens: int = option(128, "maximum tokens of a response of PPO", group="stages", at_least=1)
    sft: list[str] | None = stage_options("sft", "epochs=2")
    reward: list[str] | None = stage_options("reward", "centre=0")
    ppo: list[str] | None = stage_options("ppo", "kl_target=6")
    output: str = option(help="folder to write a folder of each stage to: sft, reward and ppo", group="output")
    seed: int = option(0, "seed of every stage", group="machine", at_least=0, at_most=2**32 - 1)

    def check(self) -> None:
        for name in STAGES:
            self.stage(name)

    def stage(self, name: str, *, resume: bool = False) -> MethodConfig:
        """The config of one stage. Raises ``ConfigError`` for an unknown option."""
        kind = METHODS[name].config
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {f.name for f in fields(kind)}
        ours: dict[str, Any] = {n: mine[n] for n in known & mine.keys() - set(STAGES) if mine[n] is not None}
        ours |= {"output": str(self.folder(name)), "resume": resume}
        if name != "sft":
            ours["model"] = str(self.folder("tuned" if self.adapts else "sft"))
        if name == "ppo":
            if self.prompts is not None:  # --format and the like are about the data
                ours = {n: value for n, value in ours.items() if n not in READING or n == "picture_folder"}
            ours |= {"prompts": self.prompts or self.data, "reward": str(self.folder("reward"))}
        given = parse_given(name, getattr(self, name) or ())
        place = f"--{name}"
        for option_name in given:
            if option_name in OF_THE_CHAIN or (name == "ppo" and option_name == "reward"):
                raise ConfigError(f"{place} {option_name}: the chain sets it; leave it out")
        return kind.from_dict(ours | given, place)

    @property
    def adapts(self) -> bool:
        """Whether SFT trains an adapter, which is merged before the other stages."""
        return self.lora or is_adapter(self.model)

    def folder(self, name: str) -> Path:
        """Output folder of a stage. ``tuned``: the fine-tuned model with its adapter merged."""
        return Path(self.output) / name
