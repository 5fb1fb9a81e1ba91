"""Options by the names that they have in other trainers (TRL, transformers, LLaMA-Factory), for whoever types those.

>>> our_name("--per_device_train_batch_size", ["batch_size", "beta"])
('batch_size', 'rows per optimiser step, over all devices')
>>> our_name("--lr", ["beta"]) is None
True
"""

from __future__ import annotations

from collections.abc import Sequence

WHOLE_BATCH = "rows per optimiser step, over all devices"

OTHER_NAMES: dict[str, tuple[str, str]] = {
    "attn-implementation": ("attention", ""),
    "bf16": ("dtype", "bfloat16"),
    "cutoff-len": ("max-length", ""),
    "dataset": ("data", ""),
    "dataset-name": ("data", ""),
    "eval-dataset": ("eval-data", ""),
    "eval-steps": ("eval-every", ""),
    "finetuning-type": ("lora", ""),
    "flash-attn": ("attention", ""),
    "fp16": ("dtype", "bfloat16 or float32"),
    "gradient-accumulation-steps": ("batch-size", f"{WHOLE_BATCH}; micro-batches are sized by memory"),
    "init-kl-coef": ("beta", ""),
    "kl-coef": ("beta", ""),
    "load-in-4bit": ("quantise", "nf4"),
    "load-in-8bit": ("quantise", "int8"),
    "logging-dir": ("track", "tensorboard"),
    "lora-r": ("lora-rank", ""),
    "lora-target": ("lora-targets", ""),
    "lora-target-modules": ("lora-targets", ""),
    "lr": ("learning-rate", ""),
    "lr-scheduler-type": ("schedule", ""),
    "media-dir": ("picture-folder", ""),
    "max-completion-length": ("max-new-tokens", ""),
    "max-prompt-length": ("max-length", "tokens of prompt and response together"),
    "max-seq-length": ("max-length", ""),
    "mini-batch-size": ("token-budget", "tokens per micro-batch"),
    "model-name": ("model", ""),
    "model-name-or-path": ("model", ""),
    "num-epochs": ("epochs", ""),
    "num-generations": ("num", "responses per prompt"),
    "num-train-epochs": ("epochs", ""),
    "output-dir": ("output", ""),
    "overwrite-output-dir": ("overwrite", ""),
    "per-device-train-batch-size": ("batch-size", WHOLE_BATCH),
    "pref-beta": ("beta", ""),
    "pref-loss": ("loss", ""),
    "loss-type": ("loss", ""),
    "quantization-bit": ("quantise", "nf4 or int8"),
    "ref-model": ("reference", ""),
    "report-to": ("track", ""),
    "response-length": ("max-new-tokens", ""),
    "resume-from-checkpoint": ("resume", ""),
    "reward-model-path": ("reward", ""),
    "target-kl": ("max-update-kl", "where updates end; --kl-target adapts beta"),
    "save-steps": ("save-every", ""),
    "save-total-limit": ("keep-last", ""),
    "sft-model-path": ("model", ""),
    "torch-dtype": ("dtype", ""),
    "use-peft": ("lora", ""),
    "val-size": ("eval-fraction", ""),
    "warmup-ratio": ("warmup", ""),
}
"""Their name to ours, with a note where the meaning or the value differs."""


def our_name(word: str, known: Sequence[str]) -> tuple[str, str] | None:
    """The name among ``known`` for an option that other trainers call ``word``, and a note on it; None where there is
    none. Dashes and underscores count as equal."""
    name, note = OTHER_NAMES.get(word.lstrip("-").lower().replace("_", "-"), ("", ""))
    spelt = {k.lstrip("-").replace("_", "-"): k for k in known}
    return (spelt[name], note) if name in spelt else None
