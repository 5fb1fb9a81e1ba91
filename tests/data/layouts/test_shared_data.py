"""Every file of preferences, text or chat at hand: its layout, and the numbers that its SOURCE.txt gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from prefopt.data.comparisons import Reading, open_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import DataKind, Problem, check
from prefopt.records import Comparison


def reading_of(path: Path) -> Reading:
    (source,) = find_sources([path])
    return open_comparisons(source)


def kinds(reading: Reading, want: DataKind) -> Counter[str]:
    """How many rows there are of each kind of problem, and how many are ``good``."""
    found: Counter[str] = Counter()
    for x in reading:
        problems = [x] if isinstance(x, Problem) else check(x, want)
        found.update({p.kind for p in problems} or ["good"])
    return found


FILES: list[tuple[str, str, DataKind, int, dict[str, int]]] = [
    ("llamafactory_demo/alpaca_en_demo.json", "alpaca", "demonstrations", 999, {}),
    ("llamafactory_demo/alpaca_zh_demo.json", "alpaca", "demonstrations", 1000, {}),
    ("llamafactory_demo/identity.json", "alpaca", "demonstrations", 91, {}),
    ("llamafactory_demo/dpo_en_demo.json", "sharegpt-ranking", "pairs", 300, {}),
    ("llamafactory_demo/dpo_zh_demo.json", "sharegpt-ranking", "pairs", 300, {}),
    ("llamafactory_demo/kto_en_demo.json", "kto", "labels", 300, {}),
    ("llamafactory_demo/v1_dpo_demo.jsonl", "v1-preference", "pairs", 10, {}),
    ("llamafactory_demo/v1_sft_demo.jsonl", "messages", "demonstrations", 500, {}),
    ("finegrained_qa/dev_feedback.json", "pair-labels", "pairs", 500, {"only ties": 12}),
    ("gsm8k/train.jsonl", "question-answer", "demonstrations", 7473, {}),
    ("gsm8k/test.jsonl", "question-answer", "demonstrations", 1319, {}),
    ("gsm8k/example_model_solutions.jsonl", "solutions", "pairs", 1319, {"only ties": 432 + 156}),
    (
        "hh_rlhf/harmless-base-test.jsonl.gz",
        "hh",
        "pairs",
        2312,
        {"differing prompts": 5, "empty response": 4},
    ),
    (
        "hh_rlhf/helpful-base-test.jsonl.gz",
        "hh",
        "pairs",
        2354,
        {"differing prompts": 9, "identical responses": 2, "empty response": 4},
    ),
    (
        "ultrafeedback_sample/train_clean.jsonl",
        "preference-text",
        "pairs",
        1000,
        # Of its four rows of identical responses one has equal scores, as other rows have.
        {"identical responses": 3, "empty response": 2, "only ties": 111},
    ),
    ("ultrafeedback_sample/eval_clean.jsonl", "preference-text", "pairs", 200, {"only ties": 25}),
]


@pytest.mark.parametrize(("name", "layout", "want", "rows", "bad"), FILES)
def test_files_load_with_the_numbers_of_their_sources(
    shared: Path, name: str, layout: str, want: DataKind, rows: int, bad: dict[str, int]
) -> None:
    reading = reading_of(shared / "data" / name)
    found = kinds(reading, want)
    assert (reading.layout, reading.count) == (layout, rows)
    assert dict(found) == bad | {"good": rows - sum(bad.values())}
    recognised = open_comparisons(find_sources([shared / "data" / name])[0], format=layout)
    assert list(recognised) == list(reading)


def test_labels_of_pairs_of_four_answers(shared: Path) -> None:
    rows = reading_of(shared / "data/finegrained_qa/dev_feedback.json").comparisons
    assert sum(len(c.pairs) for c in rows) == 3000 - 384
    assert all(len(c.responses) == 4 for c in rows)
    # No cycles; in 22 rows ties that are not transitive, which no order has.
    voted = [c for c in rows if c.votes is not None]
    assert len(voted) == 22 and not any(c.tiers for c in voted)
    for c in rows:
        pairs = set(c.pairs)
        assert all((a, d) in pairs for a, b in pairs for e, d in pairs if b == e)


def test_solutions_and_labels(shared: Path) -> None:
    solved = reading_of(shared / "data/gsm8k/example_model_solutions.jsonl").comparisons
    right = Counter(sum(c.labels or ()) for c in solved)
    assert [right[k] for k in range(5)] == [432, 290, 236, 205, 156]
    assert solved[0].extra["solutions"] == ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    labelled = reading_of(shared / "data/llamafactory_demo/kto_en_demo.json").comparisons
    assert Counter(c.labels for c in labelled) == {(True,): 150, (False,): 150}


def test_conversations_and_scores(shared: Path) -> None:
    rows = reading_of(shared / "data/llamafactory_demo/dpo_en_demo.json").comparisons
    assert sum(c.prompt[0].role == "system" for c in rows) == 80 and max(len(c.prompt) for c in rows) == 13
    assert len({c.prompt_key for c in rows}) == 295
    feedback = reading_of(shared / "data/ultrafeedback_sample/train_clean.jsonl")
    scores = [c.scores for c in feedback.comparisons]
    assert None not in scores and sum(s is not None and s[0] == s[1] for s in scores) == 111
    assert feedback.notes == [f"{feedback.file}: columns not read: source_index"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("train", 25_000), ("test", 25_000), ("unsup", 50_000)])
def test_film_reviews_are_text_and_their_labels_are_not_read(shared: Path, name: str, rows: int) -> None:
    reading = reading_of(shared / f"data/imdb/{name}.jsonl.gz")
    assert (reading.layout, reading.count) == ("raw-text", rows)
    unread = "id" if name == "unsup" else "id, label, rating"
    assert reading.notes == [f"{reading.file}: columns not read: {unread}"]
    assert kinds(reading, "demonstrations") == {"good": rows}
    first = next(iter(reading))
    assert isinstance(first, Comparison) and first.text and first.labels is None and first.prompt[0].content == ""


def test_every_row_of_every_file_is_written_again(shared: Path) -> None:
    for name, layout, *_ in FILES:
        for c in reading_of(shared / "data" / name).comparisons[::7]:
            for other in {"canonical", layout if LAYOUTS[layout].writer else "canonical"}:
                again = LAYOUTS[other].parse(LAYOUTS[other].write(c), c.row, c.file)
                assert again == c and again.extra == c.extra
