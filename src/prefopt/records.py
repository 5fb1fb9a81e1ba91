"""A row of preference data, before tokenization.

>>> row = Comparison.pair([Message("user", "2 + 2?")], chosen="4", rejected="22", row=1)
>>> row.responses[0].text, row.tiers, row.pairs
('4', ((0,), (1,)), ((0, 1),))
>>> row = Comparison.scored([Message("user", "2 + 2?")], ["22", "4", "four"], scores=[0, 9, 9], row=2)
>>> row.tiers, row.pairs
(((1, 2), (0,)), ((1, 0), (2, 0)))
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

ROLES = ("system", "user", "assistant", "tool")
Tiers = tuple[tuple[int, ...], ...]
"""Indices of responses, best tier first. Responses of one tier are tied."""


PICTURE = "\ufffc"
"""Stands for each picture of a message in its content: Unicode's object replacement character."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a message: its file on disk (``source``, an absolute path) or the bytes of one (``data``).

    ``digest`` is that of the bytes of the file (16 bytes), ``width`` and ``height`` are in pixels.
    """

    digest: bytes
    width: int
    height: int
    source: str = ""
    data: bytes = field(default=b"", repr=False, compare=False)

    @property
    def size(self) -> str:
        """Width and height, in words."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks for; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user``, ``assistant`` or ``tool``.

    ``reasoning`` is what a thinking model wrote before its answer. ``trained`` is false for an assistant turn of a
    response that is not trained on. A turn may be judged by itself: ``label`` is whether it is desirable, ``rejected``
    what is worse in its place, one turn or several. ``pictures`` belong to the characters :data:`PICTURE` in
    ``content``, in order; in a message without pictures that character is one like any other.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    trained: bool = True
    label: bool | None = None
    rejected: tuple[Message, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt: a last assistant turn, or several turns of which the assistant's are trained.

    ``cut``: truncated by a sampler's limit, so no end-of-turn token is trained.
    """

    messages: tuple[Message, ...]
    cut: bool = False

    @property
    def text(self) -> str:
        """The assistant's words, turn by turn."""
        return "\n".join(m.content for m in self.messages if m.role == "assistant")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, its K responses, and the judgements of them.

    ``prompt`` is a conversation, or plain text for a base model: then ``text`` is true, the prompt is one message of
    the user (empty where there is none), each response one of the assistant, and they are joined without a chat
    template. ``tools`` are the functions that the model may call, JSON objects as text.

    Judgements are any of these:

    - ``tiers``: the responses best first; those of one tier are tied. A list of the best few ends in a tier of all
      others, whose order is unknown.
    - ``scores`` [K]: a number for each response. Tiers follow from them, see :meth:`scored`.
    - ``labels`` [K]: whether each response is desirable; no response need be compared with another.
    - ``votes``: (preferred, dispreferred, weight), where they form no order: cycles, ties that are not transitive.

    With none of them the responses are demonstrations, and with no response the row is a prompt.
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    tiers: Tiers
    row: int
    file: str = ""
    text: bool = False
    extra: dict[str, object] = field(default_factory=dict, compare=False)
    scores: tuple[float, ...] | None = None
    labels: tuple[bool, ...] | None = None
    votes: tuple[tuple[int, int, float], ...] | None = None
    tools: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All (preferred, dispreferred) pairs of response indices that votes or tiers give; ties give none."""
        if self.votes is not None:
            return tuple((best, worse) for best, worse, _ in self.votes)
        tiers = self.tiers
        return tuple(
            (best, worse)
            for i, tier in enumerate(tiers)
            for best in tier
            for lower in tiers[i + 1 :]
            for worse in lower
        )

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures of the prompt, then those of the responses."""
        turns = [*self.prompt, *(m for r in self.responses for m in r.messages)]
        return tuple(picture for m in turns for picture in m.pictures)

    @property
    def prompt_key(self) -> bytes:
        """16 bytes that identify the prompt: roles, contents without surrounding white space, pictures, tools and tool
        calls, but no ids and no reasoning. A row without a prompt, such as raw text, is identified by its responses."""
        parts = [part for m in self.prompt for part in _parts(m)]
        parts += [part for tool in self.tools for part in ("tools", tool)]
        if not any(m.content.strip() or m.tool_calls for m in self.prompt):
            parts += [part for r in self.responses for m in r.messages for part in ("response", *_parts(m))]
        digest = hashlib.blake2b(digest_size=16)
        for text in parts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    @classmethod
    def pair(
        cls, prompt: Sequence[Message] | str, *, chosen: str, rejected: str, row: int, file: str = ""
    ) -> Comparison:
        """One response preferred to another; a prompt given as a string is plain text."""
        scored = cls.scored(prompt, [chosen, rejected], scores=[1, 0], row=row, file=file)
        return replace(scored, scores=None)

    @classmethod
    def scored(
        cls,
        prompt: Sequence[Message] | str,
        responses: Sequence[str],
        *,
        scores: Sequence[float],
        row: int,
        file: str = "",
    ) -> Comparison:
        """Responses with a number each, higher is better; a prompt given as a string is plain text."""
        text, given = isinstance(prompt, str), tuple(float(s) for s in scores)
        turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        sides = tuple(Response((Message("assistant", response),)) for response in responses)
        return cls(turns, sides, tiers_of(given), row, file, text, scores=given)


def tiers_of(scores: Sequence[float]) -> Tiers:
    """Indices by falling score; equal scores share a tier."""
    return tuple(tuple(i for i, s in enumerate(scores) if s == value) for value in sorted(set(scores), reverse=True))


def tiers_of_signs(signs: Mapping[tuple[int, int], int], count: int) -> Tiers:
    """The order of ``count`` responses that agrees with the sign of every pair; empty where there is none.

    ``signs[i, j]``, for i < j, is 1 where i is preferred, -1 where j is and 0 for a tie. A missing pair, a cycle and
    ties that are not transitive give no order.

    >>> tiers_of_signs({(0, 1): -1, (0, 2): 0, (1, 2): 1}, 3), tiers_of_signs({(0, 1): 1, (1, 2): 1, (0, 2): -1}, 3)
    (((1,), (0, 2)), ())
    """
    # In an order with ties, tied responses have as many wins less losses: this sort finds the only candidate.
    net = [0] * count
    for (i, j), sign in signs.items():
        net[i] += sign
        net[j] -= sign
    complete = len(signs) == count * (count - 1) // 2
    agrees = all(sign == (net[i] > net[j]) - (net[i] < net[j]) for (i, j), sign in signs.items())
    return tiers_of(net) if complete and agrees else ()


def _parts(m: Message) -> list[str]:
    calls = [part for call in m.tool_calls for part in ("call", call.name, call.arguments)]
    return [m.role, m.content.strip(), *calls, *(part for p in m.pictures for part in ("picture", p.digest.hex()))]
