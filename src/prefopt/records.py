"""What a row of preference data says, before any tokenizer has seen it.

>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="22", row=1)
>>> row.responses[0].text, row.tiers
('4', ((0,), (1,)))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user``, ``assistant`` or ``tool``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt: a last assistant turn, or several turns of which the assistant's are trained."""

    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """The assistant's words, turn by turn."""
        return "\n".join(m.content for m in self.messages if m.role == "assistant")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, its K responses, and what people said of them.

    ``prompt`` is a conversation, or plain text for a base model (then ``text`` is true and every message is taken as it
    stands, without a chat template). ``tiers`` lists the responses best first; responses in one tier are tied.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    tiers: tuple[tuple[int, ...], ...]
    row: int
    file: str = ""
    text: bool = False
    extra: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All (preferred, dispreferred) pairs of response indices that the tiers imply; ties give none."""
        tiers = self.tiers
        return tuple(
            (best, worse)
            for i, tier in enumerate(tiers)
            for best in tier
            for lower in tiers[i + 1 :]
            for worse in lower
        )

    @property
    def prompt_key(self) -> bytes:
        """16 bytes that name the prompt by its roles and words, white space around each message aside."""
        digest = hashlib.blake2b(digest_size=16)
        for message in self.prompt:
            for part in (message.role, message.content.strip()):
                data = part.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    @classmethod
    def pair(
        cls, prompt: Sequence[Message] | str, *, chosen: str, rejected: str, row: int, file: str = ""
    ) -> Comparison:
        """One response preferred to another; a prompt given as a string is plain text."""
        text = isinstance(prompt, str)
        turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        sides = tuple(Response((Message("assistant", side),)) for side in (chosen, rejected))
        return cls(turns, sides, ((0,), (1,)), row, file, text)
