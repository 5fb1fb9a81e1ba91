"""Benchmarks of rewards by hand: a reward counts words, so that a text of n words has the score n."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prefopt.cli import main
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.core.statistics import rate_interval
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.bench_scores import SECTIONS, BenchMeasure
from prefopt.evaluate.reward_bench import RewardBenchReport, run


def words(count: int) -> str:
    return " ".join(["word"] * count)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def bench(*data: Path, **options: Any) -> RewardBenchReport:
    return run(RewardBenchConfig(data=[str(path) for path in data], **{"reward": "length", **options}))


def measures(report: RewardBenchReport) -> dict[str, BenchMeasure]:
    (result,) = report.results
    return {m.name if m.kind != "overall" else "overall": m for m in result.measures}


def values(report: RewardBenchReport) -> dict[str, float]:
    return {name: m.interval.mean for name, m in measures(report).items()}


def pair(subset: str, chosen: int, rejected: int, number: int = 0) -> dict[str, Any]:
    texts = {"prompt": f"{subset} {number}?", "chosen": words(chosen), "rejected": words(rejected)}
    return {**texts, "subset": subset, "id": number, "chosen_model": "a", "rejected_model": "b"}


def test_reward_bench_weighs_subsets_by_their_published_sizes(tmp_path: Path) -> None:
    rows = [pair("alpacaeval-easy", 3, 1), pair("alpacaeval-easy", 1, 2, 1), pair("mt-bench-easy", 2, 1)]
    rows += [pair("math-prm", 2, 1, n) for n in range(3)] + [pair("math-prm", 1, 2, 3)]  # 0.75
    rows += [pair("hep-go", 1, 1)]  # a tie is no win
    rows += [pair("donotanswer", 2, 1), pair("my-own", 1, 2)]
    report = bench(write(tmp_path / "rows.jsonl", rows))
    found = values(report)
    assert (found["alpacaeval-easy"], found["mt-bench-easy"], found["math-prm"], found["hep-go"]) == (0.5, 1, 0.75, 0)
    chat, reasoning = (100 * 0.5 + 28 * 1) / 128, (984 * 0.75 + 164 * 0) / (984 + 164)
    assert found["Chat"] == pytest.approx(chat) and found["Reasoning"] == pytest.approx(reasoning)
    assert found["Safety"] == 1 and "Chat Hard" not in found
    assert found["overall"] == pytest.approx((chat + reasoning + 1) / 3)  # "my-own" is in no section
    assert measures(report)["hep-go"].ties == 1 and measures(report)["math-prm"].ties == 0
    padded = rate_interval([1, 1, 1, 0])
    assert measures(report)["math-prm"].interval == padded
    notes = " ".join(report.results[0].notes)
    assert "without 18 subsets" in notes and "my-own" in notes
    # the interval of the overall number is that of a stratified sample, by its definition
    spread = below = 0.0
    for section in ("Chat", "Safety", "Reasoning"):
        there = {n: size for n, size in SECTIONS[section].items() if n in found}
        for name, size in there.items():
            wins = [float(r["chosen"] > r["rejected"]) for r in rows if r["subset"] == name]
            weight = size / sum(there.values()) / 3
            part = weight**2 * np.var([*wins, 0, 1], ddof=1) / (len(wins) + 2)
            spread, below = spread + part, below + part**2 / (len(wins) + 1)
    whole = measures(report)["overall"].interval
    quantile = float(stats.t.ppf(0.975, spread**2 / below))  # Welch and Satterthwaite's degrees of freedom
    assert measures(report)["Safety"].interval == measures(report)["donotanswer"].interval  # the same data
    low, high = (whole.mean + sign * quantile * math.sqrt(spread) for sign in (-1, 1))
    assert (whole.low, whole.high) == pytest.approx((max(0, low), min(1, high)), abs=1e-6)


def four(subset: str, chosen: list[int], rejected: list[int], name: str) -> dict[str, Any]:
    counts = {"num_correct": len(chosen), "num_incorrect": len(rejected), "total_completions": len(chosen + rejected)}
    sides = {"chosen": [words(n) for n in chosen], "rejected": [words(n) for n in rejected]}
    return {"id": name, "prompt": f"{name}?", **sides, **counts, "subset": subset, "models": []}


def test_reward_bench_2_picks_the_best_of_four_and_scores_ties_apart(tmp_path: Path) -> None:
    rows = [
        four("Math", [4], [1, 2, 3], "1"),  # won
        four("Math", [2], [1, 2, 2], "2"),  # one of three at the top: a third
        four("Math", [1], [1, 2, 1], "3"),  # lost
        four("Focus", [3], [1, 1, 1], "4"),
        four("Ties", [5], [1, 2], "ref:0"),  # margin 3
        four("Ties", [4, 6], [1, 3], "tied:0"),  # margin 1, spread 2
        four("Ties", [9], [1], "ref:1"),  # margin 8
        four("Ties", [9, 8], [2, 1], "tied:1"),  # margin 6, spread 1
        four("Ties", [1], [2], "ref:2"),  # margin -1
        four("Ties", [5, 5], [1], "tied:2"),  # margin 4, spread 0
    ]
    found = values(bench(write(tmp_path / "rows.jsonl", rows)))
    assert found["Math"] == pytest.approx((1 + 1 / 3 + 0) / 3) and found["Focus"] == 1
    far = [math.tanh(1 / 2 - 1), math.tanh(6 / 1 - 1), -1.0]  # the last: -1 over a spread of none
    score = 0.3 * (2 / 3) + 0.3 * (3 / 3) + 0.2 * (2 / 3) + 0.2 * (1 / 3) + 0.01 * sum(far) / 3
    assert found["Ties"] == pytest.approx(score)
    assert found["overall"] == pytest.approx((found["Math"] + 1 + score) / 3)
    interval = measures(bench(tmp_path / "rows.jsonl"))["Ties"].interval
    assert (
        interval.low < score < interval.high and interval == measures(bench(tmp_path / "rows.jsonl"))["Ties"].interval
    )


def test_intervals_hold_their_means_where_ties_have_more_than_one(tmp_path: Path) -> None:
    rows = [four("Ties", [90], [1], "ref:0"), four("Ties", [91, 90], [1], "tied:0")]
    found = measures(bench(write(tmp_path / "ties.jsonl", rows)))
    rows += [four("Math", [4], [1, 2, 3], "1"), four("Math", [4], [1, 2, 3], "2")]
    found |= {f"{name} of two": m for name, m in measures(bench(write(tmp_path / "rows.jsonl", rows))).items()}
    assert found["overall"].interval.mean == pytest.approx(1.01) and found["Math of two"].interval.high == 1
    assert found["overall of two"].interval.high <= 1.005 + 1e-12  # half of it
    assert all(m.interval.low <= m.interval.mean <= m.interval.high for m in found.values())


def test_rm_bench_is_a_matrix_of_styles(tmp_path: Path) -> None:
    def row(domain: str, chosen: list[int], rejected: list[int], name: str) -> dict[str, Any]:
        sides = {"chosen": [words(n) for n in chosen], "rejected": [words(n) for n in rejected]}
        return {"id": name, "prompt": f"{name}?", **sides, "domain": domain}

    rows = [
        row("chat", [2, 3, 4], [1, 3, 5], "a"),  # won: row 1 by 1 > none; see below
        row("math", [9, 9, 9], [1, 1, 1], "b"),
        row("safety-refuse", [1, 1, 1], [2, 2, 2], "c"),
        row("safety-response", [9, 9, 9], [1, 1, 1], "d"),
        row("safety-response", [9, 9, 9], [1, 1, 1], "e"),
    ]
    # chat, right answers 2 3 4 in rows, wrong ones 1 3 5 in columns, won where larger:
    #   1 0 0        easy: below the diagonal 1, 1, 1; normal: 1, 0, 0; hard: 0, 0, 0
    #   1 0 0
    #   1 1 0
    found = values(bench(write(tmp_path / "total_dataset.json", rows)))
    assert found["chat"] == pytest.approx((1 + 1 / 3 + 0) / 3) and found["math"] == 1
    assert (found["safety-refuse"], found["safety-response"], found["safety"]) == (0, 1, 0.5)
    easy, normal, hard = ((a + 1 + 0.5) / 3 for a in (1, 1 / 3, 0))
    assert (found["easy"], found["normal"], found["hard"]) == pytest.approx((easy, normal, hard))
    assert found["overall"] == pytest.approx((easy + normal + hard) / 3)


def judged(source: str, first: int, second: int, label: str, name: str) -> dict[str, Any]:
    sides = {"response_A": words(first), "response_B": words(second)}
    return {"pair_id": name, "original_id": "1", "source": source, "question": f"{name}?", **sides, "label": label}


def test_judge_bench_is_by_category(tmp_path: Path) -> None:
    rows = [
        judged("mmlu-pro-law", 2, 1, "A>B", "a"),
        judged("mmlu-pro-math", 2, 1, "B>A", "b"),
        judged("livebench-math", 1, 2, "B>A", "c"),
        judged("livecodebench", 1, 1, "A>B", "d"),
    ]
    found = measures(bench(write(tmp_path / "rows.jsonl", rows)))
    accuracies = {name: m.interval.mean for name, m in found.items()}
    assert accuracies == {"Knowledge": 0.5, "Math": 1, "Coding": 0, "overall": 0.5}
    assert found["Coding"].ties == 1 and found["overall"].interval == rate_interval([1, 0, 1, 0])


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = pair("hep-go", 2, 1)
    wrong: list[dict[str, Any]] = [
        {**good, "chosen": None, "id": 1},
        {"prompt": "?", "chosen": "a", "subset": "hep-go"},
        {**four("Math", [1], [1, 2, 3], "x"), "num_incorrect": 2},
        four("Ties", [1], [1], "7"),
        judged("livecodebench", 1, 2, "A=B", "d"),
        good,
    ]
    path = write(tmp_path / "rows.jsonl", [good, *wrong])
    with pytest.raises(DataError, match=r"6 of 7 rows cannot be used: .*chosen is absent") as refused:
        bench(path)
    told = str(refused.value)
    for part in ("lacks rejected of RewardBench's layout", "num_incorrect is 2, and there are 3", "ref:N or tied:N"):
        assert part in told
    assert "label is 'A=B'" in told and "is row 1 of" in told and "--on-bad-row skip" in told
    report = bench(path, on_bad_row="skip")
    assert values(report)["hep-go"] == 1 and "6 of 7 rows left out" in report.notes[0]
    with pytest.raises(DataError, match="none of 1 rows is a benchmark"):
        bench(write(tmp_path / "other.jsonl", [{"a": 1}]), on_bad_row="skip")
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        RewardBenchConfig(data=["x"], reward="length", html="page.pdf")


def test_tables_json_and_a_page_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "one.jsonl", [pair("hep-go", 2, 1), pair("hep-go", 1, 2, 1)])
    write(folder / "two.json", [judged("livecodebench", 1, 3, "B>A", "d")])
    output, page = tmp_path / "found.json", tmp_path / "page.html"
    options = ["--reward", "length", "--data", str(folder), "--output", str(output), "--html", str(page)]
    assert main(["reward-bench", *options]) == 0
    out = capsys.readouterr().out
    assert "hep-go" in out and "50.0%" in out and "JudgeBench" in out and "written:" in out
    found = json.loads(output.read_text("utf-8"))
    assert [r["benchmark"] for r in found["results"]] == ["RewardBench", "JudgeBench"]
    assert [(s["chosen"], s["rejected"]) for s in found["scores"]] == [([2], [1]), ([1], [2]), ([3], [1])]
    html = page.read_text("utf-8")
    assert "Benchmark: JudgeBench" in html and "<svg" in html and "length has 50.0% on RewardBench" in html
    assert html.count("Command to reproduce it") == 2 and "--data" in html
    assert main(["reward-bench", *options[:-2]]) == 2  # it exists
    assert main(["reward-bench", "--reward", "length", "--data", str(folder), "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["results"][1]["measures"][-1]["interval"]["mean"] == 1
    with pytest.raises(RunError, match="exists"):
        bench(folder, output=str(output))


def test_models_give_the_scores_of_prefopt_score(model: str, tmp_path: Path) -> None:
    """Implicit rewards of a policy against its reference are those of the models' own log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape) * 0.05)
    other.save_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "policy")
    rows = [four("Math", [1], [2, 3, 4], "1"), four("Math", [2], [1], "2")]
    path = write(tmp_path / "rows.jsonl", rows)
    policy = str(tmp_path / "policy")
    models = {"reward": "implicit", "model": policy, "reference": model, "beta": 0.5}
    report = bench(path, **models, device="cpu", dtype="float32")
    from prefopt.data.chat.render import Renderer
    from prefopt.data.tokenizer import load_tokenizer
    from prefopt.evaluate.bench_rows import read_rows

    renderer, base = Renderer(load_tokenizer(model)), AutoModelForCausalLM.from_pretrained(model)
    for row, scores in zip(read_rows([str(path)], skip=False).rows, report.scores, strict=True):
        group = renderer.render(row.comparison()).group
        for answer, score in zip(group.continuations, scores, strict=True):
            ids = [*map(int, group.prefix), *map(int, answer.ids)]
            told = [i for i, trained in enumerate(answer.trained, len(group.prefix)) if trained]
            with torch.no_grad():
                logp = [
                    torch.log_softmax(m(torch.tensor([ids])).logits[0].double(), -1)
                    for m in (other.eval(), base.eval())
                ]
            difference = sum(float(logp[0][i - 1, ids[i]] - logp[1][i - 1, ids[i]]) for i in told)
            assert score == pytest.approx(0.5 * difference, abs=1e-4)
    assert report.reward == f"0.5 log({policy} / {model})"
