"""The lines of docs/results.md that make its data, run on copies of data sets as their makers lay them out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from prefopt.core.files import expanded

PAGE = Path(__file__).parents[1] / "docs/results.md"


def make(name: str) -> None:
    """Run the page's Python that writes a file, in the working folder."""
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S) if f'"{name}"' in b)
    exec(compile(code, str(PAGE), "exec"), {})


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def review(name: str, text: str) -> None:
    file = Path("aclImdb/test", name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


def test_reviews_are_chosen_and_cut_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    review("pos/3_9.txt", "Great!!!!!!!!" + "<br /><br />" * 5 + "x" * 1476)  # 1499 characters without the marks
    review("neg/10_1.txt", "Ten: bad!!!!!!!!")
    review("neg/9_1.txt", "Nine: naïve!!!!!!!!")
    review("neg/0_2.txt", "Calm!!!!!!!<br />")
    review("pos/1_8.txt", "!!!!!!!!" + "x" * 1492)
    make("style.jsonl")
    style = [row["text"] for row in rows("style.jsonl")]
    assert style == ["Nine: naïve!!!!!!!!", "Ten: bad!!!!!!!!", "Great!!!!!!!!" + "\n" * 10 + "x" * 477]
    assert [row["text"] for row in rows("TEXT.jsonl")] == ["Calm!!!!!!!<br />", *style[:2]]
    lines = Path("imdb_test.txt").read_text("utf-8").splitlines()
    assert sorted(lines) == sorted(["Calm!!!!!!!", *style[:2], "Great!!!!!!!! " + "x" * 1476, "!!!!!!!!" + "x" * 1492])


def test_problems_with_right_and_wrong_solutions_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marks = {"mixed": (True, False), "right": (True, True), "wrong": (False, False)}
    lines = [
        {"question": f"{n}, {kind}?", "ground_truth": str(n)}
        | {f"model {k}": {"is_correct": mark, "solution": str(n)} for k, mark in enumerate(marks[kind])}
        for n in range(302)
        for kind in marks
    ]
    Path("example_model_solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make("gsm8k.jsonl")
    assert [row["question"] for row in rows("gsm8k.jsonl")] == [f"{n}, mixed?" for n in range(300)]


@pytest.mark.slow
def test_the_data_sets_themselves_give_as_many_rows_as_the_page_says(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with gzip.open(shared / "data/imdb/test.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            review(f"{row['id'].removeprefix('test/')}_{row['rating']}.txt", row["text"])
    make("style.jsonl")
    assert "304 reviews" in PAGE.read_text("utf-8") and len(rows("style.jsonl")) == 304
    assert len(rows("TEXT.jsonl")) == 100 and len(Path("imdb_test.txt").read_text("utf-8").splitlines()) == 1500
    Path("example_model_solutions.jsonl").symlink_to(shared / "data/gsm8k/example_model_solutions.jsonl")
    make("gsm8k.jsonl")
    assert len(rows("gsm8k.jsonl")) == 300


def test_every_command_that_runs_a_model_names_its_precision() -> None:
    """Left to the device, numbers of a machine with bfloat16 would not be those of the page."""
    found = set()
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if (
                start := re.search(r"\bprefopt (sft|dpo|reward|ppo|sample|score|compare|methods|frontier) (.*)", line)
            ) is None:
                continue
            verb, words = start.groups()
            if verb == "score" and "--reward vader" in words:
                continue  # a rule runs no model
            if recipe := re.search(r"--config (\S+)", words):
                words = (PAGE.parents[1] / expanded(recipe[1])).read_text("utf-8")
            assert re.search(r"(--dtype |^dtype: )float32", words, re.M), line
            found.add(verb)
    assert found == {"sft", "reward", "ppo", "sample", "score", "compare", "methods", "frontier"}
