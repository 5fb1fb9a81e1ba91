"""Python as a notebook shows it: results as tables, errors as a line, one bar; and the tutorial from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import prefopt
from prefopt.core.notebook import NotebookDisplay
from prefopt.core.terminal import Reporter
from prefopt.errors import ConfigError, ConfigErrors, RunError
from train.small import dpo, pairs, quick, write_model

TUTORIAL = Path(__file__).resolve().parents[1] / "examples/tutorial.ipynb"


def test_a_result_is_a_table_a_model_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = write_model(tmp_path / "m")
    result = dpo(model, pairs(24), tmp_path / "out", eval_fraction=0.4, samples=2, epochs=2)
    lines = repr(result).splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: {result.steps} steps"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        *("held-out loss", "held-out accuracy", "training loss", "training accuracy", "training margin", "samples")
    ]
    assert f"{result.held_out_loss:.4g}"[:5] in lines[1]
    html = result._repr_html_()
    assert html.count("<tr>") == len(lines) - 1 and "held-out accuracy" in html
    loaded = result.load(device="cpu")
    ids = loaded.tokenizer("k1: ", return_tensors="pt").input_ids
    assert not loaded.model.training and loaded.model(input_ids=ids).logits.shape[:2] == ids.shape
    assert result.plot()._repr_png_().startswith(b"\x89PNG") and len(result.samples()) == 2
    assert prefopt.plot(tmp_path / "out", metrics="loss", output=tmp_path / "c.svg")._repr_png_()
    assert (tmp_path / "c.svg").exists()
    (run,) = prefopt.list_runs(tmp_path)
    assert run["status"] == "finished" and "finished" in repr(prefopt.list_runs(tmp_path))


def test_an_error_is_a_line_in_the_words_of_python(tmp_path: Path) -> None:
    given: dict[str, Any] = {"output": tmp_path / "o", **quick("m")}
    for options, said, shown in (
        ({"bta": 1.0}, "unknown option 'bta'; did you mean beta?", "unknown option 'bta'; did you mean beta?"),
        ({"early_stopping": 1, "eval_fraction": 0.0}, "give --eval-data or --eval-fraction", "give eval_data or eval_"),
        ({"resume": True, "overwrite": True}, "--resume continues the run", "resume=True continues the run that"),
    ):
        with pytest.raises(ConfigError) as caught:
            prefopt.dpo("m", "d", **given, **options)
        assert said in str(caught.value)
        (line,) = caught.value._render_traceback_()
        assert line.startswith("ConfigError: ") and shown in line and "--" not in line
    with pytest.raises(ConfigErrors) as several:
        prefopt.dpo("m", "d", **given, bta=1, lss="dpo")
    assert len(several.value._render_traceback_()) == 1
    assert RunError("a, by --resume")._render_traceback_() == ["RunError: a, by --resume"]  # not raised by a function


def test_bars_of_a_run_share_one_display(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, content: Any) -> None:
            shown.append(content)

    def display(content: Any, display_id: bool) -> Handle:
        assert display_id and not shown
        shown.append(content)
        return Handle()

    class Fake:
        kernel = object()

    class Module:
        get_ipython = staticmethod(Fake)

    class Display:
        pass

    monkeypatch.setitem(sys.modules, "IPython", Module)
    monkeypatch.setitem(sys.modules, "IPython.display", Display)
    monkeypatch.setattr(Display, "display", staticmethod(display), raising=False)
    reporter = Reporter()
    assert reporter.mode == "notebook" and isinstance(reporter.display, NotebookDisplay)
    reporter.say("go on with --resume")
    for name in ("reference", "train"):
        with reporter.bar(name, 40, "<steps>") as bar:
            for step in range(1, 41):
                bar.update(step, ["loss 0.5"], first=step == 1)
    assert repr(shown[-1]) == "train: 40/40 <steps>, loss 0.5" and len(shown) < 20
    html = shown[-1]._repr_html_()
    assert 'value="40" max="40"' in html and "&lt;steps&gt;" in html and "loss 0.5" in html
    assert capsys.readouterr().out == "go on with resume=True\n"


def test_the_tutorial_is_stored_without_outputs() -> None:
    cells = json.loads(TUTORIAL.read_text("utf-8"))["cells"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells if c["cell_type"] == "code")


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vaderSentiment", "matplotlib", "ipykernel"):
        pytest.importorskip(name)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    notebook = nbformat.read(TUTORIAL, 4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = {c.source.splitlines()[0]: c.outputs for c in notebook.cells if c.cell_type == "code"}

    def texts(line: str, kind: str) -> list[str]:
        """The text of outputs of one kind."""
        found = [o for o in outputs[line] if o.output_type == kind]
        return [o.get("text") or o.get("data", {}).get("text/plain", "") for o in found]

    (bar,) = texts("result = prefopt.dpo(", "display_data")
    assert bar.startswith("train: 30/30 steps, loss ")
    assert not any("stderr" in o.get("name", "") for many in outputs.values() for o in many)
    assert "held-out loss" in texts("result", "execute_result")[0]
    assert "image/png" in outputs["result.plot()"][0].data
    rate = texts("found = prefopt.compare(", "execute_result")[0]
    assert "aligned is better" in rate or float(rate.split("win rate ")[1].split("%")[0]) > 55
    mistakes = [o for many in outputs.values() for o in many if o.output_type == "error"]
    assert [len("\n".join(o.traceback).splitlines()) for o in mistakes] == [1, 1]
    assert mistakes[0].traceback[0].endswith("did you mean learning_rate?")
    assert "overwrite=True" in mistakes[1].traceback[0]
    assert (tmp_path / "report.html").exists()
