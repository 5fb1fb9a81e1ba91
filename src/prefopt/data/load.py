"""From files to groups, with every row accounted for: what a method calls.

``rows read == rows kept + rows refused``, and a run says all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefopt.data.formats import Rows, read_comparisons
from prefopt.data.group import Group
from prefopt.data.render import Renderer
from prefopt.data.split import split_by_prompt
from prefopt.data.tokenizer import Tokenizer
from prefopt.data.validate import Problem, describe, refuse, refused_rows, validate
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison

OnBadRow = Literal["refuse", "skip"]


@dataclass(slots=True)
class GroupSet:
    """Groups of all files in order, and what became of every row.

    ``groups[i]`` was made from ``comparisons[i]``; ``prompts_cut[i]`` and ``responses_cut[i]`` count the tokens it lost
    to ``--max-length`` from its prompt and from the end of each response. ``template`` is the plain layout's chat
    template where the tokenizer has none and conversations were rendered with it: a trained model should carry it.
    """

    groups: list[Group] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    prompts_cut: list[int] = field(default_factory=list)
    responses_cut: list[tuple[int, ...]] = field(default_factory=list)
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
        return sum(bool(p) or any(r) for p, r in zip(self.prompts_cut, self.responses_cut, strict=True))

    def summary(self) -> list[str]:
        """Lines that a run prints: rows read, kept and refused, rows truncated, notes."""
        lines = [f"{self.read} rows read, {self.kept} kept, {self.refused} refused"]
        if self.problems:
            lines.append(f"refused: {describe(self.problems)}")
        if self.truncated:
            prompts = sum(bool(p) for p in self.prompts_cut)
            responses = sum(bool(r) for row in self.responses_cut for r in row)
            lines.append(f"{self.truncated} of {self.kept} rows truncated ({prompts} prompts, {responses} responses)")
        return lines + self.notes

    def split(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of groups (train, held out), no prompt on both sides; see :func:`split_by_prompt`."""
        return split_by_prompt([c.prompt_key for c in self.comparisons], fraction, seed)


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
    for source in rows:
        good, bad = validate(source.comparisons)
        result.problems += [*source.problems, *bad]
        for comparison, rendered in zip(good, renderer.render_all(good), strict=True):
            if isinstance(rendered, Problem):
                result.problems.append(rendered)
                continue
            result.groups.append(rendered.group)
            result.comparisons.append(comparison)
            result.prompts_cut.append(rendered.prompt_cut)
            result.responses_cut.append(rendered.responses_cut)
    result.notes += renderer.notes
    if any(not c.text for c in result.comparisons):
        result.template = renderer.template
    if result.problems and on_bad_row == "refuse":
        raise refuse(result.problems, result.read)
    if not result.groups:
        raise DataError(f"none of {result.read} rows can be used: {describe(result.problems)}", file=rows[0].file)
    return result
