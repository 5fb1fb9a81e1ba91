"""Options that say which model is trained, and whether all of it or an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from prefopt.core.model_folder import is_adapter
from prefopt.core.options import flag, nearest, option
from prefopt.errors import ConfigError

LORA_RANK, LORA_ALPHA_PER_RANK, LORA_DROPOUT = 16, 2, 0.0
FILLED = {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA_PER_RANK * LORA_RANK, "lora_dropout": LORA_DROPOUT}
ADAPTER_SHAPE = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The model and, if wanted, a new LoRA adapter on it: part of the config of every verb that trains.

    ``lora_rank``, ``lora_alpha`` and ``lora_dropout`` are filled in where a new adapter is trained.
    """

    model: str = option(help="model to align: a folder, or the name of one on the Hugging Face Hub", group="model")

    lora: bool = option(False, "train a LoRA adapter, not all weights", group="adapter")
    lora_rank: int | None = option(
        None, "rank of a new adapter", group="adapter", default_text=f"{LORA_RANK}", at_least=1
    )
    lora_alpha: int | None = option(
        None,
        "scale of a new adapter: its change is multiplied by alpha / rank",
        group="adapter",
        default_text="twice the rank",
        at_least=1,
    )
    lora_dropout: float | None = option(
        None, "dropout of a new adapter", group="adapter", default_text="0", at_least=0, below=1
    )
    lora_targets: list[str] | None = option(
        None,
        "what a new adapter changes: kinds (all-linear, attention, mlp, experts, shared-experts, mixer, other, router)"
        " or names of layers and of fused weights (experts.gate_up_proj)",
        group="adapter",
        default_text="all linear layers and experts, but no head and no router",
    )

    @property
    def named_adapter(self) -> str | None:
        """An adapter that is there already and goes on training."""
        return None

    def check_adapter(self) -> None:
        """Refuse options that shape a new adapter where none is made. Raises ``ConfigError``."""
        for name in ADAPTER_SHAPE:
            if getattr(self, name) is not None and self.named_adapter is not None:
                where = "--adapter" if self.named_adapter != self.model else "--model, which is an adapter,"
                raise ConfigError(f"{flag(name)} shapes a new adapter, but {where} brings its own: leave one out")
            if getattr(self, name) is not None and not self.lora:
                raise ConfigError(f"{flag(name)} does nothing without --lora: add it, or leave {flag(name)} out")

    def fill_adapter(self) -> None:
        """Defaults that depend on other options; called on construction."""
        fill = object.__setattr__  # the dataclass is frozen for everyone else
        if self.named_adapter is not None:
            fill(self, "lora", True)
        elif self.lora:
            fill(self, "lora_rank", self.lora_rank or LORA_RANK)
            fill(self, "lora_alpha", self.lora_alpha or LORA_ALPHA_PER_RANK * (self.lora_rank or LORA_RANK))
            fill(self, "lora_dropout", LORA_DROPOUT if self.lora_dropout is None else self.lora_dropout)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoraOptions):
    """The same, or an adapter that goes on training; it implies ``lora``."""

    adapter: str | None = option(
        None,
        "LoRA adapter on the model to go on training; it is then the reference too, as it is before training,"
        " unless --reference or --reference-adapter names another",
        group="model",
    )

    @property
    def named_adapter(self) -> str | None:
        """An adapter that is there already and goes on training; ``model`` may be one."""
        return self.adapter or (self.model if is_adapter(self.model) else None)

    def check_adapter(self) -> None:
        """See :class:`LoraOptions`; two adapters are one too many."""
        if self.adapter is not None and is_adapter(self.model):
            raise ConfigError(
                f"--model {self.model} is an adapter itself: leave --adapter out, or name the model of both"
            )
        super().check_adapter()


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """Part of the config of every verb that runs a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "precision of computation (trained weights stay float32 under bfloat16); auto: bfloat16 where the device"
        " has it natively, else float32",
        group="machine",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", group="machine", default_text="cuda, then mps, where there is one, else cpu"
    )
    threads: int | None = option(None, "processor threads", group="machine", default_text="torch's choice", at_least=1)

    def check_machine(self) -> None:
        """Refuse what no machine has. Raises ``ConfigError``."""
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            near = nearest(self.device, ["cpu", "cuda", "mps"])
            raise ConfigError(f"--device is {self.device!r}; it must be cpu, cuda, cuda:N or mps{near}")
        if self.device == "mps" and self.dtype == "float64":
            raise ConfigError("--device mps has no float64: take --device cpu, or --dtype float32")


@dataclass(frozen=True, kw_only=True)
class BalanceOptions:
    """Part of the config of ``dpo`` and ``sft``."""

    router_aux_loss_coef: float | Literal["auto"] | None = option(
        None,
        "for a mixture of experts: add its load-balancing loss, multiplied by this; auto: by what the model's"
        " configuration says. A batch that does not fit into memory at once then takes a forward pass more",
        group="loss",
        default_text="no such loss",
        above=0,
    )
