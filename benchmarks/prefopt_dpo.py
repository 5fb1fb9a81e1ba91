"""One DPO run with prefopt, measured: python prefopt_dpo.py SPEC.json

SPEC and the answer are those of `trl_dpo.py`; times and metrics are the run's own metrics.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import limit_bytes, peak_bytes


def collect(output: Path) -> dict[str, Any]:
    """The steps that a run, finished or stopped, has written."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [step for step in map(json.loads, lines) if "step_seconds" in step]
    peaks = [step["peak_memory_bytes"] for step in steps]
    return {
        "step_seconds": [step["step_seconds"] for step in steps],
        "metrics": steps,
        "peak_bytes": max(peaks, default=0),
    }


def main() -> None:
    import prefopt  # here, so that `collect` can be imported where only TRL is measured

    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limit_bytes(spec["memory_limit"])
    settings = {
        "max_length": spec["max_length"],
        "batch_size": spec["batch_size"],
        "max_steps": spec["steps"],
        "dtype": spec["dtype"],
        "gradient_checkpointing": spec["gradient_checkpointing"],
        "token_budget": spec["token_budget"],
        "beta": spec["beta"],
        "learning_rate": spec["learning_rate"],
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "shuffle": False,
        "seed": spec["seed"],
    }
    output = Path(spec["output"])
    prefopt.dpo(
        model=spec["model"],
        data=[spec["pairs"]],
        output=str(output),
        eval_fraction=0.0,
        device="cpu",
        progress="none",
        **settings,
    )
    versions = {m.__name__: m.__version__ for m in (prefopt, transformers, torch)}
    result = {**collect(output), "peak_bytes": peak_bytes(), "versions": versions, "settings": settings}
    Path(spec["result"]).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
