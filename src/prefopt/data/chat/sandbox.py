"""The sandbox of chat templates, with limits on time and memory.

Jinja's sandbox keeps a template from the machine, but lets it run forever or fill the memory: nested loops, macros that
call themselves twice, ``'a' * 10**10``. Here every rendering has a budget. A loop pays for its items before it begins,
a call for itself, and whatever makes text or a list for its length; what would be too long is refused before it is
made. A clock is the last resort. Ordinary templates use less than a thousandth of the budget.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from prefopt.errors import first_line

STEPS = 4_000_000  # loop items and calls of one rendering
CALL = 16  # steps that a call costs
CHARACTERS = 64  # characters made for the price of a step: 256 million in all
SECONDS = 20.0
FREE = 4096  # length of a text that costs nothing
LONGEST = 1 << 26  # characters or items of one value
NUMBER = 1 << 16  # largest number given to a filter or to a method of text (a width, a count)
BITS = 1 << 14  # of an integer
_WIDE = re.compile(r"\d{7}")


class LimitExceeded(TemplateError):
    """The template exceeds the sandbox's limits of time or memory."""


class _Budget(threading.local):
    """What the current rendering of a thread may still spend."""

    steps = STEPS
    ends = float("inf")

    def start(self) -> None:
        self.steps, self.ends = STEPS, time.monotonic() + SECONDS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise LimitExceeded(f"it takes more than {STEPS:,} steps")
        if time.monotonic() > self.ends:
            raise LimitExceeded(f"it takes more than {SECONDS:g} seconds")


budget = _Budget()


def paid(value: Any) -> Any:
    """Pay for the length of a value that was made."""
    if isinstance(value, str):
        length = str.__len__(value)
        if length > FREE:
            _fits(length)
            budget.spend(length // CHARACTERS)
    elif isinstance(value, (list, tuple, dict)):
        budget.spend(len(value))
    return value


def _fits(length: int) -> None:
    if length > LONGEST:
        raise LimitExceeded(f"it makes a text or list of more than {LONGEST:,}")


def _spent(items: Any) -> Any:
    """Pay for the items of a loop; an iterator pays as it goes."""
    try:
        length = str.__len__(items) if isinstance(items, str) else len(items)
    except TypeError:
        return _paying(items)
    budget.spend(length)
    return items


def _paying(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        budget.spend(1)
        yield item


@pass_context  # keeps Jinja from folding it as a constant
def _tick(_: Any, __: Any) -> None:
    """Check the clock: a step of a loop may take long and cost nothing, such as comparing long texts."""
    budget.spend(0)


def _concat(parts: Iterable[Any]) -> str:
    return Bounded.concat([part if isinstance(part, str) else str(_shown(part)) for part in parts])


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > BITS:
            raise LimitExceeded("it makes a number that is too large")
        return left * right
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            _fits(_length(many) * max(times, 0))
    return paid(left * right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > BITS:
        raise LimitExceeded("it makes a number that is too large")
    return left**right


def modulo(left: Any, right: Any) -> Any:
    """``a % b``."""
    if isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))
    return paid(left % right)


def _check_format(form: str, given: Iterable[Any]) -> None:
    """Refuse a format with wide fields, or with many repetitions of long values."""
    form, given = str.__str__(form), list(given)
    if _WIDE.search(form) or any(isinstance(v, int) and abs(v) > NUMBER for v in given if "*" in form or "{:{" in form):
        raise LimitExceeded("it formats text to a width that is too large")
    _fits(_length(form) + (form.count("%") + form.count("{")) * max(map(_length, given), default=0))


def _length(value: Any) -> int:
    """The approximate length of a value as text. Raises :class:`LimitExceeded` beyond :data:`LONGEST`."""
    if isinstance(value, str):
        return str.__len__(value)
    waiting, length = [value], 0
    while waiting:
        inner = waiting.pop()
        length += str.__len__(inner) if isinstance(inner, str) else 32
        if isinstance(inner, dict):
            waiting += [*inner.keys(), *inner.values()]
        elif isinstance(inner, (list, tuple)):
            waiting += inner
        _fits(length)
    return length


def _check_given(name: str, value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse a filter or method that would make too long a result of ``value``."""
    given = [*args, *named.values()]
    numbers = [abs(v) for v in given if isinstance(v, (int, float))] if name not in ("default", "d") else []
    if any(number > NUMBER for number in numbers):
        raise LimitExceeded(f"it gives {name} a number that is too large")
    budget.spend(int(max(numbers, default=0)))
    if name in _WRITING:
        _fits(_length(value) * (1 + int(max(numbers, default=0)) if name == "tojson" else 1))
    if name == "join":
        separator, items = (value, given[0] if given else "") if isinstance(value, str) else (given[:1], value)
        _fits(_length(separator) * (len(items) if isinstance(items, (str, list, tuple, dict)) else 1) + _length(items))
    elif isinstance(value, str):
        if name in ("format", "format_map"):
            _check_format(value, given)
        elif name == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
            found = str.count(value, str.__str__(given[0])) if str.__len__(given[1]) > 1 else 0
            _fits(str.__len__(value) + found * str.__len__(given[1]))
        elif name in _GROWING:
            most = max((v if isinstance(v, int) else _length(v) for v in given), default=1)
            _fits((str.__len__(value) + 1) * max(most, 1))


# Filters that write out a whole value; filters and methods that insert text in many places.
_WRITING = {"string", "tojson", "pprint", "escape", "e", "forceescape", "sum", "urlencode", "xmlattr", "safe"}
_WRITING |= {"sort", "unique", "groupby", "min", "max", "dictsort"}  # they compare lowercased copies
_GROWING = {"indent", "wordwrap", "expandtabs", "translate", "urlize"}
_METHODS = {"format", "format_map", "replace", "join", "center", "ljust", "rjust", "zfill", "to_bytes"} | _GROWING


def _bounded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and pays for its result."""
    first = 1 if hasattr(run, "jinja_pass_arg") else 0  # the environment, or the context

    @wraps(run)
    def bounded(*args: Any, **named: Any) -> Any:
        budget.spend(1)
        if (name == "join" or name in _WRITING) and isinstance(args[first], Iterator):
            args = (*args[:first], list(args[first]), *args[first + 1 :])
        if len(args) > first + 1 or named or name in _WRITING or name == "join":
            _check_given(name, args[first], args[first + 1 :], named)
        return paid(run(*args, **named))

    return bounded


def _tested(run: Callable[..., Any]) -> Callable[..., Any]:
    """A test that checks its arguments as a comparison does."""

    @wraps(run)
    def tested(*args: Any, **named: Any) -> Any:
        budget.spend(1)
        for value in args:
            _shown(value)
        return run(*args, **named)

    return tested


def _shown(value: Any) -> Any:
    """Check a value that is about to be written or compared: nested lists that share parts can be huge."""
    if isinstance(value, (list, tuple, dict)):
        _length(value)
    return value


# Filters that compiled templates call in place of loops and operators.
OWN: dict[str, Callable[..., Any]] = {
    "prefopt_spent": _spent,
    "prefopt_add": lambda left, right: paid(left + right),
    "prefopt_concat": _concat,
    "prefopt_shown": _shown,
    "prefopt_paid": paid,
    "prefopt_tick": _tick,
}


class Bounded(ImmutableSandboxedEnvironment):
    """An environment in which a rendering spends :data:`budget`."""

    intercepted_binops = frozenset(("*", "**", "%"))

    @classmethod
    def like(cls, other: ImmutableSandboxedEnvironment) -> Bounded:
        """A bounded environment with all that another has."""
        made: Bounded = object.__new__(cls)
        made.__dict__.update(other.__dict__)
        made.binop_table = {**other.binop_table, "*": _multiply, "**": _power, "%": modulo}
        made.filters = {name: _bounded(name, run) for name, run in other.filters.items()} | OWN
        tests: dict[str, Any] = other.tests
        made.tests = {name: _tested(run) for name, run in tests.items()}
        made.globals = {name: value for name, value in other.globals.items() if name != "lipsum"}  # text of any length
        made.finalize = _shown
        made.extensions = {name: extension.bind(made) for name, extension in other.extensions.items()}
        made.cache = None
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        budget.spend(CALL)
        method = getattr(__obj, "__wrapped__", __obj)  # text.format is wrapped by the sandbox
        if not isinstance(method, BuiltinMethodType):
            return super().call(__context, __obj, *args, **named)
        if method.__name__ in _METHODS:
            _check_given(method.__name__, method.__self__, args, named)
        return paid(super().call(__context, __obj, *args, **named))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts = parts if isinstance(parts, list) else list(parts)
        _fits(sum(map(str.__len__, texts)))
        return str(paid("".join(texts)))

    def _generate(self, source: nodes.Template, *args: Any, **named: Any) -> str:
        budget.start()  # constants are folded here
        return super()._generate(_Paying().visit(source), *args, **named)


class _Paying(NodeTransformer):
    """Inserts filters that make loops, sums, ``~``, slices, tuples and comparisons of variables pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("prefopt_spent", node.iter)
        node.body.insert(0, nodes.ExprStmt(_filtered("prefopt_tick", nodes.Const(0, lineno=node.lineno))))
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        self.generic_visit(node)
        if any(isinstance(side, nodes.Const) and _length(side.value) <= CHARACTERS for side in (node.left, node.right)):
            return node  # too short to need paying
        return _filtered("prefopt_add", node.left, node.right)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if not any(isinstance(side, nodes.Const) for side in (node.expr, *(op.expr for op in node.ops))):
            node.expr = _filtered("prefopt_shown", node.expr)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """A tuple as a dict key is hashed part by part, however often its parts are shared."""
        self.generic_visit(node)
        return node if node.ctx != "load" or not node.items else _filtered("prefopt_shown", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("prefopt_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("prefopt_paid", node) if isinstance(node.arg, nodes.Slice) else node


def _filtered(name: str, first: Any, *rest: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(first, name, list(rest), [], None, None, lineno=first.lineno)


@lru_cache(maxsize=1)
def environment() -> Bounded:
    """The environment of transformers, with its filters and its ``generation`` tag, and limits."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return Bounded.like(_compile_jinja_template("").environment)


@lru_cache(maxsize=16)
def compiled(text: str) -> Any:
    """The template compiled in :func:`environment`."""
    return environment().from_string(text)


def render(template: Any, **given: Any) -> str:
    """Render a compiled template. Raises :class:`LimitExceeded` where that takes too much time or memory."""
    budget.start()
    return str(template.render(**given))


def syntax_error(text: str) -> str:
    """The syntax error of a template with its line; empty where there is none."""
    try:
        compiled(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {first_line(error)}"
    except Exception as error:  # such as nested too deeply for the compiler
        return first_line(error)
    return ""


@lru_cache(maxsize=16)
def mentioned(text: str) -> tuple[set[str], set[str]]:
    """Variables that neither the template nor its environment defines, and fields that it may look up."""
    tree = environment().parse(text)
    fields = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    fields |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return meta.find_undeclared_variables(tree), fields
