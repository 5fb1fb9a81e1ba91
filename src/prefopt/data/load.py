"""From files to groups, with every row accounted for: what a method calls.

``rows read == rows kept + rows refused``, and a run says all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefopt.data.formats import Rows, read_comparisons
from prefopt.data.render import Renderer
from prefopt.data.split import Indices, split_by_prompt
from prefopt.data.table import GroupTable, Part, TableBuilder
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import Problem, describe, refuse, refused_rows, validate
from prefopt.errors import ConfigError, DataError

OnBadRow = Literal["refuse", "skip"]


@dataclass(slots=True)
class GroupSet:
    """Groups of all files in order, and what became of every row.

    ``template`` is the plain layout's chat template where the tokenizer has none and conversations were rendered with
    it: a trained model should carry it.
    """

    groups: GroupTable = field(default_factory=GroupTable)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    template: str | None = None

    @property
    def kept(self) -> int:
        """Rows that became groups."""
        return len(self.groups)

    @property
    def refused(self) -> int:
        """Rows that did not; ``problems`` says why."""
        return refused_rows(self.problems)

    @property
    def truncated(self) -> int:
        """Groups that lost tokens of their prompt or of a response."""
        return int(self.groups.truncated_G.sum())

    def summary(self) -> list[str]:
        """Lines that a run prints: rows read, kept and refused, rows truncated, notes."""
        lines = [f"{self.read} rows read, {self.kept} kept, {self.refused} refused"]
        if self.problems:
            lines.append(f"refused: {describe(self.problems)}")
        if self.truncated:
            prompts = int((self.groups.column("prompt_cut_G") > 0).sum())
            responses = int((self.groups.column("cut_N") > 0).sum())
            lines.append(f"{self.truncated} of {self.kept} rows truncated ({prompts} prompts, {responses} responses)")
        return lines + self.notes

    def split(self, fraction: float, seed: int) -> tuple[Indices, Indices]:
        """Indices of groups (train, held out), no prompt on both sides; see :func:`split_by_prompt`."""
        return split_by_prompt(self.groups.prompt_key_G, fraction, seed)


def load_groups(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_bad_row: OnBadRow = "refuse",
    add_eos: bool = True,
) -> GroupSet:
    """Read, check and render files of comparisons.

    Raises :class:`DataError` for a file that cannot be read, for bad rows under ``on_bad_row="refuse"`` (all of them
    are named at once), and where no row is left; :class:`ConfigError` and :class:`ModelError` as :class:`Renderer`.
    """
    if not files:
        raise ConfigError("no data file is named; use --data FILE")
    seen = [str(Path(f).resolve()) for f in files]
    if twice := [str(f) for f, s in zip(files, seen, strict=True) if seen.count(s) > 1]:
        raise ConfigError(f"--data names {twice[0]} twice")
    rows = [read_comparisons(file) for file in files]
    return build_groups(rows, tokenizer, max_length=max_length, on_bad_row=on_bad_row, add_eos=add_eos)


def build_groups(
    rows: Sequence[Rows],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    on_bad_row: OnBadRow = "refuse",
    add_eos: bool = True,
) -> GroupSet:
    """As :func:`load_groups`, from rows that are in memory already (see :func:`parse_comparisons`)."""
    if on_bad_row not in ("refuse", "skip"):
        raise ConfigError(f"--on-bad-row {on_bad_row} should be refuse or skip")
    renderer = Renderer(tokenizer, max_length=max_length, add_eos=add_eos)
    result = GroupSet(read=sum(r.read for r in rows), notes=[note for r in rows for note in r.notes])
    conversations = False
    for number, source in enumerate(rows):
        good, bad = validate(source.comparisons)
        builder = TableBuilder()
        result.problems += [*source.problems, *bad]
        for comparison, rendered in zip(good, renderer.render_all(good), strict=True):
            if isinstance(rendered, Problem):
                result.problems.append(rendered)
                continue
            builder.add(
                rendered.group,
                prompt_key=comparison.prompt_key,
                prompt_cut=rendered.prompt_cut,
                cuts=rendered.responses_cut,
            )
            conversations = conversations or not comparison.text
        result.groups += GroupTable([Part(builder.columns(), source=number)])
    result.notes += renderer.notes
    if conversations:
        result.template = renderer.template
    if result.problems and on_bad_row == "refuse":
        raise refuse(result.problems, result.read)
    if not result.groups:
        raise DataError(f"none of {result.read} rows can be used: {describe(result.problems)}", file=rows[0].file)
    return result
