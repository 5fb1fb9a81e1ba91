"""Writes the list of commands and the tables of options in docs/cli.md from the commands: python docs/make_cli.py."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.cli import VERBS
from prefopt.core.options import Option, options

PAGE = Path(__file__).with_name("cli.md")
TABLE = re.compile(r"(<!-- options of prefopt ([a-z ]+) -->\n).*?(<!-- end -->)", re.S)
LIST = re.compile(r"(<!-- commands -->\n).*?(<!-- end -->)", re.S)


def written(page: str) -> str:
    """The page with the list and every table between its two marks as the commands and options are now."""
    page = LIST.sub(lambda found: f"{found[1]}\n{_commands(page)}\n\n{found[2]}", page)
    return TABLE.sub(lambda found: found[1] + "\n" + _tables(found[2]) + "\n" + found[3], page)


def _commands(page: str) -> str:
    """Every command, with a link to its section or to that of its group."""
    lines = ["| command | what it does |", "| --- | --- |"]
    for name, verb in VERBS.items():
        own = re.search(rf"^#+ prefopt {name}$", page, re.M)
        lines.append(
            f"| [`prefopt {name}`](#prefopt-{(name if own else name.split()[0]).replace(' ', '-')}) | {verb.help} |"
        )
    return "\n".join(lines)


def _tables(verb: str) -> str:
    groups: dict[str, list[Option]] = {}
    for o in options(VERBS[verb].config):
        groups.setdefault(o.group, []).append(o)
    parts = []
    for name, many in groups.items():
        lines = [f"**{name.capitalize()}**\n", "| option | value | default | |", "| --- | --- | --- | --- |"]
        for o in many:
            default = "required" if o.required else o.default_text
            lines.append(f"| `{o.flag}` | {o.expects} | {default} | {o.help} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
