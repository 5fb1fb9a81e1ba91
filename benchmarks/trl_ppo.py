"""PPO by TRL 0.29, measured; runs in an environment of its own: python trl_ppo.py JSON. See ppo_throughput.py.

The trainer lives in ``trl.experimental.ppo``. Its models are loaded as its own example script loads them; the KL
coefficient, clip ranges, epochs and minibatches are those of ``prefopt ppo``, and nothing is recomputed to save memory.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock(TrainerCallback):
    """When each step ended, and the seconds of its parts: what is no sampling, reward or scoring is training."""

    def __init__(self, reward: torch.nn.Module) -> None:
        self.reward = reward
        self.marks: list[float] = [time.perf_counter()]
        self.parts: list[dict[str, float]] = []
        self.spent = dict.fromkeys(("rollouts", "reward", "scoring"), 0.0)
        self.tokens: list[int] = []
        self.drawn = 0
        for name in ("batch_generation", "get_reward", "forward"):
            setattr(ppo_trainer, name, self.timed(name, getattr(ppo_trainer, name)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The trainer's function, with its seconds put down. Its ``forward`` scores only where nothing is trained."""

        def call(model: Any, *rest: Any, **named: Any) -> Any:
            if name == "forward" and torch.is_grad_enabled():
                return function(model, *rest, **named)
            started = self._now()
            result = function(model, *rest, **named)
            part = {"batch_generation": "rollouts", "forward": "scoring"}.get(name)
            self.spent[part or ("reward" if model is self.reward else "scoring")] += self._now() - started
            if name == "batch_generation":
                responses = result[0][:, rest[0].shape[1] :]
                self.drawn += int((responses != rest[2]).sum())
            return result

        return call

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(self._now())
        whole = self.marks[-1] - self.marks[-2]
        self.parts.append({**self.spent, "training": whole - sum(self.spent.values())})
        self.tokens.append(self.drawn)
        self.spent, self.drawn = dict.fromkeys(self.spent, 0.0), 0

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def settings(asked: dict[str, Any]) -> PPOConfig:
    """As ``prefopt ppo`` does it by default."""
    return PPOConfig(
        output_dir=asked["output"],
        per_device_train_batch_size=asked["batch"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_mini_batches=1,
        num_ppo_epochs=4,
        total_episodes=asked["steps"] * asked["batch"],
        response_length=asked["tokens"],
        stop_token="eos",
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


def main(asked: dict[str, Any]) -> None:
    """Run, and print one JSON object."""
    torch.set_num_threads(asked["threads"])
    tokenizer = AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    rows = [{"input_ids": tokenizer(p, add_special_tokens=False)["input_ids"]} for p in asked["prompts"]]
    rows = [row for row in rows for _ in range(asked["num"])]
    policy, ref = (AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(asked["reward"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    clock = Clock(reward)
    trainer = PPOTrainer(
        args=settings(asked),
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
    shares = {name: sum(parts[name] for parts in clock.parts[1:]) / sum(seconds) for name in clock.parts[0]}
    models = {"actor": policy, "reference": ref, "reward": reward, "critic": value}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {
        "samples_per_second": asked["batch"] / statistics.median(seconds),
        "tokens_per_second": sum(clock.tokens[1:]) / sum(seconds),
        "share": shares,
        "bytes": {n: sum(p.numel() * p.element_size() for p in m.parameters()) for n, m in models.items()},
        "peak_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
