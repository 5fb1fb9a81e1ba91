"""Traces of chat templates: fixed text with words in between, so that most rows need no template run at all.

A template is run once for each shape of conversation, on words that record what it does to them. Where it only copies
them, asks them a question (does the text contain ``</think>``?) or leaves them unchanged (trims words without white
space around them), all words that answer the questions alike give the same text around them. A template that does
anything else to words, such as splitting them, renders every row.

Words keep their type through ``+``, ``~``, macros and blocks. Operations that would treat them as plain text (searching
for them in a text, formatting, unknown filters) are replaced by versions that notice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from prefopt.data.chat import sandbox
from prefopt.data.chat.sandbox import OWN, Bounded, modulo

REMEMBERED = 1024  # shapes of conversations; a file has a few for each number of turns
# Shows whether the words were escaped, quoted or changed in case.
_ODD = '\u00e9<&>"\\\u00cb'
_QUESTIONS = (
    *("startswith", "endswith", "find", "rfind", "count", "__contains__", "__eq__", "__ne__"),
    *("isdigit", "isalpha", "isalnum", "isnumeric", "isdecimal", "isspace", "isupper", "islower", "istitle"),
)
_WHOLE = ("split", "rsplit", "splitlines")  # give a list of one where there is nothing to split at
_HARMLESS = ("strip", "lstrip", "rstrip", "replace", "removeprefix", "removesuffix", "expandtabs")
_KEPT = {
    *("__class__", "__doc__", "__new__", "__init__", "__str__", "__add__", "__getattribute__", "__setattr__"),
    *("__delattr__", "__repr__", "__sizeof__", "__dir__", "__init_subclass__", "__subclasshook__"),
}
_FILTERS = {
    *("trim", "string", "default", "d", "length", "count", "items", "list", "first", "last", "reverse", "map"),
    *("select", "reject", "selectattr", "rejectattr", "tojson", "dictsort", "upper", "lower", "capitalize", "replace"),
}
SAME = object()
_plain = str.__str__


@dataclass(frozen=True, slots=True)
class _Guard:
    """``words[slot].method(*args)`` must give ``result``; ``SAME``: the words themselves, or a list of them alone."""

    slot: int
    method: str
    args: tuple[Any, ...]
    result: object

    def holds(self, words: str) -> bool:
        found = getattr(words, self.method)(*self.args)
        return found in (words, [words]) if self.result is SAME else bool(found == self.result)


@dataclass
class _Log:
    """The questions that a template asked of words, and whether it did anything else to them."""

    guards: dict[tuple[object, ...], _Guard] = field(default_factory=dict)
    failed: bool = False

    def fail(self) -> NoReturn:
        self.failed = True  # recorded as well as raised: Jinja's tests swallow exceptions
        raise RuntimeError("what the template does depends on the words")


class Words(str):
    """Text that records what is done to it. ``slot`` is the number of the turn; text made from words has none."""

    log: _Log
    slot: int | None

    def __new__(cls, text: str, log: _Log, slot: int | None = None) -> Words:
        words = super().__new__(cls, text)
        words.log, words.slot = log, slot
        return words

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Words:
        return Words(_plain(self) + _plain(other), self.log) if isinstance(other, str) else self.log.fail()

    def __radd__(self, other: str) -> Words:
        return Words(_plain(other) + _plain(self), self.log) if isinstance(other, str) else self.log.fail()

    def __bool__(self) -> bool:
        return True  # traced words are never empty, see Traces.render


def _ask(method: str) -> Callable[..., Any]:
    def ask(self: Words, *args: Any) -> Any:
        result = self if self.slot is None else getattr(_plain(self), method)(*args)
        listed = method in _WHOLE and result == [_plain(self)]
        harmless = listed or (method in _HARMLESS and result == _plain(self))
        if self.slot is None or any(isinstance(a, Words) for a in args) or not (harmless or method in _QUESTIONS):
            self.log.fail()
        key = (self.slot, method, repr(args))
        self.log.guards.setdefault(key, _Guard(self.slot, method, args, SAME if harmless else result))
        return ([self] if listed else self) if harmless else result

    return ask


def _refuse(self: Words, *_args: Any, **_named: Any) -> NoReturn:
    self.log.fail()


for _name in dir(str):
    if _name in (*_QUESTIONS, *_HARMLESS, *_WHOLE):
        setattr(Words, _name, _ask(_name))
    elif _name not in _KEPT:
        setattr(Words, _name, _refuse)


@dataclass(frozen=True, slots=True)
class Trace:
    """``pieces[0] + words[slots[0]] + pieces[1] + ...``, for words for which all guards hold."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    guards: tuple[_Guard, ...]

    def render(self, words: Sequence[str]) -> str | None:
        for guard in self.guards:
            if not guard.holds(words[guard.slot]):
                return None
        parts = [self.pieces[0]]
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            parts += words[slot], piece
        return "".join(parts)


def from_trace(
    traces: dict[object, Trace | None], shape: object, words: Sequence[str], run: Callable[[Sequence[str]], str]
) -> str | None:
    """The text for words in a conversation of this shape; None where the template must be run.

    The shape is all that the template is given beside the words. ``run`` renders it on words. ``traces`` are those of
    the template so far.
    """
    if shape not in traces and len(traces) < REMEMBERED and all(words):
        traces[shape] = _trace(len(words), run)
    trace = traces.get(shape)
    return None if trace is None or not all(words) else trace.render(words)


def _trace(count: int, render: Callable[[Sequence[str]], str]) -> Trace | None:
    log = _Log()
    marks = [f"{_ODD}{i}{_ODD}" for i in range(count)]
    try:
        text = _plain(render([Words(mark, log, i) for i, mark in enumerate(marks)]))
    except Exception:  # reported when the row itself is rendered
        return None
    parts = re.split(f"{re.escape(_ODD)}([0-9]+){re.escape(_ODD)}", text)
    pieces, slots = tuple(map(sys.intern, parts[::2])), tuple(map(int, parts[1::2]))
    if log.failed or set(slots) != set(range(count)) or any(_ODD in piece for piece in pieces):
        return None
    return Trace(pieces, slots, tuple(log.guards.values()))


@lru_cache(maxsize=16)
def compiled(source: str) -> Any | None:
    """The template for tracing; None where it cannot be traced."""
    environment = sandbox.compiled(source).environment.overlay()
    tree = environment.parse(source)
    # The replacements below must cover everything in the template.
    chains = (node for node in tree.find_all(nodes.Compare) if len(node.ops) > 1)
    if (
        any(True for _ in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)))
        or any(op.op in ("in", "notin") for node in chains for op in node.ops)
        or any(_of_text(call) and (call.dyn_args or call.dyn_kwargs) for call in tree.find_all(nodes.Call))
    ):
        return None
    environment.concat = _concat
    known: dict[str, Callable[..., Any]] = environment.filters
    guarded = {name: run if name in _FILTERS or name in OWN else _guarded(run) for name, run in known.items()}
    environment.filters = guarded | {
        "prefopt_alone": _alone,
        "prefopt_join": lambda parts: _concat(part if isinstance(part, Words) else str(part) for part in parts),
        "prefopt_holds": _holds,
        "prefopt_modulo": lambda left, right: modulo(left, _alone(right) if isinstance(left, str) else right),
    }
    environment.tests = {**environment.tests, "in": lambda value, container: _holds(container, value)}
    tree = _Noting().visit(tree)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _of_text(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Getattr) and hasattr(str, call.node.attr)


class _Noting(NodeTransformer):
    """Replaces operations that would treat words as plain text."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._filter("prefopt_join", node, nodes.List(node.nodes))

    def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
        return self._filter("prefopt_modulo", node, node.left, node.right)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        if node.ops[0].op not in ("in", "notin"):
            return self.generic_visit(node)
        found = self._filter("prefopt_holds", node, node.ops[0].expr, node.expr)
        return found if node.ops[0].op == "in" else nodes.Not(found, lineno=node.lineno)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        if _of_text(node):
            node.args = [self._alone(value) for value in node.args]
            for pair in node.kwargs:
                pair.value = self._alone(pair.value)
        return node

    def _alone(self, value: nodes.Expr) -> nodes.Expr:
        if isinstance(value, nodes.Const):
            return value
        return nodes.Filter(value, "prefopt_alone", [], [], None, None, lineno=value.lineno)

    def _filter(self, name: str, node: nodes.Node, first: nodes.Expr, *rest: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(self.visit(first), name, [self.visit(r) for r in rest], [], None, None, lineno=node.lineno)


def _concat(parts: Iterable[str]) -> str:
    """Join parts; the result is words where some part is."""
    given = [part for part in parts if isinstance(part, Words) or part]
    words = [part for part in given if isinstance(part, Words)]
    if not words:
        return Bounded.concat(given)
    return words[0] if len(given) == 1 else Words(Bounded.concat(list(map(_plain, given))), words[0].log)


def _holds(container: Any, value: Any) -> bool:
    return (_alone(value) if isinstance(container, str) else value) in container


def _alone(value: Any) -> Any:
    """The value, after a check that it contains no words."""
    if isinstance(value, Iterator):
        value = list(value)
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Words):
            item.log.fail()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
    return value


def _guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that must not be given words."""

    @wraps(run)  # with its attributes, which tell Jinja what to pass
    def guarded(*args: Any, **named: Any) -> Any:
        given = [_alone(a) if isinstance(a, (str, list, tuple, dict, Iterator)) else a for a in args]
        return run(*given, **{name: _alone(value) for name, value in named.items()})

    return guarded
