"""What hundreds of small runs would spend much of their time on, done once for all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def quick_runs(patch: pytest.MonkeyPatch) -> None:
    """Runs of this process do not measure the machine, draw held-out answers of four tokens, check the same
    architecture by its tiny model once, and try the largest batch of the same architecture and objective once.
    Versions of packages, entry points, counts of parameters and YAML texts are found once too."""
    import yaml

    from prefopt.core import plugins
    from prefopt.model import load

    patch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
    patch.setattr("prefopt.train.samples.MAX_NEW_TOKENS", 4)
    patch.setattr("prefopt.model.check._checked_clone", checked_once())
    patch.setattr("prefopt.train.budget.try_largest", tried_once())
    patch.setattr(plugins, "version", once(plugins.version, lambda name: (name, *sys.path)))
    patch.setattr(plugins, "entry_points", once(plugins.entry_points, lambda group: (group, *sys.path)))
    patch.setattr(load, "_parameters", once(load._parameters, lambda kind, name, config: (kind, described(config))))
    patch.setattr(yaml, "dump", dumped_once(yaml.dump))


def once(function: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """``function``, which remembers what it returned for the same ``key``; errors are not remembered."""
    found: dict[Hashable, Any] = {}

    def remembered(*given: Any, **named: Any) -> Any:
        about = key(*given, **named)
        if about not in found:
            found[about] = function(*given, **named)
        return found[about]

    return remembered


def dumped_once(dump: Callable[..., Any]) -> Callable[..., Any]:
    """``yaml.dump``, which remembers texts; what goes to a file is written each time."""
    remembered = once(dump, lambda *given, **named: repr((given, named)))

    def dumped(data: Any, stream: Any = None, *more: Any, **named: Any) -> Any:
        return (remembered if stream is None else dump)(data, stream, *more, **named)

    return dumped


def described(config: Any) -> str:
    """All that the configuration of a model says, but where it is from."""
    return json.dumps({n: v for n, v in config.to_dict().items() if n != "_name_or_path"}, sort_keys=True, default=repr)


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
        kernel = (scorer.attention, scorer.kernel, scorer.layout.share, scorer.dtype, next(model.parameters()).device)
        key = (type(model), described(model.config), getattr(scorer, "head", None), *kernel)
        if key not in _FOUND:
            error = checked(scorer)
            if error is None:
                return None
            _FOUND[key] = error
        return _FOUND[key]

    return once


_TRIED: dict[tuple[Any, ...], float] = {}


def tried_once() -> Callable[..., tuple[int, float]]:
    """The trial of the largest batch, which remembers what has fitted: an architecture with what is trained of it, an
    objective, a budget and the tokens of the largest group. One that ran out of memory, and one whose passes compile or
    communicate, is not remembered."""
    from prefopt.data.table import GroupTable
    from prefopt.model import check
    from prefopt.train import budget

    tries = budget.try_largest

    def once(
        differentiator: Any, weights: Any, groups: Any, batch_of: Any, token_budget: int, *more: Any
    ) -> tuple[int, float]:
        scorer = differentiator.scorer
        largest = int(scorer.layout.costs(GroupTable.of(groups)).max())
        trained = tuple(name for name, weight in scorer.model.named_parameters() if weight.requires_grad)
        kernel = (scorer.attention, scorer.kernel, scorer.layout.share, scorer.dtype)
        kind = (type(scorer.model), described(check.causal_model(scorer.model).config), trained, *kernel)
        live = differentiator.reference is not None and differentiator.reference.live is not None
        key = (*kind, live, *loss_of(differentiator.objective), token_budget, largest)
        if key in _TRIED:
            scorer.train()
            return token_budget, _TRIED[key]
        fits, speed = tries(differentiator, weights, groups, batch_of, token_budget, *more)
        if fits == token_budget and scorer.compiled is None and not differentiator.lockstep:
            _TRIED[key] = speed
        return fits, speed

    return once


def forget_trials() -> None:
    """Make the next run try its largest batch, for tests that count its tokens."""
    _TRIED.clear()


def loss_of(objective: Any) -> tuple[Any, ...]:
    """What an objective computes: its class, its losses, and those around it."""
    terms = tuple(term.loss.name for term in getattr(objective, "terms", ()))
    inner = loss_of(objective.inner) if hasattr(objective, "inner") else ()
    named = (getattr(objective, name, None) for name in ("average", "losses"))
    return (type(objective), terms, objective.whole_batch, *map(repr, named), *inner)
