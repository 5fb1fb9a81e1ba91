"""Words of a command line or of a form as values of options."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from prefopt.core.options import Option
from prefopt.errors import ConfigError


def from_words(o: Option, values: list[str]) -> Any:
    """The words of an option as its type; what cannot be converted stays text, which the config refuses. Raises
    ``ConfigError`` without any word."""
    if not values and bool in o.kinds:
        return True
    if not values:
        raise ConfigError(f"{o.flag} has no value; it must be {o.expects}")
    if list[str] in o.kinds:
        return values
    text = values[0]
    if text == "null" and o.optional:
        return None
    if bool in o.kinds:
        return {"true": True, "false": False}.get(text, text)
    for kind in (k for k in (int, float) if k in o.kinds):
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := kind(text)):
                return number
    return text
