"""How long a run takes, phase by phase: a phase inside another one is not counted in that one.

>>> with clocked() as clock:
...     with phase("training"), phase("samples"):
...         pass
>>> [*clock.seconds], clock.in_words()
(['samples', 'training'], '0 s')
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefopt.core.terminal import duration

LEAST = 0.5
"""Seconds of a phase from which on it is printed."""


class PhaseClock:
    """``seconds`` of the phases that are over, and the time since the clock was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._inner: list[float] = []
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count this block as ``name``, but for the phases inside of it."""
        started = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds

    def in_words(self) -> str:
        """``1 min 54 s (training 48 s, reference 30 s, other 36 s)``: the phases by length, and the time outside of
        them. One that rounds to nothing is left out."""
        total = self.total
        parts = {n: s for n, s in sorted(self.seconds.items(), key=lambda item: -item[1]) if s >= LEAST}
        rest = total - sum(parts.values())
        said = [f"{name} {duration(seconds)}" for name, seconds in parts.items()]
        if said and rest >= LEAST:
            said.append(f"other {duration(rest)}")
        return duration(total) + (f" ({', '.join(said)})" if said else "")


_clocks: list[PhaseClock] = []


@contextmanager
def clocked() -> Iterator[PhaseClock]:
    """A clock that counts the phases inside this block; a clock around it does not."""
    clock = PhaseClock()
    _clocks.append(clock)
    try:
        yield clock
    finally:
        _clocks.remove(clock)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count this block, or the function that this decorates, as a phase of the run, if there is one."""
    if not _clocks:
        yield
        return
    with _clocks[-1].phase(name):
        yield
