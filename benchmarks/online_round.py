"""What a round of online DPO takes beside its parts: python online_round.py --model MODEL --prompts PROMPTS.txt

A run of `prefopt online` on these prompts, and a run of `prefopt dpo` on the rows that it kept, with the reference
scored with every batch, since new rows are in no cache. Both in this process, in batches of as many prompts, and
without checkpoints. The clock counts the processor's time of this process, which a busy machine leaves alone. Printed
are, as medians over rounds without the first: a round, what the sampler took of it, an offline step, and the ratio of
the round to the sum of the other two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import prefopt
from prefopt.rl.samplers import LocalSampler


class Clock(prefopt.Callback):
    """Seconds between the steps of a run."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_start(self, run: Any) -> None:
        self.marks.append(time.process_time())

    def on_step(self, run: Any, step: int, metrics: Any) -> None:
        self.marks.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False)]


class Timed(LocalSampler):
    """A sampler whose time is counted."""

    seconds: ClassVar[list[float]] = []

    def sample(self, *given: Any, **named: Any) -> Any:
        before = time.process_time()
        found = super().sample(*given, **named)
        Timed.seconds.append(time.process_time() - before)
        return found


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A number for each text, hardly ever the same for two."""
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") / 2**32 for text in responses]


def main() -> None:
    args = parsed()
    from prefopt.rl import stages

    stages.LocalSampler = Timed  # type: ignore[misc]
    common: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "threads": args.threads, "progress": "none"}
    common |= {"batch_size": args.batch_size, "max_steps": args.rounds + 1, "epochs": 1000, "learning_rate": 1e-7}
    common |= {"token_budget": args.token_budget, "save_every": 10**6}  # short runs would write one every round
    with tempfile.TemporaryDirectory() as folder:
        online, offline, output = Clock(), Clock(), Path(folder) / "online"
        how: dict[str, Any] = {"num": 2, "max_new_tokens": args.max_new_tokens, "lines": "text"}
        prefopt.online(args.model, args.prompts, output=output, reward=reward, callbacks=[online], **how, **common)
        kept = sum(len(file.read_text().splitlines()) for file in (output / "rounds").glob("*.jsonl"))
        live = {"ref_model_sync_steps": 10**9}
        data = str(output / "rounds")
        prefopt.dpo(args.model, data, output=Path(folder) / "dpo", callbacks=[offline], **live, **common)
    sampling = statistics.median(Timed.seconds[2:])  # the first is of the load check
    a_round, step = statistics.median(online.steps), statistics.median(offline.steps)
    ratio = a_round / (sampling + step)
    found = {"round": a_round, "sampling": sampling, "offline step": step, "ratio": ratio, "rows kept": kept}
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
