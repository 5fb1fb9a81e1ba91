"""Every layout of rows that is read, by name, in order of precedence; layouts from outside the package; their listing.

A row that has the fields of several layouts has the first of them: layouts with more fields come before those with
fewer, and of layouts with the same fields the more specific comes first. Layouts of installed packages (entry points
``prefopt.layouts``) come before all others. A module of a family has ``LAYOUTS``: layouts by precedence, lowest first.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path

from prefopt.core.options import nearest
from prefopt.core.plugins import load_object, plugins
from prefopt.data.layouts import canonical, conversations, pairs, rankings, trl
from prefopt.data.layouts.layout import ColumnMap, Layout
from prefopt.data.layouts.row import RowReader
from prefopt.data.layouts.values import BadRow, type_name
from prefopt.data.validate import DataKind
from prefopt.errors import ConfigError
from prefopt.records import Comparison

_FAMILIES = (canonical, conversations, trl, pairs, rankings)
_BY_PRECEDENCE = {at: layouts for family in _FAMILIES for at, layouts in family.LAYOUTS.items()}
REPLACED = {
    "v1-messages": "it is now called messages",
    "swift-rejected-response": "it is now called swift-preference",
    "alpaca-outputs": "write the list as k-wise rows do: responses, and their order, such as [0, 1, 2]",
    "oasst-replies": "give the whole trees, which are oasst-trees",
}
"""Layouts of earlier versions, with what to do."""
LAYOUTS: dict[str, Layout] = {x.name: x for _, layouts in sorted(_BY_PRECEDENCE.items()) for x in layouts}


@cache
def all_layouts() -> Mapping[str, Layout]:
    """The layouts of installed packages, then :data:`LAYOUTS`. Raises :class:`ConfigError` if one cannot be loaded."""
    found: dict[str, Layout] = {}
    for name, point in plugins("prefopt.layouts").items():
        place = f"layout {name} of the package {point.dist.name if point.dist else '?'}"
        try:
            layout = _layout_of(load_object(point.value, place), name)
        except ConfigError as error:
            raise ConfigError(f"{error}; fix or uninstall it") from error
        if layout.name in LAYOUTS or layout.name in found:
            raise ConfigError(f"{place}: there is a layout {layout.name} already; rename or uninstall it")
        found[layout.name] = layout
    return {**found, **LAYOUTS}


def named_layout(name: str) -> Layout:
    """The layout of that name, or ``module:attribute``; dashes, spaces and underscores are one.

    Raises :class:`ConfigError` if there is none.
    """
    if ":" in name:
        return _layout_of(load_object(name, f"layout {name}"), name)
    known = all_layouts()
    plain = name if name in known else "-".join(name.replace("_", " ").replace("-", " ").split()).lower()
    if plain not in known:
        if plain in REPLACED:
            raise ConfigError(f"there is no layout {plain} any more; {REPLACED[plain]}")
        guess = nearest(plain, list(known)) or f"; there are {', '.join(known)}, and module:function for your own"
        raise ConfigError(f"{name!r} is not a layout{guess}")
    return known[plain]


def writable_layout(name: str) -> Layout:
    """The layout of that name, to write rows. Raises :class:`ConfigError` if there is none, or it is only read."""
    layout = named_layout(name)
    if layout.writer is None:
        written = ", ".join(x.name for x in all_layouts().values() if x.writer is not None)
        raise ConfigError(f"--layout {layout.name}: such rows are read, not written; give one of {written}")
    return layout


def _layout_of(found: object, name: str) -> Layout:
    """A :class:`Layout`, or one that is read by a function from a row (a dict) to a row in the canonical layout."""
    if isinstance(found, Layout):
        return found
    if not callable(found):
        raise ConfigError(f"layout {name} is {type_name(found)}, neither a Layout nor a function of a row")
    return Layout(
        name=name,
        kind="ranking",
        description=(inspect.getdoc(found) or "rows that this function converts").partition("\n")[0].rstrip("."),
        origin=name,
        example={},
        reader=partial(_converted, found),
        own_columns=lambda looks: tuple(looks),
    )


def _converted(function: Callable[[dict[str, object]], object], row: RowReader) -> Comparison:
    try:
        made = function(dict(row.values))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadRow("failed conversion", f"the layout's function failed ({reason})") from error
    return LAYOUTS["canonical"].parse(made, row.number, row.file, ColumnMap(tags=row.tags))


def code_of_layouts(format: str | None) -> str:
    """A digest of the code of layouts from outside the package that may read a file; empty if there are none."""
    named = [named_layout(format)] if format is not None else list(all_layouts().values())
    modules = sorted({_module(x) for x in named})
    files = [getattr(sys.modules.get(x), "__file__", None) for x in modules if not x.startswith("prefopt.")]
    text = "".join(Path(file).read_text("utf-8", "replace") for file in files if file)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if text else ""


def _module(layout: Layout) -> str:
    function: Callable[..., object] = layout.reader
    if isinstance(function, partial):
        function = function.args[0] if function.func is _converted else function.func
    return str(inspect.unwrap(function).__module__)


WIDTH = 100
HEADINGS: dict[DataKind, str] = {
    "pairs": "Pairs: one response preferred to another",
    "ranking": "K responses: orders, scores, votes, right and wrong",
    "labels": "Labels: a response that is desirable or not",
    "demonstrations": "Demonstrations: a response to train on",
    "prompts": "Prompts alone",
}


def families(layouts: Iterable[Layout]) -> dict[str, list[Layout]]:
    """Layouts under headings, by what their rows can be used for."""
    every = list(layouts)
    return {heading: [x for x in every if x.kind == kind] for kind, heading in HEADINGS.items()}


def list_layouts() -> str:
    """Every layout in two lines: its name and columns, its description and who writes it."""
    parts = []
    for heading, layouts in families(all_layouts().values()).items():
        parts.append(heading)
        for x in layouts:
            parts.append(f"  {x.name:24}{', '.join(x.fields)}")
            about = f"{x.description} ({x.origin})"
            parts += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        parts.append("")
    parts.append("Layouts are recognised from all rows of a file, or named with --format NAME; --columns NAME=COLUMN")
    parts.append("names columns. prefopt data layouts NAME shows a row of one. NAME may be module:function, your own.")
    return "\n".join(parts)


def describe_layout(layout: Layout) -> str:
    """One layout with all its columns and an example row."""
    lines = [
        f"{layout.name}: {layout.description} ({layout.origin})",
        f"columns: {', '.join(layout.fields) or 'those that the function reads'}",
        f"optional: {', '.join(layout.optional) or 'none'}",
        f"written by data convert: {'no' if layout.writer is None else 'yes'}",
    ]
    for title, names in (("also called", layout.aliases), ("--columns also knows", layout.option_names)):
        if names:
            lines.append(f"{title}: {', '.join(f'{name} for {field}' for name, field in names.items())}")
    wrapped = [line for text in lines for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    return "\n".join(wrapped + (["a row:", example(layout)] if layout.example else []))


def example(layout: Layout) -> str:
    parts = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in layout.example.items()]
    return "{" + ",\n ".join(parts) + "}"
