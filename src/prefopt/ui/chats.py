"""A chat with one or two models, kept by the server: closing the page loses nothing, and it can be saved to a file."""

from __future__ import annotations

import gc
import logging
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config.sample import ChatConfig
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, UserError
from prefopt.records import Message
from prefopt.ui.feed import Event

log = logging.getLogger("prefopt.ui")
LONGEST = 32_000
"""Characters of a message."""


@dataclass(slots=True)
class Side:
    """A model with its conversation. ``streaming``: its last message is not complete."""

    model: Any
    messages: list[Message] = field(default_factory=list)
    streaming: bool = False
    note: str = ""

    def values(self) -> dict[str, Any]:
        turns = [{"role": m.role, "text": m.content} for m in self.messages]
        return {"name": self.model.name, "turns": turns, "note": self.note, "streaming": self.streaming}


class Room:
    """One chat at a time. ``state``: empty, opening, ready or answering; ``problem`` is the last error,
    ``draft`` a message that nobody answered: it is taken back, and not lost."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake, self._turn = wake, threading.Lock()
        self.sides: list[Side] = []
        self.state, self.problem, self.draft = "empty", "", ""
        self.notes: list[str] = []
        self.system: str | None = None
        self.version = self._attempt = 0
        self._stop = threading.Event()

    def open(self, config: ChatConfig) -> None:
        """Load the models, in a thread. Raises :class:`ConfigError` while the chat is busy."""
        self._claim("opening", "empty", "ready")
        self._release()
        self.system = config.system
        threading.Thread(target=self._guarded, args=(lambda: self._load(config), "empty"), daemon=True).start()

    def say(self, text: str) -> None:
        """Send a message to all. Raises :class:`ConfigError` while the chat is busy, and for an empty message."""
        if not text.strip():
            raise ConfigError("there is nothing to send: write a message")
        if len(text) > LONGEST:
            raise ConfigError(f"the message has {len(text):,} characters; at most {LONGEST:,} are sent")
        self._claim("answering", "ready")
        self._attempt, self.draft = 0, ""
        for side in self.sides:
            side.messages.append(Message("user", text))
        self._begin()

    def retry(self) -> None:
        """Answer the last message again."""
        if not any(side.messages for side in self.sides):
            raise ConfigError("there is nothing to answer again yet: write a message")
        self._claim("answering", "ready")
        self._attempt += 1
        for side in self.sides:
            while side.messages[-1].role != "user":
                side.messages.pop()
        self._begin()

    def stop(self) -> None:
        """End the answer; what is there stays."""
        self._stop.set()

    def reset(self) -> None:
        """Forget the conversation."""
        self._claim("ready", "ready")
        for side in self.sides:
            side.messages, side.note = [], ""
        self._changed()

    def close(self) -> None:
        """Give the models' memory back."""
        self._claim("empty", "ready")
        self._release()
        self._changed()

    def _release(self) -> None:
        self.sides, self.notes = [], []
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def save(self, path: Path) -> None:
        """Append each conversation to a file of JSON lines. Raises :class:`UserError`."""
        from prefopt.chat.conversation import append_row, check_appendable
        from prefopt.data.layouts.messages import write_messages
        from prefopt.generate.chat_model import with_system

        if self.state != "ready" or not any(side.messages for side in self.sides):
            raise ConfigError("there is nothing to save yet, or an answer is not complete")
        check_appendable(path, "messages", "the file")
        for side in self.sides:
            turns = write_messages(with_system(self.system, side.messages))
            append_row(path, {"messages": turns, "model": side.model.name})

    def values(self) -> dict[str, Any]:
        """All of it, for the page."""
        sides = [side.values() for side in self.sides]
        return {"state": self.state, "problem": self.problem, "draft": self.draft, "notes": self.notes, "sides": sides}

    def _claim(self, state: str, *allowed: str) -> None:
        with self._turn:
            if self.state not in allowed:
                raise ConfigError("the models are busy, or none is open: wait, stop the answer, or open one")
            self.state, self.problem = state, ""
        self._changed()

    def _begin(self) -> None:
        self._stop.clear()
        threading.Thread(target=self._guarded, args=(self._answer, "ready"), daemon=True).start()

    def _guarded(self, work: Callable[[], None], after_error: str) -> None:
        try:
            work()
            self.state = "ready"
        except Exception as error:  # whatever a model raises, the chat has to be usable after it
            if not isinstance(error, UserError):
                log.exception("the chat failed")
            self.problem, self.state = " ".join(str(error).split()) or type(error).__name__, after_error
            for side in self.sides:
                side.streaming = False
        self._changed()

    def _load(self, config: ChatConfig) -> None:
        from prefopt.chat.session import open_models

        seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
        self.sides = [Side(model) for model in open_models(config, seed, _Said(self.notes))]

    def _answer(self) -> None:
        """One answer after another. A message that nobody answers is taken back."""
        try:
            for side in self.sides:
                self._answer_one(side)
        finally:
            for side in self.sides:
                if side.messages and side.messages[-1].role == "user":  # unanswered: kept for all, or for none
                    side.messages.append(Message("assistant", ""))
            if not any(side.messages[-1].content for side in self.sides if side.messages):
                for side in self.sides:
                    self.draft = side.messages[-2].content
                    del side.messages[-2:]

    def _answer_one(self, side: Side) -> None:
        from prefopt.chat.conversation import fitting_answer
        from prefopt.generate.chat_model import with_system

        if self._stop.is_set():
            return
        asked = with_system(self.system, side.messages)
        side.messages.append(Message("assistant", ""))
        side.streaming = True
        self._changed()
        dropped, chunks = fitting_answer(side.model, asked, self._attempt)
        side.note = f"the context is full: the {dropped} oldest turns are left out" if dropped else ""
        text = ""
        for chunk in chunks:
            text += chunk
            side.messages[-1] = Message("assistant", text)
            self._wake()
            if self._stop.is_set():
                break
        side.messages[-1] = Message("assistant", text.strip())
        side.streaming = False
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._wake()


class _Said(Reporter):
    """Takes what :func:`prefopt.chat.session.open_models` says of the models."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("none")
        self._lines = lines

    def say(self, line: str) -> None:
        self._lines.append(line)


@dataclass(slots=True)
class ChatTopic:
    """The chat as it changes: all of it at a new turn, else what an answer has grown by."""

    room: Room
    _sent: int = -1
    _lengths: list[int] = field(default_factory=list)

    def changes(self) -> list[Event]:
        version = self.room.version
        if version != self._sent:
            values = self.room.values()
            self._sent = version
            self._lengths = [len(side["turns"][-1]["text"]) if side["turns"] else 0 for side in values["sides"]]
            return [("chat", values)]
        return [("chunk", chunk) for chunk in self._grown(self.room.sides)]

    def _grown(self, sides: Sequence[Side]) -> list[dict[str, Any]]:
        found = []
        for n, side in enumerate(sides[: len(self._lengths)]):
            text = side.messages[-1].content if side.streaming and side.messages else ""
            if len(text) > self._lengths[n]:
                found.append({"side": n, "text": text[self._lengths[n] :]})
                self._lengths[n] = len(text)
        return found
