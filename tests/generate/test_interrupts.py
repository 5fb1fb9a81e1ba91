"""Ctrl-C at every single line of a conversation's code, and while a terminal is about to wait for keys."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from generate.test_chat import Echo, history
from prefopt.chat import conversation as chat_module
from prefopt.chat import input as interrupts_module
from prefopt.chat.conversation import Chat
from prefopt.chat.input import LineReader

FILES = {chat_module.__file__, interrupts_module.__file__}


class AtLine:
    """Raises SIGINT when the ``at``-th line of the watched files is about to run, while the chat hears signals."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> AtLine | None:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


def talk(at: int, *, complete: bool) -> tuple[Chat, str, int]:
    out = io.StringIO()
    typed = "first words \nsecond\n/retry\nthird\n"
    found = Chat([Echo("m")], LineReader(io.StringIO(typed), None), out, complete=complete)
    trace, before = AtLine(at), sys.gettrace()
    sys.settrace(trace)
    try:
        found.run()
    finally:
        sys.settrace(before)
    return found, out.getvalue(), trace.lines


@pytest.mark.parametrize("complete", [False, True])
def test_ctrl_c_ends_what_is_under_way_and_nothing_else_at_whatever_line_it_comes(complete: bool) -> None:
    _, undisturbed, lines = talk(0, complete=complete)
    assert lines > 200 and "(stopped)" not in undisturbed
    told = []
    for at in range(1, lines + 1):
        found, shown, _ = talk(at, complete=complete)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        roles = [role for role, _ in history(found)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        told.append(shown.count("(stopped)") + shown.count("(Ctrl-D ends)"))
        assert told[-1] <= 1
    # At the very end nothing is left that it could stop.
    assert all(told[: lines - 20]) and not told[-1]


def test_a_second_ctrl_c_comes_too_late() -> None:
    class Hectic(io.StringIO):
        presses = 4

        def write(self, text: str) -> int:
            if self.presses and any(words in text for words in ("well", "(stopped)", "Ctrl-D ends")):
                self.presses -= 1
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Hectic()
    found = Chat([Echo("m")], LineReader(io.StringIO("well then\nnext\nlast\n"), None), out)
    found.run()
    assert out.presses == 0 and "(stopped)" in out.getvalue() and out.getvalue().count("Ctrl-D ends") == 3
    assert history(found)[-1] == ("assistant", "m0: last")


def test_an_interrupt_that_a_callback_swallowed_is_heard_all_the_same() -> None:
    class Swallowing(Echo):
        def answer(self, asked: Any, attempt: int) -> Iterator[str]:
            yield "one "
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            yield "two "
            yield "three "

    out = io.StringIO()
    found = Chat([Swallowing("m")], LineReader(io.StringIO("hello\n"), None), out)
    found.run()
    assert history(found)[-1] == ("assistant", "one two") and "(stopped)" in out.getvalue()


CHILD = """
import readline
from prefopt.chat.input import interruptible_input
for n in range({rounds}):
    try:
        interruptible_input("> ")
    except KeyboardInterrupt:
        print("interrupted", n, flush=True)
"""


def test_ctrl_c_is_heard_however_soon_behind_the_prompt_it_comes(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    from generate.terminal import python_in_terminal

    rounds = 300
    with python_in_terminal("-c", CHILD.format(rounds=rounds)) as t:
        for n in range(rounds):
            t.wait("> ")
            t.type("half a line\x03")
            t.wait(f"interrupted {n}")
        assert t.end() == 0
