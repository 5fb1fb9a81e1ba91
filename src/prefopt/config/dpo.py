"""What ``prefopt dpo`` reads. The command line, a YAML file and ``prefopt.dpo(...)`` fill it; it checks itself.

>>> DpoConfig(model="m", data="pairs.jsonl", output="out", lora=True).learning_rate
2e-05
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.config import option as _options
from prefopt.config.option import option
from prefopt.errors import ConfigError

# The DPO paper's 1e-6 for full fine-tuning, at the upper end of the 3e-7..1e-6 that the field reports; LoRA, whose few
# weights start at no change at all, takes 5e-6..5e-5, of which 2e-5 is about the geometric middle.
LEARNING_RATE = {False: 1e-6, True: 2e-5}
LORA_RANK, LORA_ALPHA_PER_RANK, LORA_DROPOUT = 16, 2, 0.0
ADAPTER_SHAPE = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """One run of DPO. Construction checks types, ranges and contradictions, and raises ``ConfigError``.

    Defaults that depend on other options are filled in on construction, so that what is read here, and what
    ``to_dict`` writes, is what the run does: ``learning_rate``; ``lora_rank``, ``lora_alpha`` and ``lora_dropout``
    where a new adapter is trained; ``lora``, which ``adapter`` implies.
    """

    model: str = option(help="model to align: a folder, or the name of one on the Hugging Face Hub", group="model")
    reference: str | None = option(
        None,
        "model that log-ratios are taken against",
        group="model",
        default_text="the model before training",
    )
    adapter: str | None = option(
        None,
        "LoRA adapter on the model to go on training; it is then the reference too, as it is before training,"
        " unless --reference or --reference-adapter names another",
        group="model",
    )
    reference_adapter: str | None = option(
        None,
        "adapter to put on the reference (on --reference where that is given, else on the model without its own)",
        group="model",
    )

    data: list[str] = option(help="files of preference pairs, json or jsonl; one or more", group="data")
    eval_data: list[str] | None = option(None, "files of pairs to evaluate on", group="data")
    eval_fraction: float = option(
        0.0,
        "part of the prompts to hold out for evaluation; no prompt is on both sides",
        group="data",
        at_least=0,
        below=1,
    )
    on_bad_row: Literal["refuse", "skip"] = option(
        "refuse", "a row that cannot be used stops the run, or is left out and counted", group="data"
    )
    max_length: int | None = option(
        None,
        "tokens of prompt and response together; longer rows are truncated and counted",
        group="data",
        default_text="1024, or the model's context where that is smaller",
        at_least=2,
    )
    shuffle: bool = option(True, "draw a new order every epoch, from the seed", group="data")

    beta: float = option(0.1, "strength of the pull to the reference; 0.01 to 0.5 is usual", group="loss", above=0)
    label_smoothing: float = option(
        0.0, "assumed part of labels that are wrong (conservative DPO)", group="loss", at_least=0, below=0.5
    )

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
        "names of the layers that a new adapter changes",
        group="adapter",
        default_text="all linear layers but the head",
    )

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

    eval_every: int | None = option(
        None, "steps between evaluations", group="evaluation", default_text="at the end of each epoch", at_least=1
    )
    early_stopping: int | None = option(
        None, "stop after this many evaluations without a lower loss", group="evaluation", at_least=1
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

    def __post_init__(self) -> None:
        _options.check_all(self)
        self._refuse_contradictions()
        self._fill_defaults()

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML."""
        return _options.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object], place: str | None = None) -> DpoConfig:
        """The config that ``to_dict`` wrote; ``place`` names the file it comes from."""
        return _options.from_dict(cls, values, place)

    @property
    def evaluates(self) -> bool:
        """Whether pairs are held out or given to evaluate on."""
        return self.eval_data is not None or self.eval_fraction > 0

    def _refuse_contradictions(self) -> None:
        if self.eval_data is not None and self.eval_fraction > 0:
            raise ConfigError("--eval-data and --eval-fraction both name evaluation pairs: give one of them")
        for name in ("eval_every", "early_stopping"):
            if getattr(self, name) is not None and not self.evaluates:
                flag = _flag(name)
                raise ConfigError(
                    f"{flag} needs evaluation pairs: give --eval-data or --eval-fraction, or leave it out"
                )
        for name in ADAPTER_SHAPE:
            if getattr(self, name) is not None and self.adapter is not None:
                raise ConfigError(f"{_flag(name)} shapes a new adapter, but --adapter brings its own: leave one out")
            if getattr(self, name) is not None and not self.lora:
                raise ConfigError(f"{_flag(name)} does nothing without --lora: add it, or leave {_flag(name)} out")
        if self.reference_adapter is not None and not (self.lora or self.adapter or self.reference):
            raise ConfigError(
                "--reference-adapter under full fine-tuning needs the model it belongs to: give --reference, or train"
                " with --lora or --adapter"
            )
        if self.resume and self.dry_run:
            raise ConfigError("--dry-run trains nothing that --resume could go on with: leave one of them out")
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            near = _options.nearest(self.device, ["cpu", "cuda", "mps"])
            raise ConfigError(f"--device is {self.device!r}; it must be cpu, cuda, cuda:N or mps{near}")
        if self.device == "mps" and self.dtype == "float64":
            raise ConfigError("--device mps has no float64: take --device cpu, or --dtype float32")

    def _fill_defaults(self) -> None:
        fill = object.__setattr__  # the dataclass is frozen for everyone else
        if self.adapter is not None:
            fill(self, "lora", True)
        elif self.lora:
            fill(self, "lora_rank", self.lora_rank or LORA_RANK)
            fill(self, "lora_alpha", self.lora_alpha or LORA_ALPHA_PER_RANK * (self.lora_rank or LORA_RANK))
            fill(self, "lora_dropout", LORA_DROPOUT if self.lora_dropout is None else self.lora_dropout)
        if self.learning_rate is None:
            fill(self, "learning_rate", LEARNING_RATE[self.lora])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
