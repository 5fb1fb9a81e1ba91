"""Functions by name, ``module:function``: those of this package, of the user, and entry points of installed packages.

>>> load_function("math:sqrt", "--reward math:sqrt")(4.0), imported("math:sqrt")(4.0)
(2.0, 2.0)
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from prefopt.core.options import nearest
from prefopt.errors import ConfigError


def imported(name: str) -> Callable[..., Any]:
    """The function ``module:function`` of this package; errors on importing it are bugs, and travel."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def function_of(package: str, name: str, known: Sequence[str]) -> Any:
    """What ``prefopt.data.check`` and the like stand for: a function of ``prefopt.api``, imported when it is asked for.
    Raises ``AttributeError`` for a name that is not ``known``, as a module does."""
    if name not in known:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(package.replace("prefopt", "prefopt.api", 1)), name)


def load_object(name: str, place: str, known: Sequence[str] = ()) -> Any:
    """What ``module:name`` stands for; modules are also looked for in the working folder.

    ``place`` begins the messages; ``known`` are names that the module may be a misspelling of. Raises ``ConfigError``.
    """
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.split(".")[0]):
            raise ConfigError(f"{place}: {module} imports {error.name}, which is not installed") from error
        guess = nearest(module, known)
        raise ConfigError(f"{place}: there is no module {module} in {here} or installed{guess}") from error
    except Exception as error:
        raise ConfigError(f"{place}: importing {module} raised {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        raise ConfigError(f"{place}: {module} has no {attribute}{nearest(attribute, list(vars(found)))}")
    return getattr(found, attribute)


def load_function(name: str, place: str, known: Sequence[str] = ()) -> Callable[..., Any]:
    """The same for a function."""
    function: Callable[..., Any] = load_object(name, place, known)
    if not callable(function):
        raise ConfigError(f"{place}: {name.partition(':')[2]} is not a function but of type {type(function).__name__}")
    return function


def plugins(group: str) -> dict[str, EntryPoint]:
    """Entry points of installed packages in a group such as ``prefopt.losses``, by name."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_plugin(entry: EntryPoint, place: str) -> Callable[..., Any]:
    """The function of an entry point. Raises ``ConfigError``."""
    package = f" of {entry.dist.name}" if entry.dist else ""
    return load_function(entry.value, f"{place} (entry point{package})")


def installed_version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def extras() -> dict[str, list[str]]:
    """The packages of each extra of prefopt but ``dev``, by what is installed; empty where prefopt is not."""
    requirements: list[str] = []
    with suppress(PackageNotFoundError):
        requirements = metadata.requires("prefopt") or []
    packages: dict[str, list[str]] = {}
    for text in requirements:
        condition, name = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", text), re.match(r"[\w.-]+", text)
        if condition and name and condition[1] != "dev" and name[0] != "prefopt":
            packages.setdefault(condition[1], []).append(name[0])
    return packages


@contextmanager
def needing(extra: str, command: str) -> Iterator[None]:
    """Imports of a command that needs an extra. Raises :class:`ConfigError` where one of its packages is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "prefopt":
            raise
        raise ConfigError(f"{error.name} is not installed; {command} needs {how_to_install(extra)}") from None


def how_to_install(extra: str) -> str:
    """The command that installs the packages of an extra: by their own names, however prefopt itself was installed."""
    return f"pip install {' '.join(extras().get(extra, [f'prefopt[{extra}]']))}"
