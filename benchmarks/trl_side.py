"""One whole run with TRL on given token ids. Runs in TRL's own environment: python trl_side.py SPEC.json

SPEC is written by `trl_parity.py`: method (dpo, sft, reward), model, rows (train and held_out: lists of columns that
TRL's own collators read), options, output, result. The answer holds the losses of all steps and the metrics of one
evaluation before and one after training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class AsGiven:
    """Trains on the ids that both sides see, instead of the trainer's own tokenisation."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class DpoOnIds(AsGiven, DPOTrainer):
    """DPO."""


class SftOnIds(AsGiven, SFTTrainer):
    """SFT."""


class RewardOnIds(AsGiven, RewardTrainer):
    """Reward model."""


TRAINERS = {
    "dpo": (DpoOnIds, DPOConfig, AutoModelForCausalLM),
    "sft": (SftOnIds, SFTConfig, AutoModelForCausalLM),
    "reward": (RewardOnIds, RewardConfig, AutoModelForSequenceClassification),
}


class Logged(TrainerCallback):
    """Losses of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    trainer_class, config_class, model_class = TRAINERS[spec["method"]]
    torch.set_num_threads(1)
    args = config_class(
        output_dir=spec["output"],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_length=None,
        **spec["options"],
    )
    model = model_class.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    logged = Logged()
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=Dataset.from_list(spec["train"]),
        eval_dataset=Dataset.from_list(spec["held_out"]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[logged],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    found = {"losses": logged.losses, "before": before, "after": after, "versions": versions}
    Path(spec["result"]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
