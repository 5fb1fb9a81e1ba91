"""Pictures of runs hold the numbers of the runs, and say what they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evaluate.small import write_run
from prefopt.cli import main
from prefopt.errors import ConfigError
from prefopt.runs import plot
from prefopt.runs.history import read_history
from prefopt.runs.plot import figure_of, plot_runs, smoothed, window

pytest.importorskip("matplotlib")


def legend(axes: Any) -> list[str]:
    found = axes.get_legend() if hasattr(axes, "get_legend") else axes.legends[0]
    return [text.get_text() for text in found.get_texts()]


def test_curves_are_the_runs_numbers(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path / "a"))
    figure = figure_of([run])
    loss, *_, ratios = figure.axes
    raw, mean, marks, ln2 = loss.get_lines()
    curve, held_out = run.curve("loss"), run.curve("loss", held_out=True)
    assert (list(raw.get_xdata()), list(raw.get_ydata())) == (curve.steps, curve.values)
    assert list(mean.get_ydata()) == smoothed(curve.values) and list(ln2.get_ydata()) == [math.log(2)] * 2
    assert (list(marks.get_xdata()), list(marks.get_ydata())) == (held_out.steps, held_out.values)
    assert marks.get_marker() == "o" and marks.get_linestyle() == "None"
    low, high = loss.get_ylim()
    assert low < min(curve.values) and high > max(held_out.values)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "Loss" and titles[3] == "Log-ratio to the reference"
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "margin (reward)", "fraction of rows", "nats per token"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert legend(loss) == ["training, average of 3 steps", "held out"]
    assert legend(ratios) == ["chosen", "rejected", "held out"]
    means = [line for line in ratios.get_lines() if line.get_linewidth() > 1.5]
    assert [line.get_linestyle() for line in means] == ["-", "--"]
    assert "a" in figure.get_suptitle() and "beta 0.1" in figure.get_suptitle() and not figure.legends


def test_where_the_loss_begins_elsewhere_no_line_says_otherwise(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text().replace(f'"loss": {math.log(2)}', '"loss": 0.9')
    (folder / "metrics.jsonl").write_text(text)
    assert len(figure_of([read_history(folder)]).axes[0].get_lines()) == 3


def test_runs_have_colours_and_a_legend_of_what_differs(tmp_path: Path) -> None:
    runs = [read_history(write_run(tmp_path / f"{r}", options={"learning_rate": r})) for r in (1e-6, 5e-6)]
    figure = figure_of(runs)
    assert legend(figure.legends[0] and figure) == ["learning rate 1e-6", "learning rate 5e-6"]
    handles = [line.get_color() for line in figure.legends[0].get_lines()]
    drawn = [line.get_color() for line in figure.axes[0].get_lines() if line.get_linewidth() == 1.6]
    assert handles == drawn and len(set(drawn)) == 2
    assert "learning rate" not in figure.get_suptitle() and "2 runs" in figure.get_suptitle()


def test_metrics_and_the_axis_can_be_chosen(tmp_path: Path) -> None:
    run = read_history(write_run(tmp_path / "a"))
    figure = figure_of([run], metrics=["grad_norm", "log_ratios_per_token/chosen", "learning_rate"], x="epoch")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [
        "Norm of the gradient, before clipping", "log_ratios_per_token/chosen", "Learning rate",
    ]  # fmt: skip
    assert shown[0].get_xlabel() == "epoch"
    assert list(shown[0].get_lines()[0].get_xdata())[-1] == pytest.approx(2.0)
    assert len(shown[2].get_lines()) == 1, "a rate has no noise to take a mean of"


def test_a_wild_step_does_not_hide_the_rest(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=200)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[50]["loss"] = 900.0
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert figure_of([read_history(folder)]).axes[0].get_ylim()[1] < 200


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("deep/p.svg", b"<?xml"), ("p.pdf", b"%PDF")])
def test_the_ending_names_the_kind(name: str, magic: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert main(["plot", str(folder), "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--output", "p.jpeg"], "--output p.jpeg must end in .png, .svg or .pdf"),
        (["a", "--metrics", "los"], "--metrics los: no run has it; did you mean loss?"),
        (["a", "--metrics", "zzz"], "no run has it; there are epoch, grad_norm"),
        (["none"], "none: no run of prefopt"),
        (["empty"], "no run has written a step"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    (write_run(tmp_path / "empty") / "metrics.jsonl").write_text("")
    assert main(["plot", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_matplotlib_its_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot_runs([read_history(write_run(tmp_path / "a"))], tmp_path / "p.png")


def test_a_mean_keeps_its_start_and_a_line_and_calms_its_end() -> None:
    line = [float(i) for i in range(100)]
    assert smoothed(line)[:95] == pytest.approx(line[:95]) and window(100) == 11 and window(20) == 1
    jagged = [float(i % 2) for i in range(100)]
    assert smoothed(jagged)[0] == 0.0 and all(abs(value - 0.5) < 0.09 for value in smoothed(jagged)[10:])


def test_losses_of_different_kinds_share_no_axis(tmp_path: Path) -> None:
    runs = [
        read_history(write_run(tmp_path / name, options={"loss": kind}))
        for name, kind in (("a", "dpo"), ("b", "dpo"), ("c", "kto"))
    ]
    for metrics in (None, ["loss", "rewards/margins", "rewards/accuracies"]):
        titles = [axes.get_title(loc="left") for axes in figure_of(runs, metrics=metrics).axes if axes.get_visible()]
        assert titles[:2] == ["Loss (dpo)", "Loss (kto)"]
        assert sum("Margin" in title for title in titles) == 2 and sum("Accuracy" in title for title in titles) == 1
    dpo, kto = figure_of(runs, metrics=["loss"]).axes
    assert (len(curves(dpo)), len(curves(kto))) == (2, 1)


def curves(axes: Any) -> list[Any]:
    """The smoothed curves of an axis."""
    return [line for line in axes.get_lines() if line.get_linewidth() == 1.6]
