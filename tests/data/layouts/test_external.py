"""Layouts from outside the package: a function that is named, and the entry points of installed packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import all_layouts, code_of_layouts, named_layout
from prefopt.errors import ConfigError
from prefopt.records import Message

FUNCTION = '''
def exam(row):
    """Exam answers, the one with more points preferred.

    More about them."""
    return {"prompt": [{"role": "user", "content": row["task"]}], "responses": row["texts"], "scores": row["points"]}

number = 3
'''
PLUGIN = """
from prefopt.data.layouts.layout import Layout

def read(row):
    return row.pair(row.prompt_at("quiz"), row.response("right"), row.response("wrong"))

QUIZ = Layout(name=NAME, fields=("quiz", "right", "wrong"), kind="pairs", description="a quiz", origin="us",
              example={"quiz": "2 + 2?", "right": "4", "wrong": "22"}, reader=read)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    all_layouts.cache_clear()
    yield tmp_path
    all_layouts.cache_clear()


def install(folder: Path, module: str, source: str, points: str) -> None:
    """A package with entry points, as an installer leaves it."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[prefopt.layouts]\n{points}\n")


def test_a_function_in_the_working_folder_is_a_layout(here: Path, capsys: Any) -> None:
    (here / "exams.py").write_text(FUNCTION)
    rows: list[Any] = [{"task": "Why?", "texts": ["a", "b"], "points": [1, 2]}, {"task": "Why?"}, 3]
    reading = parse_comparisons(rows, "f", format="exams:exam")
    (found,) = reading.comparisons
    assert found.prompt == (Message("user", "Why?"),) and found.tiers == ((1,), (0,)) and found.extra == {}
    assert reading.notes == [] and reading.lost == ""
    assert [(p.row, p.kind) for p in reading.problems] == [(2, "failed conversion"), (3, "not an object")]
    assert "KeyError: 'texts'" in reading.problems[0].what
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    words = ["data", "convert", "rows.jsonl", "out.jsonl", "--format", "exams:exam"]
    assert main(words) == 0 and json.loads((here / "out.jsonl").read_text())["scores"] == [1.0, 2.0]
    capsys.readouterr()
    assert main(["data", "layouts", "exams:exam"]) == 0
    assert "exams:exam: Exam answers, the one with more points preferred" in capsys.readouterr().out
    for name in ("exams:other", "exams:number", "nowhere:exam", ":exam", "exams:"):
        with pytest.raises(ConfigError, match=name):
            named_layout(name)


def test_layouts_of_installed_packages_are_recognised_and_listed(here: Path, capsys: Any) -> None:
    install(here, "quizzes", PLUGIN.replace("NAME", '"quiz"'), "quiz = quizzes:QUIZ")
    row = {"quiz": "2 + 2?", "right": "4", "wrong": "22"}
    reading = parse_comparisons([row, {**row, "wrong": None}], "f")
    assert reading.layout == "quiz" and [p.kind for p in reading.problems] == ["missing field"]
    assert reading.comparisons[0].tiers == ((0,), (1,))
    named = parse_comparisons([{"q": "2 + 2?", "right": "4", "wrong": "22"}], "f", columns=["quiz=q"])
    assert named.layout == "quiz" and len(named.comparisons) == 1
    assert main(["data", "layouts"]) == 0 and "  quiz  " in capsys.readouterr().out
    # Tokens that are cached are not used after its code has changed.
    before, other = code_of_layouts(None), code_of_layouts("preference-text")
    (here / "quizzes.py").write_text((here / "quizzes.py").read_text() + "# changed\n")
    assert before and code_of_layouts(None) == code_of_layouts("quiz") != before and other == ""


def test_packages_whose_layouts_cannot_be_used_are_named(here: Path) -> None:
    install(here, "copycat", PLUGIN.replace("NAME", '"canonical"'), "quiz = copycat:QUIZ")
    with pytest.raises(ConfigError, match=r"layout quiz of the package copycat.* canonical already"):
        parse_comparisons([{"prompt": "q"}], "f")
    (here / "copycat-1.0.dist-info/entry_points.txt").write_text("[prefopt.layouts]\nquiz = copycat:GONE\n")
    with pytest.raises(ConfigError, match=r"layout quiz of the package copycat: .*GONE"):
        parse_comparisons([{"prompt": "q"}], "f")
