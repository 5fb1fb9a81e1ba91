"""What a run costs, counted where it is spent: every forward pass, and every token that is drawn.

>>> with counting() as costs:
...     count_generated(3)
>>> costs.generated_tokens
3
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

Purpose = Literal["train", "score", "decode"]


@dataclass(slots=True)
class Costs:
    """Counts of one run.

    A forward pass is one call of a model's layers; ``trained_tokens`` went through one that gradients were taken of,
    ``scored_tokens`` through one without, ``decoded_tokens`` through one that draws (prompts and what is drawn); a
    prefix that responses share counts once. ``generated_tokens`` were drawn. ``models``: the most models in memory
    together, of those that were used, with ``model_bytes`` of weights; a second set of weights for all of a model is
    another model. The load check's tiny copy is left out; its look at real rows, and the trial of the token budget,
    are not.
    """

    forward_passes: int = 0
    trained_tokens: int = 0
    scored_tokens: int = 0
    decoded_tokens: int = 0
    generated_tokens: int = 0
    models: int = 0
    model_bytes: int = 0
    _there: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary, repr=False)

    def saw(self, model: Any, size: int) -> None:
        """A model is in memory; it counts as long as anybody holds it."""
        if model not in self._there:
            self._there[model] = size
            self.models = max(self.models, len(self._there))
            self.model_bytes = max(self.model_bytes, sum(self._there.values()))

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in COUNTS}


COUNTS = (
    *("forward_passes", "trained_tokens", "scored_tokens", "decoded_tokens", "generated_tokens"),
    *("models", "model_bytes"),
)
LARGEST = ("models", "model_bytes", "peak_memory_bytes")
"""Of these the largest counts, where a run or a road has several parts; of the others the sum."""

_open: list[Costs] = []


@contextmanager
def counting() -> Iterator[Costs]:
    """Count what happens inside, for everybody who counts around it too."""
    costs = Costs()
    _open.append(costs)
    try:
        yield costs
    finally:
        _open.remove(costs)


@contextmanager
def uncounted() -> Iterator[None]:
    """What happens inside is nobody's."""
    before, _open[:] = list(_open), []
    try:
        yield
    finally:
        _open[:] = before


def count_pass(model: Any, tokens: int, purpose: Purpose) -> None:
    """A forward pass of ``model`` over so many tokens."""
    for costs in _open:
        costs.forward_passes += 1
        name = {"train": "trained_tokens", "score": "scored_tokens", "decode": "decoded_tokens"}[purpose]
        setattr(costs, name, getattr(costs, name) + tokens)
        if model not in costs._there:
            costs.saw(model, sum(p.numel() * p.element_size() for p in model.parameters()))


def count_generated(tokens: int) -> None:
    """So many tokens were drawn."""
    for costs in _open:
        costs.generated_tokens += tokens


def count_held(owner: Any, size: int) -> None:
    """``owner`` holds weights of a whole model."""
    for costs in _open:
        costs.saw(owner, size)


def together(parts: list[dict[str, float]]) -> dict[str, float]:
    """The costs of several parts, one after the other.

    >>> together([{"seconds": 2.0, "models": 1}, {"seconds": 3.0, "models": 4}])
    {'seconds': 5.0, 'models': 4}
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: (max if n in LARGEST else sum)([part[n] for part in parts if n in part]) for n in names}
