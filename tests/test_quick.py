"""tests/quick.txt, which ``make quick`` runs: tests that exist, of every room."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_its_tests_exist_and_every_room_has_some() -> None:
    names = (TESTS / "quick.txt").read_text("utf-8").splitlines()
    assert len(set(names)) == len(names)
    for name in names:
        file, _, function = name.partition("::")
        path = TESTS.parent / file
        assert path.exists(), f"tests/quick.txt: there is no {file}"
        assert not function or re.search(rf"^def {function}\(", path.read_text("utf-8"), re.M), name
    rooms = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert rooms == {room for name in names if (room := name.split("/")[1]) in rooms}
