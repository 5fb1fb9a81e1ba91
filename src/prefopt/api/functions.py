"""How a command becomes a function: signature, help and messages from its options."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, TypeVar

from prefopt.api.objects import plain
from prefopt.core.options import Config, options
from prefopt.core.python_words import in_python, to_python, values_of
from prefopt.core.signature import annotation_of, options_in_words, signature_of
from prefopt.errors import ConfigError, PrefoptError

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def public(config: type[Config] | None = None, hidden: Collection[str] = ()) -> Callable[[AnyFunction], AnyFunction]:
    """Decorates a function of ``prefopt``: its ``**options`` are spelled out from ``config``, but for ``hidden`` ones,
    and its errors know their message in Python's words."""

    def decorate(function: AnyFunction) -> AnyFunction:
        @functools.wraps(function)
        def called(*args: Any, **named: Any) -> Any:
            try:
                return function(*args, **named)
            except PrefoptError as error:
                error.in_python = in_python(str(error))
                raise

        described: Any = called
        if config is not None:
            described.__signature__ = signature_of(function, config, hidden)
            described.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_options(config, hidden)}\n"
            described.config, described.hidden = config, frozenset(hidden)
        done: AnyFunction = described
        return done

    return decorate


def _options(config: type[Config], hidden: Collection[str]) -> str:
    return to_python(options_in_words(config, hidden), values_of([config]))


@dataclass(frozen=True, slots=True)
class Command:
    """A command as a function: its config, what runs it, the type of its result as a stub spells it, and its options
    that say how the command line prints."""

    config: type[Config]
    run: Callable[[Any], Any]
    returns: str
    help: str
    hidden: tuple[str, ...] = ()


def command_function(name: str, module: str, command: Command) -> Callable[..., Any]:
    """``prefopt.NAME`` for a command without objects; positional arguments are those of the command line."""
    first = [o.name for o in options(command.config) if o.positional]

    def call(*args: Any, **named: Any) -> Any:
        if len(args) > len(first):
            most = f"{' and '.join(first)} alone" if first else "no argument"
            raise ConfigError(f"{name}() takes {most} without a name; write name=value")
        given = dict(zip(first, args, strict=False))
        if twice := given.keys() & named.keys():
            raise ConfigError(f"{min(twice)} is given twice: by its place and by its name")
        return command.run(command.config.from_dict(_values({**given, **named}, command)))

    call.__name__ = call.__qualname__ = name
    call.__module__ = module
    call.__doc__ = f"""{command.help}

Raises ``prefopt.errors.UserError`` where the command prints one line.

{_options(command.config, command.hidden)}
"""
    found: Any = public()(call)
    found.__signature__ = _signature(command, first)
    found.config, found.hidden = command.config, frozenset(command.hidden)
    done: Callable[..., Any] = found
    return done


def _values(given: Mapping[str, Any], command: Command) -> dict[str, Any]:
    for name in command.hidden:
        if name in given:
            raise ConfigError(f"{name} is for the command line, and does nothing in Python: leave it out")
    return {name: plain(value) for name, value in given.items() if value is not None}


def _signature(command: Command, first: Sequence[str]) -> Signature:
    """Required positional arguments first; an optional one in front of them would be no signature."""
    parameters = []
    for o in sorted(options(command.config), key=lambda o: first.index(o.name) if o.name in first else len(first)):
        if o.name not in command.hidden:
            kind = Parameter.POSITIONAL_OR_KEYWORD if o.name in first else Parameter.KEYWORD_ONLY
            default = Parameter.empty if o.required else o.default
            parameters.append(Parameter(o.name, kind, default=default, annotation=annotation_of(o)))
    return inspect.Signature(parameters, return_annotation=command.returns)


def in_stub(annotation: str) -> str:
    """The type of a parameter for a type checker: text may be a path, and a list one name, several, or a mapping.

    >>> in_stub("list[str] | None"), in_stub("Literal['str'] | str"), in_stub("str | Scores")
    ('Names | None', "Literal['str'] | Name", 'Name | Scores')
    """
    parts = re.split(r"(Literal\[[^\]]*\])", annotation)
    for n in range(0, len(parts), 2):
        parts[n] = re.sub(r"\bstr\b", "Name", re.sub(r"list\[str\]", "Names", parts[n]))
    return "".join(parts)
