"""The command that does what a config says, as a person would type it."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt.config.option import options
from prefopt.errors import ConfigError


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
