"""DPO on one GPU: pairs per second, utilisation and peak memory; beside TRL; and what sharing prompts saves.

    python benchmarks/gpu_dpo.py --json results.json
    python benchmarks/gpu_dpo.py --device cpu --shapes tiny --steps 3 --batch-size 4 --profile-pairs 6

Models have the shapes of Qwen2.5-1.5B and Llama-3-8B and random weights, which nothing but the loss depends on. Every
run is a process of its own. Speeds are of whole steps, optimiser included, the first two left out; loading, the load
check and the reference's log-probabilities are not timed.

Utilisation counts useful work: each prompt once, no padding, nothing recomputed (`prefopt/model/flops.py`), over the
figure of the card's data sheet where it is known, else over a measured matrix product. Beside it stands the
figure that counts the prompt of a pair twice.

Profiles: prompts and responses of the lengths of six data sets (medians of the table in the README of
github.com/frankxwang/dpo-prefix-sharing, arXiv:2410.20305), each length drawn from a log-normal distribution of that
median and a standard deviation of 0.4. The same pairs are scored and differentiated as groups and as sequences of their
own, both packed without padding. The bound is the ratio of their arithmetic.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import GIB, hardware
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

SHAPES: dict[str, Any] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "1.5B": lambda: Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    ),
    "8B": lambda: LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": True, "learning_rate": 1e-5},
    "LoRA, checkpointed": {"lora": True, "learning_rate": 1e-5, "gradient_checkpointing": True},
    "full": {"learning_rate": 1e-6},
    "full, checkpointed": {"learning_rate": 1e-6, "gradient_checkpointing": True},
}
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, by NVIDIA's data sheets."""
PROFILES = {
    # median length of prompt and response together, and the prompt's over the response's
    "Capybara": (1160, 1.59),
    "MetaMath": (872, 3.91),
    "HelpSteer": (775, 6.34),
    "TLDR": (416, 11.14),
    "UltraFeedback": (409, 0.42),
    "HH": (186, 2.15),
}
WARM_UP = 2


def new_model(shape: str, device: str) -> torch.nn.Module:
    """A model of random weights, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    return model


def words_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, so that a text of n words is n tokens."""
    vocabulary = {f"w{i}": i for i in range(size - 2)} | {"<end>": size - 2, "<pad>": size - 1}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")


def pairs(count: int, prompt: int, response: int, vocabulary: int, spread: float = 0.0) -> Iterator[dict[str, Any]]:
    """Rows of random words. Lengths are in tokens; of responses, without the end."""
    chance = np.random.default_rng(0)
    top = min(vocabulary - 2, 20_000)
    for _ in range(count):
        lengths = np.array([prompt, response, response]) * np.exp(spread * chance.standard_normal(3))
        texts = [" ".join(f"w{i}" for i in chance.integers(top, size=max(1, round(n)))) for n in lengths]
        yield {"prompt": texts[0] + " ", "chosen": texts[1], "rejected": texts[2]}


def nominal(device: str) -> tuple[float, str]:
    """Operations per second that utilisation is measured against, and where they come from."""
    from prefopt.model.flops import matmul_peak

    name = torch.cuda.get_device_name() if device == "cuda" else "processor"
    for card, flops in DATA_SHEET.items():
        if card in name:
            return flops, f"{name}, data sheet: {flops / 1e12:.0f} TFLOP/s"
    measured = matmul_peak(torch.device(device), torch.bfloat16 if device != "cpu" else torch.float32)
    return measured, f"{name}, measured: {measured / 1e12:.3g} TFLOP/s"


def run_prefopt(spec: dict[str, Any]) -> dict[str, Any]:
    """Train by ``prefopt.dpo``; the numbers are those of its metrics.jsonl."""
    import prefopt
    from prefopt.train import budget

    peak, _ = nominal(spec["device"])
    budget.matmul_peak = lambda *_: peak  # what the run's utilisation is a fraction of
    model = new_model(spec["shape"], spec["device"])
    rows = list(pairs(spec["rows"], spec["prompt"], spec["response"], model.config.vocab_size, 0.2))
    output = Path(spec["folder"]) / "output"
    prefopt.dpo(
        model,
        rows,
        output=output,
        tokenizer=words_tokenizer(model.config.vocab_size),
        max_steps=spec["steps"],
        batch_size=spec["batch_size"],
        epochs=1,
        schedule="constant",
        warmup=0.0,
        eval_fraction=0.0,
        progress="none",
        token_budget=spec["token_budget"],
        **MODES[spec["mode"]],
    )
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timed = [line for line in lines if "step_seconds" in line][WARM_UP:]
    seconds = sum(line["step_seconds"] for line in timed)
    return {
        "pairs_per_second": len(timed) * spec["batch_size"] / seconds,
        "tokens_per_second": sum(line["tokens"] for line in timed) / seconds,
        **{
            name: sum(line[name] * line["step_seconds"] for line in timed) / seconds
            for name in ("utilisation", "utilisation_unshared")
        },
        "peak_bytes": timed[-1]["peak_memory_bytes"],
    }


def run_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """The same pairs with TRL at its best for one GPU: bfloat16, precomputed reference, and, where the package is
    there, flash attention with padding-free batches."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    flash = importlib.util.find_spec("flash_attn") is not None
    mode = MODES[spec["mode"]]
    model = new_model(spec["shape"], spec["device"])
    model.set_attn_implementation("flash_attention_2" if flash else "sdpa")
    rows = list(pairs(spec["rows"], spec["prompt"], spec["response"], model.config.vocab_size, 0.2))
    clock = Clock()
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=spec["folder"],
            max_steps=spec["steps"],
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch_size"] // spec["micro_batch"],
            bf16=True,
            gradient_checkpointing=mode.get("gradient_checkpointing", False),
            precompute_ref_log_probs=True,
            padding_free=flash,
            learning_rate=mode["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=words_tokenizer(model.config.vocab_size),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if mode.get("lora") else None,
        callbacks=[clock],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = clock.marks[-1] - clock.marks[WARM_UP - 1]
    steps = len(clock.marks) - WARM_UP
    return {
        "pairs_per_second": steps * spec["batch_size"] / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "micro_batch": spec["micro_batch"],
    }


def groups_of(lengths: Sequence[tuple[int, int, int]]) -> tuple[list[Any], list[Any]]:
    """Groups of random tokens with a prompt and two responses each; the same sequences, each a group of its own."""
    from prefopt.data.group import Continuation, Group

    chance = np.random.default_rng(1)
    shared, apart = [], []
    for row, (prompt, *responses) in enumerate(lengths):
        prefix = chance.integers(500, size=prompt).astype(np.int32)
        sides = [chance.integers(500, size=n).astype(np.int32) for n in responses]
        shared.append(Group(prefix, tuple(Continuation(ids, np.ones(len(ids), np.bool_)) for ids in sides), row))
        apart += [Group(prefix, (Continuation(ids, np.ones(len(ids), np.bool_)),), row, pairs=()) for ids in sides]
    return shared, apart


def run_profiles(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of forward and backward for the pairs of each profile, as groups and as sequences, and the bound."""
    from prefopt.model.flops import FlopCount
    from prefopt.model.scorer import Scorer
    from prefopt.train.batch import Batch, micro_batches

    device = torch.device(spec["device"])
    model = new_model(spec["shape"], spec["device"])
    scorer = Scorer(model)
    count, chance = FlopCount.of(model), np.random.default_rng(2)

    def seconds(batches: Sequence[Any]) -> float:
        started = time.perf_counter()
        for packed in batches:
            scorer(packed).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    found = {}
    for name, (length, ratio) in PROFILES.items():
        medians = np.array([length * ratio / (1 + ratio), *2 * [length / (1 + ratio)]])
        drawn = medians * np.exp(0.4 * chance.standard_normal((spec["profile_pairs"], 3)))
        lengths = [tuple(max(2, round(n)) for n in row) for row in drawn]
        sides = [
            [part.packed.to(device) for part in micro_batches(scorer, Batch(groups), spec["token_budget"] or 16_384)]
            for groups in groups_of(lengths)
        ]
        work = [sum(map(count, side)) for side in sides]
        times: list[list[float]] = [[], []]
        for _ in range(1 + spec["rounds"]):  # the first one loads kernels
            for side, taken in zip(sides, times, strict=True):
                taken.append(seconds(side))
        shared, apart = (min(taken[1:]) for taken in times)
        found[name] = {
            "pairs_per_second": spec["profile_pairs"] / shared,
            "unshared_pairs_per_second": spec["profile_pairs"] / apart,
            "speedup": apart / shared,
            "bound": work[1] / work[0],
        }
    return found


RUNS = {"prefopt": run_prefopt, "TRL": run_trl, "profiles": run_profiles}


def in_a_process(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of one run, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps({**spec, "folder": folder}), encoding="utf-8")
        try:
            command = [sys.executable, __file__, "--one", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"ended": f"stopped after {seconds:.0f} s"}
        answer = Path(folder) / "answer.json"
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
    return {"ended": (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]}


def rows_of(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The tables, as Markdown."""
    yield "| run | pairs/s | tokens/s | utilisation | unshared | peak memory |"
    yield "|---|---|---|---|---|---|"
    for name, one in found.items():
        if "pairs_per_second" in one:
            used = [f"{one[n]:.1%}" if n in one else "" for n in ("utilisation", "utilisation_unshared")]
            tokens = f"{one['tokens_per_second']:,.0f}" if "tokens_per_second" in one else ""
            peak = f"{one['peak_bytes'] / GIB:.1f} GiB"
            yield f"| {name} | {one['pairs_per_second']:.2f} | {tokens} | {' | '.join(used)} | {peak} |"
        elif "ended" in one:
            yield f"| {name} | {one['ended']} | | | | |"
    for name, one in found.items():
        profiles = {n: p for n, p in one.items() if n in PROFILES}
        if profiles:
            yield f"\n{name}:\n\n| lengths of | pairs/s | unshared | speed-up | bound | of the bound |"
            yield "|---|---|---|---|---|---|"
        for data, p in profiles.items():
            part = f"{p['speedup'] / p['bound']:.0%}"
            speeds = f"{p['pairs_per_second']:.2f} | {p['unshared_pairs_per_second']:.2f}"
            yield f"| {data} | {speeds} | {p['speedup']:.2f}x | {p['bound']:.2f}x | {part} |"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--one", type=Path, help=argparse.SUPPRESS)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--shapes", nargs="+", default=["1.5B", "8B"], choices=list(SHAPES))
    add("--modes", nargs="+", default=["LoRA", "full, checkpointed"], choices=list(MODES))
    add("--sides", nargs="+", default=list(RUNS), choices=list(RUNS))
    add("--steps", type=int, default=6, help=f"optimiser steps, of which {WARM_UP} are not timed")
    add("--batch-size", type=int, default=64, help="pairs of a step")
    add("--micro-batch", type=int, default=4, help="pairs that TRL takes at once")
    add("--token-budget", type=int, help="tokens prefopt encodes at once; its own choice if not given")
    add("--prompt", type=int, default=400, help="median tokens of a prompt")
    add("--response", type=int, default=400, help="median tokens of a response")
    add("--profile-pairs", type=int, default=64, help="pairs of each length profile")
    add("--rounds", type=int, default=3, help="timed passes of each profile, of which the best counts")
    add("--seconds", type=float, default=150, help="time limit of one run")
    add("--json", type=Path, help="write all numbers there")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.one:
        spec = json.loads(options.one.read_text(encoding="utf-8"))
        answer = RUNS[spec["side"]](spec)
        (Path(spec["folder"]) / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu --shapes tiny tries the script")
    sides = [side for side in options.sides if side != "TRL" or importlib.util.find_spec("trl") is not None]
    spec = {
        name: getattr(options, name)
        for name in "device steps batch_size micro_batch token_budget prompt response profile_pairs rounds".split()
    }
    spec["rows"] = options.steps * options.batch_size
    found = {}
    for shape in options.shapes:
        for side in sides:
            for mode in options.modes if side != "profiles" else [""]:
                name = f"{side}, {shape}{mode and f', {mode}'}"
                one = {**spec, "side": side, "shape": shape, "mode": mode}
                found[name] = in_a_process(one, options.seconds)
                print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    _, against = nominal(options.device)
    print(f"{hardware(torch.get_num_threads())}; utilisation of: {against}\n", *rows_of(found), sep="\n")
    if options.json:
        document = {"hardware": hardware(torch.get_num_threads()), "against": against, "options": spec, "runs": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
