"""The Jinja of chat templates: compiled as transformers does it, and asked what it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes


@lru_cache(maxsize=16)
def compiled(text: str) -> Any:
    """The template, in the sandbox of transformers with its filters and its ``generation`` tag."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)


def syntax_error(text: str) -> str:
    """What is wrong with a template and on which line, or nothing."""
    try:
        compiled(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {one_line(error)}"
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


def one_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
