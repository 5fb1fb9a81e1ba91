"""Messages of the command line in the words of Python: the names of keyword arguments.

>>> to_python("holds an unfinished run; continue it with --resume, or name another folder", {"resume": ()})
'holds an unfinished run; continue it with resume=True, or name another folder'
>>> to_python("lower --learning-rate, or try --dtype float32", {"dtype": ("float32", "bfloat16")})
"lower learning_rate, or try dtype='float32'"
>>> to_python("run prefopt launch --gpus 2, or leave --shard out", {})
'run prefopt launch --gpus 2, or leave shard out'
>>> to_python("--beta is -1; it must be above 0; --eval-fraction 0 trains on all", {})
'beta is -1; it must be above 0; eval_fraction=0 trains on all'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prefopt.core.options import Config, options

Values = Sequence[str] | None
"""The words that an option takes; none for a switch, None for any value."""

_OPTION = re.compile(r"(\bprefopt [a-z][^;:,()\n]*)|(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?:[ =]([\w.+-]*\w))?")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?")


def in_python(text: str) -> str:
    """``text`` with the options of all commands as keyword arguments."""
    return to_python(text, values_of(_every_config()))


def to_python(text: str, known: Mapping[str, Values]) -> str:
    """``text`` with options as keyword arguments; ``known``: the values of some."""

    def argument(found: re.Match[str]) -> str:
        if found[1]:  # a command, which is for a shell
            return found[0]
        name, value = found[2].replace("-", "_"), found[3]
        if name == "help":
            return "help()" + found[0][len("--help") :]
        rest = found[0][len(found[2]) + 2 :]
        words = known.get(name)
        if words is not None and not words:  # a switch
            if value in ("true", "false"):
                return f"{name}={value == 'true'}"
            return f"{name}=True{rest}"
        if value and _NUMBER.fullmatch(value):
            return f"{name}={value}"
        if value and words and value in words:
            return f"{name}={value!r}"
        return f"{name}{rest}"

    return _OPTION.sub(argument, text)


def values_of(kinds: Iterable[type[Config]]) -> dict[str, Values]:
    """The values of all switches and choices of some configs."""
    found: dict[str, Values] = {}
    for o in (o for kind in kinds for o in options(kind)):
        if o.choices or bool in o.kinds:
            found[o.name] = tuple(dict.fromkeys([*(found.get(o.name) or ()), *o.choices]))
    return found


def _every_config() -> Iterator[type[Config]]:
    kinds = list(Config.__subclasses__())
    for kind in kinds:  # the list grows
        kinds += kind.__subclasses__()
        yield kind
