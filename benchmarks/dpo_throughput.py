"""DPO throughput and memory, prefopt against TRL, on one machine in one run.

    python benchmarks/dpo_throughput.py --setup-trl trl-env          # once: TRL's own environment
    python benchmarks/dpo_throughput.py --trl-python trl-env/bin/python --data-root DATA

Every run is a process of its own; the trainers take turns. Same model, float32 weights, pairs, order, token ids, pairs
per step, optimiser and checkpointing setting. The first step is a warm-up; loading, tokenising and reference
log-probabilities are not timed, for either. See benchmarks/README.md for what is counted how.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from llama_40m import build_model
from pairs import choose, write
from prefopt_dpo import collect
from report import GIB, Outcome, hardware, same_work, summarise, table

HERE = Path(__file__).parent
TRL_VERSION = "1.16.0"
OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "MemoryError", "Cannot allocate memory")


@dataclass(frozen=True)
class Case:
    """What both sides train on. ``longest``: the longest pairs of the data set, not a sample of it."""

    data: str
    max_length: int
    batch_size: int
    longest: bool = False

    @property
    def name(self) -> str:
        return f"{self.data}-{self.max_length}"


CASES = [
    Case("dpo_en_demo", max_length=1024, batch_size=4),
    Case("dpo_en_demo", max_length=4096, batch_size=1, longest=True),
    Case("ultrafeedback_sample", max_length=1024, batch_size=4),
]


@dataclass(frozen=True)
class Spec:
    """One process: what its script reads. ``pairs``: text for prefopt, token ids for TRL."""

    model: str
    pairs: str
    output: str
    result: str
    dtype: str
    max_length: int
    batch_size: int
    micro_batch: int | None
    token_budget: int | None
    steps: int
    gradient_checkpointing: bool
    memory_limit: int
    beta: float = 0.1
    learning_rate: float = 1e-5  # high enough that the losses of the two sides would part if they did not do the same
    seed: int = 0


def run_process(python: str, script: str, spec: Spec, options: argparse.Namespace) -> Outcome:
    """Start one side and wait for it; out of memory and out of time are outcomes, other failures end the benchmark."""
    folder = Path(spec.result).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec_path, log = folder / "spec.json", folder / "log.txt"
    spec_path.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "PREFOPT_CACHE": str(options.cache / "prefopt"),
    }
    ended = ""
    with log.open("w", encoding="utf-8") as stream:
        command = [python, str(HERE / script), str(spec_path)]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(options.time_limit)
        except subprocess.TimeoutExpired:
            status, ended = 0, f"stopped after {options.time_limit:g} s"
        finally:  # an interrupted benchmark leaves nothing running
            process.kill()
            process.wait()
    if status != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        if status != -9 and not any(sign in text for sign in OUT_OF_MEMORY):
            raise SystemExit(f"{script} failed; the end of {log}:\n{text[-3000:]}")
        ended = "out of memory"
    path = Path(spec.result)
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else collect(Path(spec.output))
    return Outcome(done, ended)


def measure_peak(dtype: torch.dtype, threads: int, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of several in either layout: utilisation is measured against it."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, size, size).to(dtype)
    best, start, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or (time.perf_counter() - start < 5 and runs < 50):
        for right in (b, b.t()):
            before = time.perf_counter()
            torch.mm(a, right)
            best, runs = min(best, time.perf_counter() - before), runs + 1
    return 2 * size**3 / best


def run_case(case: Case, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one case in one dtype, prefopt and every TRL setting in turn."""
    peak = measure_peak(getattr(torch, dtype), options.threads)
    model = build_model(options.data_root, options.cache)
    steps = options.warm_up + options.steps
    rows, pairs = choose(options.data_root, case.data, model, steps * case.batch_size, case.longest, case.max_length)
    folder = options.cache / "runs" / f"{case.name}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    text, ids = write(folder, rows, pairs)
    micro_batches: dict[str, int | None] = {"prefopt": None} if "prefopt" in options.only else {}
    if "trl" in options.only:
        sizes = sorted({min(n, case.batch_size) for n in options.trl_micro_batch}, reverse=True)
        micro_batches |= {f"TRL, {n} x {case.batch_size // n}": n for n in sizes}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in micro_batches}
    for turn in range(options.rounds):
        for name, micro_batch in micro_batches.items():
            place = folder / f"{name.replace(', ', '-').replace(' ', '')}-{turn}"
            spec = Spec(
                model=str(model),
                pairs=str(ids if micro_batch else text),
                output=str(place / "output"),
                result=str(place / "result.json"),
                dtype=dtype,
                max_length=case.max_length,
                batch_size=case.batch_size,
                micro_batch=micro_batch,
                token_budget=options.token_budget,
                steps=steps,
                gradient_checkpointing=options.gradient_checkpointing,
                memory_limit=int(options.memory_limit * GIB),
            )
            python, script = (options.trl_python, "trl_dpo.py") if micro_batch else (sys.executable, "prefopt_dpo.py")
            outcomes[name].append(run_process(python, script, spec, options))
            seconds = ", ".join(f"{s:.1f}" for s in outcomes[name][-1].result.get("step_seconds", []))
            print(f"{case.name} {dtype} {name}, round {turn + 1}: {seconds} s {outcomes[name][-1].ended}", flush=True)
    result: dict[str, Any] = {"case": asdict(case), "dtype": dtype, "matrix_product_flops": peak}
    result["sides"] = {
        name: summarise(outcomes[name], pairs, case.batch_size, n, options.warm_up, peak)
        for name, n in micro_batches.items()
    }
    result["check"] = {
        name: same_work(outcomes["prefopt"], outcomes[name], dtype)
        for name, n in micro_batches.items()
        if n and "prefopt" in outcomes
    }
    return result


def set_up_trl(folder: Path) -> None:
    """An environment of TRL's own, with the version of torch that runs here."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    for package in (f"torch=={torch.__version__.split('+')[0]}", f"trl=={TRL_VERSION}"):
        subprocess.run([*pip, package], check=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trl-python", default=sys.executable, help="interpreter of TRL's environment")
    add("--setup-trl", type=Path, metavar="DIR", help=f"make an environment with TRL {TRL_VERSION} there, and end")
    add("--data-root", type=Path, default=Path("data"), help="folder with llamafactory_demo and ultrafeedback_sample")
    add("--cache", type=Path, default=HERE.parent / "runs" / "benchmark", help="folder of the model and all runs")
    add("--cases", nargs="+", default=[c.name for c in CASES], choices=[c.name for c in CASES])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--only", nargs="+", default=["prefopt", "trl"], choices=["prefopt", "trl"])
    add("--trl-micro-batch", nargs="+", type=int, default=[4, 1], help="pairs TRL takes at once; the rest accumulates")
    add("--token-budget", type=int, help="tokens prefopt encodes at once; its own choice if not given")
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add("--rounds", type=int, default=2, help="how often the sides take turns")
    add("--warm-up", type=int, default=1, help="steps that are not timed")
    add("--steps", type=int, default=8, help="steps that are timed")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--time-limit", type=float, default=3600, help="seconds for one process; what it did until then counts")
    add(
        "--memory-limit",
        type=float,
        default=psutil.virtual_memory().available * 0.95 / GIB,
        help="GiB for one process; more is out of memory (default: what is free now)",
    )
    add("--json", type=Path, help="write all numbers there")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.setup_trl:
        set_up_trl(options.setup_trl)
        return
    options.cache, options.data_root = options.cache.resolve(), options.data_root.resolve()
    results = [
        run_case(case, dtype, options) for case in CASES if case.name in options.cases for dtype in options.dtypes
    ]
    print(f"\n{hardware(options.threads)}\n")
    for result in results:
        print(table(result))
        print(f"matrix product in {result['dtype']}: {result['matrix_product_flops'] / 1e9:.1f} GFLOP/s\n")
    if options.json:
        document = {"hardware": hardware(options.threads), "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
