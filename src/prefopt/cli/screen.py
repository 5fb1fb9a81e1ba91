"""What the command line says of itself: the list of commands, the help of one, and what one still needs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from prefopt.cli.verbs import VERBS, options_of, verbs_below
from prefopt.core.options import Option
from prefopt.errors import ConfigErrors

INDENT = 24
"""Columns before the help of an option."""


def help_of(name: str) -> str:
    """The help of a command: its arguments, its options by group, and an example."""
    known = options_of(name).values()
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    places = [o for o in known if o.positional]
    usage = " ".join(["usage: prefopt", name, *map(_place, places), "[options]"])
    lines = [usage, "", *textwrap.wrap(VERBS[name].help, width)]
    if places:
        lines += ["", "arguments:"]
    for o in places:
        lines += _described(f"  {_metavar(o)}", f"{o.help} ({_default(o)}; also {o.flag})", width)
    rest = [o for o in known if not o.positional]
    for group in dict.fromkeys(o.group for o in rest):
        lines += ["", f"{group}:"]
        for o in (o for o in rest if o.group == group):
            lines += _described(f"  {o.flag} {_metavar(o)}", f"{o.help} ({_default(o)})", width)
    return "\n".join([*lines, "", example_of(name)])


def example_of(name: str) -> str:
    return f"example: prefopt {name} {VERBS[name].example}".rstrip()


def still_needed(name: str, missing: Sequence[Option]) -> ConfigErrors:
    """The error for a command without several of the options that it requires, one a line."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    title = f"prefopt {name} needs"
    lines = [line for o in missing for line in _described(f"  {_needed(o)}", o.help, width)]
    names = ", ".join(map(_needed, missing))
    return ConfigErrors(f"{title} {names}", [f"{title}:", *lines, example_of(name), f"help: prefopt {name} --help"])


def overview(group: str = "") -> str:
    """The list of all commands, or of those of a group such as ``data``."""
    names = verbs_below(group) if group else list(VERBS)
    width = max(map(len, names)) + 2
    lines = "\n".join(f"  {name:{width}}{VERBS[name].help}" for name in names)
    what = f"prefopt {group} COMMAND" if group else "prefopt COMMAND"
    more = "" if group else "; prefopt --version (-V) prints the version"
    return (
        f"usage: {what} [options]\n\n"
        "Align a language model with preferences on the hardware you have.\n\n"
        f"commands:\n{lines}\n\n"
        f"{what} --help lists its options{more}."
    )


def _needed(o: Option) -> str:
    return _metavar(o) if o.positional else f"{o.flag} {_metavar(o)}"


def _place(o: Option) -> str:
    return _metavar(o) if o.required else f"[{_metavar(o)}]"


def _default(o: Option) -> str:
    return "required" if o.required else f"default: {o.default_text}"


def _described(left: str, text: str, width: int) -> list[str]:
    """A name and its help, beside it where there is room."""
    wrapped = textwrap.wrap(text, width - INDENT, break_on_hyphens=False)  # an option's name stays whole
    lines = [left.ljust(INDENT) + wrapped.pop(0)] if len(left) < INDENT - 1 else [left]
    return lines + [" " * INDENT + line for line in wrapped]


def _metavar(o: Option) -> str:
    name = o.name.rsplit("_", 1)[-1].upper()
    if list[str] in o.kinds:
        return f"{name} [{name} ...]"
    if bool in o.kinds:
        return f"[{'|'.join(('true', 'false', *o.choices))}]"
    if o.choices and len(o.kinds) == 1:
        return "{" + ",".join(o.choices) + "}"
    return "N" if int in o.kinds else "X" if float in o.kinds else name
