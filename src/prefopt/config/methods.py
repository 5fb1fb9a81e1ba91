"""The table of training methods. The command line, ``prefopt.NAME``, sweeps, chains and reports follow from it.

To add a method: a config dataclass here in ``prefopt.config``, a module ``prefopt.methods.NAME`` with
``run(config, *, model, tokenizer, rows, callbacks)``, and a row below.

>>> METHODS["dpo"].run_path, METHODS["ppo"].rows, method_of(METHODS["sft"].config(model="m", data=["d"], output="o"))
('prefopt.methods.dpo:run', 'prompts', 'sft')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

from prefopt.config.dpo import DpoConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.reward import RewardConfig
from prefopt.config.sft import SftConfig
from prefopt.core.options import RENAMED, from_dict

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
        return load_function(self.run_path)(config, **objects)


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method("sft", SftConfig, "fine-tune a model on demonstrations, chosen responses of preferences, or raw text"),
        Method("dpo", DpoConfig, "align a model with preferences by DPO or another loss"),
        Method("reward", RewardConfig, "train a reward model, which scores responses, on preferences"),
        Method("ppo", PpoConfig, "align a model with a reward by PPO or RLOO, on its own responses", rows="prompts"),
    )
}


def load_function(path: str) -> Callable[..., Any]:
    """The function at ``module:function``."""
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def method_of(config: object) -> str | None:
    """The name of the method that a config belongs to."""
    return next((m.name for m in METHODS.values() if type(config) is m.config), None)


def read_options(method: str, values: Mapping[str, Any]) -> MethodConfig:
    """The config that ``run.json`` holds. Raises ``ConfigError`` where this version has other options."""
    given = {RENAMED.get(name, name): value for name, value in values.items() if value is not None}
    return from_dict(METHODS[method].config, given)
