"""A conversation in the terminal with one model, or with two that answer one after another.

What is typed is a message, or a command that begins with a slash. An answer is shown as it comes, and Ctrl-C ends it
and nothing else; what was said until then stays.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from prefopt.chat.input import Interrupts, LineReader
from prefopt.core.options import nearest
from prefopt.core.terminal import write
from prefopt.data.layouts.messages import write_messages
from prefopt.errors import RunError, UserError
from prefopt.generate.chat_model import ChatModel, ChatRequest, ContextLengthError, Messages, drop_oldest, system_and
from prefopt.records import Message

TIERS = {"a": [[0], [1]], "b": [[1], [0]], "tie": [[0, 1]]}


class VoteFile:
    """JSON lines in the canonical layout, appended to: a vote is on the disk before the next question is asked."""

    def __init__(self, path: Path, models: Sequence[str]) -> None:
        """Raises :class:`RunError` where the file holds something else, or ends in the middle of a row."""
        self.path = path
        self.wins = dict.fromkeys(models, 0)
        self.ties = 0
        if path.is_dir():
            raise RunError(f"--votes {path} is a folder; name a file")
        check_appendable(path, "responses", "--votes")

    def add(self, prompt: str | Sequence[Message], answers: Sequence[str], models: Sequence[str], vote: str) -> None:
        """A vote ``a``, ``b`` or ``tie`` on two answers, in the order they were shown. Raises :class:`RunError`.

        ``prompt`` is a conversation, or text that the answers continue.
        """
        text = isinstance(prompt, str)
        sides = [answer if text else write_messages([Message("assistant", answer)]) for answer in answers]
        row = {
            "prompt": prompt if isinstance(prompt, str) else write_messages(prompt),
            "responses": sides,
            "tiers": TIERS[vote],
            "models": list(models),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_row(self.path, row)
        if vote == "tie":
            self.ties += 1
        else:
            self.wins[models["ab".index(vote)]] += 1

    def tally(self) -> str:
        """Who won how often, in one line."""
        total = sum(self.wins.values()) + self.ties
        if not total:
            return "no votes"
        won = ", ".join(f"{name} won {count}" for name, count in self.wins.items())
        return f"{total} vote{'s' * (total > 1)}: {won}, ties {self.ties}; written to {self.path}"


def check_appendable(path: Path, column: str, option: str) -> None:
    """Refuse a file that holds rows of another kind, or ends within one. Raises :class:`RunError`."""
    if not path.exists():
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{option} {path} cannot be read ({error.strerror}); name another file") from error
    if not data.strip():
        return
    last = data.splitlines()[-1]
    try:
        row = json.loads(last)
    except ValueError:
        row = None
    if not data.endswith(b"\n") or not isinstance(row, dict) or column not in row:
        raise RunError(f"{option} {path} holds something else than rows of this kind; name another file")


def append_row(path: Path, row: object) -> None:
    """Add a row to a file of JSON lines; it is on the disk when this returns. Raises :class:`RunError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); make room, or name another file") from error


HELP = {
    "/system TEXT": "set the system prompt; without TEXT take it away",
    "/reset": "forget the conversation; the system prompt stays",
    "/retry": "answer the last message again",
    "/save FILE": "append the conversation to a file of JSON lines, for --data",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does",
}
HINTS = (
    'a line that ends in \\ goes on in the next; """ begins and ends a block of lines; // sends a message with a slash;'
    " Ctrl-C stops an answer"
)
VOTE = "better: a, b, tie, or skip? "


class End(Exception):
    """A person wants to leave."""


@dataclass(slots=True)
class Side:
    """One talker with the turns that it has seen, the system turn aside, and how many were left out last."""

    talker: ChatModel
    turns: list[Message] = field(default_factory=list)
    left_out: int = 0


class Chat:
    """``votes``: two talkers answer blind, as A and B, and the better answer goes on in both conversations.

    ``complete``: what is typed is text that the model continues, without turns. ``seed`` decides who is A.
    """

    def __init__(
        self,
        talkers: Sequence[ChatModel],
        reader: LineReader,
        out: TextIO,
        *,
        system: str | None = None,
        complete: bool = False,
        votes: VoteFile | None = None,
        seed: int = 0,
    ) -> None:
        self.sides = [Side(talker) for talker in talkers]
        self.system, self.complete, self.votes = system, complete, votes
        self._reader, self._out = reader, out
        self._interrupts = Interrupts()
        self._order = random.Random(seed)
        self._attempt = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
            "/help": self._help,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Until the input ends, or a person does."""
        with self._interrupts.caught():
            while True:
                try:
                    self._one(self._read("> ").encode("utf-8", "replace").decode())
                except EOFError:
                    self._say("")
                    break
                except End:
                    break
                except KeyboardInterrupt:
                    self._interrupts.taken()
                    self._say("\n(Ctrl-D ends)")
                except UserError as error:
                    self._say(f"error: {' '.join(str(error).split())}")
            if self.votes is not None:
                self._say(self.votes.tally())

    def _read(self, prompt: str) -> str:
        with self._interrupts.section():
            return self._reader.read(prompt)

    def _one(self, typed: str) -> None:
        if typed.startswith("/") and not typed.startswith("//"):
            name, _, rest = typed.partition(" ")
            command = self._commands.get(name.strip())
            if command is None:
                raise RunError(f"there is no {name}{nearest(name, list(self._commands)) or '; /help lists commands'}")
            command(rest.strip())
            return
        words = typed[1:] if typed.startswith("//") else typed
        if self.complete:
            self._attempt = 0
            self._continue(words)
        elif words.strip():
            self._attempt = 0
            for side in self.sides:
                side.turns.append(Message("user", words))
            self._answer()

    # -- answers -----------------------------------------------------------------------------------------------

    def _round(self, pieces: Callable[[Side], Iterator[str]]) -> tuple[list[Side], list[str]]:
        """Every side says something, blind ones in a random order; the sides and what they said."""
        order = list(self.sides)
        if self.votes is not None:
            self._order.shuffle(order)
        answers = []
        for label, side in zip("AB", order, strict=False):
            if len(order) > 1:
                self._say(f"[{label if self.votes is not None else side.talker.name}]")
            answers.append(self._shown(side, pieces))
        return order, answers

    def _answer(self) -> None:
        """Every side answers its last turn, which is taken back where no answer came."""
        prompt = system_and(self.system, self.sides[0].turns)
        try:
            order, answers = self._round(self._pieces)
        except BaseException:
            self._take_back()
            raise
        answers = [answer.strip() for answer in answers]
        if not any(answers):
            self._take_back()
            self._say("(no answer; the message is taken back)")
            return
        for side, answer in zip(order, answers, strict=True):
            side.turns.append(Message("assistant", answer))
        if self.votes is not None:
            self._vote(order, prompt, answers)

    def _take_back(self) -> None:
        """Forget the last message and what was said to it."""
        for side in self.sides:
            while side.turns and side.turns.pop().role != "user":
                pass

    def _pieces(self, side: Side) -> Iterator[str]:
        asked: ChatRequest | None = side.talker.fit(system_and(self.system, side.turns))
        while asked is not None:
            pieces = side.talker.answer(asked, self._attempt)
            try:
                first = next(pieces, "")
            except ContextLengthError:
                shorter = drop_oldest(asked)
                if shorter is None:
                    raise
                asked = shorter
                continue
            if asked.left_out > side.left_out:
                self._say(f"(the context is full: the {asked.left_out} oldest turns are left out)")
                side.left_out = asked.left_out
            yield first
            yield from pieces
            return

    def _continue(self, text: str, *, again: bool = False) -> None:
        """Each side continues the text; where it is empty what it wrote last, or ``again`` what that began with."""
        if not text and not all(side.turns for side in self.sides):
            raise RunError("there is nothing to continue yet: type the beginning of a text")

        def before(side: Side) -> str:
            return text or "".join(m.content for m in side.turns[: 1 if again else None])

        def pieces(side: Side) -> Iterator[str]:
            if text or again:
                self._write(before(side))
            return side.talker.continued(before(side), self._attempt)

        order, answers = self._round(pieces)
        prompt = before(order[0])
        for side, answer in zip(order, answers, strict=True):
            side.turns = [Message("user", before(side)), Message("assistant", answer)]
        if self.votes is not None:
            self._vote(order, prompt, answers)

    def _shown(self, side: Side, pieces: Callable[[Side], Iterator[str]]) -> str:
        """Write an answer as it comes; Ctrl-C ends it. What was said."""
        parts: list[str] = []
        try:
            with self._interrupts.section():
                for piece in pieces(side):
                    parts.append(piece)
                    self._write(piece)
                    self._interrupts.check()
        except KeyboardInterrupt:
            self._interrupts.taken()
            self._write(" (stopped)")
        self._write("\n")
        return "".join(parts)

    def _vote(self, order: Sequence[Side], prompt: str | Messages, answers: Sequence[str]) -> None:
        """Ask which answer is better; it goes on as the answer of both."""
        assert self.votes is not None
        vote = "skip"
        try:
            if answers[0] == answers[1]:
                self._say("(both said the same: no vote)")
            elif not all(answer.strip() for answer in answers):
                self._say("(one said nothing: no vote)")
            else:
                vote = self._asked_vote()
            if vote in TIERS:
                self.votes.add(prompt, answers, [side.talker.name for side in order], vote)
        finally:  # also where a person leaves without a vote: both go on with the same conversation
            kept = answers[1] if vote == "b" or not answers[0].strip() else answers[0]
            for side in self.sides:
                side.turns[-1] = Message("assistant", kept)

    def _asked_vote(self) -> str:
        known = {"a": "a", "b": "b", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}
        while True:
            typed = self._read(VOTE).strip().lower()
            if typed in known:
                return known[typed]

    # -- commands ----------------------------------------------------------------------------------------------

    def _set_system(self, words: str) -> None:
        if self.complete:
            raise RunError("text to continue has no system prompt")
        self.system = words or None
        self._say("(system prompt set)" if words else "(no system prompt)")

    def _reset(self, _: str) -> None:
        for side in self.sides:
            side.turns.clear()
            side.left_out = 0
        self._say("(a new conversation)")

    def _retry(self, _: str) -> None:
        if not any(side.turns for side in self.sides):
            raise RunError("there is nothing to answer again yet")
        self._attempt += 1
        if self.complete:
            self._continue("", again=True)
            return
        for side in self.sides:
            while side.turns[-1].role != "user":
                side.turns.pop()
        self._answer()

    def _save(self, name: str) -> None:
        if not name:
            raise RunError("/save needs the name of a file")
        if not any(side.turns for side in self.sides):
            raise RunError("there is nothing to save yet")
        path = Path(name).expanduser()
        if path.is_dir():
            raise RunError(f"{path} is a folder; name a file")
        column = "text" if self.complete else "messages"
        check_appendable(path, column, "/save")
        sides = self.sides[:1] if self.votes is not None else self.sides  # blind, both have the same conversation
        for side in sides:
            whole = system_and(self.system, side.turns)
            said: object = "".join(m.content for m in side.turns) if self.complete else write_messages(whole)
            model = {} if self.votes is not None else {"model": side.talker.name}
            append_row(path, {column: said, **model})
        self._say(f"(saved to {path})")

    def _help(self, _: str) -> None:
        width = max(map(len, HELP))
        for name, what in HELP.items():
            self._say(f"{name:{width}}  {what}")
        self._say(HINTS)

    def _exit(self, _: str) -> None:
        raise End

    # -- the screen --------------------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        write(self._out, text)
        self._out.flush()
