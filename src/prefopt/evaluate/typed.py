"""Records out of JSON, whose fields are what their annotations say.

>>> from dataclasses import dataclass
>>> @dataclass
... class Place:
...     name: str
...     reward: float | None = None
>>> typed(Place, {"name": "a", "reward": 1})
Place(name='a', reward=1)
>>> typed(Place, {"name": "a", "reward": "abc"})
Traceback (most recent call last):
TypeError: reward is 'abc'
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def typed(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """The dataclass ``kind`` of ``values``. Raises ``TypeError`` for other types or names, and for what is missing.

    A whole number will do for a float, which must be finite.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.80}")
    return kind(**values)


def _is(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and (
            all(_is(v, parts[0]) for v in value)
            if parts[-1] is Ellipsis
            else len(value) == len(parts) and all(map(_is, value, parts))
        )
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, parts[0]) and _is(v, parts[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
