"""A conversation in the terminal with one model, or with two that answer one after another.

Input is a message, or a command that begins with a slash. An answer is shown as it streams; Ctrl-C stops it and nothing
else, and the part shown so far stays in the conversation.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TextIO

from prefopt.chat.input import Interrupts, LineReader
from prefopt.core.files import expanded, making_room
from prefopt.core.options import nearest
from prefopt.core.terminal import write
from prefopt.data.layouts.messages import write_messages
from prefopt.data.pictures import BadPicture, read_picture
from prefopt.errors import RunError, UserError
from prefopt.generate.chat_model import ChatModel, ContextLengthError, Messages, drop_oldest, with_system
from prefopt.records import PICTURE, Message, Picture

TIERS = {"a": [[0], [1]], "b": [[1], [0]], "tie": [[0, 1]]}
VOTES = {"a": "a", "b": "b", "t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}
COMMANDS = {
    "/system TEXT": "set the system prompt; without TEXT remove it",
    "/image PATH": "show the model a picture, with the next message",
    "/reset": "forget the conversation; the system prompt stays",
    "/retry": "answer the last message again",
    "/save FILE": "append the conversation to a file of JSON lines, for --data",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does",
}
HINTS = (
    'a line that ends in \\ continues in the next; """ begins and ends a block of lines; // sends a message with a'
    " slash; Ctrl-C stops an answer"
)


class VoteFile:
    """A file of JSON lines in the canonical layout, to which each vote is appended at once."""

    def __init__(self, path: Path, models: Sequence[str]) -> None:
        """Raises :class:`RunError` where the file holds rows of another kind, or ends within a row."""
        self.path = path
        self.wins = dict.fromkeys(models, 0)
        self.ties = 0
        check_appendable(path, "responses", "--votes")

    def add(self, prompt: str | Sequence[Message], answers: Sequence[str], models: Sequence[str], vote: str) -> None:
        """A vote ``a``, ``b`` or ``tie`` on two answers in the order they were shown. ``prompt`` is a conversation, or
        text that they continue. Raises :class:`RunError`."""
        text = isinstance(prompt, str)
        row = {
            "prompt": prompt if isinstance(prompt, str) else write_messages(prompt),
            "responses": [answer if text else write_messages([Message("assistant", answer)]) for answer in answers],
            "tiers": TIERS[vote],
            "models": list(models),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_row(self.path, row)
        if vote == "tie":
            self.ties += 1
        else:
            self.wins[models["ab".index(vote)]] += 1

    def summary(self) -> str:
        """The wins of each model in one line."""
        total = sum(self.wins.values()) + self.ties
        if not total:
            return "no votes"
        won = ", ".join(f"{name} won {count}" for name, count in self.wins.items())
        return f"{total} vote{'s' * (total > 1)}: {won}, ties {self.ties}; written to {self.path}"


def check_appendable(path: Path, column: str, option: str) -> None:
    """Refuse a folder, and a file without ``column`` or that ends within a row. Raises :class:`RunError`."""
    if path.is_dir():
        raise RunError(f"{option} {path} is a folder; name a file")
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RunError(f"{option} {path} cannot be read ({error.strerror}); name another file") from error
    if not data.strip():
        return
    try:
        row = json.loads(data.splitlines()[-1])
    except ValueError:
        row = None
    if not data.endswith(b"\n") or not isinstance(row, dict) or column not in row:
        raise RunError(f"{option} {path} holds other rows than this command writes; name another file")


def append_row(path: Path, row: object) -> None:
    """Append a row to a file of JSON lines; it is on disk when this returns. Raises :class:`RunError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); {making_room(error)}name another file"
        ) from error


@dataclass(slots=True)
class Participant:
    """A model with its conversation, without the system message; ``dropped``: messages that last exceeded the
    context."""

    model: ChatModel
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0


def fitting_answer(model: ChatModel, messages: Messages, attempt: int) -> tuple[int, Iterator[str]]:
    """The answer to a conversation, which begins here, and how many of its oldest messages were left out to fit the
    model's context. Raises :class:`ContextLengthError` where the last message alone does not."""
    kept = messages
    while True:
        chunks = model.answer(kept, attempt)
        try:
            first = next(chunks, "")
        except ContextLengthError:
            if (shorter := drop_oldest(kept)) is None:
                raise
            kept = shorter
        else:
            return len(messages) - len(kept), chain([first], chunks)


class Chat:
    """``votes``: two models answer blind, as A and B, and the better answer continues both conversations.

    ``complete``: input is text that the model continues, without turns. ``seed`` decides who is A.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        reader: LineReader,
        out: TextIO,
        *,
        system: str | None = None,
        complete: bool = False,
        votes: VoteFile | None = None,
        seed: int = 0,
    ) -> None:
        self.participants = [Participant(model) for model in models]
        self.system, self.complete, self.votes = system, complete, votes
        self._reader, self._out = reader, out
        self._interrupts = Interrupts()
        self._order = random.Random(seed)
        self._attempt = 0
        self._pictures: list[Picture] = []

    def run(self) -> None:
        """Talk until the input ends, or the user leaves."""
        with self._interrupts.caught():
            while True:
                try:
                    self._handle(self._read("> ").encode("utf-8", "replace").decode())
                except EOFError:
                    self._say("")
                    break
                except KeyboardInterrupt:
                    self._interrupts.taken()
                    self._say("\n(Ctrl-D ends)")
                except UserError as error:
                    self._say(f"error: {' '.join(str(error).split())}")
            if self.votes is not None:
                self._say(self.votes.summary())

    def _read(self, prompt: str) -> str:
        with self._interrupts.section():
            return self._reader.read(prompt)

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            names = [command.split()[0] for command in COMMANDS]
            if name not in names:
                raise RunError(f"there is no {name}{nearest(name, names) or '; /help lists commands'}")
            getattr(self, f"_{name[1:]}")(argument.strip())
            return
        text = line.removeprefix("/") if line.startswith("//") else line
        self._attempt = 0
        if self.complete:
            self._continue(text)
        elif text.strip():
            pictures, self._pictures = tuple(self._pictures), []
            content = PICTURE * len(pictures) + text
            for participant in self.participants:
                participant.messages.append(Message("user", content, pictures=pictures))
            self._answer()

    def _round(self, chunks: Callable[[Participant], Iterator[str]]) -> tuple[list[Participant], list[str]]:
        """One answer of each participant, blind ones in random order."""
        order = list(self.participants)
        if self.votes is not None:
            self._order.shuffle(order)
        answers = []
        for label, participant in zip("AB", order, strict=False):
            if len(order) > 1:
                self._say(f"[{label if self.votes is not None else participant.model.name}]")
            answers.append(self._show(participant, chunks))
        return order, answers

    def _show(self, participant: Participant, chunks: Callable[[Participant], Iterator[str]]) -> str:
        """Show an answer as it streams, until it ends or Ctrl-C; returns the text shown."""
        parts: list[str] = []
        try:
            with self._interrupts.section():
                for chunk in chunks(participant):
                    parts.append(chunk)
                    self._write(chunk)
                    self._interrupts.check()
        except KeyboardInterrupt:
            self._interrupts.taken()
            self._write(" (stopped)")
        self._write("\n")
        return "".join(parts)

    def _answer(self) -> None:
        """Everyone answers the last message, which is taken back where no answer comes."""
        prompt = with_system(self.system, self.participants[0].messages)
        try:
            order, answers = self._round(self._answer_chunks)
        except BaseException:
            self._take_back()
            raise
        answers = [answer.strip() for answer in answers]
        if not any(answers):
            self._take_back()
            self._say("(no answer; the message is removed)")
            return
        for participant, answer in zip(order, answers, strict=True):
            participant.messages.append(Message("assistant", answer))
        if self.votes is not None:
            self._vote(order, prompt, answers)

    def _take_back(self) -> None:
        """Forget the last message of the user and what followed; its pictures go with the next one."""
        for participant in self.participants:
            while participant.messages and (taken := participant.messages.pop()):
                if taken.role == "user":
                    self._pictures = list(taken.pictures)
                    break

    def _answer_chunks(self, participant: Participant) -> Iterator[str]:
        dropped, chunks = fitting_answer(
            participant.model, with_system(self.system, participant.messages), self._attempt
        )
        if dropped > participant.dropped:
            self._say(f"(the context is full: the {dropped} oldest turns are left out)")
            participant.dropped = dropped
        yield from chunks

    def _continue(self, text: str, *, again: bool = False) -> None:
        """Everyone continues ``text``, or what they wrote last where it is empty; ``again``: what that began with."""
        if not text and not all(participant.messages for participant in self.participants):
            raise RunError("there is nothing to continue yet: type the beginning of a text")

        def before(participant: Participant) -> str:
            return text or "".join(m.content for m in participant.messages[: 1 if again else None])

        def chunks(participant: Participant) -> Iterator[str]:
            if text or again:
                self._write(before(participant))
            return participant.model.complete(before(participant), self._attempt)

        order, answers = self._round(chunks)
        prompt = before(order[0])
        for participant, answer in zip(order, answers, strict=True):
            participant.messages = [Message("user", before(participant)), Message("assistant", answer)]
        if self.votes is not None:
            self._vote(order, prompt, answers)

    def _vote(self, order: Sequence[Participant], prompt: str | Messages, answers: Sequence[str]) -> None:
        """Ask which answer is better; it continues both conversations."""
        assert self.votes is not None
        vote = "skip"
        try:
            if answers[0] == answers[1]:
                self._say("(both answers are the same: no vote)")
            elif not all(answer.strip() for answer in answers):
                self._say("(one answer is empty: no vote)")
            else:
                while (line := self._read("better: a, b, tie, or skip? ").strip().lower()) not in VOTES:
                    pass
                vote = VOTES[line]
            if vote in TIERS:
                self.votes.add(prompt, answers, [participant.model.name for participant in order], vote)
        finally:  # also without a vote: both continue with the same conversation
            kept = answers[1] if vote == "b" or not answers[0].strip() else answers[0]
            for participant in self.participants:
                participant.messages[-1] = Message("assistant", kept)

    # -- commands: each is the method of its name --------------------------------------------------------------

    def _system(self, text: str) -> None:
        if self.complete:
            raise RunError("text to continue has no system prompt")
        self.system = text or None
        self._say("(system prompt set)" if text else "(no system prompt)")

    def _image(self, path: str) -> None:
        if self.complete:
            raise RunError("text to continue has no pictures")
        if not path:
            raise RunError("/image needs the path of a picture")
        try:
            picture = read_picture(str(expanded(path)) if path.startswith("~") else path)
        except BadPicture as bad:
            raise RunError(str(bad)) from None
        self._pictures.append(picture)
        self._say(f"({picture.size} pixels, shown with the next message)")

    def _reset(self, _: str) -> None:
        self._pictures.clear()
        self.participants = [Participant(participant.model) for participant in self.participants]
        self._say("(a new conversation)")

    def _retry(self, _: str) -> None:
        if not any(participant.messages for participant in self.participants):
            raise RunError("there is nothing to answer again yet")
        self._attempt += 1
        if self.complete:
            self._continue("", again=True)
            return
        for participant in self.participants:
            while participant.messages[-1].role != "user":
                participant.messages.pop()
        self._answer()

    def _save(self, name: str) -> None:
        if not name:
            raise RunError("/save needs the name of a file")
        if not any(participant.messages for participant in self.participants):
            raise RunError("there is nothing to save yet")
        path = expanded(name)
        column = "text" if self.complete else "messages"
        check_appendable(path, column, "/save")
        blind = self.votes is not None  # then both have the same conversation
        for participant in self.participants[:1] if blind else self.participants:
            messages = with_system(self.system, participant.messages)
            value: object = "".join(m.content for m in messages) if self.complete else write_messages(messages)
            append_row(path, {column: value} if blind else {column: value, "model": participant.model.name})
        self._say(f"(saved to {path})")

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for name, text in COMMANDS.items():
            self._say(f"{name:{width}}  {text}")
        self._say(HINTS)

    def _exit(self, _: str) -> None:
        raise EOFError

    def _say(self, line: str) -> None:
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        write(self._out, text)
        self._out.flush()
