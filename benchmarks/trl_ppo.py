"""PPO by TRL 0.29, measured; runs in an environment of its own: python trl_ppo.py JSON. See ppo_throughput.py.

The trainer lives in ``trl.experimental.ppo``. Its models are loaded as its own example script loads them; the KL
coefficient, clip ranges, epochs and minibatches are those of ``prefopt ppo``.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.marks: list[float] = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())


def main(asked: dict[str, Any]) -> None:
    """Run, and print one JSON object."""
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    rows = [{"input_ids": tokenizer(p, add_special_tokens=False)["input_ids"]} for p in asked["prompts"]]
    rows = (rows * -(-asked["batch"] // len(rows)))[: asked["batch"]]
    policy, ref = (AutoModelForCausalLM.from_pretrained(asked["model"]) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(asked["reward"], num_labels=1) for _ in range(2)
    )
    config = PPOConfig(
        output_dir=asked["output"],
        per_device_train_batch_size=asked["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=asked["steps"] * asked["batch"],
        response_length=asked["tokens"],
        local_rollout_forward_batch_size=asked["batch"],
        temperature=1.0,
        learning_rate=3e-6,
        kl_coef=0.05,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    clock = Clock()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:1]),
        callbacks=[clock],
    )
    trainer.train()
    seconds = [b - a for a, b in zip(clock.marks[1:], clock.marks[2:], strict=False)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {
        "samples_per_second": asked["batch"] / statistics.median(seconds),
        "peak_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
