"""The Jinja of chat templates: compiled as transformers does it, and asked what it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes

from prefopt.data import sandbox
from prefopt.errors import first_line


@lru_cache(maxsize=16)
def compiled(text: str) -> Any:
    """The template, in the sandbox of transformers with its filters and its ``generation`` tag, and bounds."""
    return sandbox.environment().from_string(text)


def render(template: Any, **given: Any) -> str:
    """What a template makes of ``given``. Raises :class:`sandbox.TooMuch` where that would have no end."""
    sandbox.budget.start()
    return str(template.render(**given))


def syntax_error(text: str) -> str:
    """What is wrong with a template and on which line, or nothing."""
    try:
        compiled(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {first_line(error)}"
    except Exception as error:  # nested too deep for the compiler, say
        return first_line(error)
    return ""


@lru_cache(maxsize=16)
def variables(text: str) -> frozenset[str]:
    """The names that whoever renders the template may give: those that neither it nor its environment defines."""
    return frozenset(meta.find_undeclared_variables(compiled(text).environment.parse(text)))


@lru_cache(maxsize=16)
def names(text: str) -> frozenset[str]:
    """Every name that the template uses."""
    return frozenset(node.name for node in compiled(text).environment.parse(text).find_all(nodes.Name))


@lru_cache(maxsize=16)
def fields(text: str) -> frozenset[str]:
    """Names that the template may look up in a message."""
    tree = compiled(text).environment.parse(text)
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(constants | {node.attr for node in tree.find_all(nodes.Getattr)})
