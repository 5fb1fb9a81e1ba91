"""From votes to a trained model: the study as it is, and its exports."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.errors import StudyError
from prefopt.studies.items import add_items
from prefopt.studies.study import Study
from prefopt.studies.votes import Vote, record
from small_chat import build_model
from studies.small import new_item, new_study, people, shown

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(folder, [f"question {n} answer {n}.0 answer {n}.1" for n in range(50)])
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Twelve pairs and six rankings that three people judged: mostly alike, with ties, skips and a dissent."""
    draw = random.Random(0)
    study = new_study(tmp_path / "s.db", 12, overlap=3)
    add_items(study, [new_item(30 + n, 4) for n in range(6)])
    for person in people(study, "Ann", "Bob", "Cay"):
        for n in range(18):
            found = shown(study, person)
            order = list(range(found.item.count))
            if draw.random() < 0.2:
                draw.shuffle(order)
            vote = Vote(tuple((k,) for k in order))
            if n == 4:
                vote = Vote((tuple(order),))
            record(study, person, found.ticket, Vote(skipped="unclear") if n == 7 else vote)
    study.close()
    return tmp_path / "s.db"


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def trained(model: Path, data: Path, output: Path, *more: str, verb: str = "dpo") -> list[float]:
    words = [verb, "--model", str(model), "--data", str(data), "--output", str(output), "--max-steps", "3"]
    assert main([*words, "--batch-size", "8", "--learning-rate", "1e-4", "--dtype", "float32", *more]) == 0
    return losses(output)


def test_dpo_trains_on_a_study_as_it_is(model: Path, study: Path, tmp_path: Path) -> None:
    found = trained(model, study, tmp_path / "o", "--eval-fraction", "0.2", "--loss", "dpo")
    assert found[0] == pytest.approx(math.log(2), abs=1e-3) and all(map(math.isfinite, found))


@pytest.mark.parametrize(
    ("form", "more"),
    [("pairs", ["--disagreement", "every"]), ("soft", ["--ties", "half"]), ("rankings", ["--ties", "keep"])],
)
def test_dpo_trains_on_what_is_exported(form: str, more: list[str], model: Path, study: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main(["collect", "export", str(study), "--output", str(rows), "--form", form, *more]) == 0
    found = trained(model, rows, tmp_path / "o", "--on-bad-row", "skip")
    assert found[0] == pytest.approx(math.log(2), abs=1e-3)


def test_soft_labels_from_the_file_and_from_the_export_train_the_same(model: Path, study: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main(["collect", "export", str(study), "--output", str(rows), "--form", "soft", "--ties", "half"]) == 0
    assert trained(model, rows, tmp_path / "a") == trained(model, study, tmp_path / "b")


def test_rankings_train_by_plackett_luce(model: Path, study: Path, tmp_path: Path) -> None:
    found = trained(model, study, tmp_path / "o", "--loss", "plackett_luce", "--on-bad-row", "skip")
    assert all(map(math.isfinite, found))


@pytest.mark.parametrize("verb", ["reward", "sft"])
def test_reward_models_and_fine_tuning_read_the_study_too(verb: str, model: Path, study: Path, tmp_path: Path) -> None:
    found = trained(model, study, tmp_path / "o", "--on-bad-row", "skip", verb=verb)
    assert len(found) == 3 and all(map(math.isfinite, found))


def test_a_reward_model_trains_on_an_export(model: Path, study: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main(["collect", "export", str(study), "--output", str(rows), "--form", "pairs"]) == 0
    assert all(map(math.isfinite, trained(model, rows, tmp_path / "o", verb="reward")))


def test_a_model_answers_and_people_compare(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("question 1\nquestion 2\nquestion 3\n")
    words = ["collect", "new", str(tmp_path / "n.db"), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "8"]
    assert main([*words, "--model", str(model), str(model), "--num", "4", "--dtype", "float32"]) == 0
    assert "items added" in capsys.readouterr().out
    with Study(tmp_path / "n.db") as study:
        rows = study.connection.execute("SELECT count, origins FROM item").fetchall()
        settings = json.loads(study.connection.execute("SELECT settings FROM sampling").fetchone()[0])
    assert 1 <= len(rows) <= 3 and all(2 <= row["count"] <= 4 for row in rows)
    assert {o["model"] for row in rows for o in json.loads(row["origins"])} == {str(model)}
    assert settings["max_new_tokens"] == 8 and settings["temperature"] == 1.0
    assert not list(tmp_path.glob("*.samples"))


def test_samples_survive_what_stops_a_new_study(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("question 1\nquestion 2\n")
    words = ["collect", "new", str(tmp_path / "n.db"), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "8"]
    words += ["--model", str(model), "--dtype", "float32"]

    def full(path: Path, settings: object) -> Study:
        raise StudyError(f"{path}: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Study, "create", full)
        assert main(words) == 2
    assert not (tmp_path / "n.db").exists() and (tmp_path / "n.db.samples" / "0.jsonl").exists()
    assert main([*words, "--temperature", "0.5"]) == 2
    assert "drawn with other options" in capsys.readouterr().err
    assert main(words) == 0
    assert "is finished: nothing is left to sample" in capsys.readouterr().out


def test_votes_are_a_judge_of_models(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--votes", str(study), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {(v["first"], v["second"]) for v in told["versus"]} >= {("model-0", "model-1")}
