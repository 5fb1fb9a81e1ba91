"""Every verb that reads a run, on a real run of every method: what it is for, or one line that says what to do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub
from pipeline.sweeping import frontier_config, values, write_place
from prefopt.cli import main
from prefopt.config.sweeps import MethodsConfig
from prefopt.errors import RunError
from prefopt.runs.history import read_history
from prefopt.sweeps import frontier, methods
from runs_of_all import METHODS, QUICK, RUNS, command, write_runs
from shortcuts import quick_runs_in

pytest.importorskip("matplotlib", reason="plot and report draw with it: prefopt[plot]")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]


KINDS = [
    name if name in ("dpo", "lora", "reward", "ppo", "rloo", "chain") else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every method, that nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    here = Path.cwd()
    with quick_runs_in(folder):
        os.chdir(folder)
        try:
            return write_runs(folder, list(METHODS))
        finally:
            os.chdir(here)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which verbs write, with the runs in it."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What a command prints, or the one line with which it is refused. A traceback would reach the test."""
    capsys.readouterr()
    status = main(words)
    out, err = capsys.readouterr()
    if status == 0:
        return status, out
    lines = [line for line in err.splitlines() if line.startswith("prefopt: ")]
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith("prefopt: error: "), (words, err)
    return status, lines[0]


@pytest.mark.parametrize("name", KINDS)
def test_runs_tells_of_it(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(["runs", name], capsys)
    assert status == 0 and "finished" in text
    if name == "chain":
        assert [line.split()[0] for line in text.splitlines()[1:]] == ["sft", "reward", "ppo"]
    else:
        told = {"kto": "dpo (kto)", "ranking": "dpo (plackett_luce)", "rloo": "ppo (rloo)"}
        assert re.search(rf"^method: +{re.escape(told.get(name, METHODS[name][0]))}$", text, re.M)
        assert ("reward of the policy's samples" in text) == (name in ("ppo", "rloo", "online"))
        assert ("no rows were held out" in text) == (name in ("lora", "kto", "ranking"))
    found = json.loads(said(["runs", name, "--json"], capsys)[1])
    assert [run["status"] for run in found] == ["finished"] * (3 if name == "chain" else 1)
    assert all(math.isfinite(run["training"]["loss"]) for run in found)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_drawn_and_reported(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = "3 runs" if name == "chain" else "1 run"
    assert said(["plot", name, "--output", "p.svg"], capsys) == (0, f"p.svg: {many}\n")
    assert said(["report", name, "--output", "p.html"], capsys)[0] == 0
    page = Path("p.html").read_text()
    assert "No row was held out" not in page or name not in ("ppo", "rloo", "online")
    if name == "chain":
        assert [page.count(f"<h2>{stage}</h2>") for stage in ("sft", "reward", "ppo")] == [1, 1, 1]
        assert "ppo: Reward of the policy" in page and "sft: Loss" in page


def test_runs_of_several_methods_stand_side_by_side(
    made: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "different methods" in said(["runs", *RUNS], capsys)[1]
    assert said(["plot", *RUNS, "--output", "p.png"], capsys)[0] == 0
    assert said(["report", *RUNS, "chain", "--output", "p.html"], capsys)[0] == 0
    monkeypatch.chdir(made)
    status, line = said(["report", "."], capsys)
    assert status == 2 and "holds no run of its own, but 13 runs below it: name output folders, such as " in line


@pytest.mark.parametrize("name", KINDS)
def test_a_finished_run_is_not_resumed(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "chain":  # starts again by itself, and has nothing to do
        assert said(command(name), capsys)[0] == 0
        return
    status, line = said([*command(name), "--resume"], capsys)
    assert status == 2 and "is finished; to train further, name its folder as --model" in line


def model_of(name: str) -> list[str]:
    if name == "lora":
        return ["--model", "base", "--adapter", name]
    return ["--model", "chain/ppo" if name == "chain" else name]


@pytest.mark.parametrize("name", KINDS)
def test_its_model_is_used(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = [x for x in QUICK if x not in ("--progress", "none")]
    few = ["--max-new-tokens", "3", *machine]
    works = 2 if name == "reward" else 0  # a head that gives one number writes no text
    status, line = said(["sample", *model_of(name), "--prompts", "prompts.jsonl", "--output", "s.jsonl", *few], capsys)
    assert status == works, line
    monkeypatch.setattr("sys.stdin", io.StringIO("k1: \n/exit\n"))
    status, line = said(["chat", *model_of(name), *few], capsys)
    assert status == works, line
    judged = ["--b", "base", "--prompts", "prompts.jsonl", "--judge", "length", "--output", "c.jsonl"]
    status, line = said(["compare", "--a", model_of(name)[-1], *judged, *few], capsys)
    assert status == works, line
    scored = ["score", "answers.jsonl", "--reward", model_of(name)[-1], "--output", "o.jsonl", *machine]
    status, line = said(scored, capsys)
    assert status == 2 - works, line


def test_every_verb_says_that_its_model_is_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = [x for x in QUICK if x not in ("--progress", "none")]
    implicit = ["--reward", "implicit", "--beta", "0.1", "--output", "o.jsonl", *machine]
    for words in (
        ["score", "answers.jsonl", "--model", "lora", *implicit],
        ["data", "check", "pairs.jsonl", "--model", "lora"],
        ["sample", "--model", "lora", "--prompts", "prompts.jsonl", "--output", "s.jsonl", *machine],
    ):
        status, text = said(words, capsys)
        assert status == 0 and text.startswith("lora is an adapter on base: both are loaded\n"), words


@pytest.mark.parametrize("name", KINDS)
def test_it_is_merged_and_pushed(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(name)[-1]
    status, line = said(["merge", "--model", "base", "--adapter", folder, "--output", "merged"], capsys)
    assert status == (0 if name == "lora" else 2), line
    if name != "lora":
        assert folder in line and "adapter" in line
    with hub.Hub().served() as there:
        done = hub.prefopt(there, monkeypatch, "push", folder, "--repo", "me/it", "--yes")
        assert done.status == 0, done.err
        assert "README.md" in there.repos["me/it"]


# -- folders of several runs, which hold no model of their own ------------------------------------------------------


@pytest.fixture(scope="session")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``prefopt frontier`` and ``prefopt methods`` leave behind."""
    folder = tmp_path_factory.mktemp("sweeps")
    place = write_place(folder)
    given = values(place, folder / "methods")
    rates: dict[str, Any] = {"seeds": 1, "rate_factors": ["1"], "isolate": False, "sft": ["batch_size=4"]}
    with quick_runs_in(folder):
        frontier.run(frontier_config(place, folder / "frontier", methods=["dpo:beta=0.1", "best-of:n=2"]))
        methods.run(MethodsConfig(**{**given, **rates}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs", "first"),
    [
        ("frontier", ["dpo/beta=0.1-seed0"], "frontier/dpo/beta=0.1-seed0"),
        ("methods", ["dpo/seed0-rate1", "ppo/seed0-rate1", "reward/seed0", "sft/seed0"], "methods/dpo/seed0-rate1"),
    ],
)
def test_a_folder_of_a_sweep_is_told_by_its_runs(
    name: str,
    runs: list[str],
    first: str,
    sweeps: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(sweeps)
    status, text = said(["runs", name], capsys)
    assert status == 0 and sorted(line.split()[0] for line in text.splitlines()[1:]) == runs
    status, line = said(["plot", name, "--output", str(tmp_path / "p.svg")], capsys)
    assert status == 2 and "below it: name output folders, such as " + first in line
    status, line = said(["report", name, "--output", str(tmp_path / "p.html")], capsys)
    assert (status, "such as " + first in line) == ((0, False) if name == "frontier" else (2, True))


def test_a_folder_with_models_below_it_is_no_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = [x for x in QUICK if x not in ("--progress", "none")]
    told = "below it: name one, such as chain/ppo"
    for words in (
        ["sample", "--model", "chain", "--prompts", "prompts.jsonl", "--output", "s.jsonl", *machine],
        ["chat", "--model", "chain", *machine],
        ["compare", "--a", "chain", "--b", "base", "--prompts", "prompts.jsonl", "--judge", "length", *machine],
        ["score", "answers.jsonl", "--reward", "chain", "--output", "o.jsonl", *machine],
        ["merge", "--model", "base", "--adapter", "chain", "--output", "merged"],
        ["push", "chain", "--repo", "me/it", "--yes"],
    ):
        status, line = said(words, capsys)
        assert status == 2 and line.endswith(told), line


# -- records and metrics that were damaged ---------------------------------------------------------------------------

ODD: tuple[Any, ...] = (None, "x", [], {}, [None], {"a": []}, 10**400, 1e300, float("nan"), -1, True, 0, "\ud800")


def changed(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record with each value replaced by each odd one, and those of an object in it one by one."""
    for key, value in record.items():
        for odd in ODD:
            yield {**record, key: odd}
            if isinstance(value, dict) and odd is not None:
                for inner in list(value)[:: max(1, len(value) // 3)]:
                    yield {**record, key: {**value, inner: odd}}


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_odd_values_are_told_or_read_and_never_a_traceback(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefopt.reports import page
    from prefopt.runs.listing import SORTS, as_table, in_order, list_of, run_as_json
    from prefopt.runs.table import comparison, describe

    run = place / "odd"
    shutil.copytree(place / name, run)
    record = json.loads((run / "run.json").read_text())
    whole = read_history(place / name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    template = page.template("prefopt.reports", "report.html.j2")
    monkeypatch.setattr(page, "curves", lambda runs: [])  # drawing takes longer than the rest together
    monkeypatch.setattr(page, "template", lambda *names: template)

    def readable() -> bool:
        try:
            found = read_history(run)
        except RunError as error:
            assert "\n" not in str(error) and str(run) in str(error)
            return False
        describe(found), json.dumps(run_as_json(found)), page.page([found])
        list_of([found, whole], None), as_table([found, whole]), comparison([found, whole])
        assert all(len(in_order([found, whole], sort)) == 2 for sort in SORTS)
        return True

    told = [readable() for record in changed(record) if (run / "run.json").write_text(json.dumps(record))]
    assert True in told and False in told
    (run / "run.json").write_text(json.dumps(record))
    told = []
    for line in changed(lines[-1]):
        (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines, line, *lines]))
        told.append(readable())
    assert True in told and False in told


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", b"\xff\xfe{}"),
        ("run.json", b"[]"),
        ("run.json", b"[" * 100_000),
        ("run.json", b'{"status": "started", "rows": "many"}'),
        ("run.json", b'{"status": "started", "options": [1]}'),
        ("metrics.jsonl", b'{"step": 1, "loss": 0.5}\n\xff\n{"step": 2, "loss": 0.4}\n'),
        ("metrics.jsonl", b'{"step": "one", "loss": 0.5}\n'),
        ("metrics.jsonl", b'[1]\n{"step": 1}\n'),
        ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n'),
        ("metrics.jsonl", b'{"step": 1, "loss": 1e200}\n'),
    ],
)
def test_a_damaged_run_is_one_line_for_every_verb(
    file: str, text: bytes, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "damaged"
    shutil.copytree(place / "dpo", run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    (run / file).write_bytes(text)
    resume = [word if word != "dpo" or n == 0 else "damaged" for n, word in enumerate([*command("dpo"), "--resume"])]
    for words in (["runs", "damaged"], ["plot", "damaged"], ["report", "damaged"], resume):
        status, line = said(words, capsys)
        assert status == 2 and f"damaged/{file}" in line
    assert f"damaged/{file}" in said(["runs", "."], capsys)[1], "a list says which it leaves out"
    assert main(["runs", ".", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "damaged" not in {Path(run["folder"]).name for run in json.loads(out)} and f"damaged/{file}" in err
