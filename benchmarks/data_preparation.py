"""From a file to tokens: rows per second, peak memory and the size of the cache, beside TRL's preparation of that file.

    python benchmarks/data_preparation.py --rows 1000000 --tokenizer MODEL
    python benchmarks/data_preparation.py --rows 1000000 --tokenizer MODEL --trl trl-env/bin/python

A file of conversations in TRL's explicit-prompt layout is written, then prepared in a process of its own each time:
cold (an empty cache), warm (the second start), and by TRL, in its own interpreter, with as many processes. What TRL
does is its own code, `DPOTrainer._prepare_dataset` on `datasets.load_dataset("json", ...)`, also with an empty cache.

Memory is the largest sum of what all processes hold for themselves (private and anonymous: pages of mapped files that
the system may drop are not counted, and are printed apart), sampled ten times a second, and the peak of the largest
single process as the system gives it (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TURNS = (60, 400)
"""Characters of a prompt's filling and of a response's, at the most."""


def write_file(path: Path, rows: int) -> None:
    """Conversations of one turn, of English-looking words, every prompt its own."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(5000)]

    def text(characters: int) -> str:
        return " ".join(chance.choices(words, k=max(1, chance.randint(characters // 4, characters) // 6)))

    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            row = {
                "prompt": [{"role": "user", "content": f"{n}: {text(TURNS[0])}?"}],
                "chosen": [{"role": "assistant", "content": text(TURNS[1])}],
                "rejected": [{"role": "assistant", "content": text(TURNS[1])}],
            }
            file.write(json.dumps(row) + "\n")


class Watch(threading.Thread):
    """The largest memory of a process and all its children, in bytes: ``private``, and ``mapped`` beside it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.private = self.mapped = 0

    def run(self) -> None:
        import psutil

        try:
            root = psutil.Process(self.pid)
            while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
                private = mapped = 0
                for process in [root, *root.children(recursive=True)]:
                    try:
                        status = Path(f"/proc/{process.pid}/status").read_text()
                    except OSError:
                        continue
                    sizes = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
                    private += int(sizes.get("RssAnon", "0 kB").split()[0]) * 1024
                    mapped += int(sizes.get("RssFile", "0 kB").split()[0]) * 1024
                self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)
                time.sleep(0.1)
        except psutil.NoSuchProcess:
            pass


def measured(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command that prints one JSON object last; its seconds, its memory, and what it printed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    watch = Watch(process.pid)
    watch.start()
    out, _ = process.communicate()
    seconds = time.monotonic() - started
    watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told | {"whole_seconds": seconds, "private_bytes": watch.private, "mapped_bytes": watch.mapped}


def _peak() -> int:
    """Bytes of the largest of this process and those it waited for."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def prepare(args: argparse.Namespace) -> None:
    """What prefopt does between its start and the first step, but for the model."""
    import numpy as np

    from prefopt.core.cache_folder import tokens_folder
    from prefopt.data.load import load_groups
    from prefopt.data.sampler import BatchSampler
    from prefopt.data.tokenizer import load_tokenizer
    from prefopt.model.packing import PackLayout
    from prefopt.runs.folder import fingerprint

    tokenizer = load_tokenizer(args.tokenizer)
    started = time.monotonic()
    data = load_groups([args.file], tokenizer, max_length=args.max_length, workers=args.processes)
    loaded = time.monotonic() - started
    train, held_out = data.split(0.01, seed=0)
    fingerprint(data.groups)
    costs = PackLayout().costs(data.groups)
    batch = BatchSampler(len(train), 64, seed=0).batch(0)
    first = [data.groups[train[i]].tokens for i in batch.tolist()]
    told = {
        "seconds": loaded,
        "columns_seconds": time.monotonic() - started - loaded,
        "rows": data.read,
        "cached": data.cached,
        "tokens": int(np.sum(costs)),
        "held_out": len(held_out),
        "first_step_tokens": sum(first),
        "peak_bytes": _peak(),
        "cache_bytes": sum(path.stat().st_size for path in tokens_folder().rglob("*") if path.is_file()),
    }
    print(json.dumps(told))


def prepare_with_trl(args: argparse.Namespace) -> None:
    """TRL's own preparation, without a model: the method of its trainer asks for nothing but the tokenizer."""
    import types

    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if tokenizer.chat_template is None:
        raise SystemExit(f"{args.tokenizer} has no chat template, which TRL needs for conversations; name another")
    config = DPOConfig(
        output_dir=str(Path(args.file).with_suffix(".trl")),
        max_length=args.max_length,
        dataset_num_proc=args.processes,
        use_cpu=True,
        report_to=[],
    )
    started = time.monotonic()
    dataset = load_dataset("json", data_files=args.file, split="train")
    dataset = DPOTrainer._prepare_dataset(
        types.SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, config, "train"
    )
    told = {
        "seconds": time.monotonic() - started,
        "rows": len(dataset),
        "peak_bytes": _peak(),
        "version": trl.__version__,
        "cache_bytes": sum(p.stat().st_size for p in Path(os.environ["HF_DATASETS_CACHE"]).rglob("*") if p.is_file()),
    }
    print(json.dumps(told))


def show(name: str, result: dict[str, Any]) -> None:
    megabytes = {key: f"{result[key] / 1e6:,.0f} MB" for key in result if key.endswith("_bytes")}
    print(
        f"{name:12} {result['rows'] / result['seconds']:>9,.0f} rows/s  {result['seconds']:>8.1f} s"
        f"  memory {megabytes['private_bytes']} (mapped {megabytes['mapped_bytes']}, largest process"
        f" {megabytes['peak_bytes']})  cache {megabytes['cache_bytes']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name of a tokenizer with a chat template")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter that has TRL, to prepare the same file")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--folder", type=Path, help="where the file and the caches go (a temporary folder)")
    parser.add_argument("--only", choices=("prefopt", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return prepare(args) if args.only == "prefopt" else prepare_with_trl(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "rows.jsonl"
        write_file(file, args.rows)
        size = file.stat().st_size
        print(f"{args.rows:,} rows, {size / 1e6:,.0f} MB, {args.processes} processes", flush=True)
        common = ["--tokenizer", args.tokenizer, "--max-length", str(args.max_length), "--file", str(file)]
        common += ["--processes", str(args.processes)]
        results: dict[str, Any] = {"file_bytes": size, "processes": args.processes}
        for name in ("cold", "warm"):
            command = [sys.executable, str(HERE), "--only", "prefopt", *common]
            results[name] = measured(command, {"PREFOPT_CACHE": str(Path(folder) / "cache")})
            show(name, results[name])
        if args.trl:
            command = [args.trl, str(HERE), "--only", "trl", *common]
            quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
            results["trl"] = measured(command, quiet | {"HF_DATASETS_CACHE": str(Path(folder) / "datasets")})
            show(f"TRL {results['trl']['version']}", results["trl"])
        if args.json:
            args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
