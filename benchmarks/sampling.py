"""Sampling with prefopt beside transformers' generate: python sampling.py --model MODEL --texts TEXTS.jsonl

The same model, prompts, number of samples and number of tokens on both sides, both with a key-value cache and batches
of prompts sorted by length. No token ends a sample, but with --stop: then samples end at EOS, and only tokens up to it
count. generate encodes a prompt once for each of its samples and pads to the left; it draws from the same distribution,
with another generator. Its log-probabilities are not asked for. Sides run in turn, each in the same process, the first
round to warm up; they are compared round by round, so that a load that changes slowly hits both. What the matrix
products alone take (2 operations per weight and token, the head's at drawn tokens, at the best rate of this machine) is
printed beside. With --compile, prefopt's steps are compiled on a third side, in the round to warm up. With --against
SRC, the ``src`` folder of another checkout samples in turn with this one, in processes of its own; --clock processor
leaves out the time that other programs take of a busy machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.generate.sampler import SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.flops import matmul_peak
from prefopt.model.scorer import Scorer

Prompts = list[list[int]]


def main() -> None:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = read_prompts(args, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    sides: dict[str, Callable[[], int]] = {
        "generate": lambda: by_generate(model, prompts, args),
        "prefopt": lambda: by_prefopt(model, prompts, args),
    }
    if args.compile:
        sides["compiled"] = lambda: by_prefopt(model, prompts, args, compiled=True)
    args.eos = tokenizer.eos_token_id if args.stop else None
    clock = time.process_time if args.clock == "processor" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    drawn: dict[str, list[int]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, run in sides.items():
            if args.only not in (None, name) and name != "compiled":
                continue
            started = clock()
            tokens = run()
            taken = clock() - started
            assert args.stop or tokens == len(prompts) * args.num * args.tokens
            if number:  # the first round warms up
                seconds[name].append(taken)
                drawn[name].append(tokens)
        if args.against and number:
            taken, tokens = by_other_checkout(args)
            seconds.setdefault("before", []).append(taken)
            drawn.setdefault("before", []).append(tokens)
    report(args, model, prompts, seconds, drawn, products(model, prompts, args) / matmul_peak(device, dtype))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True, help="JSON lines with a field text, .gz or not")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs=2, default=(2, 8), help="tokens of a prompt, from and to")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--stop", action="store_true", help="samples end at EOS")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="a third side: prefopt with compiled steps")
    parser.add_argument("--only", choices=("generate", "prefopt"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--against", metavar="SRC", help="the src folder of another checkout of prefopt")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--json")
    return parser.parse_args()


def read_prompts(args: argparse.Namespace, tokenizer: Any) -> Prompts:
    """The beginnings of texts, of random lengths from a fixed seed."""
    data = Path(args.texts).read_bytes()
    data = gzip.decompress(data) if args.texts.endswith(".gz") else data
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    chance = random.Random(0)
    chance.shuffle(texts)
    low, high = args.lengths
    encoded = (tokenizer(text)["input_ids"][: chance.randint(low, high)] for text in texts)
    return [ids for ids in encoded if len(ids) >= low][: args.prompts]


def by_prefopt(model: Any, prompts: Prompts, args: argparse.Namespace, *, compiled: bool = False) -> int:
    scorer = Scorer(model)
    if compiled:
        scorer.compile_layers()
    try:
        sampler = TransformersSampler(scorer, rows=args.batch_size)
        found = sampler.sample(prompts, args.num, SamplingParams(args.tokens, () if args.eos is None else (args.eos,)))
        assert scorer.compiled is None or scorer.compiled.step_failure is None
    finally:
        scorer.release()
    return sum(sample.tokens for many in found for sample in many)


def by_other_checkout(args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and tokens of prefopt's side by the code of another checkout, after a round to warm up."""
    given = vars(args) | {"only": "prefopt", "rounds": 1, "against": None}
    words = []
    for name in (
        "model",
        "texts",
        "prompts",
        "num",
        "tokens",
        "batch_size",
        "rounds",
        "only",
        "dtype",
        "device",
        "clock",
    ):
        words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += ["--lengths", *map(str, args.lengths), "--threads", str(torch.get_num_threads())]
    words += ["--stop"] if args.stop else []
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, *words, "--json", str(found)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": args.against}, check=True, stdout=subprocess.DEVNULL)
        read = json.loads(found.read_text(encoding="utf-8"))
    return read["seconds"]["prefopt"][0], read["tokens"]["prefopt"][0]


@torch.no_grad()
def by_generate(model: Any, prompts: Prompts, args: argparse.Namespace) -> int:
    drawn = 0
    order = sorted(prompts, key=len, reverse=True)
    size = max(1, args.batch_size // args.num)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=args.num,
            max_new_tokens=args.tokens,
            min_new_tokens=None if args.stop else args.tokens,
            eos_token_id=args.eos,
            pad_token_id=0,
        )
        made = out[:, longest:]
        ended = (made == args.eos).cumsum(1) if args.stop else torch.zeros_like(made)
        drawn += int((ended.roll(1, 1).index_fill_(1, torch.tensor([0], device=ended.device), 0) == 0).sum())
    return drawn


def products(model: Any, prompts: Prompts, args: argparse.Namespace) -> float:
    """Operations of the matrix products that sampling needs: prompts once, attention left aside."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1) - model.get_input_embeddings().weight.numel()
    body -= 0 if model.config.tie_word_embeddings else head
    drawn = len(prompts) * args.num * args.tokens
    return 2.0 * (body * (sum(map(len, prompts)) + drawn) + head * drawn)


def report(
    args: argparse.Namespace,
    model: Any,
    prompts: Prompts,
    seconds: dict[str, list[float]],
    drawn: dict[str, list[int]],
    ideal: float,
) -> None:
    where = f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads"
    print(f"{args.model}: {model.num_parameters():,} weights, {where}")
    print(f"{len(prompts)} prompts x {args.num} samples x {args.tokens} tokens, {args.batch_size} side by side")
    for name, taken in seconds.items():
        if taken:
            middle = statistics.median(taken)
            rate = statistics.median(n / t for n, t in zip(drawn[name], taken, strict=True))
            print(f"{name:9} {middle:7.2f} s ({min(taken):.2f} to {max(taken):.2f}), {rate:9,.0f} tokens/s")
    print(f"products  {ideal:7.2f} s" + (", were every sample as long as it may be" if args.stop else ""))
    rates = {name: [n / t for n, t in zip(drawn[name], seconds[name], strict=True)] for name in seconds}
    for side in ("prefopt", "compiled"):
        for other in ("generate", "before", "prefopt"):
            if rates.get(side) and rates.get(other) and side != other:
                ratios = [ours / theirs for ours, theirs in zip(rates[side], rates[other], strict=True)]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                what = args.against if other == "before" else other
                print(f"{side} draws {statistics.median(ratios):.2f} times the tokens per second of {what} ({spread})")
    if args.json:
        found = {"arguments": vars(args), "seconds": seconds, "products_seconds": ideal, "tokens": drawn}
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
