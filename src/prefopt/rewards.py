"""Rewards: rules by name, and functions of your own.

>>> length = load_reward("length")
>>> length(["Say hello."], ["Hello there"])
[2.0]

A reward maps prompts and responses, equally many, to as many finite numbers; higher is better.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.core.options import nearest
from prefopt.core.plugins import how_to_install, load_function, load_plugin, plugins
from prefopt.errors import ConfigError, RunError
from prefopt.records import Comparison

GROUP = "prefopt.rewards"
"""The entry points of packages with further rewards: a name and its ``module:function``."""
Function = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Reward:
    """A function of prompts and responses whose output is checked."""

    name: str
    function: Function

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number for each response. Raises :class:`RunError` that names the reward and the prompt."""
        where = f" (the first prompt was {_short(prompts[0])})" if prompts else ""
        try:
            given = list(self.function(prompts, responses))
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise RunError(f"the reward {self.name} failed{where}: {what}") from error
        if len(given) != len(responses):
            raise RunError(f"the reward {self.name} gave {len(given)} numbers for {len(responses)} responses{where}")
        for prompt, value in zip(prompts, given, strict=True):
            if isinstance(value, bool | str) or not _finite(value):
                raise RunError(
                    f"the reward {self.name} gave {value!r} for a response to {_short(prompt)}; it must be a"
                    " finite number"
                )
        return [float(value) for value in given]

    def digest(self) -> str | None:
        """A digest of the code, to detect changes: of the file of the function's module; of the function alone where
        that is a script or a notebook. None for a rule of prefopt, and for code that is in no file.
        """
        if getattr(self.function, "__module__", None) == __name__:
            return None
        function: Any = inspect.unwrap(getattr(self.function, "func", self.function))  # a partial has its function
        code: Any = function if hasattr(function, "__code__") else type(function)
        try:
            script = code.__module__ == "__main__"
            text = inspect.getsource(code) if script else Path(inspect.getfile(code)).read_text("utf-8", "replace")
        except (OSError, TypeError):
            return None
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_reward(name: str) -> Reward:
    """A rule, a reward of an installed package (:data:`GROUP`), or ``module:function``. Raises :class:`ConfigError`."""
    if name in RULES:
        return Reward(name, RULES[name]())
    outside = plugins(GROUP)
    if name in outside:
        return Reward(name, load_plugin(outside[name], f"reward {name}"))
    if ":" not in name:
        known = [*RULES, *outside]
        raise ConfigError(
            f"no reward is called {name!r}{nearest(name, known)}; there are {', '.join(known)}, MODULE:FUNCTION for"
            " your own, and folders of reward models"
        )
    return Reward(name, load_function(name, f"reward {name}"))


def prompt_text(c: Comparison) -> str:
    """The prompt as rewards get it: text unchanged; a conversation as a line ``role: words`` per turn."""
    if c.text:
        return "".join(m.content for m in c.prompt)
    return "\n".join(f"{m.role}: {m.content}" for m in c.prompt)


def _vader() -> Function:
    """Sentiment of a response, -1 to 1: the compound score of VADER (Hutto and Gilbert, ICWSM 2014)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError(f"the rule vader needs vaderSentiment: {how_to_install('demo')}") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompts, responses: [analyzer.polarity_scores(text)["compound"] for text in responses]


def _length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The number of words."""
    return [float(len(text.split())) for text in responses]


RULES: dict[str, Callable[[], Function]] = {"vader": _vader, "length": lambda: _length}


def _finite(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
