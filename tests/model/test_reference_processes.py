"""The reference cache with several processes: raced, killed, out of disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dying import Death
from model import fake_reference
from model.fake_reference import BUDGET, SPACE, Once, committed, fill, make_groups, sums
from prefopt.core.cache_folder import clear
from prefopt.errors import CacheError, Interrupted
from prefopt.reference.blocks import list_spaces, verify
from prefopt.reference.cache import ReferenceCache


def start(
    root: Path, n: int, *, name: str = "child", delay: float = 0.0, fill_disk_after: int = 0, death: Death | None = None
) -> Any:
    """Score ``n`` groups in a process of its own; what it scores is appended to ``<name>.log`` in ``root``."""
    command = [sys.executable, str(fake_reference.__file__), str(root), str(n), name, str(delay), str(fill_disk_after)]
    command += [str(value) for value in death or ()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def scored(root: Path, name: str) -> list[list[str]]:
    """Batches that a child scored."""
    path = root / f"{name}.log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill(process: Any) -> None:
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_at_ten_operations_the_end_is_the_same(tmp_path: Path) -> None:
    """Before a batch, before a block, and between its writing and its rename: after none, one or two blocks."""
    groups = make_groups(200)
    fill(tmp_path / "whole", groups)
    root = tmp_path / "killed"
    root.mkdir()
    chance = random.Random(0)
    killed_with = []
    for n in range(10):
        before = {key.hex() for key in committed(root)}
        death = Death("block-", chance.randrange(3), chance.randrange(6))
        process = start(root, 200, name=f"run{n}", death=death)
        _, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, err
        assert not before & {key for batch in scored(root, f"run{n}") for key in batch}
        killed_with.append(len(committed(root)))
    assert killed_with == sorted(killed_with) and len(set(killed_with)) > 3
    assert 0 < killed_with[-1] < 400, killed_with
    assert fill(root, groups).responses == 400 - killed_with[-1]
    assert sums(root, groups) == sums(tmp_path / "whole", groups)
    assert not verify(root) and not list(ReferenceCache(SPACE, root).folder.glob("plan-*"))


def test_two_processes_score_each_response_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 60, name=name, delay=0.01) for name in ("one", "two")]
    results = [process.communicate(timeout=120) for process in processes]
    assert sorted(out for out, _ in results) == ["0", "120"], results
    keys = [key for name in ("one", "two") for batch in scored(tmp_path, name) for key in batch]
    assert len(keys) == len(set(keys)) == 120
    groups = make_groups(60)
    fill(tmp_path / "alone", groups)
    assert sums(tmp_path, groups) == sums(tmp_path / "alone", groups)


def test_a_busy_space_can_be_read_and_waited_for_and_not_cleared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start(tmp_path, 60, delay=0.2)
    try:
        wait_for(lambda: len(committed(tmp_path)) > 0, process)
        with pytest.raises(CacheError, match="in use"):
            clear(tmp_path)
        assert list_spaces(tmp_path)[0].responses > 0
        with pytest.raises(Interrupted):
            ReferenceCache(SPACE, tmp_path).fill(make_groups(60), pytest.fail, token_budget=BUDGET, stop=Once(1))
        assert "waiting for it" in caplog.text
    finally:
        kill(process)
    clear(tmp_path)  # the lock died with its holder
    assert not list_spaces(tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_was_stored(tmp_path: Path) -> None:
    process = start(tmp_path, 60, fill_disk_after=10)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and not err
    assert "File too large" in out and "free some space" in out and "\n" not in out
    stored = {key.hex() for key in committed(tmp_path)}
    assert stored == {key for batch in scored(tmp_path, "child") for key in batch} and len(stored) > 10
    groups = make_groups(60)
    assert fill(tmp_path, groups).responses == 120 - len(stored)
    fill(tmp_path / "whole", groups)
    assert sums(tmp_path, groups) == sums(tmp_path / "whole", groups)
