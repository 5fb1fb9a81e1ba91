"""What a row of preference data says, before any tokenizer has seen it.

>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="22", row=1)
>>> row.responses[0].text, row.tiers
('4', ((0,), (1,)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


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

    ``prompt`` is a conversation, or plain text for a base model (then ``text`` is true and every message is
    taken as it stands, without a chat template). ``tiers`` lists the responses best first; responses in one tier are tied.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    tiers: tuple[tuple[int, ...], ...]
    row: int
    file: str = ""
    text: bool = False
    extra: dict[str, object] = field(default_factory=dict, compare=False)

    @classmethod
    def pair(
        cls, prompt: Sequence[Message] | str, *, chosen: str, rejected: str, row: int, file: str = ""
    ) -> Comparison:
        """One response preferred to another; a prompt given as a string is plain text."""
        text = isinstance(prompt, str)
        turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        sides = tuple(Response((Message("assistant", side),)) for side in (chosen, rejected))
        return cls(turns, sides, ((0,), (1,)), row, file, text)
