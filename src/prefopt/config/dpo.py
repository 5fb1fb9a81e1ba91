"""What ``prefopt dpo`` reads. The command line, a YAML file and ``prefopt.dpo(...)`` fill it; it checks itself.

>>> DpoConfig(model="m", data="pairs.jsonl", output="out", lora=True).learning_rate
2e-05
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.config.training import LEARNING_RATE, BalanceOptions, MethodOptions, ModelOptions
from prefopt.core.options import flag, option
from prefopt.errors import ConfigError

MIXUP_ALPHA = 0.6  # TR-DPO's soft update


@dataclass(frozen=True, kw_only=True)
class DpoConfig(BalanceOptions, MethodOptions, ModelOptions):
    """One run of DPO. Construction checks types, ranges and contradictions, and raises ``ConfigError``.

    Defaults that depend on other options are filled in on construction, so that what is read here, and what
    ``to_dict`` writes, is what the run does: ``learning_rate``; ``lora_rank``, ``lora_alpha`` and ``lora_dropout``
    where a new adapter is trained; ``lora``, which ``adapter`` implies. What depends on the loss (``beta``,
    ``label_smoothing``, ``divergence``, ``pairs``) is filled in when the run begins, since to know losses takes torch.
    """

    reference: str | None = option(
        None,
        "model that log-ratios are taken against",
        group="model",
        default_text="the model before training",
    )
    reference_adapter: str | None = option(
        None,
        "adapter to put on the reference (on --reference where that is given, else on the model without its own)",
        group="model",
    )

    ref_model_sync_steps: int | None = option(
        None,
        "steps between updates of the reference towards the policy (TR-DPO; the paper used 512); reference"
        " log-probabilities are then computed for every batch and not cached",
        group="loss",
        default_text="the reference is fixed",
        at_least=1,
    )
    ref_model_mixup_alpha: float = option(
        None,
        "reference = alpha * policy + (1 - alpha) * reference at every update; 1 copies the policy",
        group="loss",
        default_text="0.6, with --ref-model-sync-steps",
        above=0,
        at_most=1,
    )
    loss: str = option(
        "dpo",
        "what is optimised: a name that prefopt losses lists, a weighted sum such as dpo:1.0,nll:0.2, or one's own as"
        " module:function",
        group="loss",
    )
    loss_options: list[str] | None = option(
        None,
        "options of the loss, NAME=VALUE, such as gamma=1.0; LOSS.NAME=VALUE is for one of a sum",
        group="loss",
        default_text="those of each loss, see prefopt losses",
    )
    beta: float = option(
        None,
        "strength of the pull to the reference; 0.01 to 0.5 is usual for dpo",
        group="loss",
        default_text="0.1 for dpo; each loss has its own",
        above=0,
    )
    label_smoothing: float = option(
        None,
        "assumed part of labels that are wrong (conservative DPO)",
        group="loss",
        default_text="0",
        at_least=0,
        below=0.5,
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = option(
        None,
        "divergence from the reference that is held small, for losses on the difference of log-ratios",
        group="loss",
        default_text="reverse_kl",
    )
    divergence_alpha: float = option(
        None,
        "of the divergence alpha: 0 is reverse_kl, 1 is forward_kl",
        group="loss",
        default_text="0.5",
        at_least=0,
        at_most=1,
    )
    weighting: Literal["wpo"] | None = option(
        None, "what the loss of each pair is multiplied by, see prefopt losses", group="loss"
    )
    pairs: Literal["all", "best-worst"] = option(
        None,
        "of more than two responses: every pair, those of a prompt weighing 1 together, or the best against the worst",
        group="loss",
        default_text="all",
    )

    def __post_init__(self) -> None:
        self.fill(LEARNING_RATE)
        if self.reference_adapter is not None and not (self.lora or self.named_adapter or self.reference):
            raise ConfigError(
                "--reference-adapter under full fine-tuning needs the model it belongs to: give --reference, or train"
                " with --lora or --adapter"
            )
        self.check_movement()

    def check_movement(self) -> None:
        """Refuse what does not go with a reference that moves. Raises ``ConfigError``."""
        if self.ref_model_sync_steps is None:
            if self.ref_model_mixup_alpha is not None:
                raise ConfigError("--ref-model-mixup-alpha does nothing without --ref-model-sync-steps: add it")
            return
        if self.ref_model_mixup_alpha is None:
            object.__setattr__(self, "ref_model_mixup_alpha", MIXUP_ALPHA)
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
