"""``metrics.jsonl``: what a run measured, line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.disk.write import output_errors


class Metrics:
    """``metrics.jsonl``: one line per step and per evaluation, appended and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, as JSON has none."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with output_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps: they are done again after a resume."""
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if record.get("step", 0) <= step:
                kept.append(line)
        aside = self.path.with_name(f".{self.path.name}")
        with output_errors(self.path):
            aside.write_text("".join(line + "\n" for line in kept))
            aside.replace(self.path)
