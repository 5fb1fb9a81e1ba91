"""Rows by the prompts that they ask: rows that ask the same are samples of one prompt, however often it stands there.

>>> import numpy as np
>>> gathered(np.array([[1.0], [0.5], [0.0]]), np.array([0, 1, 0]))
array([[1. , 0. ],
       [0.5, nan]])
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def numbered(keys: Iterable[Hashable]) -> Ints:
    """The number [rows] of each row's prompt, in the order in which they first come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def gathered(values: Floats, prompt: Ints) -> Floats:
    """``values`` [rows, samples] as [prompts, most samples of one], NaN where a prompt has fewer than another."""
    _, place, rows = np.unique(prompt, return_inverse=True, return_counts=True)
    found = np.full((len(rows), int(rows.max(initial=0)), values.shape[1]), np.nan)
    filled = np.zeros(len(rows), np.int64)
    for row, p in zip(values, place, strict=True):
        found[p, filled[p]] = row
        filled[p] += 1
    return found.reshape(len(rows), -1)
