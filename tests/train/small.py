"""A tiny model, pairs to train it on in a second, and runs: in this process, or in one that can be killed."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import prefopt
from data.small import small_tokenizer
from dying import Death, die_at
from forked import forked
from prefopt.train.result import TrainingResult

Row = dict[str, str]

# What differs between two runs of the same thing.
CLOCKS = {
    "step_seconds",
    "tokens_per_second",
    "pairs_per_second",
    "rows_per_second",
    "utilisation",
    "utilisation_unshared",
    "peak_memory_bytes",
}

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 64,
    "device": "cpu",
    "dtype": "float32",
    "progress": "none",
}


def tiny_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Two layers of width 32 over a byte-level vocabulary, its norms not at one."""
    fields: dict[str, Any] = {
        "vocab_size": len(small_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def write_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A model folder with its tokenizer."""
    tiny_llama(seed, **changes).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(n: int, seed: int = 0) -> list[Row]:
    """Prompts of a few letters, responses of different lengths; the chosen ones like vowels."""
    chance = random.Random(seed)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(chance.choice(letters) for _ in range(chance.randint(low, high)))

    return [
        {"prompt": f"{text('klm', 1, 9)}{i}: ", "chosen": text("aeiou", 1, 16), "rejected": text("xyz", 1, 16)}
        for i in range(n)
    ]


def doubtful_pairs(n: int, seed: int) -> list[Row]:
    """The same with every fourth preference the other way round: who learns the rest too well is punished."""
    rows = pairs(n, seed)
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if not i % 4 else row for i, row in enumerate(rows)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> str:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def quick(model: Any) -> dict[str, Any]:
    """The options of a quick test; a model object is where it is already."""
    return QUICK if isinstance(model, (str, Path)) else {k: v for k, v in QUICK.items() if k != "device"}


def dpo(model: Any, data: Any, output: Path, **options: Any) -> TrainingResult:
    """``prefopt.dpo`` with the options of a quick test."""
    result = prefopt.dpo(model, data, output=output, **{**quick(model), **options})
    assert result is not None
    return result


def words(model: str, data: str, output: Path, **options: Any) -> list[str]:
    """The same as arguments of the command line."""
    given = {"model": model, "data": data, "output": str(output), **QUICK, **options}
    return ["dpo", *(f"--{name.replace('_', '-')}={_plain(value)}" for name, value in given.items())]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def steps(output: Path) -> list[dict[str, Any]]:
    """Its lines about training steps."""
    return [line for line in metrics(output) if "loss" in line]


def evaluations(output: Path) -> list[dict[str, Any]]:
    """Its lines about evaluations."""
    return [line for line in metrics(output) if "eval_loss" in line]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The weights that a run wrote: the model's or the adapter's."""
    (file,) = output.glob("*model.safetensors")
    return load_file(file)


def same_bits(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights and told the same numbers."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(one) == metrics(other)


def start(arguments: list[str], log: Path, **options: Any) -> Any:
    """``prefopt`` with these arguments in a process of its own; what it prints goes to ``log``.

    ``options``: as :func:`_child` takes them.
    """
    return forked(_child, arguments, log, **options)


def _child(
    arguments: list[str],
    log: Path,
    *,
    commit_seconds: float | None = None,
    largest_file: int | None = None,
    held_up: tuple[str, ...] | None = None,
    death: Death | None = None,
) -> None:
    """``commit_seconds``: how often the reference cache commits. ``largest_file``: bytes after which disks are full.
    ``held_up``: a thread does not get to write files whose path has all of these in it. ``death``: where it dies."""
    from prefopt.cli import main
    from prefopt.reference import cache

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    if commit_seconds is not None:
        cache.COMMIT_SECONDS, cache.COMMIT_SHARE = commit_seconds, 0.0
    if held_up is not None:
        hold_up(*held_up)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if death is not None:
        die_at(death)
    sys.exit(main(arguments))


def hold_up(*parts: str) -> None:
    """From here on a thread of this process begins files of checkpoints whose path has all ``parts``, and never ends
    them."""
    from prefopt.train import checkpoint
    from prefopt.train.tensor_file import TensorFile

    def held(path: Path) -> None:
        if threading.current_thread() is not threading.main_thread() and all(part in str(path) for part in parts):
            path.write_bytes(b"half")
            threading.Event().wait()

    tensors, flushed = TensorFile.write, checkpoint.write_flushed
    TensorFile.write = lambda file, path: held(path) or tensors(file, path)  # type: ignore[method-assign]
    checkpoint.write_flushed = lambda path, data: held(path) or flushed(path, data)
