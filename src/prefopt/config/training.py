"""Options that every command that trains has in common: model, adapter, optimiser, output and machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from prefopt.config.data import DataOptions
from prefopt.core import options as _options
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


# The DPO paper's 1e-6 for full fine-tuning, at the upper end of the 3e-7..1e-6 that the field reports; LoRA, whose few
# weights start at no change at all, takes 5e-6..5e-5, of which 2e-5 is about the geometric middle.
LEARNING_RATE = {False: 1e-6, True: 2e-5}

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True, kw_only=True)
class RunOptions(MachineOptions):
    """Optimiser, output and machine. ``learning_rate`` is filled in on construction."""

    epochs: float = option(1.0, "passes over the data", group="optimiser", above=0)
    max_steps: int | None = option(
        None, "stop after this many steps, where the epochs are longer", group="optimiser", at_least=1
    )
    batch_size: int = option(
        16,
        "pairs per optimiser step, whatever fits into memory at once; small data sets, of hundreds of pairs, want"
        " steps more than they want large ones",
        group="optimiser",
        at_least=1,
    )
    learning_rate: float = option(
        None,
        "peak learning rate; 3e-7 to 1e-6 is usual, with LoRA 5e-6 to 5e-5",
        group="optimiser",
        default_text=f"{LEARNING_RATE[False]:g}, with LoRA {LEARNING_RATE[True]:g}",
        above=0,
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "learning rate after the warm-up: falls to zero, or stays", group="optimiser"
    )
    warmup: float = option(0.1, "part of the steps in which it rises from zero", group="optimiser", at_least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", group="optimiser", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean", group="optimiser", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay of the square", group="optimiser", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", group="optimiser", above=0)
    max_grad_norm: float = option(
        1.0, "gradients are scaled down to this norm; a huge number clips nothing", group="optimiser", above=0
    )

    output: str = option(help="folder to write the model, its card and the metrics to", group="output")
    save_every: int | None = option(
        None,
        "steps between checkpoints",
        group="output",
        default_text="only where the run is interrupted",
        at_least=1,
    )
    keep_last: int = option(2, "checkpoints to keep, the newest", group="output", at_least=1)
    resume: bool = option(False, "go on from the newest whole checkpoint in the output folder", group="output")
    dry_run: bool = option(
        False, "show the options, rows, rendered examples and estimates; train and write nothing", group="output"
    )
    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )

    track: list[str] | None = option(
        None,
        f"draw the run's curves by {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}, one or more; each is an extra, such as"
        ' pip install "prefopt[tensorboard]"',
        group="tracking",
        default_text="nothing leaves the output folder",
    )
    track_project: str = option("prefopt", "project or experiment of the trackers that have one", group="tracking")

    token_budget: int | None = option(
        None,
        "tokens encoded at once",
        group="machine",
        default_text="estimated from memory, then tried",
        at_least=1,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a third slower", group="machine"
    )
    attention: Literal["auto", "loop"] = option(
        "auto", "attention kernel; loop: the plain one, segment by segment, to compare with", group="machine"
    )
    seed: int = option(
        0, "seed of order, held-out split, dropout and new adapters", group="machine", at_least=0, at_most=2**32 - 1
    )
    deterministic: bool = option(
        False, "deterministic kernels on a GPU, so that a resumed run is the same to the bit", group="machine"
    )

    def check_run(self) -> None:
        """Refuse contradictions. Raises ``ConfigError``."""
        if self.resume and self.dry_run:
            raise ConfigError("--dry-run trains nothing that --resume could go on with: leave one of them out")
        for name in self.track or ():
            if name not in TRACKERS:
                raise ConfigError(f"--track {name}: it must be one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        if self.track_project != type(self).track_project and not set(self.track or ()) - {"tensorboard"}:
            raise ConfigError("--track-project does nothing without --track wandb, trackio or mlflow: leave it out")
        self.check_machine()


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RunOptions):
    """The same for runs that look at held-out data as they go."""

    eval_every: int | None = option(
        None, "steps between evaluations", group="evaluation", default_text="at the end of each epoch", at_least=1
    )
    early_stopping: int | None = option(
        None, "stop after this many evaluations without a lower loss", group="evaluation", at_least=1
    )

    def check_training(self, *, evaluates: bool) -> None:
        """Refuse contradictions; ``evaluates`` tells whether there are rows to evaluate on. Raises ``ConfigError``."""
        for name in ("eval_every", "early_stopping"):
            if getattr(self, name) is not None and not evaluates:
                raise ConfigError(
                    f"{flag(name)} needs evaluation pairs: give --eval-data or --eval-fraction, or leave it out"
                )
        self.check_run()


@dataclass(frozen=True, kw_only=True)
class MethodOptions(TrainingOptions, DataOptions, LoraOptions):
    """Model, data, optimiser, output and machine of one run.

    Defaults that depend on other options are filled in on construction, so that what is read here, and what
    ``to_dict`` writes, is what the run does.
    """

    def fill(self, learning_rate: Mapping[bool, float]) -> None:
        """Check what all methods share, and fill in defaults; ``learning_rate`` by whether an adapter is trained.

        Raises ``ConfigError``.
        """
        _options.check_all(self)
        self.check_data()
        self.check_adapter()
        self.check_training(evaluates=self.evaluates)
        self.fill_adapter()
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", learning_rate[self.lora])

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return _options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> Self:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return _options.from_dict(cls, values, place)
