"""Processes of tests are forked from one that has imported and checked everything."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from forked import CONTEXT, forked
from train.small import write_model


def _look(out: Connection, said: str) -> None:
    import shortcuts
    from prefopt.train import budget

    modules = [name for name in ("fork_server", "prefopt.methods.dpo", "peft") if name in sys.modules]
    ready = getattr(sys.modules.get("fork_server"), "READY", False)
    variables = {name: os.environ.get(name) for name in ("PREFOPT_CACHE", "MINE", "LEFT")}
    out.send((said, modules, ready, len(shortcuts._FOUND), budget.matmul_peak("cpu"), variables, str(Path.cwd())))  # type: ignore[arg-type,call-arg]


def test_a_process_begins_with_everything_imported_and_in_the_place_of_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEFT", "in the server too, where this is its first process")
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("PREFOPT_CACHE", folder)
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = forked(_look, theirs, said=folder, variables={"MINE": folder})
        said, modules, ready, checks, peak, variables, place = ours.recv()
        process.join()
        assert process.exitcode == 0 and said == folder
        assert modules == ["fork_server", "prefopt.methods.dpo", "peft"] and ready
        assert checks == (0 if Path("/dev/nvidia0").exists() else 1) and peak == 1e10
        left = "in the server too, where this is its first process" if folder == "one" else None
        assert variables == {"PREFOPT_CACHE": folder, "MINE": folder, "LEFT": left}
        assert place == str(tmp_path / folder)
        monkeypatch.delenv("LEFT", raising=False)


def _trained(out: Connection, model: str, folder: str) -> None:
    import shortcuts
    from prefopt.model import check
    from train.small import dpo, pairs

    builds: list[object] = []
    own = check.tiny_clone
    check.tiny_clone = lambda config: builds.append(config) or own(config)  # type: ignore[func-returns-value]
    dpo(model, pairs(4), Path(folder), max_steps=1)
    out.send((len(builds), len(shortcuts._FOUND)))


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="with a GPU, the server does not check")
def test_a_run_checks_the_architecture_that_the_server_has_checked_no_more(tmp_path: Path) -> None:
    found = []
    for name, changes in (("known", {}), ("other", {"num_key_value_heads": 4})):
        model = write_model(tmp_path / name, seed=1, **changes)
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = forked(_trained, theirs, model, str(tmp_path / f"{name}-out"))
        found.append(ours.recv())
        process.join()
    assert found == [(0, 1), (1, 2)]
