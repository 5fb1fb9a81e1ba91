"""Output folders of runs, written as runs write them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "model": "models/tiny",
    "data": ["a.jsonl"],
    "learning_rate": 1e-6,
    "beta": 0.1,
    "lora": False,
}
RECORD = {"status": "finished", "steps": 30, "data": "d1 90+10", "reference": "r1", "loss": "dpo"}


def write_run(folder: Path, *, options: Any = None, record: Any = None, fall: float = 0.01, steps: int = 30) -> Path:
    """A run whose loss falls by ``fall`` a step, evaluated every ten steps."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for i in range(1, steps + 1):
        values = {
            "loss": 0.7 - fall * i if i > 1 else math.log(2),
            "rewards/margins": 0.1 * fall * i,
            "rewards/accuracies": 0.5 + 0.01 * i,
            "log_ratios_per_token/chosen": fall * (i - 1) / 10,
            "log_ratios_per_token/rejected": -fall * (i - 1) / 10,
        }
        lines.append({"step": i, **values, "learning_rate": 1e-6, "epoch": i / 15, "tokens": 100, "grad_norm": 2.0})
        if i % 10 == 0:
            lines.append({"step": i, **{f"eval_{name}": value + 0.05 for name, value in values.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole = {**RECORD, "options": {**OPTIONS, "output": str(folder), **(options or {})}, **(record or {})}
    (folder / "run.json").write_text(json.dumps(whole))
    return folder
