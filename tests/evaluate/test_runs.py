"""``prefopt runs``: listed, told about, compared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from filelock import FileLock

from evaluate.small import write_run
from prefopt.cli import main
from prefopt.errors import RunError
from prefopt.runs.history import read_history
from prefopt.runs.table import caveats, differing, labels, reached, show_runs, shown, what_differs
from train.small import dpo, evaluations, pairs, steps


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_runs_below_a_folder_are_listed_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "b", options={"learning_rate": 5e-7}, record={"started": "2026-01-01"}, fall=0.005)
    write_run(tmp_path / "deep" / "a", record={"started": "2026-01-02", "steps": 40, "status": "interrupted"})
    write_run(tmp_path / "c", options={"lora": True}, record={"started": "2026-01-03", "status": "started"})
    with FileLock(tmp_path / "c" / ".lock"):
        lines = show_runs([str(tmp_path)])
    assert [cells(line) for line in lines] == [
        ["run", "status", "steps", "loss", "held-out loss", "held-out accuracy", "options that differ"],
        ["b", "finished", "30", "0.555", "0.6", "0.85", "learning_rate=5e-7 lora=false"],
        ["deep/a", "interrupted", "30 of 40", "0.41", "0.45", "0.85", "learning_rate=1e-6 lora=false"],
        ["c", "running", "30", "0.41", "0.45", "0.85", "learning_rate=1e-6 lora=true"],
    ]
    assert read_history(tmp_path / "c").status == "stopped", "nobody holds it any more"


def test_several_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", options={"beta": 0.3, "data": ["a.jsonl", "b.jsonl"]}, record={"data": "d2 90+10"})
    text = show_runs([str(a), str(b)])
    rows = {cells(line)[0]: cells(line)[1:] for line in text if line.startswith("  ")}
    assert rows["beta"] == ["0.1", "0.3"] and rows["data"] == ["a.jsonl", "a.jsonl,b.jsonl"]
    assert rows["grad_norm"] == ["2", "2"]
    held_out = text[text.index("held-out rows, at the step whose loss is lowest:") :]
    assert cells(held_out[2]) == ["step", "30", "30"] and cells(held_out[3]) == ["loss", "0.45", "0.45"]
    notes = [line for line in text if line.startswith("note: ")]
    assert len(notes) == 2 and "beta changes the loss" in notes[0] and "different data" in notes[1]
    assert caveats([read_history(a), read_history(a)]) == []


def test_one_run_is_told_about_with_its_curve_and_its_findings(tmp_path: Path) -> None:
    text = "\n".join(show_runs([str(write_run(tmp_path / "a"))]))
    assert re.search(r"^status: +finished$", text, re.M) and "●" in text and "⠤" in text
    assert "the training loss fell" in text


def test_what_a_run_reached_is_what_it_wrote(model: str, tmp_path: Path) -> None:
    dpo(model, pairs(12), tmp_path / "out", eval_fraction=0.3, eval_every=2, epochs=6, batch_size=3)
    run = read_history(tmp_path / "out")
    lines = steps(tmp_path / "out")
    last = lines[-math.ceil(len(lines) / 10) :]
    assert reached(run)["training"]["loss"] == pytest.approx(sum(line["loss"] for line in last) / len(last))
    best = min(evaluations(tmp_path / "out"), key=lambda line: line["eval_loss"])
    assert (
        reached(run)["held_out"]["step"]
        == best["step"]
        == json.loads(Path(run.folder, "run.json").read_text())["results"]["best step"]
    )
    assert run.status == "finished" and run.steps == len(lines) and run.record["rows"]["kept"] == 12


def test_json_holds_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert main(["runs", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["folder"] for run in found] == [str(a), str(b)]
    assert found[0]["held_out"]["loss"] == pytest.approx(0.45) and found[0]["status"] == "finished"
    assert {"name", "text", "look"} == set(found[0]["findings"][0])


def test_the_current_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no run of prefopt below .\n"
    write_run(tmp_path / "x")
    main(["runs"])
    assert capsys.readouterr().out.splitlines()[1].startswith("x  ")


def test_damage_is_told_and_hides_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "run.json").write_text("{")
    lines = show_runs([str(tmp_path)])
    assert lines[1].startswith("a ") and re.search(r"b/run.json cannot be read \(it is not JSON\)", lines[2])


@pytest.mark.parametrize(
    ("folders", "message"),
    [(["none"], "none: no such folder"), ([".", "a"], r"\. holds no run of its own, a does"), (["b"], "damaged")],
)
def test_what_cannot_be_shown_is_one_line(
    folders: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / "run.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=message):
        show_runs(folders)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    same = [read_history(write_run(tmp_path / x / "out")) for x in "ab"]
    assert labels(same) == ["a/out", "b/out"] == what_differs(same)
    assert differing(same) == [], "where they were written to is no difference"
    other = [same[0], read_history(write_run(tmp_path / "c", options={"learning_rate": 3e-5}))]
    assert what_differs(other) == ["learning rate 1e-6", "learning rate 3e-5"]
    assert [shown(v) for v in (1e-6, 1e20, 0.25, True, None, ["a", "b"], "x")] == [
        "1e-6", "1e20", "0.25", "true", "none", "a,b", "x",
    ]  # fmt: skip
