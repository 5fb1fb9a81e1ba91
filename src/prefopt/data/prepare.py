"""Rows to groups in columns, a chunk at a time: checked, converted to what is wanted, rendered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prefopt.data.findings import Findings
from prefopt.data.group import Group
from prefopt.data.render import Rendered, Renderer
from prefopt.data.rendering import Rendering
from prefopt.data.table import Array, TableBuilder
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import Problem, Want, check, convert
from prefopt.records import Comparison

Row = Comparison | Problem

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became of ``rows`` rows that follow one another: columns of groups, and problems in the order of the rows.

    ``conversations``: some of the groups went through a chat template.
    """

    rows: int
    columns: dict[str, Array]
    problems: list[Problem]
    findings: Findings
    conversations: bool


class Preparer:
    """Makes chunks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering, want: Want) -> None:
        """Raises :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`."""
        self.renderer, self.want = Renderer(tokenizer, rendering), want

    def __call__(self, rows: Sequence[Row]) -> Chunk:
        """Every row becomes a group or has a problem, whichever rows it stands with."""
        problems: list[Problem] = []
        good: list[Comparison] = []
        for row in rows:
            found = [row] if isinstance(row, Problem) else check(row, self.want)
            problems += found
            if isinstance(row, Comparison) and not found:
                converted = convert(row, self.want)
                assert isinstance(converted, Comparison), "what was checked can be converted"
                good.append(converted)
        builder = TableBuilder()
        for comparison, rendered in zip(good, self._rendered(good), strict=True):
            if isinstance(rendered, Problem):
                problems.append(rendered)
                continue
            builder.add(
                rendered.group,
                prompt_key=comparison.prompt_key,
                prompt_cut=rendered.prompt_cut,
                cuts=rendered.responses_cut or None,
            )
            for group in rendered.more:
                builder.add(group, prompt_key=comparison.prompt_key)
        findings = {what: list(numbers) for what, numbers in self.renderer.findings.items()}
        self.renderer.findings.clear()
        problems.sort(key=lambda p: p.row)
        return Chunk(len(rows), builder.columns(), problems, findings, any(not c.text for c in good))

    def _rendered(self, good: Sequence[Comparison]) -> Iterator[Rendered | Problem]:
        if self.want != "prompts":
            yield from self.renderer.render_all(good)
            return
        for comparison, ids in zip(good, self.renderer.prompts(good), strict=True):
            yield ids if isinstance(ids, Problem) else Rendered(Group(ids, (), comparison.row, ()))


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in runs of so many, or fewer where they are long."""
    chunk: list[Row] = []
    room = CHUNK_CHARACTERS
    for row in rows:
        chunk.append(row)
        if isinstance(row, Comparison):
            room -= sum(len(m.content) for turns in (row.prompt, *(r.messages for r in row.responses)) for m in turns)
        if len(chunk) == CHUNK_ROWS or room <= 0:
            yield chunk
            chunk, room = [], CHUNK_CHARACTERS
    if chunk:
        yield chunk
