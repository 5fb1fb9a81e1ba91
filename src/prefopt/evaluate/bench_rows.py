"""Rows of reward benchmarks, recognised by their fields: RewardBench, RewardBench 2, RM-Bench, JudgeBench.

>>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "hep-python", "id": 7}
>>> found = parse_row(row, 1, "rows")
>>> found.benchmark, found.subset, found.chosen, found.rejected
('RewardBench', 'hep-python', ('4',), ('5',))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prefopt.data.files.sources import find_sources
from prefopt.data.validate import Problem, describe, refuse, refused_rows
from prefopt.errors import DataError
from prefopt.records import Comparison, Message, Response

REWARD_BENCH = "RewardBench"
REWARD_BENCH_2 = "RewardBench 2"
RM_BENCH = "RM-Bench"
JUDGE_BENCH = "JudgeBench"
Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One prompt with its right and wrong answers. ``id``: as the file has it, as text."""

    benchmark: str
    subset: str
    id: str
    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    row: int
    file: str

    def comparison(self) -> Comparison:
        """The prompt as a user's turn, with all answers, the right ones first."""
        sides = tuple(Response((Message("assistant", text),)) for text in (*self.chosen, *self.rejected))
        return Comparison((Message("user", self.prompt),), sides, (), self.row, self.file)


class _Bad(Exception):
    def __init__(self, kind: str, what: str) -> None:
        self.kind, self.what = kind, what


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _Bad("missing field", f"{name} is {_shown(value)}, not text")
    return value


def _texts(row: Row, name: str, count: int | None = None) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise _Bad("missing field", f"{name} is {_shown(value)}, not a list of texts")
    if count is not None and len(value) != count:
        raise _Bad("wrong number of answers", f"{name} has {len(value)}, not {count}")
    return tuple(value)


def _shown(value: object) -> str:
    return "absent" if value is None else f"{value!r:.40}"


def _reward_bench(row: Row, number: int, file: str) -> BenchRow:
    sides = (_text(row, "chosen"),), (_text(row, "rejected"),)
    return BenchRow(REWARD_BENCH, _text(row, "subset"), _id(row), _text(row, "prompt"), *sides, number, file)


def _reward_bench_2(row: Row, number: int, file: str) -> BenchRow:
    sides = _texts(row, "chosen"), _texts(row, "rejected")
    for name, found in zip(("num_correct", "num_incorrect"), sides, strict=True):
        if isinstance(row.get(name), int) and row[name] != len(found):
            raise _Bad("wrong number of answers", f"{name} is {row[name]}, and there are {len(found)}")
    subset = _text(row, "subset")
    if subset.lower() == TIES:
        kind, _, prompt = _id(row).partition(":")
        if kind not in ("ref", "tied") or not prompt:
            raise _Bad("unknown id", f"id is {_id(row)!r:.40}; of ties it is ref:N or tied:N")
        if kind == "tied" and len(sides[0]) < 2:
            raise _Bad("wrong number of answers", "a tied prompt has at least two right answers")
    return BenchRow(REWARD_BENCH_2, subset, _id(row), _text(row, "prompt"), *sides, number, file)


def _rm_bench(row: Row, number: int, file: str) -> BenchRow:
    sides = _texts(row, "chosen", STYLES), _texts(row, "rejected", STYLES)
    return BenchRow(RM_BENCH, _text(row, "domain"), _id(row), _text(row, "prompt"), *sides, number, file)


def _judge_bench(row: Row, number: int, file: str) -> BenchRow:
    label = _text(row, "label").replace(" ", "")
    if label not in ("A>B", "B>A"):
        raise _Bad("unknown label", f"label is {label!r:.40}, neither A>B nor B>A")
    sides = [(_text(row, "response_A"),), (_text(row, "response_B"),)]
    better, worse = sides if label == "A>B" else sides[::-1]
    name = row.get("pair_id")
    return BenchRow(JUDGE_BENCH, _text(row, "source"), str(name), _text(row, "question"), better, worse, number, file)


def _id(row: Row) -> str:
    return str(row.get("id", ""))


TIES = "ties"
STYLES = 3
"""Answers of each side of a row of RM-Bench: concise, detailed, detailed with Markdown."""
FIELDS: dict[str, tuple[str, ...]] = {
    JUDGE_BENCH: ("question", "response_A", "response_B", "label"),
    RM_BENCH: ("prompt", "chosen", "rejected", "domain"),
    REWARD_BENCH: ("prompt", "chosen", "rejected", "subset"),
}
"""The fields that a row of each layout has; lists of answers tell RewardBench 2 from RewardBench."""
_READERS: dict[str, Callable[[Row, int, str], BenchRow]] = {
    JUDGE_BENCH: _judge_bench,
    RM_BENCH: _rm_bench,
    REWARD_BENCH: _reward_bench,
    REWARD_BENCH_2: _reward_bench_2,
}


def parse_row(row: object, number: int, file: str) -> BenchRow | Problem:
    """A row of a benchmark, or why it is none."""
    if isinstance(row, DataError):
        return Problem("unreadable", number, row.what, file)
    if not isinstance(row, Mapping):
        return Problem("no object", number, f"is {_shown(row)}", file)
    name = next((name for name, fields in FIELDS.items() if all(field in row for field in fields)), None)
    if name is None:
        nearest = max(FIELDS, key=lambda one: sum(field in row for field in FIELDS[one]))
        lacking = [field for field in FIELDS[nearest] if field not in row]
        return Problem("unknown layout", number, f"lacks {', '.join(lacking)} of {nearest}'s layout", file)
    if name == REWARD_BENCH and isinstance(row["chosen"], list):
        name = REWARD_BENCH_2
    try:
        return _READERS[name](row, number, file)
    except _Bad as bad:
        return Problem(bad.kind, number, bad.what, file)


@dataclass(frozen=True, slots=True)
class BenchRows:
    """All rows of some files. ``read``: rows in them, those that were left out too; ``problems`` names these."""

    rows: list[BenchRow]
    read: int
    problems: list[Problem]

    @property
    def left_out(self) -> str | None:
        """A line on rows that were left out."""
        if not self.problems:
            return None
        return f"{refused_rows(self.problems)} of {self.read} rows left out: {describe(self.problems)}"


def read_rows(names: Sequence[str], *, skip: bool) -> BenchRows:
    """The rows of files. Raises :class:`DataError` for rows that cannot be used, duplicates among them, unless they are
    to be skipped, and where no row is left."""
    found: list[BenchRow] = []
    problems: list[Problem] = []
    read = 0
    for row in _parsed(names):
        read += 1
        if isinstance(row, Problem):
            problems.append(row)
        else:
            found.append(row)
    found, duplicates = _once(found)
    problems += duplicates
    if problems and not skip:
        raise refuse(problems, read)
    if not found:
        layouts = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items())
        raise DataError(f"--data: none of {read} rows is a benchmark's ({layouts})")
    return BenchRows(found, read, problems)


def _parsed(names: Sequence[str]) -> Iterator[BenchRow | Problem]:
    for source in find_sources(names):
        for number, row in enumerate(source.rows(keep_going=True), 1):
            yield parse_row(row, number, source.name)


def _once(rows: Sequence[BenchRow]) -> tuple[list[BenchRow], list[Problem]]:
    """The rows without those that repeat another, such as of a file that holds all others."""
    seen: dict[tuple[object, ...], BenchRow] = {}
    problems = []
    for row in rows:
        first = seen.setdefault((row.benchmark, row.subset, row.id, row.prompt, row.chosen, row.rejected), row)
        if first is not row:
            problems.append(Problem("duplicate row", row.row, f"is row {first.row} of {first.file} again", row.file))
    return list(seen.values()), problems
