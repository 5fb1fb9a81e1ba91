"""``metrics.jsonl``: what a run measured, line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.disk.write import output_errors
from prefopt.train.record import numbered_lines


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
        """Drop the lines of later steps: they are done again after a resume.

        Raises :class:`prefopt.errors.RunError` for a line that holds no metrics.
        """
        kept = [text.decode() for text, line in numbered_lines(self.path) if line["step"] <= step]
        aside = self.path.with_name(f".{self.path.name}")
        with output_errors(self.path):
            aside.write_text("".join(line + "\n" for line in kept))
            aside.replace(self.path)


def note(record: Mapping[str, float]) -> list[str]:
    """The numbers of a step or an evaluation that a person watches, in a few words each; what it lacks is left out."""
    sides = [record.get(f"log_ratios_per_token/{side}") for side in ("chosen", "rejected")]
    pattern = {
        "objective/scores": "score {:.3f}",
        "objective/kl": "KL {:.3g}",
        "objective/rlhf_reward": "score less penalty {:.3f}",
        "val/length": "{:.0f} tokens each",
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.2f}",
        "rewards/margins": "margin {:+.3f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "": "log-ratio per token {:+.3f} chosen, {:+.3f} rejected",
        "learning_rate": "learning rate {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "pairs_per_second": "{:.1f} pairs/s",
        "rows_per_second": "{:.1f} rows/s",
        "eps": "{:.1f} responses/s",
        "grad_norm": "gradient norm {:.3g}",
    }
    found = {name: [record[name]] for name in pattern if record.get(name) is not None}
    if None not in sides:
        found[""] = sides  # type: ignore[assignment]
    return [text.format(*found[name]) for name, text in pattern.items() if name in found]
