"""What ``prefopt rlhf`` reads: a model, data, and options of each stage that differ from their defaults.

>>> config = RlhfConfig(model="m", data="pairs.jsonl", output="out", ppo=["beta=0.02", "critic=head"])
>>> config.stage("ppo").beta, config.stage("reward").eval_fraction, config.stage("sft").output
(0.02, 0.1, 'out/sft')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import READING, ReadOptions, TemplateOptions
from prefopt.config.methods import METHODS, MethodConfig
from prefopt.config.training import MachineOptions
from prefopt.core.model_folder import is_adapter
from prefopt.core.options import check_all, from_dict, option, parse_given, to_dict
from prefopt.errors import ConfigError

STAGES = ("sft", "reward", "ppo")
"""Methods of the chain, in order."""
# What the chain decides, so that no stage may be given it.
OF_THE_CHAIN = ("model", "data", "prompts", "output", "adapter", "resume", "dry_run", "from_scratch", "train_tokenizer")


@dataclass(frozen=True, kw_only=True)
class RlhfConfig(MachineOptions, TemplateOptions, ReadOptions):
    """The chain of supervised fine-tuning, reward model and PPO."""

    model: str = option(help="model to begin with: a folder, or the name of one on the Hugging Face Hub", group="model")
    lora: bool = option(False, "train LoRA adapters, not all weights, in every stage", group="model")
    data: list[str] = option(
        help="files, folders, globs or Hub data sets of preferences: their best responses are learned, then all are"
        " compared, and last their prompts are answered",
        group="data",
    )
    prompts: list[str] | None = option(
        None, "what PPO answers, in any layout, or .txt", group="data", default_text="the prompts of the data"
    )
    eval_fraction: float = option(
        0.1,
        "part of the prompts that SFT and reward model do not see, and are evaluated on",
        group="data",
        at_least=0,
        below=1,
    )
    max_length: int | None = option(
        None,
        "tokens of prompt and response together; longer rows are truncated and counted",
        group="data",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops the run, or is left out and counted", group="data"
    )
    max_new_tokens: int = option(128, "tokens of a response of PPO at most", group="stages", at_least=1)
    sft: list[str] | None = option(
        None,
        "options of prefopt sft, NAME=VALUE, such as epochs=2",
        group="stages",
        default_text="its own defaults",
    )
    reward: list[str] | None = option(
        None,
        "options of prefopt reward, NAME=VALUE, such as centre=0",
        group="stages",
        default_text="its own defaults",
    )
    ppo: list[str] | None = option(
        None,
        "options of prefopt ppo, NAME=VALUE, such as kl_target=6",
        group="stages",
        default_text="its own defaults",
    )
    output: str = option(help="folder to write a folder of each stage to: sft, reward and ppo", group="output")
    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )
    seed: int = option(0, "seed of every stage", group="machine", at_least=0, at_most=2**32 - 1)

    def __post_init__(self) -> None:
        check_all(self)
        self.check_machine()
        for name in STAGES:  # a mistake in the last stage is told before the first one has run
            self.stage(name)

    def stage(self, name: str, *, resume: bool = False) -> MethodConfig:
        """The whole configuration of one stage. Raises ``ConfigError`` for options that it has not."""
        kind = METHODS[name].config
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {f.name for f in fields(kind)}
        ours: dict[str, Any] = {n: mine[n] for n in known & mine.keys() - set(STAGES) if mine[n] is not None}
        ours |= {"output": str(self.folder(name)), "resume": resume}
        if name != "sft":
            ours["model"] = str(self.folder("tuned" if self.adapts else "sft"))
        if name == "ppo":
            if self.prompts is not None:  # the layout that is named is that of the data
                ours = {n: value for n, value in ours.items() if n not in READING}
            ours |= {"prompts": self.prompts or self.data, "reward": str(self.folder("reward"))}
        given = parse_given(name, getattr(self, name) or ())
        place = f"--{name}"
        for option_name in given:
            if option_name in OF_THE_CHAIN or (name == "ppo" and option_name == "reward"):
                raise ConfigError(f"{place} {option_name}: the chain decides it; leave it out")
        return from_dict(kind, ours | given, place)

    @property
    def adapts(self) -> bool:
        """Whether the fine-tuned model is an adapter, which is folded in before the stages that follow."""
        return self.lora or is_adapter(self.model)

    def folder(self, name: str) -> Path:
        """Where a stage writes. ``tuned``: the fine-tuned model with its adapter folded in."""
        return Path(self.output) / name

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> RlhfConfig:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return from_dict(cls, values, place)
