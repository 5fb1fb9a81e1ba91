"""Conversations of one shape as fixed text with words in between, so that most rows need no template run at all.

A template is run once on words that note what it does to them. Where it only passes them on, asks them a question
(does the text contain ``</think>``?) or does something that leaves them as they are (trims what has no white space
around it), all other words that answer those questions alike, and are left alone by the same, give the same text with
other words in it. Whatever else a template does to words, such as taking them apart, means that it is run for each row.

Words keep their kind through ``+``, macros and blocks. Where a template might lose it and ask its questions of an
ordinary text (``~`` and ``%`` outside of output, words looked for in a text, filters not known here) none of its
conversations is traced; :func:`traceable` tells that from its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import nodes

from prefopt.data import jinja

REMEMBERED = 512  # shapes; a file has as many as it has numbers of turns, times a few
# In this order, what stands in for words shows whether it was escaped, quoted or put in another case.
_ODD = '\u00e9<&>"\\\u00cb'
_QUESTIONS = (
    *("startswith", "endswith", "find", "rfind", "count", "__contains__", "__eq__", "__ne__"),
    *("isdigit", "isalpha", "isalnum", "isnumeric", "isdecimal", "isspace", "isupper", "islower", "istitle"),
)
_HARMLESS = ("strip", "lstrip", "rstrip", "replace", "removeprefix", "removesuffix", "expandtabs")
_KEPT = {
    *("__class__", "__doc__", "__new__", "__init__", "__str__", "__add__", "__getattribute__", "__setattr__"),
    *("__delattr__", "__repr__", "__sizeof__", "__dir__", "__init_subclass__", "__subclasshook__"),
}
_FILTERS = {
    *("trim", "string", "default", "d", "length", "count", "items", "list", "first", "last", "reverse", "map"),
    *("select", "reject", "selectattr", "rejectattr", "tojson", "dictsort", "upper", "lower", "capitalize", "replace"),
}
_LOSING = {"format", "format_map", "join", "translate", "encode", "maketrans"}
_FIELDS = {"role", "type", "name"}


class _Untraceable(Exception):
    """The template does something to words that depends on what they are."""


@dataclass(frozen=True, slots=True)
class _Guard:
    """Words number ``slot``, asked ``method(*args)``, must give ``result``; where that is None, themselves."""

    slot: int
    method: str
    args: tuple[Any, ...]
    result: object

    def holds(self, words: str) -> bool:
        found = getattr(words, self.method)(*self.args)
        return bool(found == (words if self.result is None else self.result))


class _Log:
    """What a template did to words."""

    def __init__(self) -> None:
        self.guards: dict[tuple[object, ...], _Guard] = {}
        self.failed = False

    def fail(self) -> NoReturn:
        self.failed = True  # noted as well as raised: Jinja's tests swallow exceptions
        raise _Untraceable


class Words(str):
    """Text that notes what is done to it. ``slot`` numbers the words of a turn; text made from them has none."""

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
        return True  # traced words are never empty, see Traces.show


def _ask(method: str) -> Callable[..., Any]:
    def ask(self: Words, *args: Any) -> Any:
        result = self if self.slot is None else getattr(_plain(self), method)(*args)
        harmless = method in _HARMLESS and result == _plain(self)
        if self.slot is None or any(isinstance(a, Words) for a in args) or not (harmless or method in _QUESTIONS):
            self.log.fail()
        key = (self.slot, method, repr(args))
        self.log.guards.setdefault(key, _Guard(self.slot, method, args, None if harmless else result))
        return self if harmless else result

    return ask


def _refuse(self: Words, *_args: Any, **_named: Any) -> NoReturn:
    self.log.fail()


for _name in dir(str):
    if _name in _QUESTIONS or _name in _HARMLESS:
        setattr(Words, _name, _ask(_name))
    elif _name not in _KEPT:
        setattr(Words, _name, _refuse)


@dataclass(frozen=True, slots=True)
class _Trace:
    """``pieces[0] + words[slots[0]] + pieces[1] + ...``, for words of which all guards hold."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    guards: tuple[_Guard, ...]

    def show(self, words: Sequence[str]) -> str | None:
        for guard in self.guards:
            if not guard.holds(words[guard.slot]):
                return None
        parts = [self.pieces[0]]
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            parts += words[slot], piece
        return "".join(parts)


class Traces:
    """The traces of one template. ``render(template, words, generation)`` runs it, for the roles at hand."""

    def __init__(self) -> None:
        self._traces: dict[object, _Trace | None] = {}

    def show(self, shape: object, words: Sequence[str], render: Callable[[Sequence[str]], str]) -> str | None:
        """What the template makes of words in a conversation of this shape, if that is known without running it.

        The shape must be all that the template is given beside the words. ``render`` runs it on words.
        """
        if not all(words):
            return None
        if shape not in self._traces:
            if len(self._traces) >= REMEMBERED:
                return None
            self._traces[shape] = _trace(len(words), render)
        trace = self._traces[shape]
        return None if trace is None else trace.show(words)


def _trace(count: int, render: Callable[[Sequence[str]], str]) -> _Trace | None:
    log = _Log()
    marks = [f"{_ODD}{i}{_ODD}" for i in range(count)]
    try:
        text = _plain(render([Words(mark, log, i) for i, mark in enumerate(marks)]))
    except Exception:  # whatever is wrong is seen again, and said, when the row itself is shown
        return None
    parts = re.split("|".join(map(re.escape, marks)), text)
    slots = tuple(marks.index(found) for found in re.findall("|".join(map(re.escape, marks)), text))
    if log.failed or set(slots) != set(range(count)) or any(_ODD in part for part in parts):
        return None
    return _Trace(tuple(parts), slots, tuple(log.guards.values()))


@lru_cache(maxsize=16)
def compiled(source: str) -> Any | None:
    """The template for tracing, whose macros and blocks keep words what they are; None where it cannot be traced."""
    if not traceable(source):
        return None
    environment = jinja.compiled(source).environment.overlay()
    environment.concat = _concat
    return environment.from_string(source)


def _concat(parts: Iterable[str]) -> str:
    given = [part for part in parts if isinstance(part, Words) or part]
    words = [part for part in given if isinstance(part, Words)]
    if not words:
        return "".join(given)
    return words[0] if len(given) == 1 else Words("".join(map(_plain, given)), words[0].log)


def _plain(text: str) -> str:
    return str.__str__(text)


def traceable(source: str) -> bool:
    """Whether whatever a template does to words is noted by them."""
    tree = jinja.compiled(source).environment.parse(source)
    blocks = (nodes.Macro, nodes.AssignBlock, nodes.CallBlock, nodes.FilterBlock)
    shown = set() if any(True for _ in tree.find_all(blocks)) else {id(node) for node in _shown(tree)}
    return not any(
        isinstance(node, (nodes.Mod, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.FilterBlock))
        or (isinstance(node, nodes.Concat) and id(node) not in shown)
        or (isinstance(node, nodes.Filter) and node.name not in _FILTERS)
        or (isinstance(node, nodes.Test) and node.name == "in")
        or (isinstance(node, nodes.Getattr) and node.attr in _LOSING)
        or (
            isinstance(node, nodes.Compare)
            and not all(_fixed(node.expr) or op.op not in ("in", "notin") for op in node.ops)
        )
        or (isinstance(node, nodes.Call) and not _call_noted(node))
        for node in tree.find_all(nodes.Node)
    )


def _shown(tree: nodes.Template) -> Iterator[nodes.Node]:
    """What is written out as it stands."""
    waiting: list[nodes.Node] = [node for output in tree.find_all(nodes.Output) for node in output.nodes]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, (nodes.Concat, nodes.Add, nodes.CondExpr)):
            waiting += node.iter_child_nodes()


def _fixed(node: nodes.Node) -> bool:
    """Whether this is no words: what is looked for in a text is given a text that cannot note it."""
    if isinstance(node, nodes.Getattr):
        return node.attr in _FIELDS
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in _FIELDS
    return isinstance(node, nodes.Const)


def _call_noted(call: nodes.Call) -> bool:
    """Whether words can tell of the call: it is none of an ordinary text's methods with words for an argument."""
    method = call.node
    if not isinstance(method, nodes.Getattr) or not hasattr(str, method.attr):
        return True
    given = [*call.args, *(pair.value for pair in call.kwargs)]
    dynamic = call.dyn_args is not None or call.dyn_kwargs is not None
    return not isinstance(method.node, nodes.Const) and not dynamic and all(map(_constant, given))


def _constant(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) or (isinstance(node, nodes.Tuple) and all(map(_constant, node.items)))
