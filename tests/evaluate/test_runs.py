"""``prefopt runs``: listed, told about, compared."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from evaluate.small import write_run
from prefopt.cli import main
from prefopt.config.dpo import DpoConfig
from prefopt.errors import RunError
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import read_history
from prefopt.runs.listing import show_runs
from prefopt.runs.plot import figure_of
from prefopt.runs.settings import differing, set_options, shown
from prefopt.runs.table import caveats, labels, reached, what_differs
from train.small import dpo, evaluations, pairs, steps

HEAD = ["run", "method", "started", "took", "data", "held-out accuracy"]
HELD_OUT = "85% [54%, 96%] of 10"


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_runs_below_a_folder_are_listed_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "b", options={"learning_rate": 5e-7}, record={"started": "2026-01-01"}, fall=0.005)
    write_run(tmp_path / "deep" / "a", record={"started": "2026-01-02", "steps": 40, "status": "interrupted"})
    write_run(tmp_path / "c", options={"lora": True}, record={"started": "2026-01-03", "status": "started"})
    with FileLock(tmp_path / "c" / ".lock"):
        lines = show_runs([str(tmp_path)])
    assert [cells(line) for line in lines] == [
        [*HEAD, "held-out dpo", "status", "options set"],
        ["b", "dpo", "2026-01-01", "-", "a.jsonl", HELD_OUT, "0.6", "finished", "learning_rate=5e-7"],
        [
            "deep/a",
            "dpo",
            "2026-01-02",
            "-",
            "a.jsonl",
            HELD_OUT,
            "0.45",
            "interrupted, step 30 of 40",
            "learning_rate=1e-6",
        ],
        ["c", "dpo", "2026-01-03", "-", "a.jsonl", HELD_OUT, "0.45", "running", "learning_rate=1e-6 lora=true"],
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


def test_a_line_says_method_time_data_and_reward(tmp_path: Path) -> None:
    record = {"started": "2026-01-31T14:05:09+0000", "costs": {"seconds": 3725.0}, "rows": {"read": 1300, "kept": 1234}}
    write_run(tmp_path / "kto", options={"loss": "kto", "data": ["/far/away/up.jsonl"]}, record=record)
    rloo = {"method": "ppo", "algorithm": "rloo", "started": "2026-02-01T08:00:00+0000"}
    write_run(tmp_path / "rloo", options={"prompts": ["p", "q"], "data": None}, record=rloo)
    lines = (tmp_path / "rloo" / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines if "eval_loss" not in line]
    scored = "".join(json.dumps({**line, "objective/scores": 0.5}) + "\n" for line in kept)
    (tmp_path / "rloo" / "metrics.jsonl").write_text(scored)
    head, kto, rloo_line = (cells(line) for line in show_runs([str(tmp_path)]))
    assert head[:8] == [*HEAD, "held-out kto", "reward of samples"]
    assert kto[:8] == [
        "kto",
        "dpo (kto)",
        "2026-01-31 14:05",
        "1 h 02 min",
        "up.jsonl, 1,234 rows",
        HELD_OUT,
        "0.45",
        "-",
    ]
    assert rloo_line[1:8] == ["ppo (rloo)", "2026-02-01 08:00", "-", "2 files", "-", "-", "0.5"]


def test_losses_of_different_kinds_share_no_column(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / kind, options={"loss": kind}) for kind in ("dpo", "kto", "simpo")]
    sft = write_run(tmp_path / "sft", record={"method": "sft"})
    lines = [{"step": 10, "loss": 2.5, "nll": 2.5}, {"step": 10, "eval_loss": 2.25, "eval_nll": 2.25}]
    (sft / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, *rows = (cells(line) for line in show_runs([str(tmp_path)]))
    # Preferences have accuracies to compare; a loss has a column where a run has nothing else.
    assert [title for title in head if "held-out" in title] == ["held-out accuracy", "held-out nll"]
    assert [row[head.index("held-out nll")] for row in rows] == ["-", "-", "-", "2.25"]
    compared = {cells(line)[0]: cells(line)[1:] for line in show_runs([str(runs[0]), str(runs[1])])[10:] if line}
    assert "loss" not in compared and "rewards/margins" not in compared
    assert compared["loss (dpo)"] == ["0.41", "-"] and compared["loss (kto)"] == ["-", "0.41"]
    assert len(compared["rewards/accuracies"]) == 2 and "-" not in compared["rewards/accuracies"]
    table = list(csv.DictReader(show_runs([str(tmp_path)], as_csv=True)))
    of_loss = [name for name in table[0] if "loss " in name]
    assert of_loss == [f"held_out_loss {kind}" for kind in ("dpo", "kto", "simpo", "nll")]
    assert [sum(bool(row[name]) for name in of_loss) for row in table] == [1, 1, 1, 1]


def test_losses_of_different_divergences_share_no_column(tmp_path: Path) -> None:
    own = [{"divergence": "forward"}, {"divergence": "reverse"}, {"divergence": "forward", "on_policy": 0.5}]
    own += [{"divergence": "jsd", "jsd_weight": weight} for weight in (0.5, 0.9)]
    runs = [write_run(tmp_path / str(n), options=of, record={"method": "distil"}) for n, of in enumerate(own)]
    kinds = [read_history(run).loss_kind for run in runs]
    forward = "distil, forward"
    assert kinds == [forward, "distil, reverse", forward, "distil, jsd 0.5", "distil, jsd 0.9"]
    table = list(csv.DictReader(show_runs([str(tmp_path)], as_csv=True)))
    of_loss = [name for name in table[0] if "held_out_loss" in name]
    assert of_loss == [f"held_out_loss {kind}" for kind in dict.fromkeys(kinds)]
    panels = [
        axes for axes in figure_of([read_history(run) for run in runs], metrics=["loss"]).axes if axes.get_visible()
    ]
    assert [axes.get_title(loc="left") for axes in panels] == [f"Loss ({kind})" for kind in dict.fromkeys(kinds)]
    assert {read_history(run).label for run in runs} == {"distil"}


def test_options_are_listed_where_a_run_sets_them(tmp_path: Path) -> None:
    def write(name: str, **values: Any) -> None:
        config = DpoConfig(model="m", data=["d"], output=name, **values)
        filled = (
            {"beta": 2.0, "pairs": "all"} if values.get("loss") == "simpo" else {"beta": 0.1, "label_smoothing": 0.0}
        )
        write_run(tmp_path / name, options={**config.to_dict(), **filled})

    write("a")
    write("b", lora=True)  # whose rate, rank and alpha follow
    write("c", loss="simpo")  # which has another beta
    write("d", learning_rate=3e-6)
    table = [cells(line) for line in show_runs([str(tmp_path)])]
    assert {row[0]: row[-1] for row in table} == {
        "run": "options set",
        "a": "-",
        "b": "lora=true",
        "c": "-",
        "d": "learning_rate=3e-6",
    }
    write("e", gradient_checkpointing=True)  # which affects memory and speed
    checkpointed = read_history(tmp_path / "e")
    assert set_options(checkpointed)["gradient_checkpointing"] is True
    assert differing([read_history(tmp_path / "a"), checkpointed]) == ["gradient_checkpointing"]
    one = read_history(tmp_path / "b")
    assert {"lora", "data"} <= set(set_options(one)) and "lora_rank" not in set_options(one)


def test_runs_are_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"a": 5e-7, "b": 1e-6, "c": 1e-5}
    for (name, rate), fall, seconds in zip(rates.items(), (0.002, 0.01, 0.005), (30.0, 10.0, None), strict=True):
        record = {"started": f"2026-01-0{'312'['abc'.index(name)]}", "costs": {"seconds": seconds} if seconds else {}}
        write_run(tmp_path / name, options={"learning_rate": rate}, record=record, fall=fall)

    def order(sort: str) -> str:
        assert main(["runs", str(tmp_path), "--sort", sort]) == 0
        return "".join(line[0] for line in capsys.readouterr().out.splitlines()[1:])

    found = {sort: order(sort) for sort in ("started", "name", "took", "loss", "learning_rate", "learning-rate")}
    assert found == {
        "started": "bca",
        "name": "abc",
        "took": "bac",
        "loss": "bca",
        "learning_rate": "abc",
        "learning-rate": "abc",
    }
    assert main(["runs", str(tmp_path), "--sort", "acuracy"]) == 2
    assert "--sort acuracy: no run has it; did you mean accuracy?" in capsys.readouterr().err


def test_csv_has_a_row_per_run_with_full_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", options={"data": ["/x/a, b.jsonl"], "lora": True})
    write_run(tmp_path / "b")
    assert main(["runs", str(tmp_path), "--csv"]) == 0
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert first["folder"] == str(tmp_path / "a") and first["option data"] == "/x/a, b.jsonl"
    assert (first["option lora"], second["option lora"]) == ("true", "")
    assert float(first["held_out_accuracy"]) == pytest.approx(0.85) and first["held_out_rows"] == "10"
    assert float(first["held_out_accuracy_low"]) == pytest.approx(0.5412, abs=1e-3)
    assert main(["runs", str(tmp_path), "--csv", "--json"]) == 2


def test_three_runs_named_have_a_line_each_and_what_to_mind(tmp_path: Path) -> None:
    names = [str(write_run(tmp_path / kind, options={"loss": kind})) for kind in ("dpo", "kto", "ipo")]
    lines = show_runs(names)
    assert [cells(line)[0] for line in lines[1:4]] == names
    assert lines[4].startswith("note: loss changes the loss: compare accuracies") and len(lines) == 5


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
    assert found[0]["loss"] == "dpo" and found[0]["set"]["data"] == ["a.jsonl"]
    assert found[0]["held_out_accuracy"]["rows"] == 10
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


def test_gradients_that_are_always_clipped_are_told_with_a_limit(tmp_path: Path) -> None:
    def found(name: str, limit: float) -> list[str]:
        run = read_history(write_run(tmp_path / name, options={"max_grad_norm": limit}))
        return [finding.text for finding in diagnose(run) if finding.name == "always clipped"]

    (text,) = found("always", 1.0)  # the norms are 2
    assert "clipped in each of 30 steps (norms 2 to 2, --max-grad-norm 1)" in text
    assert "--max-grad-norm 4 clips only outliers" in text
    assert not found("never", 2.0)
