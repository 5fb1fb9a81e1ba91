"""One DPO run with TRL, measured. Runs in TRL's own environment: python trl_dpo.py SPEC.json

SPEC holds the fields of `dpo_throughput.Spec`. After every step the answer is rewritten to the file `result` names,
so that a run that is stopped leaves what it did: step_seconds (one per optimiser step, the warm-up first), metrics (one
dict per step), peak_bytes, versions, settings.

TRL at its best on a CPU: reference log-probabilities computed before training, fused AdamW, SDPA attention, no gradient
checkpointing unless the case asks for it. TRL 1.16 has no more to offer here: `padding_free` warns that it is
"temporarily unavailable" and pads; Liger and the Hub kernels are for GPUs; activation offloading moves memory to the
CPU, where it is. The fused head works in tiles, without whole logits, and projects only trained positions on CUDA and
XPU, but on a CPU every position, prompt and padding too (`compact = _use_triton(device)` in trl/trainer/utils.py).
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from memory import limit_bytes, peak_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class SamePairsTrainer(DPOTrainer):
    """TRL's trainer on the token ids that both sides see, instead of its own tokenisation and truncation."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class Clock(TrainerCallback):
    """Seconds from the end of one optimiser step to the end of the next, batching and logging included."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self.marks: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:  # the summary of the whole run
            return
        self.metrics.append(dict(logs))
        result = {
            "step_seconds": [b - a for a, b in pairwise(self.marks)],
            "metrics": self.metrics,
            "peak_bytes": peak_bytes(),
            "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
            "settings": self.settings,
        }
        self.path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limit_bytes(spec["memory_limit"])
    settings = {
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["micro_batch"],
        "gradient_accumulation_steps": spec["batch_size"] // spec["micro_batch"],
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": spec["gradient_checkpointing"],
        "precompute_ref_log_probs": True,
        "beta": spec["beta"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,  # the ids are cut already
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused",
    }
    args = DPOConfig(
        output_dir=spec["output"],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=spec["seed"],
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, attn_implementation="sdpa")
    trainer = SamePairsTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(json.loads(Path(spec["pairs"]).read_text(encoding="utf-8"))),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[Clock(spec["result"], settings)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
