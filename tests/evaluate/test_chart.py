"""A curve in the terminal."""

from __future__ import annotations

import math

import pytest

from prefopt.runs.history import Curve
from prefopt.runs.table import DOTS, MARK, chart


def dots(lines: list[str], margin: int) -> set[tuple[int, int]]:
    """The (column, row) of every dot, as the eye sees them."""
    found = set()
    for y, line in enumerate(lines):
        for x, sign in enumerate(line[margin:]):
            bits = ord(sign) - 0x2800
            found |= {
                (2 * x + c, 4 * y + r) for r in range(4) for c in range(2) if 0 <= bits < 256 and bits & DOTS[r][c]
            }
    return found


def test_a_line_is_drawn_where_its_points_are() -> None:
    steps = list(range(1, 40))
    lines = chart(Curve(steps, [float(s) for s in steps]), width=24, height=5)
    assert len(lines) == 6 and all(len(line) == 24 for line in lines)
    assert lines[0].startswith("39 ") and lines[4].startswith(" 1 ") and lines[5] == "   step 1             39"
    found = dots(lines[:5], 3)
    assert {(0, 19), (41, 0)} <= found
    by_column = {x: [y for c, y in found if c == x] for x in range(42)}
    assert all(by_column.values()), "no gap"
    assert all(abs(sum(ys) / len(ys) - 19 * (1 - x / 41)) < 1 for x, ys in by_column.items())


def test_noise_within_a_column_is_drawn_as_its_mean() -> None:
    steps = list(range(4000))
    lines = chart(Curve(steps, [0.0, *([1.0, 3.0] * 2000)][:4000]), width=30, height=6)
    found = {y for x, y in dots(lines[:6], 2) if x > 0}
    assert found <= {11, 12, 13, 7, 8, 9, 10}, "around the middle of 3 and 1, from 0 to 3"


def test_marks_stand_at_their_values() -> None:
    lines = chart(Curve([1, 10], [0.0, 1.0]), Curve([10], [2.0]), title="loss", width=12, height=3)
    assert lines[0] == "loss" and lines[1].startswith("2 ") and lines[1].endswith(MARK)


@pytest.mark.parametrize(
    "values", [[], [math.nan], [1.0], [1.0, 1.0, 1.0], [1.0, math.inf, 2.0], [1.00001, 1.00002]], ids=str
)
def test_curves_at_their_limits_are_drawn(values: list[float]) -> None:
    lines = chart(Curve(list(range(len(values))), values), title="t", width=20, height=4)
    assert lines[0] == "t" and len(lines) == (6 if any(map(math.isfinite, values)) else 1)
    assert len({len(line) for line in lines[1:]}) <= 1


def test_numbers_at_the_axis_are_told_apart() -> None:
    lines = chart(Curve([1, 2], [1.00001, 1.00002]), width=20, height=2)
    assert lines[0].split()[0] != lines[1].split()[0]
