"""What reaches a terminal: nothing that it obeys, wherever the text came from."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
from pathlib import Path

import pytest

from prefopt.chat.conversation import Chat
from prefopt.chat.input import LineReader
from prefopt.cli import main
from prefopt.core import terminal
from prefopt.core.terminal import Reporter
from test_imports import modules
from train.small import pairs, write_model, write_rows

# OSC 52 (the clipboard), OSC 0 (the title), CSI in seven bits and in eight, DEL, CR, an override of direction.
HOSTILE = "\x1b]52;c;cm0=\x07\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\x08\u202e\u2066\u2028x"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(capfd: pytest.CaptureFixture[str]) -> str:
    """Both streams, in which nothing is to be obeyed."""
    shown = "".join(capfd.readouterr())
    assert not OBEYED.search(shown), ascii(OBEYED.search(shown))
    return shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31m\x07", "\\x1b[31m\\x07"),
        ("\x9b\x7f\r", "\\x9b\\x7f\\x0d"),
        ("\u202e\u2069\u2028\udcff", "\\u202e\\u2069\\u2028\\udcff"),
        ("\u05e9\u200f \u200e\u061c", "\u05e9\u200f \u200e\u061c"),  # marks that right-to-left text needs
        ("日本 é 🎈", "日本 é 🎈"),
    ],
)
def test_what_a_terminal_obeys_is_spelt_out(text: str, shown: str) -> None:
    assert terminal.visible(text) == shown == terminal.visible(shown)
    assert terminal.visible(text, "ascii").isascii()


def test_only_one_module_writes_to_a_terminal() -> None:
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "Console", "sys.stdout.write", "sys.stderr.write", "rich.print"):
                found.append(f"{module}:{node.lineno}: {name}; use prefopt.core.terminal")
    assert not [line for line in found if not line.startswith("prefopt.core.terminal:")]


@pytest.mark.parametrize("mode", ["rich", "plain"])
def test_a_reporter_shows_no_codes_no_markup_and_one_line(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, screen = io.StringIO(), terminal.Screen
    monkeypatch.setattr(terminal, "Screen", lambda: screen(file=out, width=200, color_system=None))
    reporter = Reporter(mode)
    reporter.say(f"file {HOSTILE}[/bold] :smile:\nprefopt: error: a line of its own")
    with reporter.bar(f"[/red] {HOSTILE}", 2, "rows") as bar:
        bar.update(2, [HOSTILE])
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()) if mode == "rich" else out.getvalue()
    assert not OBEYED.search(text.replace("\r", "")) and "\\x1b]52;c" in text
    assert "[/bold] :smile:" in text and "[/red]" in text and "\nprefopt: error" not in text


def test_json_on_the_screen_is_ascii_and_whole(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.tell_json({"text": HOSTILE})
    assert json.loads(shown := clean(capfd)) == {"text": HOSTILE} and shown.isascii()


def test_log_records_and_warnings_of_any_library_pass_it(capfd: pytest.CaptureFixture[str]) -> None:
    import warnings

    with terminal.guarded_streams():
        logger = logging.Logger("another library")
        logger.addHandler(logging.StreamHandler())
        logger.warning("unknown key %s", HOSTILE)
        assert not OBEYED.search(warnings.formatwarning(HOSTILE, UserWarning, "f", 1, ""))
    assert "\\x1b]52;c" in clean(capfd)


def test_verbs_over_hostile_rows_and_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows, names of files that are no UTF-8, run records: dry run, training, runs, data check, errors."""
    model = write_model(tmp_path / "model")
    rows = [{k: f"{v} {HOSTILE} {n}" for k, v in row.items()} for n, row in enumerate(pairs(6))]
    data = write_rows(tmp_path / b"rows\x1b]0;x\x07\xff\n.jsonl".decode("utf-8", "surrogateescape"), rows)
    out = tmp_path / "out\x1b]0;owned\x07\u202e"
    words = ["--model", str(model), "--data", str(data), "--device", "cpu", "--dtype", "float32"]
    train = ["dpo", *words, "--output", str(out), "--max-steps", "2", "--batch-size", "2"]
    capfd.readouterr()  # saving shows a bar of transformers
    assert main(["data", "check", str(data), "--show", "2"]) == 0
    assert "\\x1b]52;c" in clean(capfd)
    assert main([*train, "--dry-run"]) == 0
    assert "\\x1b]52;c" in clean(capfd)
    assert main(train) == 0
    assert "done in" in clean(capfd)
    record = json.loads((out / "run.json").read_text("utf-8"))
    (out / "run.json").write_text(json.dumps({**record, "loss": HOSTILE, "method": HOSTILE, "model": HOSTILE}))
    for command in (["runs", str(tmp_path)], ["runs", str(out)], ["runs", str(out), str(out)]):
        assert main(command) in (0, 2)
        assert "\\x1b" in clean(capfd)
    assert main(["dpo", *words, "--output", f"{out}2", "--loss", HOSTILE]) == 2
    assert main(["data", "check", str(tmp_path / f"none{HOSTILE}.jsonl")]) == 2
    clean(capfd)


def test_an_answer_in_a_chat_shows_no_codes() -> None:
    out = io.StringIO()
    chat = Chat([], LineReader(io.StringIO(), None), out)
    chat._write(f"an answer {HOSTILE}")
    assert not OBEYED.search(out.getvalue()) and "\\u202e" in out.getvalue()
