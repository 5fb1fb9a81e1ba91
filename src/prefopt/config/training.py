"""Options of the training loop, its output and the machine: the same for every verb that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from prefopt.config.data import DataOptions
from prefopt.config.model import LoraOptions, MachineOptions
from prefopt.core import options as _options
from prefopt.core.options import flag, nearest, option
from prefopt.errors import ConfigError

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
