"""A conversation in the terminal with one model, or with two that answer one after another.

What is typed is a message, or a command that begins with a slash. An answer is shown as it comes, and Ctrl-C ends it
and nothing else; what was said until then stays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from prefopt.config.option import nearest
from prefopt.data.layouts.messages import write_messages
from prefopt.errors import RunError, UserError
from prefopt.generate.interrupts import Interrupts
from prefopt.generate.lines import LineReader
from prefopt.generate.talker import Asked, Talker, TooLong, Turns, system_and, without_oldest
from prefopt.generate.votes import TIERS, VoteFile, append_row, check_appendable
from prefopt.records import Message
from prefopt.screen import write

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

    talker: Talker
    turns: list[Message] = field(default_factory=list)
    left_out: int = 0


class Chat:
    """``votes``: two talkers answer blind, as A and B, and the better answer goes on in both conversations.

    ``complete``: what is typed is text that the model continues, without turns. ``seed`` decides who is A.
    """

    def __init__(
        self,
        talkers: Sequence[Talker],
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
        asked: Asked | None = side.talker.fit(system_and(self.system, side.turns))
        while asked is not None:
            pieces = side.talker.answer(asked, self._attempt)
            try:
                first = next(pieces, "")
            except TooLong:
                shorter = without_oldest(asked)
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

    def _vote(self, order: Sequence[Side], prompt: str | Turns, answers: Sequence[str]) -> None:
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
