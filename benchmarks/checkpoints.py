"""How long a checkpoint stops training, and what memory it takes: as before, waiting, and in the background.

    python benchmarks/checkpoints.py FOLDER [--rounds 3] [--tokens 128] [--device cuda]

A GPT-2 of 124M weights, random, in float32, with AdamW: 1.5 GB a checkpoint, written to ``FOLDER``. Three ways take
turns in one process. *As before* is how prefopt wrote them before: ``save_file``, flush, read again for the checksum,
rename.
*Stopped* is the time between two steps that the loop spends on a checkpoint, *processor* its processor time. *Longer*
is that time and what the next steps take longer than steps without a checkpoint, until all is on the disk. *Memory* is
the most that the process held meanwhile, above what it held before (Linux alone).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory import peak_bytes
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt.train.checkpoint import Checkpoint, optimizer_tensors
from prefopt.train.saver import Saver


def as_before(folder: Path, found: Checkpoint) -> None:
    """The files of a checkpoint, written, flushed, and read again for their checksums."""
    aside = folder / ".aside"
    aside.mkdir(parents=True)
    for name, tensors in (("weights", found.weights), ("optimizer", found.optimizer)):
        path = aside / f"{name}.safetensors"
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
    shutil.rmtree(folder / "before", ignore_errors=True)
    aside.rename(folder / "before")


def forget_peak() -> None:
    """Reset the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).to(options.device)
    masters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-4, fused=True)
    ids = torch.randint(0, 50_000, (1, options.tokens), device=options.device)

    def step() -> float:
        started = time.monotonic()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.monotonic() - started

    folder = options.folder / "checkpoints-benchmark"
    saver = Saver(folder / "saver", say=print)
    number = 0

    def found() -> Checkpoint:
        return Checkpoint(masters, optimizer_tensors(optimizer), {"step": number, "progress": {"done": 0}})

    ways: dict[str, Callable[[], None]] = {
        "as before": lambda: as_before(folder, found()),
        "waiting": lambda: saver.save(found(), keep_last=1),
        "in the background": lambda: saver.save(found(), keep_last=1, wait=False),
    }
    stopped: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    longer: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    step()
    for turn in range(options.rounds + 1):  # the first does not count
        for name, save in ways.items():
            plain = statistics.median(step() for _ in range(3))
            forget_peak()
            before, number = peak_bytes(), number + 1
            started, worked = time.monotonic(), time.thread_time()
            save()
            held, work, steps = time.monotonic() - started, time.thread_time() - worked, 0
            while not saver.written:
                step()
                steps += 1
            settled, worked = time.monotonic(), time.thread_time()
            saver.settle()
            held += time.monotonic() - settled
            work += time.thread_time() - worked
            if turn:
                stopped[name].append(held)
                processor[name].append(work)
                longer[name].append(time.monotonic() - started - steps * plain)
                memory[name].append((peak_bytes() - before) / 1e9)
    shutil.rmtree(folder)
    print(f"{'':20}{'stopped':>10}{'processor':>11}{'longer':>10}{'memory':>10}")
    for name in ways:
        row = [statistics.median(values[name]) for values in (stopped, processor, longer, memory)]
        print(f"{name:20}{row[0]:8.2f} s{row[1]:9.2f} s{row[2]:8.2f} s{row[3]:7.2f} GB")


if __name__ == "__main__":
    main()
