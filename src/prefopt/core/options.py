"""Options: the fields of a config dataclass, with help, type and range, for command line, YAML and Python alike.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True, kw_only=True)
... class Example(Config):
...     beta: float = option(0.1, "KL penalty", group="loss", above=0)
>>> [o.flag for o in options(Example)], Example(beta=2).beta
(['--beta'], 2.0)
>>> Example(beta=-1)
Traceback (most recent call last):
prefopt.core.options.WrongValue: --beta is -1; it must be a number above 0

>>> parse_given("ppo", ["beta=0.02", "critic=head", "learning-rate=1e-5"])
{'beta': 0.02, 'critic': 'head', 'learning_rate': 1e-05}
"""

from __future__ import annotations

import copy
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from prefopt.core.other_names import our_name
from prefopt.errors import ConfigError, ConfigErrors

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "a list of text"}
_COMPARE = {"of at least": operator.ge, "above": operator.gt, "of at most": operator.le, "below": operator.lt}
FIRST, LAST = ("study", "model", "adapter"), "machine"
"""The groups that help and docs show first and last, whichever class brings them."""
RENAMED = {"reference_every": "ref_model_sync_steps", "reference_mix": "ref_model_mixup_alpha", "roads": "methods"}
"""Options by the name that they had before."""
BITS = 64
"""Whole numbers have no more."""
QUOTED = 200
"""Characters that are quoted of a wrong value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a config or of a loss.

    ``type``: the annotation of its field. ``default_text``: the default as help prints it. ``limits`` bound a number.
    ``positional``: it may come without its flag, as the first words after the command. ``only``: another option and
    the value of it without which this one is not read. ``needs``: another option without which it has no effect.
    ``computed``: its default, from the other options.
    """

    name: str
    help: str = ""
    type: Any = float
    group: str = ""
    required: bool = False
    default: Any = None
    default_text: str = ""
    limits: tuple[tuple[str, float], ...] = ()
    positional: bool = False
    only: tuple[str, object] | None = None
    needs: str | None = None
    computed: Callable[[Any], Any] | None = None

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types a value may have, without ``None``."""
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


_BOUNDS = {"at_least": "of at least", "above": "above", "at_most": "of at most", "below": "below"}


def bounds(**limits: float) -> tuple[tuple[str, float], ...]:
    """The ``limits`` of an :class:`Option`, from ``at_least``, ``above``, ``at_most`` and ``below``."""
    return tuple((_BOUNDS[word], limit) for word, limit in limits.items())


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str = "",
    default_text: str | None = None,
    positional: bool = False,
    needs: str | None = None,
    computed: Callable[[Any], Any] | None = None,
    **limits: float,
) -> Any:
    """A dataclass field with its help; required without a default. ``group``: by default that of the field before it.

    ``computed`` gives the default from the config, once its other options are checked; ``default_text`` describes it,
    or says what None stands for. ``needs``: see :class:`Option`. ``limits``: see :func:`bounds`.
    """
    about = {"help": help, "group": group, "default_text": default_text, "positional": positional}
    more = {"needs": needs, "computed": computed, "limits": bounds(**limits)}
    return field(default=None if computed else default, metadata=about | more)


def beside(other: str, default: Any, help: str, *, group: str = "", **limits: Any) -> Any:
    """A field like :func:`option` that is read only with the option ``other``: its default there, else None."""
    return option(
        help=help,
        group=group,
        needs=other,
        computed=lambda config: default if getattr(config, other) is not None else None,
        default_text=f"{default:g}, with {flag(other)}",
        **limits,
    )


def options(config: type) -> tuple[Option, ...]:
    """The options of a config dataclass, group by group, in the order of its fields."""
    found = _fields(config)
    groups = list(dict.fromkeys(o.group for o in found))  # configs inherit: a group may be spread over classes
    groups.sort(key=lambda g: FIRST.index(g) if g in FIRST else len(FIRST) + (g == LAST))
    return tuple(sorted(found, key=lambda o: groups.index(o.group)))


@cache
def _fields(config: Any) -> tuple[Option, ...]:
    hints = typing.get_type_hints(config)
    found = []
    for f in fields(config):
        required = f.default is MISSING
        default = None if required else f.default
        about = {**f.metadata, "default_text": f.metadata["default_text"] or _shown(default)}
        found.append(Option(name=f.name, type=hints[f.name], required=required, default=default, **about))
    return tuple(found)


class WrongValue(ConfigError):
    """A value that its option does not take."""

    def __init__(self, o: Option, problem: str, place: str | None = None) -> None:
        super().__init__(f"{f'{place}: {o.name}' if place else o.flag} {problem}")
        self.option, self.problem, self.place = o, problem, place


def checked(o: Option, value: object, place: str | None = None) -> Any:
    """``value`` with the option's type. Raises ``ConfigError``, which names the YAML file ``place`` or the flag."""
    if value is None and o.optional:
        return None
    for kind in o.kinds:
        found = _converted(kind, value)
        limits = () if isinstance(found, str) else o.limits
        if found is not None and all(_COMPARE[word](found, limit) for word, limit in limits):
            return found
    if value is None:
        raise WrongValue(o, f"has no value; it must be {o.expects}", place)
    guess = nearest(value, o.choices) if isinstance(value, str) else ""
    raise WrongValue(o, f"is {_quoted(value)}; it must be {o.expects}{guess}", place)


class MissingOptions(ConfigError):
    """Required options that are not given."""

    def __init__(self, missing: Sequence[Option]) -> None:
        super().__init__("; ".join(f"{o.flag} is missing: {o.help}" for o in missing))
        self.missing = tuple(missing)


def unknown_options(names: Sequence[str], known: Sequence[str], advice: str, place: str | None = None) -> ConfigError:
    """The error for options that are not among ``known``, each with the nearest that is; ``advice`` without one."""
    where = f"{place}: " if place else ""
    if len(names) == 1:
        return ConfigError(f"{where}unknown option {names[0]!r}{nearest(names[0], known) or f'; {advice}'}")
    lines = [f"{name!r}{nearest(name, known)}" for name in names]
    title = f"{where}{len(names)} unknown options"
    return ConfigErrors(f"{title}: {', '.join(lines)}", [f"{title}:", *(f"  {line}" for line in lines), advice])


@dataclass(frozen=True, kw_only=True)
class Config:
    """A set of options that checks itself on construction. Raises ``ConfigError``."""

    def __init_subclass__(cls) -> None:
        """Give fields without a group that of the field before them."""
        group = ""
        for own in vars(cls).values():
            if isinstance(own, Field):
                group = own.metadata["group"] or group
                own.metadata = types.MappingProxyType({**own.metadata, "group": group})

    def __post_init__(self) -> None:
        """Check types and ranges, fill in computed defaults, then refuse contradictions."""
        kind: Any = type(self)
        mine = _fields(kind)
        fill = object.__setattr__  # the dataclass is frozen for everyone else
        for o in mine:
            fill(self, o.name, checked(o, getattr(self, o.name)))
        for o in mine:
            if o.computed is not None and getattr(self, o.name) is None:
                fill(self, o.name, o.computed(self))
        for o in mine:
            if o.needs is not None:
                self.need(o.needs, o.name)
        for base in reversed(kind.__mro__):
            if "check" in vars(base):
                base.check(self)

    def check(self) -> None:
        """Refuse contradictions among the options of this class; those of its bases are checked before."""

    def is_given(self, name: str) -> bool:
        """Whether an option has another value than its default."""
        return bool(getattr(self, name) != self.__dataclass_fields__[name].default)

    def need(self, other: str, *names: str) -> None:
        """Refuse options that have no effect without ``other``. Raises ``ConfigError``."""
        for name in names:
            if self.is_given(name) and not getattr(self, other):
                raise ConfigError(f"{flag(name)} does nothing without {flag(other)}: add it, or leave {flag(name)} out")

    def to_dict(self) -> dict[str, Any]:
        """Every option with its value, plain enough for YAML; :meth:`from_dict` reads it."""
        return {o.name: copy.copy(getattr(self, o.name)) for o in options(type(self))}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], place: str | None = None, given: Mapping[str, Any] | None = None
    ) -> Self:
        """A config from plain values, which ``given`` overrides. Raises ``ConfigError``.

        ``place``: the YAML file or the option that holds ``values``, for messages.
        """
        known = {o.name: o for o in options(cls)}
        # A file that lists all options of an earlier version has those that were renamed too, mostly without a value.
        plain = {name: value for name, value in values.items() if name not in RENAMED or value is not None}
        if unknown := [name for name in plain if name not in known]:
            raise unknown_options(unknown, list(known), "see --help for all of them", place)
        for name in plain.keys() & (given or {}).keys():  # the file is checked whole, also where it is overridden
            checked(known[name], plain[name], place)
        plain |= given or {}
        if missing := [o for o in known.values() if o.required and o.name not in plain]:
            raise MissingOptions(missing)
        try:
            return cls(**plain)
        except WrongValue as error:
            if place is None or error.place is not None or error.option.name in (given or {}):
                raise
            raise WrongValue(error.option, error.problem, place) from None


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean beta?`` where one of ``known`` is near, or has the name ``word`` in another trainer; else
    nothing. A dash counts as an underscore."""
    plain = {k.lower().replace("_", "-"): k for k in known}
    renamed = RENAMED.get(word.lstrip("-").replace("-", "_"), "").replace("_", "-")
    for new in (f"--{renamed}", renamed):
        if renamed and new in plain:
            return f"; it is now called {plain[new]}"
    if found := our_name(word, known):
        return f"; it is called {found[0]} here{f' ({found[1]})' if found[1] else ''}"
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


def _quoted(value: object) -> str:
    """A wrong value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python spells no number of more than 4300 digits
        text = "a number of over 4300 digits"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


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
