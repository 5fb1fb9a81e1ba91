"""From the processes' answers to numbers and a table."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from flops import needed_flops, padded_flops
from pairs import Pair

GIB = 2**30


@dataclass
class Outcome:
    """One process: its answer (see trl_dpo.py), and how it ended where not well ("out of memory", ...)."""

    result: dict[str, Any]
    ended: str = ""

    def timed(self, warm_up: int) -> list[tuple[int, float]]:
        """(step, seconds) of the steps after the warm-up."""
        return list(enumerate(self.result.get("step_seconds", [])))[warm_up:]


def summarise(
    outcomes: list[Outcome], pairs: list[Pair], batch_size: int, micro_batch: int | None, warm_up: int, peak: float
) -> dict[str, Any]:
    """One side over all rounds. ``micro_batch`` is None for a trainer that shares prompts and pads nothing.

    utilisation: arithmetic that the steps need (`flops.needed_flops`) per second, over the measured matrix product.
    overhead: arithmetic done over arithmetic needed, 1 where nothing is padded or computed twice.
    """
    timed = [step for outcome in outcomes for step in outcome.timed(warm_up)]
    seconds = sum(s for _, s in timed)
    done = needed = 0
    for step, _ in timed:
        batch = pairs[step * batch_size : (step + 1) * batch_size]
        needed += sum(map(needed_flops, batch))
        width = micro_batch or 1
        chunks = [batch[i : i + width] for i in range(0, len(batch), width)]
        done += sum(padded_flops(chunk) if micro_batch else needed_flops(chunk[0]) for chunk in chunks)
    peaks = [o.result["peak_bytes"] for o in outcomes if "peak_bytes" in o.result]
    rounds = [o.timed(warm_up) for o in outcomes]
    return {
        "pairs_per_second": len(timed) * batch_size / seconds if timed else None,
        "by_round": [len(r) * batch_size / sum(s for _, s in r) for r in rounds if r],
        "peak_bytes": max(peaks) if peaks else None,
        "utilisation": needed / seconds / peak if timed else None,
        "overhead": done / needed if timed else None,
        "timed_steps": len(timed),
        "ended": ", ".join(dict.fromkeys(o.ended for o in outcomes if o.ended)),
        "versions": next((o.result["versions"] for o in outcomes if "versions" in o.result), None),
        "settings": next((o.result["settings"] for o in outcomes if "settings" in o.result), None),
    }


def same_work(ours: list[Outcome], theirs: list[Outcome], dtype: str) -> str:
    """Compare what two sides computed; ends the benchmark where they did not train on the same tokens."""
    a, b = (next((o.result["metrics"] for o in side if o.result.get("metrics")), []) for side in (ours, theirs))
    if not a or not b:
        return "not compared, as one side has no step"
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for name in ("logps/chosen", "logps/rejected"):
        if abs(a[0][name] - b[0][name]) > tolerance * abs(b[0][name]):
            raise SystemExit(f"not the same work: {name} of the first step is {a[0][name]}, TRL's {b[0][name]}")
    apart = max(abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=False))
    return f"same log-probabilities in the first step, losses of {min(len(a), len(b))} steps within {apart:.1e}"


def table(result: dict[str, Any]) -> str:
    """One case as Markdown, with the ratios of prefopt to every TRL setting."""
    case, sides = result["case"], result["sides"]
    lines = [
        f"### {case['data']}, {case['max_length']} tokens, {case['batch_size']} pairs per step, {result['dtype']}",
        "",
        "| trainer | pairs/s (each round) | peak memory | utilisation | arithmetic done / needed | timed steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        if not side["timed_steps"]:
            lines.append(f"| {name} | {side['ended'] or 'no step'} | | | | 0 |")
            continue
        rounds = ", ".join(f"{x:.3f}" for x in side["by_round"])
        ended = f", {side['ended']}" if side["ended"] else ""
        lines.append(
            f"| {name} | {side['pairs_per_second']:.3f} ({rounds}) | {side['peak_bytes'] / GIB:.2f} GiB "
            f"| {side['utilisation']:.1%} | {side['overhead']:.2f} | {side['timed_steps']}{ended} |"
        )
    lines.append("")
    ours = sides.get("prefopt")
    for name, side in sides.items():
        if ours and name != "prefopt" and ours["timed_steps"] and side["timed_steps"]:
            speed = ours["pairs_per_second"] / side["pairs_per_second"]
            memory = side["peak_bytes"] / ours["peak_bytes"]
            checked = result["check"][name]
            lines.append(f"prefopt against {name}: {speed:.2f}x pairs per second, 1/{memory:.2f} memory; {checked}.")
    return "\n".join(lines) + "\n"


def hardware(threads: int) -> str:
    """The machine, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    native = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in flags]
    memory = psutil.virtual_memory().total / GIB
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor} ({', '.join(native)}), {threads} threads, "
        f"{memory:.0f} GiB, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
