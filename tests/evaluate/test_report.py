"""The report holds what runs say, whatever they say, and nothing that a browser would run or fetch."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefopt
from evaluate.small import write_run
from prefopt.cli import main, parse
from prefopt.config.compare import CompareConfig
from prefopt.config.dpo import DpoConfig
from prefopt.config.tools import ReportConfig
from prefopt.errors import ConfigError
from prefopt.evaluate.compare import run as compare
from prefopt.reports.page import curves
from prefopt.runs.diagnose import diagnose
from prefopt.runs.history import read_history
from prefopt.runs.plot import COLOURS
from prefopt.runs.table import labels
from prefopt.sweeps.points import Frontier, Point
from prefopt.sweeps.report import write_report
from train.small import dpo, pairs, write_rows

pytest.importorskip("matplotlib")

HOSTILE = "$\\x{$</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """What a browser would see: elements that are closed in order, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if "style" not in self.open else ""

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def report(run: Path, *, title: str | None = None, comparisons: list[str] | None = None) -> Page:
    output = str(run.parent / "r.html")
    return read(write_report(ReportConfig(run=[str(run)], output=output, title=title, comparisons=comparisons)))


def compared(tmp_path: Path, prompts: int, tail: str = "") -> list[str]:
    """What prefopt compare says by length, of answers of which the first are longer but for every fifth."""
    for name, many in (("a", [1 if i % 5 == 0 else 3 for i in range(prompts)]), ("b", [2] * prompts)):
        rows = [{"prompt": f"{i}?{tail}", "responses": ["w " * n + tail]} for i, n in enumerate(many)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    config = CompareConfig(
        a=str(tmp_path / "a.jsonl"),
        b=str(tmp_path / "b.jsonl"),
        judge="length",
        output=str(tmp_path / "judged.jsonl"),
        overwrite=True,
    )
    (tmp_path / "compared.json").write_text(json.dumps(compare(config).to_dict()))
    return [str(tmp_path / "compared.json")]


def test_two_runs_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_run(tmp_path / str(rate), options={"learning_rate": rate}) for rate in (1e-6, 5e-6)]
    target = tmp_path / "pages" / "report.html"
    assert main(["report", *map(str, folders), "--output", str(target), "--title", "Two rates"]) == 0
    assert str(target) in capsys.readouterr().out
    page = read(target)
    assert "<h1>Two rates</h1>" in target.read_text("utf-8")
    runs = [read_history(folder) for folder in folders]
    for run, name in zip(runs, labels(runs), strict=True):
        assert f"{name}: the loss on held-out rows is" in page.words
        assert all(finding.text in page.words for finding in diagnose(run))
    assert page.words.count(" rose from ") >= 4 and page.words.count("; on held-out rows from ") == 10, (
        "curves in words"
    )
    assert page.tags.count("svg") == 4 and len([x for x in page.values("aria-label") if "Loss" in x]) == 1
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 8
    used = {value.removeprefix("#") for value in page.values("href")}
    used |= set(re.findall(r"url\(#([^)]+)\)", target.read_text("utf-8")))
    assert used and used <= set(ids)


def test_a_page_of_several_runs_is_found_through(tmp_path: Path) -> None:
    """Contents that lead somewhere, a table of all runs, details folded, no more than four runs beside each other."""
    record = {"started": "2026-01-31T14:05:09+0000", "environment": {"versions": {"torch": "2"}}}
    rates = [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]
    data = ["/a/very/long/way/to/pairs.jsonl"]
    folders = [write_run(tmp_path / f"r{r}", options={"learning_rate": r, "data": data}, record=record) for r in rates]
    page = read(prefopt.report(folders, output=tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text("utf-8")
    linked = [value.removeprefix("#") for value in page.values("href")]
    sections = ["runs", "curves", "differences", *(f"run-{n}" for n in range(1, 6)), "caveats"]
    assert [name for name in linked if name in sections] == sections and set(sections) <= set(page.values("id"))
    folded = text.split("<details>")
    assert len(folded) == 1 + 4 * 5 and "<h3>What happened</h3>" in folded[0]
    assert all("Every option" not in part.split("</details>")[-1] for part in folded)
    differing = text[text.index('id="differences"') : text.index('id="run-1"')]
    assert [head.count("<th ") for head in re.findall(r"<thead>.*?</thead>", differing)] == [5, 2]
    # On a phone a cell says the title of its column, which is above it on a screen.
    heads = page.values("data-head")
    assert heads.count("held-out accuracy") == 5 and {"started", "took", "options set"} <= set(heads)
    assert "2026-01-31 14:05" in page.words and "14:05:09" not in page.words
    seen = "".join(part.split("</details>")[-1] for part in folded)
    assert "/a/very/long" not in seen and "pairs.jsonl" in seen


def test_the_headline_says_what_the_small_print_says(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    page = report(folder)
    headline = page.words.split("Curves")[0]
    found = [finding.text for finding in diagnose(read_history(folder)) if "accuracy" in finding.text]
    assert len(found) == 1 and found[0] in headline and page.words.count(found[0]) == 2
    few = write_run(tmp_path / "b", record={"data": "d1 90+3"})
    assert "3 rows, step 30): within chance" in report(few).words.split("Curves")[0]


def test_a_run_has_one_colour_in_all_figures(tmp_path: Path) -> None:
    runs = [read_history(write_run(tmp_path / kind, options={"loss": kind})) for kind in ("dpo", "kto")]
    for svg, _ in curves(runs):
        label = re.search('aria-label="([^"]*)"', svg)
        assert label is not None
        drawn = {kind for kind in ("dpo", "kto") if kind in label[1].split(": ")[-1]}
        assert {c for c, kind in zip(COLOURS, ("dpo", "kto"), strict=False) if c.lower() in svg.lower()} == {
            COLOURS[("dpo", "kto").index(kind)] for kind in drawn
        }


def test_nothing_is_run_or_fetched_whatever_the_runs_say(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "a<b>&",
        options={"model": HOSTILE, "data": [HOSTILE]},
        record={"environment": {HOSTILE: {"x": HOSTILE}}},
    )
    page = report(run, title=HOSTILE, comparisons=compared(tmp_path, 20, HOSTILE))
    assert page.words.count(HOSTILE) >= 4 + 2 * 3 * 3
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("#") for value in page.values("href")) and not page.values("src")
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "@import" not in (text := (tmp_path / "r.html").read_text("utf-8")) and "url(http" not in text


def test_a_real_run_tells_on_what_it_ran_and_how_to_do_it_again(model: str, tmp_path: Path) -> None:
    dpo(model, write_rows(tmp_path / "rows.jsonl", pairs(8)), tmp_path / "out", max_steps=2)
    page = report(tmp_path / "out")
    history = read_history(tmp_path / "out")
    environment = history.record["environment"]
    assert environment["versions"]["torch"] in page.words and environment["machine"]["processor"] in page.words
    assert history.record["reference"] in page.words
    command = next(line for line in page.words.splitlines() if " dpo " in line and "--model" in line)
    words = shlex.split(command)
    again = DpoConfig.from_dict(parse("dpo", words[words.index("dpo") + 1 :]))
    assert history.record["method"] == "dpo"
    assert again == DpoConfig.from_dict({k: v for k, v in history.options.items() if v is not None})


def test_a_run_without_a_step_or_held_out_rows_still_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text("")
    page = report(folder)
    assert "no row was held out" in page.words and "svg" not in page.tags


def test_win_rates_with_their_intervals_and_samples_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = report(run, comparisons=compared(tmp_path, 40))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    assert f"{a} is better than {b} (win rate 80.0%, 95 % interval" in page.words
    assert "32 / 0 / 8" in page.words and "Win rates by the judge length" in page.values("aria-label")
    assert "The worst samples" in page.words
    lost = page.words.split("The worst samples")[1].split("Curves")[0]
    assert (
        lost.count(f"{b} is better (1 against 2)") == 3
        and lost.count(f"{b} is better") == 3
        and f"{a} is better" not in lost
    )
    assert "80.0 % (" in page.words and "all are equally long" not in page.words
    assert "too few to say whether" in report(run, comparisons=compared(tmp_path, 5)).words


@pytest.mark.parametrize("longer", [0, 1])
def test_a_page_says_why_nothing_is_told_at_equal_length(longer: int, tmp_path: Path) -> None:
    """And calls nothing better where interval and sign test do not agree: two wins among ties."""
    for name, many in (("a", ["good"] * 2 + ["w" + "w" * longer] * 98), ("b", ["w"] * 100)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{i}?", "responses": [x]} for i, x in enumerate(many)])
    for a, b in (("a", "b"), ("b", "a")):
        files = [str(tmp_path / f"{name}.jsonl") for name in (a, b)]
        result = prefopt.compare(*files, judge="regex:good")
        assert result.versus[0].rate.verdict == "not shown"
        page = read(prefopt.report(comparisons=[result], output=tmp_path / "r.html"))
        assert f"No difference between {files[0]} and {files[1]} is shown" in page.words
        assert ("one model's are always the longer ones" in page.words) == bool(longer)


def test_a_page_shows_both_rates_at_equal_length_where_they_differ(tmp_path: Path) -> None:
    """The judge prefers the longer response, whatever the difference, and the first model's are longer."""
    longer = np.random.default_rng(0).normal(45, 30, 300).round().astype(int)
    for name, texts in (("a", ["w" * (100 + n) for n in longer]), ("b", ["w" * 100] * 300)):
        rows = [{"prompt": f"{i}?", "responses": [x]} for i, x in enumerate(texts)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    rng = np.random.default_rng(1)

    def judge(prompts: Any, responses: Any) -> list[float]:
        return [1.2 * np.tanh((len(r) - 100) / 10) + rng.logistic() for r in responses]

    result = prefopt.compare(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), judge=judge)
    equal = result.versus[0].equal_length
    assert equal is not None and equal.differs and equal.linear is not None
    page = read(prefopt.report(comparisons=[result], output=tmp_path / "r.html"))
    assert f"{100 * equal.linear.mean:.1f} % (" in page.words and "if length counted in proportion" in page.words
    assert any("if length counted in proportion" in line for line in result.lines())


def test_votes_have_the_models_as_title_and_no_table_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "a", "responses": ["b", "c"], "tiers": [[0], [1]], "models": ["one", "two"]}
    votes, found, output = (tmp_path / name for name in ("votes.jsonl", "found.json", "report.html"))
    votes.write_text("".join(json.dumps(row | {"prompt": f"a{n}"}) + "\n" for n in range(3)))
    assert main(["compare", "--votes", str(votes), "--json"]) == 0
    found.write_text(capsys.readouterr().out)
    assert main(["report", "--comparisons", str(found), "--output", str(output)]) == 0
    text = output.read_text()
    assert "<h1>one and two</h1>" in text and "What the samples show" not in text


def test_a_comparison_tells_all_that_it_found(tmp_path: Path) -> None:
    """Without a run, and without samples, which it says; with tasks, lengths, strengths, hashes and its command."""
    for name in "abc":
        rows = [{"prompt": f"{i}?", "responses": ["w " * (1 + (i * ord(name)) % 7)]} for i in range(20)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        values = {"acc,none": 0.5 + ord(name) / 1000, "acc_stderr,none": 0.01}
        found = {"results": {"t": values}, "higher_is_better": {"t": {"acc": True}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    files = [str(tmp_path / f"{name}.json") for name in "abc"]
    result = prefopt.compare(a, b, others=[c], judge="length", task_results=files)
    page = read(prefopt.report(comparisons=[result], output=tmp_path / "r.html"))
    for said in ("no samples are shown", "Bradley-Terry", "0.597", "-0.001 ± 0.014", "no difference is shown"):
        assert said in page.words
    assert "sign-flip test" in page.words and page.words.count(", among 3 comparisons p = ") == 6
    assert f"--task-results {files[0]}" in page.words
    assert all(len(digest) == 64 and digest in page.words for digest in result.identities.values())
    assert result.environment["versions"]["torch"] in page.words
    assert "characters against" in page.words
    with pytest.raises(ConfigError, match="there is nothing to report"):
        prefopt.report(output=tmp_path / "none.html")


def sweep(folder: Path, tail: str = "") -> Path:
    """A frontier of two methods: two points that count of each, one that does not, one that failed."""
    points = [
        Point("dpo" + tail, "beta=0.1", 0, 50, 0.6, (0.55, 0.65), 4.0, 0.2, length=12.0),
        Point("dpo" + tail, "beta=0.5", 0, 50, 0.3, (0.25, 0.35), 1.0, 0.1, length=11.0),
        Point("ppo" + tail, "kl_target=6", 0, 80, 0.4, (0.3, 0.5), 6.0, 0.5),
        Point(
            "ppo" + tail, "kl_target=9", 0, 80, 0.7, (0.6, 0.8), 9.0, 0.5, counted=False, why_not="no plateau" + tail
        ),
        Point("best_of" + tail, "n=4", 0, 0, 0.5, (0.4, 0.6), 0.64, None, "bound"),
        Point("sft" + tail, "chosen", 0, 9, counted=False, why_not="training failed"),
    ]
    folder.mkdir(parents=True)
    Frontier("base" + tail, "vader" + tail, 129, 4, 48, True, "made" + tail, tuple(points)).write(folder)
    return folder


def test_a_sweep_is_drawn_and_told(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep")
    target = tmp_path / "r.html"
    page = read(prefopt.report(folder, output=target))
    assert "Dpo has" not in page.words
    assert "dpo has more reward at no more KL than 1 of the 1 included trainings of ppo" in page.words
    assert "2 of 6 points are excluded" in page.words and "no: no plateau" in page.words
    for said in ("0.600 (0.550 to 0.650)", "4.00 ± 0.20", "at most 0.64", "no: training failed", "129, 4 samples each"):
        assert said in page.words
    text = target.read_text("utf-8")
    assert page.tags.count("svg") == 1
    assert not [run for run in ("run", "What differs between the runs") if f"<h2>{run}" in text]
    assert ">best_of (KL: upper bound)<" in text
    (folder / "frontier.json").write_text("{}")
    assert main(["report", str(folder), "--output", str(target)]) == 2


def test_what_differs_between_runs_has_no_column_for_a_sweep(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(rate), options={"learning_rate": rate}) for rate in (1e-6, 5e-6)]
    target = prefopt.report([*runs, sweep(tmp_path / "beside")], output=tmp_path / "r.html")
    differences = re.search(r'id="differences".*?</table>', target.read_text("utf-8"), re.S)
    assert differences is not None
    heads = re.findall(r"<th scope[^>]*>([^<]*)", differences[0])
    assert heads == ["option", *labels([read_history(run) for run in runs]), "learning-rate"]
    assert "beside" in target.read_text("utf-8") and "beside" not in differences[0]


def test_a_run_of_ppo_has_a_page_of_its_own_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ppo", options={"prompts": ["p"]}, record={"method": "ppo"})
    lines = [
        {"step": i, "objective/scores": 0.1 * i, "objective/kl": 0.2 * i, "val/length": 20 + i, "epoch": 1}
        for i in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    labels = " ".join(page.values("aria-label"))
    assert "Reward of the policy" in labels and "KL to the reference" in labels and "rose from" in page.words


def test_a_page_never_shows_the_pairs_of_another_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = compared(tmp_path, 12)
    words = ["report", "--comparisons", file, "--output", str(tmp_path / "r.html")]
    assert main(words) == 0
    kept = Path(file).read_text("utf-8")
    compared(tmp_path, 14)  # writes over judged.jsonl
    Path(file).write_text(kept)
    capsys.readouterr()
    assert main(words) == 2
    assert "judged.jsonl changed since" in capsys.readouterr().err
    compared(tmp_path, 12)
    assert main(words) == 0, "they are those of this comparison again"


def test_the_order_of_held_out_pairs_is_the_datas(tmp_path: Path) -> None:
    """Who made the labels is not known: they may be a rule's as well as people's."""
    page = report(write_run(tmp_path / "run"))
    assert "held-out accuracy 85%" in page.words and "people" not in page.words


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert "no run of prefopt" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.pdf")]) == 2
    assert ".html" in capsys.readouterr().err
    run = str(write_run(tmp_path / "run"))
    assert main(["report"]) == 2 and "there is nothing to report" in capsys.readouterr().err
    for text, said in (
        ("{}", "prefopt compare --json"),
        ("[" * 100_000, "nested too deep"),
        (None, "cannot be read"),
    ):
        (tmp_path / "c.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "c.json").write_text(text)
        words = ["report", run, "--comparisons", str(tmp_path / "c.json"), "--output", str(tmp_path / "r.html")]
        assert main(words) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
