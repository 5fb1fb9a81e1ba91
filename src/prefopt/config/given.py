"""Options of another command, given as NAME=VALUE.

>>> parse_given("ppo", ["beta=0.02", "critic=head", "learning-rate=1e-5"])
{'beta': 0.02, 'critic': 'head', 'learning_rate': 1e-05}
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from prefopt.errors import ConfigError


def parse_given(name: str, given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE as options; a value is read as YAML would. Raises ``ConfigError`` that names ``--name``."""
    values: dict[str, object] = {}
    for item in given:
        key, equals, text = item.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not equals or not key:
            raise ConfigError(f"--{name} {item!r} should be NAME=VALUE, such as learning_rate=1e-5")
        if key in values:
            raise ConfigError(f"--{name} gives {key} twice")
        values[key] = parse_value(text)
    return values


def parse_value(text: str) -> object:
    """A value as YAML would read it."""
    if re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", text):  # which YAML 1.1 takes for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
