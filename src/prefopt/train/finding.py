"""What a diagnosis says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefopt.train.history import History


@dataclass(frozen=True, slots=True)
class Finding:
    """``name`` says which rule found it; ``look``: something to look at, not only something that happened."""

    name: str
    text: str
    look: bool = False


Check = Callable[[History], Iterator[Finding]]
