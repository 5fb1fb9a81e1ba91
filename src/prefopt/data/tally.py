"""What the rows of a file are: how many responses, what is said of them, what the conversations hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from prefopt.data.want import Want
from prefopt.records import Comparison


def stated(c: Comparison) -> Want:
    """What a row says by itself: what a run could take from it without inventing anything."""
    if not c.responses:
        return "prompts"
    if c.labels is not None and not c.votes and len(c.tiers) < 2:
        return "labels"
    if len(c.responses) > 1 and (c.tiers or c.votes is not None or c.scores is not None):
        return "pairs"
    return "demonstrations"


@dataclass(slots=True)
class Tally:
    """Counts of one file. ``rows`` = ``usable`` + ``refused`` + ``left_out`` (all responses tied: no fault).

    ``responses``: rows by their number of responses; ``stated``: rows by what they say. ``pairs`` and ``ties`` (rows
    with a tie among their responses) count what is said; ``desirable`` and ``undesirable`` are labels.
    """

    file: str
    layout: str = ""
    rows: int = 0
    usable: int = 0
    refused: int = 0
    left_out: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    stated: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    ties: int = 0
    scored: int = 0
    desirable: int = 0
    undesirable: int = 0
    multi_turn: int = 0
    multi_turn_responses: int = 0
    system: int = 0
    tools: int = 0
    reasoning: int = 0
    text: int = 0

    def add(self, c: Comparison) -> None:
        """One row that could be read."""
        self.responses[len(c.responses)] += 1
        self.stated[stated(c)] += 1
        self.pairs += len(c.pairs)
        self.ties += any(len(tier) > 1 for tier in c.tiers)
        self.scored += c.scores is not None
        self.desirable += sum(c.labels or ())
        self.undesirable += len(c.labels or ()) - sum(c.labels or ())
        answers = [m for r in c.responses for m in r.messages]
        self.multi_turn += any(m.role == "assistant" for m in c.prompt)
        self.multi_turn_responses += any(len(r.messages) > 1 for r in c.responses)
        self.system += any(m.role == "system" for m in c.prompt)
        self.tools += bool(c.tools) or any(m.tool_calls or m.role == "tool" for m in (*c.prompt, *answers))
        self.reasoning += any(m.reasoning or "<think>" in m.content for m in answers)
        self.text += c.text

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        found: dict[str, object] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["responses"] = {str(k): n for k, n in sorted(self.responses.items())}
        return found | {"stated": dict(self.stated)}
