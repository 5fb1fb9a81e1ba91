"""A curve in the terminal, drawn with the dots of braille signs.

>>> from prefopt.train.history import Curve
>>> print("\\n".join(chart(Curve([1, 2, 3, 4], [1.0, 0.5, 0.25, 0.125]), width=22, height=3)))
    1 ⠑⠢⢄⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀⠀
      ⠀⠀⠀⠉⠒⠤⣀⣀⠀⠀⠀⠀⠀⠀⠀⠀
0.125 ⠀⠀⠀⠀⠀⠀⠀⠀⠉⠉⠒⠒⠤⠤⢄⣀
      step 1         4
"""

from __future__ import annotations

import math

from prefopt.train.history import Curve

# Bits of a braille sign by its rows, from the top, and its two columns.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARK = "●"


def chart(
    curve: Curve, marks: Curve | None = None, *, title: str = "", unit: str = "step", width: int = 60, height: int = 8
) -> list[str]:
    """Lines that show ``curve``, with ``marks`` (held-out points) as ●. ``width`` and ``height`` are signs in all.

    Two steps share a column of dots where there are more of them than columns: then their mean is drawn. A curve
    without points gives only the title.
    """
    lines = [title] if title else []
    points = list(zip(curve.steps, curve.values, strict=True))
    others = list(zip(marks.steps, marks.values, strict=True)) if marks else []
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return lines
    seen = [y for _, y in finite + others if math.isfinite(y)]
    low, high = min(seen), max(seen)
    names = _numbers(high, low)
    room = max(4, width - len(names[0]) - 1)
    first, last = min(x for x, _ in finite + others), max(x for x, _ in finite + others)
    across, down = 2 * room - 1, 4 * height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        column = round((x - first) / (last - first) * across) if last > first else 0
        row = round((high - y) / (high - low) * down) if high > low else down // 2
        return column, row

    cells = [[0] * room for _ in range(height)]
    before: tuple[int, int] | None = None
    for column, row in _means([place(x, y) for x, y in finite]):
        for c, r in _between(before, (column, row)):
            cells[r // 4][c // 2] |= DOTS[r % 4][c % 2]
        before = column, row
    signs = [[chr(0x2800 + bits) for bits in line] for line in cells]
    for x, y in others:
        if math.isfinite(y):
            column, row = place(x, y)
            signs[row // 4][column // 2] = MARK
    margins = [names[0], *[" " * len(names[0])] * (height - 2), names[1]] if height > 1 else [names[0]]
    lines += [f"{name} {''.join(line)}" for name, line in zip(margins, signs, strict=True)]
    left, right = f"{unit} {first}", f"{last}"
    return [*lines, " " * (len(names[0]) + 1) + left + right.rjust(room - len(left))]


def _means(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """One point per column of dots."""
    rows: dict[int, list[int]] = {}
    for column, row in points:
        rows.setdefault(column, []).append(row)
    return [(column, round(sum(many) / len(many))) for column, many in sorted(rows.items())]


def _between(start: tuple[int, int] | None, end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line, without its start."""
    if start is None:
        return [end]
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(1, steps + 1)
    ]


def _numbers(high: float, low: float) -> tuple[str, str]:
    """The ends of an axis, equally wide, with as many digits as tell them apart."""
    digits = 3
    while f"{high:.{digits}g}" == f"{low:.{digits}g}" and high != low and digits < 9:
        digits += 1
    top, bottom = f"{high:.{digits}g}", f"{low:.{digits}g}"
    width = max(len(top), len(bottom))
    return top.rjust(width), bottom.rjust(width)
