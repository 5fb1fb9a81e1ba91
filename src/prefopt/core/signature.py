"""Signatures of Python functions whose keyword arguments are the options of a config, for ``help``, completion and
stubs.

>>> from dataclasses import dataclass
>>> from prefopt.core.options import Config, option
>>> @dataclass(frozen=True, kw_only=True)
... class Example(Config):
...     beta: float | None = option(None, "KL penalty", default_text="0.1", group="loss")
...     mode: Literal["a", "b"] = option("a", "how")
>>> def run(model: str, **options: Any) -> None:
...     "Run it."
>>> signature_of(run, Example)
<Signature (model: 'str', *, beta: 'float | None' = None, mode: "Literal['a', 'b']" = 'a') -> 'None'>
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection
from inspect import Parameter, Signature
from typing import Any, Literal, get_args, get_origin

from prefopt.core.options import Config, Option, options

NAMES = {bool: "bool", int: "int", float: "float", str: "str", list[str]: "list[str]"}
WIDTH = 100


def annotation_of(o: Option) -> str:
    """The type of an option as Python spells it: ``float | None``, ``Literal['a', 'b']``."""
    parts = [_spelled(kind) for kind in o.kinds]
    if o.optional or o.computed is not None:
        parts.append("None")
    return " | ".join(dict.fromkeys(parts))


def _spelled(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(kind)))}]"
    return NAMES[kind]


def signature_of(function: Callable[..., Any], config: type[Config], hidden: Collection[str] = ()) -> Signature:
    """The signature of ``function`` with its ``**options`` spelled out: the options of ``config`` that are neither
    parameters of its own nor ``hidden``, which other parameters give."""
    plain = inspect.signature(function)
    own = [p for p in plain.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    taken = {*(p.name for p in own), *hidden}
    more = [
        Parameter(
            o.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if o.required else o.default,
            annotation=annotation_of(o),
        )
        for o in options(config)
        if o.name not in taken
    ]
    return plain.replace(parameters=[*own, *more])


def options_in_words(config: type[Config], hidden: Collection[str] = ()) -> str:
    """A paragraph for every group of options, for a docstring."""
    lines: list[str] = []
    group = None
    for o in options(config):
        if o.name in hidden:
            continue
        if o.group != group:
            group = o.group
            lines += ["", f"{group.capitalize()}:"]
        default = "required" if o.required else f"default: {o.default_text}"
        text = f"{o.name}: {o.help} ({default})"
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="        ")
    return "\n".join(lines).strip("\n")
