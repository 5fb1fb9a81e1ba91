"""Options that all commands that train share: model, adapter, optimiser, output and machine.

Defaults that depend on other options are filled in on construction: a config, and what ``to_dict`` writes of it, is
what the run does.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.config.data import DataOptions
from prefopt.config.rates import AUTO
from prefopt.core.files import expanded
from prefopt.core.model_folder import QUANTISED, base_of, is_adapter
from prefopt.core.options import Config, flag, nearest, option, options
from prefopt.errors import ConfigError, ModelError

LORA_RANK, LORA_ALPHA_PER_RANK, LORA_DROPOUT = 16, 2, 0.0
FILLED = {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA_PER_RANK * LORA_RANK, "lora_dropout": LORA_DROPOUT}
ADAPTER_SHAPE = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
OFFLOADS = ("optimizer", "activations")


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Config):
    """Part of the config of every command that runs a model."""

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "precision of computation (trained weights stay float32 under bfloat16); auto: bfloat16 where the device"
        " has it natively, else float32",
        group="machine",
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:N or mps", default_text="the first available of cuda, mps and cpu"
    )
    threads: int | None = option(None, "CPU threads", default_text="torch's choice", at_least=1)

    def check(self) -> None:
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            near = nearest(self.device, ["cpu", "cuda", "mps"])
            raise ConfigError(f"--device is {self.device!r}; it must be cpu, cuda, cuda:N or mps{near}")
        if self.device == "mps" and self.dtype == "float64":
            raise ConfigError("--device mps has no float64: use --device cpu, or --dtype float32")


@dataclass(frozen=True, kw_only=True)
class ProgressOptions(Config):
    """Part of the config of every command that takes a while."""

    progress: Literal["auto", "rich", "plain", "none"] = option(
        "auto", "how progress is shown; auto: rich on a terminal, plain lines elsewhere", group="output"
    )


def quantise_option(what: str, group: str = "") -> Any:
    """How a model is quantised at loading; None is by the record of its adapter."""
    return option(
        None,
        f"{what} 4 bits a weight (nf4) or 8 (int8), by bitsandbytes on the CPU or CUDA; none: full"
        " precision, also where the adapter was trained on a quantised model",
        group=group,
        default_text="as an adapter was trained, else none",
    )


Quantise = Literal["nf4", "int8", "none"] | None


def _new_adapter(config: LoraOptions) -> bool:
    return config.lora and config.named_adapter is None


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Config):
    """The model and, with ``lora``, a new adapter on it."""

    model: str = option(help="model to align: a folder, or the name of one on the Hugging Face Hub", group="model")

    lora: bool = option(False, "train a LoRA adapter instead of all weights", group="adapter")
    lora_rank: int | None = option(
        help="rank of a new adapter",
        computed=lambda c: LORA_RANK if _new_adapter(c) else None,
        default_text=f"{LORA_RANK}",
        at_least=1,
    )
    lora_alpha: int | None = option(
        help="scale of a new adapter: its output is multiplied by alpha / rank",
        computed=lambda c: LORA_ALPHA_PER_RANK * c.lora_rank if _new_adapter(c) else None,
        default_text="twice the rank",
        at_least=1,
    )
    lora_dropout: float | None = option(
        help="dropout of a new adapter",
        computed=lambda c: LORA_DROPOUT if _new_adapter(c) else None,
        default_text="0",
        at_least=0,
        below=1,
    )
    lora_targets: list[str] | None = option(
        None,
        "modules that a new adapter changes: kinds (all-linear, attention, mlp, experts, shared-experts, mixer, other,"
        " router) or names of layers and of fused weights (experts.gate_up_proj)",
        default_text="all linear layers and experts, without heads and routers",
    )

    vision: Literal["frozen", "lora", "full"] = option(
        "frozen",
        "vision tower and projector of a model that trains on rows with pictures: frozen, with adapters too"
        " (with --lora), or trained in full (without)",
    )
    quantise: Quantise = quantise_option(
        "QLoRA: hold the frozen weights under the adapter, and a reference or teacher, in"
    )

    @property
    def named_adapter(self) -> str | None:
        """An existing adapter whose training continues."""
        return None

    @property
    def quantises(self) -> bool:
        """Whether the model is quantised at loading."""
        return self.quantise in QUANTISED

    def check(self) -> None:
        if self.vision == "lora" and not _new_adapter(self):
            raise ConfigError("--vision lora puts a new adapter on the vision tower: add --lora")
        if self.vision == "full" and self.lora:
            raise ConfigError("--vision full trains the vision tower in full, which --lora does not: leave one out")
        for name in ADAPTER_SHAPE:
            if getattr(self, name) is not None and self.named_adapter is not None:
                where = "--adapter" if self.named_adapter != self.model else "--model, which is an adapter,"
                raise ConfigError(f"{flag(name)} shapes a new adapter, but {where} brings its own: leave one out")
        if self.named_adapter is not None:
            object.__setattr__(self, "lora", True)
        self.need("lora", *ADAPTER_SHAPE)
        if self.quantises and not self.lora:
            raise ConfigError(
                f"--quantise {self.quantise} holds frozen weights, and without an adapter all train: add --lora, or"
                " leave --quantise out"
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoraOptions):
    """The same, or an existing adapter whose training continues; it implies ``lora``."""

    adapter: str | None = option(
        None,
        "existing LoRA adapter on the model to continue training; it is also the reference, as it is before training,"
        " unless --reference or --reference-adapter names another",
        group="model",
    )

    @property
    def named_adapter(self) -> str | None:
        """An existing adapter whose training continues; ``model`` may be one."""
        return self.adapter or (self.model if is_adapter(self.model) else None)

    def check(self) -> None:
        if self.adapter is not None and is_adapter(self.model):
            raise ConfigError(
                f"--model {self.model} is an adapter itself: leave --adapter out, or name the model of both"
            )


@dataclass(frozen=True, kw_only=True)
class RouterOptions(Config):
    """Losses on the routers of a mixture of experts, part of the config of every method."""

    router_aux_loss_coef: float | Literal["auto"] | None = option(
        None,
        "coefficient of the load-balancing loss of a mixture of experts; auto: the one in the model's config. A batch"
        " that does not fit into memory at once then takes another forward pass",
        group="loss",
        default_text="no such loss",
        above=0,
    )
    router_z_loss_coef: float | None = option(
        None,
        "coefficient of the router z loss (ST-MoE; the paper used 0.001), which keeps the logits of the routers small",
        default_text="no such loss",
        above=0,
    )

    @property
    def reads_routers(self) -> bool:
        """Whether a loss is computed on routers, inside of layers."""
        return self.router_aux_loss_coef is not None or self.router_z_loss_coef is not None


def rate_option(rates: dict[bool, float], usual: str = "") -> Any:
    """The learning rate of a method, with its defaults for full training (False) and for LoRA (True)."""
    return option(
        help=f"peak learning rate{usual}",
        group="optimiser",
        computed=lambda c: rates[c.lora or c.named_adapter is not None],
        default_text=f"{rates[False]:g}, with LoRA {rates[True]:g}",
        above=0,
    )


def auto_rate_option(rates: dict[bool, float], usual: str = "") -> Any:
    """The learning rate of a method that suggests one where none is given; ``rates`` are the published ones, for full
    training (False) and for LoRA (True)."""
    return option(
        AUTO,
        f"peak learning rate{usual}; auto: the usual one for large models, {rates[False]:g} and with LoRA"
        f" {rates[True]:g}, and"
        " more for models below half a billion weights",
        group="optimiser",
        above=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(MachineOptions, ProgressOptions):
    """Optimiser, output and machine."""

    epochs: float = option(1.0, "passes over the data", group="optimiser", above=0)
    max_steps: int | None = option(None, "stop after this many steps, even if the epochs are longer", at_least=1)
    batch_size: int = option(
        16,
        "rows or pairs per optimiser step, on all devices together, however many fit into memory at once; with"
        " hundreds of rows, more steps help"
        " more than larger batches",
        at_least=1,
    )
    learning_rate: float | Literal["auto"] = option(help="peak learning rate", above=0)
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "learning rate after the warm-up: decays to zero, linearly or as a cosine, or stays constant"
    )
    warmup: float = option(
        0.1, "fraction of the steps in which the learning rate warms up, linearly from 0", at_least=0, below=1
    )
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1, decay of the first moment", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta2, decay of the second moment", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = option(
        "adamw",
        "adamw-8bit: AdamW with moments in 8 bits, 2 bytes of state per weight instead of 8; paged-adamw-8bit: its"
        ' moments move to host memory where a GPU is full. Both need pip install "prefopt[quantise]"',
    )
    max_grad_norm: float = option(
        1.0, "gradient clipping: larger gradients are scaled down to this norm; 1e9 turns it off", above=0
    )

    output: str = option(help="folder for the model, its card and the metrics", group="output")
    save_every: int | None = option(None, "steps between checkpoints", default_text="only on interruption", at_least=1)
    keep_last: int = option(2, "newest checkpoints to keep", at_least=1)
    overwrite: bool = option(False, "replace the run in the output folder, once the new one is about to train")
    resume: bool = option(False, "continue from the newest complete checkpoint in the output folder")
    dry_run: bool = option(False, "show options, rows, rendered examples and estimates; train and write nothing")

    track: list[str] | None = option(
        None,
        f"log the metrics to one or more of {', '.join(TRACKERS[:-1])} and {TRACKERS[-1]}; each is a package to"
        " install",
        group="tracking",
        default_text="nothing leaves the output folder",
    )
    track_project: str = option("prefopt", "project or experiment name in the trackers")

    token_budget: int | None = option(
        None,
        "tokens per micro-batch",
        group="machine",
        default_text="estimated from memory, then measured",
        at_least=1,
    )
    gradient_checkpointing: bool | Literal["auto"] = option(
        "auto",
        "recompute activations in the backward pass: less memory, about a third slower, the same result; auto:"
        " where too few tokens fit without it",
    )
    offload: list[str] | None = option(
        None,
        "keep in host memory, with one GPU: optimizer (float32 weights, gradients and optimiser state), activations"
        " (between forward and backward pass), or both",
        default_text="everything stays on the device",
    )
    attention: Literal["auto", "loop"] = option(
        "auto", "attention kernel; loop: one call per segment, as a reference to compare with"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "compile the model's layers with torch.compile: faster steps after a minute or two; auto: on CUDA where Triton"
        " is installed, without --deterministic and --attention loop",
    )
    shard: Literal["auto", "none", "full", "hybrid"] = option(
        "auto",
        "sharding over several processes (prefopt launch, torchrun): none, each has the whole model; full, each"
        " has a part of every weight; hybrid, the processes of each node share the model; auto: by memory",
    )
    seed: int = option(0, "seed of order, held-out split, dropout and new adapters", at_least=0, at_most=2**32 - 1)
    deterministic: bool = option(False, "use deterministic kernels on a GPU, so that a resumed run is bit-identical")

    def offloads(self, what: str) -> bool:
        """Whether ``optimizer`` or ``activations`` are in host memory."""
        return what in (self.offload or ())

    def check(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError("--resume continues the run that --overwrite would replace: leave one of them out")
        if self.overwrite:
            self._check_sources()
        if self.resume and self.dry_run:
            raise ConfigError("--dry-run trains nothing that --resume could continue: leave one of them out")
        for name in self.track or ():
            if name not in TRACKERS:
                raise ConfigError(f"--track {name}: it must be one of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        for name in self.offload or ():
            if name not in OFFLOADS:
                raise ConfigError(f"--offload {name}: it must be {' or '.join(OFFLOADS)}{nearest(name, OFFLOADS)}")
        if self.offload and self.shard in ("full", "hybrid"):
            raise ConfigError(f"--offload is for one GPU, and --shard {self.shard} for several: leave one of them out")
        if self.offloads("activations") and self.compile == "on":
            raise ConfigError("--offload activations does not work with --compile on: leave one of them out")
        if self.optimizer != "adamw":
            other = {"--shard " + self.shard: self.shard in ("full", "hybrid")}
            other |= {"--offload optimizer": self.offloads("optimizer"), "--dtype float64": self.dtype == "float64"}
            if clash := [name for name, there in other.items() if there]:
                raise ConfigError(f"--optimizer {self.optimizer} does not work with {clash[0]}: leave one of them out")
        if self.is_given("track_project") and not set(self.track or ()) - {"tensorboard"}:
            raise ConfigError("--track-project does nothing without --track wandb, trackio or mlflow: leave it out")

    def _check_sources(self) -> None:
        """Refuse to replace a folder from which the run reads."""
        folder = Path(os.path.realpath(self.output))
        for o in options(type(self)):
            value = getattr(self, o.name)
            names = [] if o.name == "output" else value if isinstance(value, list) else [value]
            for name in (n for n in names if isinstance(n, str) and "\0" not in n):  # which no path can hold
                for found in map(Path, map(os.path.realpath, _read_by(name))):
                    if folder in (found, *found.parents) and os.access(found, os.F_OK):
                        what = name if found == Path(os.path.realpath(expanded(name))) else f"{found} ({name})"
                        raise ConfigError(
                            f"--overwrite would remove {what}, which {o.flag} reads: name another --output"
                        )


def _read_by(name: str) -> Iterator[Path]:
    """The paths that a model or data of this name is read from, found as its readers find them: the path itself, that
    before the options of a data set, the matches of a glob, and the base of an adapter. Names of other things lead to
    paths that do not exist."""
    base, _, options_of_data = name.partition(",")
    for one in (name, base.strip()) if "=" in options_of_data else (name,):
        with suppress(ConfigError):  # too long for a path: it is text
            yield expanded(one)
            if glob.has_magic(one):
                yield from map(Path, glob.iglob(str(expanded(one)), recursive=True))  # noqa: PTH207  (absolute too)
            if is_adapter(one):
                with suppress(ModelError):  # damaged, which is said when it is read
                    yield expanded(base_of(one))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RouterOptions, RunOptions, LoraOptions):
    """Model, routers, optimiser, output and machine: what every run that trains has, and which of these exclude each
    other."""

    def check(self) -> None:
        if self.quantises and self.shard in ("full", "hybrid"):
            raise ConfigError(
                f"--shard {self.shard} cuts weights into parts, which --quantise {self.quantise} packs: leave"
                " one of them out"
            )
        if self.compile == "on" and self.reads_routers:
            asked = "aux" if self.router_aux_loss_coef is not None else "z"
            raise ConfigError(f"--compile on cannot read routers for --router-{asked}-loss-coef; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class MethodOptions(TrainingOptions, RouterOptions, RunOptions, DataOptions, LoraOptions):
    """Model, data, optimiser, evaluation, output and machine of a run on fixed data."""

    eval_every: int | None = option(
        None, "steps between evaluations", group="evaluation", default_text="once per epoch, at its end", at_least=1
    )
    early_stopping: int | None = option(None, "stop after this many evaluations without a lower loss", at_least=1)

    def check(self) -> None:
        for name in ("eval_every", "early_stopping"):
            if getattr(self, name) is not None and not self.evaluates:
                raise ConfigError(
                    f"{flag(name)} needs evaluation data: give --eval-data or --eval-fraction, or leave it out"
                )
