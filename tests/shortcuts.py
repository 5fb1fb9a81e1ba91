"""What hundreds of small runs would spend much of their time on, done once for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def quick_runs(patch: pytest.MonkeyPatch) -> None:
    """Runs of this process do not measure the machine, and check the same architecture by its tiny model once."""
    patch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
    patch.setattr("prefopt.model.check._checked_clone", checked_once())


@contextmanager
def quick_runs_in(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """The same within this block, for fixtures of more than one test, with a cache in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        quick_runs(patch)
        yield patch


_FOUND: dict[tuple[Any, ...], float] = {}


def checked_once() -> Callable[[Any], float | None]:
    """The load check of a scorer's architecture, which remembers for which it has passed. Everything that the check
    depends on is in the key; its own tests, in ``tests/model``, call the check itself."""
    from prefopt.model import check

    checked = check._checked_clone

    def once(scorer: Any) -> float | None:
        model = check.causal_model(scorer.model)
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        kernel = (scorer.attention, scorer.kernel, scorer.layout.share, scorer.dtype, next(model.parameters()).device)
        key = (type(model), json.dumps(config, sort_keys=True, default=repr), getattr(scorer, "head", None), *kernel)
        if key not in _FOUND:
            error = checked(scorer)
            if error is None:
                return None
            _FOUND[key] = error
        return _FOUND[key]

    return once
