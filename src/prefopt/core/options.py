"""Options: the fields of a config dataclass, with help, type and range, for command line, YAML and Python alike.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True, kw_only=True)
... class Config:
...     beta: float = option(0.1, "strength", group="loss", above=0)
>>> [o.flag for o in options(Config)], checked(options(Config)[0], 2)
(['--beta'], 2.0)

>>> parse_given("ppo", ["beta=0.02", "critic=head", "learning-rate=1e-5"])
{'beta': 0.02, 'critic': 'head', 'learning_rate': 1e-05}
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import os
import re
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from prefopt.errors import ConfigError

Config = TypeVar("Config")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "a list of text"}
_COMPARE = {"of at least": operator.ge, "above": operator.gt, "of at most": operator.le, "below": operator.lt}
LAST = "machine"
"""The group that help and docs show last, whichever class brings it."""
RENAMED = {"reference_every": "ref_model_sync_steps", "reference_mix": "ref_model_mixup_alpha", "roads": "methods"}
"""Options by the name that they had before."""
BITS = 64
"""Whole numbers have no more."""
SAID = 200
"""Characters that are quoted of a wrong value."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``type`` is the field's annotation; ``default_text`` is what help prints; ``limits`` bound a number.

    ``default`` is the field's, or None where the option is required. A ``positional`` one may come without its flag,
    as the first words after the verb.
    """

    name: str
    type: Any
    help: str
    group: str
    required: bool
    default: Any
    default_text: str
    limits: tuple[tuple[str, float], ...]
    positional: bool = False

    @property
    def flag(self) -> str:
        """The spelling of the command line: ``--max-length``."""
        return flag(self.name)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types a value may have, ``None`` left out."""
        if typing.get_origin(self.type) in (typing.Union, types.UnionType):
            return tuple(a for a in typing.get_args(self.type) if a is not types.NoneType)
        return (self.type,)

    @property
    def optional(self) -> bool:
        """Whether ``None`` (``null`` in YAML) may be given: it stands for the default."""
        return not self.required and self.default is None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a ``Literal``, else nothing."""
        return tuple(a for k in self.kinds if typing.get_origin(k) is Literal for a in typing.get_args(k))

    @property
    def expects(self) -> str:
        """What a value must be, in words: ``a whole number of at least 1``."""
        limits = " and".join(f" {word} {limit:.10g}" for word, limit in self.limits)
        plain = " or ".join(_WORDS[k] for k in self.kinds if k in _WORDS) + limits
        if not self.choices:
            return plain
        words = ", ".join(self.choices)
        return f"{words} or {plain}" if plain else f"one of {words}"


def flag(name: str) -> str:
    """How the command line spells the name of an option: ``--max-length``."""
    return "--" + name.replace("_", "-")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str,
    default_text: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field with its help; required where it has no default. ``default_text`` says what None stands for."""
    bounds = {"of at least": at_least, "above": above, "of at most": at_most, "below": below}
    limits = tuple((word, limit) for word, limit in bounds.items() if limit is not None)
    metadata = {
        "help": help,
        "group": group,
        "default_text": default_text,
        "limits": limits,
        "positional": positional,
    }
    return field(default=default, metadata=metadata)


def options(config: type) -> tuple[Option, ...]:
    """The options of a config dataclass, group by group, in the order of its fields."""
    hints = typing.get_type_hints(config)
    found = []
    for f in fields(config):
        m, required = f.metadata, f.default is MISSING
        default = None if required else f.default
        text = m["default_text"] or _shown(default)
        limits, positional = m["limits"], m["positional"]
        found.append(Option(f.name, hints[f.name], m["help"], m["group"], required, default, text, limits, positional))
    groups = list(dict.fromkeys(o.group for o in found))  # configs inherit, so that a group may come in parts
    groups.sort(key=LAST.__eq__)
    return tuple(sorted(found, key=lambda o: groups.index(o.group)))


def checked(o: Option, value: object, place: str | None = None) -> Any:
    """``value`` with the option's type. Raises ``ConfigError``, which names the YAML file ``place`` or the flag."""
    if value is None and o.optional:
        return None
    for kind in o.kinds:
        found = _converted(kind, value)
        limits = () if isinstance(found, str) else o.limits
        if found is not None and all(_COMPARE[word](found, limit) for word, limit in limits):
            return found
    name = f"{place}: {o.name}" if place else o.flag
    if value is None:
        raise ConfigError(f"{name} has no value; it must be {o.expects}")
    guess = nearest(value, o.choices) if isinstance(value, str) else ""
    raise ConfigError(f"{name} is {_said(value)}; it must be {o.expects}{guess}")


def check_all(config: Any) -> None:
    """Give every field of a frozen dataclass its checked value; called by its ``__post_init__``."""
    for o in options(type(config)):
        object.__setattr__(config, o.name, checked(o, getattr(config, o.name)))


def check_values(config: type, values: Mapping[str, object], place: str | None = None) -> dict[str, Any]:
    """The values of some options, typed; an unknown name or a wrong value raises ``ConfigError``."""
    known = {o.name: o for o in options(config)}
    # A file that lists all options of an earlier version has those that were renamed too, mostly without a value.
    values = {name: value for name, value in values.items() if name not in RENAMED or value is not None}
    for name in values:
        if name not in known:
            where = f"{place}: " if place else ""
            guess = nearest(name, list(known)) or "; see --help for all of them"
            raise ConfigError(f"{where}unknown option {name!r}{guess}")
    return {name: checked(known[name], value, place) for name, value in values.items()}


def from_dict(config: type[Config], values: Mapping[str, object], place: str | None = None) -> Config:
    """A config from plain values, as a YAML file holds them; unknown and missing names raise ``ConfigError``."""
    typed = check_values(config, values, place)
    if missing := [o for o in options(config) if o.required and o.name not in typed]:
        raise ConfigError("; ".join(f"{o.flag} is missing: {o.help}" for o in missing))
    return config(**typed)


def to_dict(config: Any) -> dict[str, Any]:
    """Every option with its value, lists copied; ``from_dict`` takes it back."""
    values = {o.name: getattr(config, o.name) for o in options(type(config))}
    return {name: list(v) if isinstance(v, list) else v for name, v in values.items()}


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean beta?`` where one of ``known`` is near, else nothing. A dash counts as an underscore."""
    plain = {k.lower().replace("_", "-"): k for k in known}
    renamed = RENAMED.get(word.lstrip("-").replace("-", "_"), "").replace("_", "-")
    for new in (f"--{renamed}", renamed):
        if renamed and new in plain:
            return f"; it is now called {plain[new]}"
    close = difflib.get_close_matches(word.lower().replace("_", "-"), list(plain), n=1, cutoff=0.6)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _converted(kind: Any, value: object) -> Any:
    """The value as ``kind``, or None where it is none. Booleans are no numbers; whole numbers are numbers."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        whole = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
        return whole if whole is not None and whole.bit_length() <= BITS else None
    if kind is float:
        return _finite(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    if kind is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return text if isinstance(text, str) and text else None
    if typing.get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in typing.get_args(kind) else None
    assert kind == list[str], kind
    many = [value] if isinstance(value, (str, os.PathLike)) else value
    items = [_converted(str, v) for v in many] if isinstance(many, (list, tuple)) else []
    return items if items and None not in items else None


def _finite(value: numbers.Real) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _said(value: object) -> str:
    """A value that an option cannot have, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python spells no number of more than 4300 digits
        text = "a number beyond all measure"
    return text if len(text) <= SAID else f"{text[:SAID]}..."


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None else str(default)


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


def command(verb: str, config: Any) -> str:
    """The program, the verb and the options that differ from their defaults."""
    kind = type(config)
    required = {o.name: getattr(config, o.name) for o in options(kind) if o.required}
    plain = {o.name: o.default for o in options(kind)}
    with suppress(ConfigError):  # some do not stand without more
        least = kind(**required)
        plain |= {name: getattr(least, name) for name in plain}
    words = verb.split()
    for o in options(kind):
        value = getattr(config, o.name)
        if not o.required and value == plain[o.name]:
            continue
        if value is True:
            words.append(o.flag)
            continue
        many = value if isinstance(value, list) else [f"{value:g}" if isinstance(value, float) else str(value)]
        words += many if o.positional else [o.flag, *many]
    return f"{program()} {shlex.join(words)}"


def program() -> str:
    """How this installation is started: ``prefopt`` where the shell finds it, else by its path."""
    beside = Path(sys.executable).with_name("prefopt")
    found = shutil.which("prefopt")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "prefopt"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m prefopt"
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))
