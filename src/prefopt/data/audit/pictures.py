"""Statistics of the pictures of rows: how many, how large, and the tokens that stand for them.

>>> counts = PictureCounts()
>>> counts.add([Picture(b"a", 640, 480), Picture(b"a", 640, 480)])
>>> counts.to_dict()["count"], counts.to_dict()["different"], counts.to_dict()["width"]["max"]
(2, 1, 640)
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from prefopt.data.table import Array
from prefopt.records import Picture

QUANTILES = {"min": 0, "50%": 50, "95%": 95, "max": 100}


class PictureCounts:
    """Pictures of all readable rows; with a tokenizer also the tokens of those that a run would take."""

    def __init__(self) -> None:
        self.rows = 0
        self.width, self.height, self.tokens = array("i"), array("i"), array("i")
        self._different: set[bytes] = set()

    def __bool__(self) -> bool:
        return self.rows > 0

    def add(self, pictures: Sequence[Picture]) -> None:
        """The pictures of a row."""
        self.rows += bool(pictures)
        self.width.extend(p.width for p in pictures)
        self.height.extend(p.height for p in pictures)
        self._different.update(p.digest for p in pictures)

    def add_columns(self, c: Mapping[str, Array]) -> None:
        """The tokens of the pictures of tokenised rows, those of a response's own pictures too."""
        self.tokens.extend((c["place_I"][:, 1] - c["place_I"][:, 0]).tolist())

    def to_dict(self) -> dict[str, object]:
        """For JSON: quantiles of pixels and tokens, None where there are none."""
        found = {"width": self.width, "height": self.height, "tokens": self.tokens}
        values = {name: _quantiles(numbers) if numbers else None for name, numbers in found.items()}
        total = sum(self.tokens) if self.tokens else None
        counts = {"rows": self.rows, "count": len(self.width), "different": len(self._different)}
        return {**counts, **values, "total_tokens": total}

    def lines(self) -> list[str]:
        """For the report."""
        count = len(self.width)
        each = f", {count / self.rows:.1f} each" if count > self.rows else ""
        lines = [f"{count:,} pictures in {self.rows:,} rows{each}; {len(self._different):,} different"]
        for name, numbers in (("width", self.width), ("height", self.height), ("tokens", self.tokens)):
            if numbers:
                shown = ", ".join(f"{at} {round(n):,}" for at, n in _quantiles(numbers).items())
                lines.append(f"{name:<8}{shown}")
        if self.tokens:
            lines.append(f"{sum(self.tokens):,} tokens stand for pictures, none of them trained")
        return lines


def _quantiles(numbers: array[int]) -> dict[str, float]:
    values = np.percentile(np.asarray(numbers), list(QUANTILES.values()))
    return dict(zip(QUANTILES, values.tolist(), strict=True))
