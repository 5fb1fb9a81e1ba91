"""Options in a YAML file: one name and value per line, names with dashes or underscores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from prefopt.core.files import expanded
from prefopt.core.options import options
from prefopt.errors import ConfigError

_HALF = re.compile("[\ud800-\udfff]")
DEPTH = 20
"""Deepest nesting: options are at most lists, and a parser may run out of stack."""
MOST = 1 << 20
"""Most bytes of a file: a parser takes a second per megabyte."""


class _Loader(yaml.SafeLoader):
    """YAML with 1e-6 as a number, without duplicate names, and without aliases, which can make a billion values."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refused("an alias; write the value out")
        self._depth += 1
        if self._depth > DEPTH:
            raise self._refused(f"nested more than {DEPTH} deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and _HALF.search(node.value):
            raise yaml.MarkedYAMLError(problem="half of a character", problem_mark=node.start_mark)
        return node

    def _refused(self, problem: str) -> yaml.MarkedYAMLError:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as a number."""


# YAML 1.1, which PyYAML reads, requires a dot in a number with an exponent.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read_document(path: str) -> dict[str, object]:
    """The options in a YAML file, by their field's name. Raises ``ConfigError`` that names the file and line."""
    try:
        with expanded(path).open("rb") as file:
            raw = file.read(MOST + 1)
        if len(raw) > MOST:
            raise ConfigError(f"--config {path} is larger than {MOST >> 20} MiB; give a file of options")
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the name of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not text in UTF-8 (byte {error.start}); give a YAML file") from error
    loader = None
    try:
        loader = _Loader(text)  # checks every character
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: no options in it; write one per line, such as `beta: 0.1`")
        return _pairs(loader, node, path)
    except ConfigError:
        raise
    except Exception as error:  # of any class: an impossible date is a ValueError
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or str(error).partition("\n")[0] or "not readable"
        raise ConfigError(f"{place}: not YAML ({what}); write one option per line, such as `beta: 0.1`") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_document(config: type, values: Mapping[str, object]) -> str:
    """All options of a config as YAML with their help and the given values; ``read_document`` reads it.

    A default that depends on other options is written as null, so that it still does on reading.
    """
    lines: list[str] = []
    group = ""
    for o in options(config):
        if o.group != group:
            group = o.group
            lines += [*([""] if lines else []), f"# --- {group} ---"]
        lines.append(f"# {o.help} ({'required' if o.required else f'default: {o.default_text}'})")
        if o.required and o.name not in values:
            lines.append(f"# {o.name}:")
            continue
        value = values.get(o.name, o.default)
        flow = None if isinstance(value, list) else False
        plain = "".join(value if isinstance(value, list) else str(value)).isprintable()  # else YAML escapes it
        text = yaml.dump({o.name: value}, None, _Dumper, default_flow_style=flow, allow_unicode=plain, width=2**31)
        lines.append(text.removesuffix("\n"))
    return "\n".join(lines) + "\n"


def _pairs(loader: _Loader, node: yaml.MappingNode, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = str(loader.construct_object(key, deep=True)).replace("-", "_")
        if name in found:
            raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {name} is a duplicate; remove it")
        found[name] = loader.construct_object(value, deep=True)
    return found
