"""What ``prefopt dpo`` reads. The command line, a YAML file and ``prefopt.dpo(...)`` fill it.

>>> DpoConfig(model="m", data="pairs.jsonl", output="out", lora=True).learning_rate
'auto'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from prefopt.config.evaluation import PreferenceOptions, SampleOptions
from prefopt.config.rates import SMALL_RATE
from prefopt.config.training import ModelOptions, auto_rate_option
from prefopt.core.options import Config, beside, flag, nearest, option
from prefopt.core.plugins import plugins
from prefopt.errors import ConfigError

# Full training: the DPO paper's 1e-6, at the upper end of the 3e-7 to 1e-6 that the field reports. LoRA: 5e-6 to 5e-5
# is usual, of which 2e-5 is about the geometric mean.
LEARNING_RATE = {False: 1e-6, True: 2e-5}
KL_SAMPLES, MAX_NEW_TOKENS = 64, 128
MIXUP_ALPHA = 0.6  # TR-DPO's soft update


OF_LOSSES = ("beta", "label_smoothing", "divergence", "divergence_alpha")
"""Options that losses may have, each with a default of its own."""
FILLED = (*OF_LOSSES, "pairs")
"""Options without a default here: a run fills in that of its loss."""


@dataclass(frozen=True, kw_only=True)
class LossOptions(Config):
    """The loss on preferences, and a reference that moves.

    Defaults that depend on the loss (:data:`FILLED`) are None here and filled in when the run begins, since losses need
    torch.
    """

    ref_model_sync_steps: int | None = option(
        None,
        "steps between updates of the reference towards the policy (TR-DPO; the paper used 512); reference"
        " log-probabilities are then computed for every batch and not cached",
        group="loss",
        default_text="the reference is fixed",
        at_least=1,
    )
    ref_model_mixup_alpha: float | None = beside(
        "ref_model_sync_steps",
        MIXUP_ALPHA,
        "reference = alpha * policy + (1 - alpha) * reference at every update; 1 copies the policy",
        above=0,
        at_most=1,
    )
    loss: str = option(
        "dpo",
        "a loss that prefopt losses lists, a weighted sum such as dpo:1.0,nll:0.2, or your own as module:function",
    )
    loss_options: list[str] | None = option(
        None,
        "options of the loss, NAME=VALUE, such as gamma=1.0; in a sum, LOSS.NAME=VALUE sets that of one loss",
        default_text="those of each loss, see prefopt losses",
    )
    beta: float | None = option(
        None,
        "KL penalty coefficient: larger keeps the policy closer to the reference; 0.01 to 0.5 is usual for dpo",
        default_text="0.1 for dpo; each loss has its own",
        above=0,
    )
    label_smoothing: float | None = option(
        None, "assumed fraction of wrong labels (conservative DPO)", default_text="0", at_least=0, below=0.5
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = option(
        None,
        "divergence from the reference to regularise with, for losses on the difference of log-ratios",
        default_text="reverse_kl",
    )
    divergence_alpha: float | None = option(
        None, "alpha of --divergence alpha: 0 is reverse_kl, 1 is forward_kl", default_text="0.5", at_least=0, at_most=1
    )
    weighting: Literal["wpo"] | None = option(
        None, "weight of each pair in the loss, see prefopt losses", default_text="all pairs have equal weight"
    )
    pairs: Literal["all", "best-worst"] | None = option(
        None,
        "pairs of three and more responses: all of them, with weights that sum to 1 per prompt, or best and worst only",
        default_text="all",
    )

    @property
    def own_losses(self) -> tuple[str, ...]:
        """Further names that ``loss`` may have, of losses that are not on preferences."""
        return ()

    def check(self) -> None:
        """Refuse a misspelt name; a sum and its options are parsed with the losses themselves."""
        known = {*loss_names(), *plugins("prefopt.losses"), *self.own_losses}
        for part in self.loss.split(",") if loss_names() else ():
            name, _, weight = (word.strip() for word in part.partition(":"))
            of_module = weight and not _NUMBER.fullmatch(weight)  # module:function, read with the losses themselves
            if not of_module and name not in known and name.replace("-", "_") not in known:
                guess = nearest(name, sorted(known)) or "; prefopt losses lists them"
                raise ConfigError(f"--loss {self.loss}: there is no loss {name!r}{guess}")


@dataclass(frozen=True, kw_only=True)
class DpoConfig(LossOptions, PreferenceOptions, SampleOptions, ModelOptions):
    """One run of DPO, or of another loss. Construction raises ``ConfigError``."""

    learning_rate: float | Literal["auto"] = auto_rate_option(
        LEARNING_RATE, "; 3e-7 to 1e-6 is usual, with LoRA 5e-6 to 5e-5"
    )
    find_learning_rate: bool | Literal["stop"] = option(
        False,
        "before training, try rates around --learning-rate in short branches from the same weights, and use the"
        " one with the lowest held-out loss; stop: print the table and train nothing",
    )
    reference: str | None = option(
        None, "reference model of the log-ratios", group="model", default_text="the model before training"
    )
    reference_adapter: str | None = option(
        None, "adapter on the reference (on --reference, else on the model without its own adapter)"
    )
    max_kl: float | None = option(
        None,
        "KL from the reference in nats per response at which the run stops, measured on samples of the policy; the last"
        " good weights are saved as a model",
        group="evaluation",
        default_text="not measured",
        above=0,
    )
    kl_every: int | None = option(
        None,
        "steps between measurements for --max-kl",
        needs="max_kl",
        default_text="20 measurements, evenly",
        at_least=1,
    )
    kl_samples: int | None = beside(
        "max_kl", KL_SAMPLES, "samples per measurement of --max-kl, to held-out prompts if there are any", at_least=2
    )
    max_new_tokens: int | None = beside("max_kl", MAX_NEW_TOKENS, "maximum tokens of a sample for --max-kl", at_least=1)
    eval_dtype: Literal["auto", "float32", "run"] = option(
        "auto",
        "precision of held-out losses: run is that of training; auto is float32 where rounding, measured at the"
        " first evaluation, exceeds a tenth of the spread of log-ratios to the reference",
        group="evaluation",
    )

    @property
    def published_rate(self) -> float:
        """The learning rate that is usual for models of billions of weights."""
        return LEARNING_RATE[self.lora]

    @property
    def small_rate(self) -> float:
        """The most that is suggested for a small model."""
        return SMALL_RATE[self.lora]

    def check(self) -> None:
        if self.find_learning_rate:
            if not self.evaluates:
                raise ConfigError(
                    "--find-learning-rate compares held-out losses: give --eval-data or --eval-fraction, or leave it"
                    " out"
                )
            if self.ref_model_sync_steps is not None:
                raise ConfigError(
                    "--find-learning-rate compares losses, and --ref-model-sync-steps changes the reference between"
                    " them: leave one of them out"
                )
        if self.eval_dtype != "auto" and not self.evaluates:
            raise ConfigError(
                f"--eval-dtype {self.eval_dtype} needs rows to evaluate on: give --eval-data or --eval-fraction"
            )
        if self.reference_adapter is not None and not (self.lora or self.named_adapter or self.reference):
            raise ConfigError(
                "--reference-adapter under full fine-tuning needs the model it belongs to: give --reference, or train"
                " with --lora or --adapter"
            )
        if self.ref_model_sync_steps is None:
            return
        if self.early_stopping is not None:
            raise ConfigError(
                "--early-stopping compares losses, and --ref-model-sync-steps changes the reference between them:"
                " leave one of them out"
            )
        for name in ("reference", "reference_adapter"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{flag(name)}: with --ref-model-sync-steps the reference starts as a copy of the policy; leave one"
                    " of them out"
                )


_NUMBER = re.compile(r"[-+.\deE]+")


@cache
def loss_names() -> tuple[str, ...]:
    """The losses of this package, from their source: to import them takes torch, and seconds."""
    folder = Path(__file__).parents[1] / "losses"
    declaration = re.compile(r"^@loss\(.*?^def (\w+)", re.S | re.M)
    return tuple(name for file in sorted(folder.glob("*.py")) for name in declaration.findall(file.read_text("utf-8")))
