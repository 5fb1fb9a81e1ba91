"""Votes between two models: a row for each in a file that every verb reads as preferences, and the tally."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefopt.data.layouts.messages import write_messages
from prefopt.errors import RunError
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
