"""How a run shares its tokens out among the experts of a mixture, without torch.

The share of an expert is its fraction of the choices of its layer's router: K of a token that goes to K experts. With E
experts an equal share is 1 / E. Every position of a batch counts once, also where several responses share it; there is
no padding.

>>> use = ExpertUse(["layers.0.mlp.gate"])
>>> table_LE = np.array([[60, 30, 10, 0]])
>>> {name: round(value, 2) for name, value in shares(table_LE).items()}
{'router/max_share': 0.6, 'router/min_share': 0.0, 'router/entropy': 0.65}
>>> [use.add(step, 20 * table_LE) is None for step in (1, 2, 3, 4)]
[True, False, True, True]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.core.files import read_json, write_json

Counts = npt.NDArray[np.int64]
FILE = "experts.json"
NAMES = ("router/max_share", "router/min_share", "router/entropy")
STARVED = 0.01
"""Of an equal share: an expert with less is said to starve."""
ENOUGH = 1000
"""Choices that an equal share comes to before shares are judged. By chance alone none would then get a hundredth."""


def shares(table_LE: Counts) -> dict[str, float]:
    """The largest and the smallest share of all experts, and the average entropy of a layer's shares as a fraction of
    log E: 1 where all are equal, 0 where one expert gets everything."""
    share_LE = _shares(table_LE)
    logs = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    entropy_L = -(share_LE * logs).sum(1) / max(np.log(share_LE.shape[1]), 1e-12)
    return dict(zip(NAMES, map(float, (share_LE.max(), share_LE.min(), entropy_L.mean())), strict=True))


def _shares(table_LE: Counts) -> npt.NDArray[np.float64]:
    share_LE: npt.NDArray[np.float64] = table_LE / np.maximum(table_LE.sum(1, keepdims=True), 1)
    return share_LE


class ExpertUse:
    """Counts of tokens per expert over all updates of a run. ``names``: of its L routers; ``remedy``: the last words of
    the warning where experts starve."""

    def __init__(self, names: Sequence[str], remedy: str = "") -> None:
        self.names, self.remedy = list(names), remedy
        self.total_LE: Counts | None = None
        self._window_LE: Counts | None = None
        self._since, self._warned = 1, False

    def add(self, step: int, table_LE: Counts) -> str | None:
        """Add the counts of an update. Returns a line, once in a run, where experts starve."""
        self.total_LE = table_LE + (0 if self.total_LE is None else self.total_LE)
        window_LE = self._window_LE = table_LE + (0 if self._window_LE is None else self._window_LE)
        if self._warned or window_LE.sum(1).min() < ENOUGH * window_LE.shape[1]:
            return None
        line, first = None, self._since
        self._window_LE, self._since = None, step + 1
        starving = self._starving(window_LE)
        if starving:
            self._warned = True
            share, name, expert = min(starving)
            line = (
                f"experts starve: {len(starving)} of {window_LE.size} got less than a hundredth of an equal share of"
                f" the tokens of steps {first} to {step}, the least expert {expert} of {name} ({share:.2g} of its"
                f" layer's choices, an equal share is {1 / window_LE.shape[1]:.2g}){self.remedy}"
            )
        return line

    def _starving(self, table_LE: Counts) -> list[tuple[float, str, int]]:
        share_LE = _shares(table_LE)
        places = zip(*np.nonzero(share_LE < STARVED / share_LE.shape[1]), strict=True)
        return [(float(share_LE[layer, e]), self.names[layer], int(e)) for layer, e in places]

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        tables = {"total": self.total_LE, "window": self._window_LE}
        kept = {name: None if table is None else table.tolist() for name, table in tables.items()}
        return {**kept, "since": self._since, "warned": self._warned}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`; nothing for a checkpoint without it."""
        if not state:
            return
        tables = [None if state[name] is None else np.array(state[name], np.int64) for name in ("total", "window")]
        self.total_LE, self._window_LE = tables
        self._since, self._warned = state["since"], state["warned"]

    def write(self, folder: Path) -> None:
        """Write ``experts.json`` into the output folder: the names of the routers, and the counts."""
        if self.total_LE is not None:
            write_json(folder / FILE, {"routers": self.names, "tokens": self.total_LE.tolist()})


def read_experts(folder: Path) -> list[tuple[str, list[float]]]:
    """The shares of the experts of each router over a run, by the router's name; empty for a run without experts.
    Raises :class:`prefopt.errors.RunError` for a damaged file."""
    if not (folder / FILE).exists():
        return []
    names, table_LE = read_json(folder / FILE, _checked, "remove it")
    return list(zip(names, _shares(table_LE).tolist(), strict=True))


def _checked(found: Any) -> tuple[list[str], Counts]:
    try:
        names, table_LE = [str(name) for name in found["routers"]], np.array(found["tokens"], np.int64)
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError("it holds no tokens by router and expert") from None
    if table_LE.ndim != 2 or len(names) != len(table_LE) or not table_LE.size or table_LE.min() < 0:
        raise ValueError("it holds no tokens by router and expert")
    return names, table_LE
