"""Every judge gives votes as people do, and says in one line what it cannot judge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import prefopt
from generate.fake_server import serving
from prefopt.config.compare import CompareConfig
from prefopt.core.cache_folder import cache_root
from prefopt.errors import ConfigError, DataError, ModelError, RunError
from prefopt.evaluate.compare import recorded_votes, run
from prefopt.evaluate.judges import Judge, Question, load_judge, vote_with_empty
from prefopt.evaluate.win_rate import tier_outcome
from prefopt.records import Comparison, Message
from prefopt.studies.votes import Vote
from studies.small import new_study, people, say
from train.flat import response_logprobs
from train.small import dpo, pairs, tiny_llama, write_model, write_rows


def question(first: str, second: str, prompt: str = "What is 3 + 4?", **more: Any) -> Question:
    return Question(Comparison.pair(prompt, chosen=first, rejected=second, row=1), **more)


def judge(name: str, **options: Any) -> Judge:
    return load_judge(CompareConfig(a="a", b="b", prompts=["p.txt"], judge=name, **options))


def votes(judge: Judge, *pairs: tuple[str, str]) -> list[float]:
    found = judge([question(*pair) for pair in pairs])
    assert all(isinstance(vote, Vote) for vote in found)
    for vote in found:
        vote.check(2)
    return [tier_outcome(vote.tiers) for vote in found]


def test_rules() -> None:
    assert votes(judge("length"), ("a b", "a"), ("a", "b"), ("a", "b c")) == [1.0, 0.5, 0.0]
    assert votes(judge("regex:^y(es|ep)"), ("yes", "no"), ("no", "yep"), ("yes", "yep"), ("no", "nay")) == [
        1,
        0,
        0.5,
        0.5,
    ]
    with pytest.raises(ConfigError, match=r"--judge regex:\(: no regular expression"):
        judge("regex:(")
    with pytest.raises(ConfigError, match=r"--judge lenght: there is no such judge; did you mean length\?.* gsm8k, "):
        judge("lenght")


def test_vader() -> None:
    pytest.importorskip("vaderSentiment")
    assert votes(judge("vader"), ("a wonderful film", "a dreadful film")) == [1.0]


def test_ones_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge_in_a_test.py").write_text(
        "def q(prompts, responses): return [r.count('q') for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert votes(judge("my_judge_in_a_test:q"), ("qq", "q"), ("a", "b")) == [1.0, 0.5]


def test_answers_of_gsm8k_are_compared_by_their_last_number() -> None:
    row = Comparison(
        (Message("user", "q"),), Comparison.scored("q", ["3 and 4\n#### 7"], scores=[1], row=3).responses, (), 3
    )
    right = {"it is 7": 1.0, "7.0": 1.0, "7 is 3 + 4 = 8": 0.5, "$1,007": 0.5, "none": 0.5, "so x = 7.": 1.0}
    found = judge("gsm8k")([question(text, "no number", row=row) for text in right])
    assert [tier_outcome(vote.tiers) for vote in found] == list(right.values())
    without = dataclasses.replace(row, responses=Comparison.scored("q", ["7"], scores=[1], row=3).responses)
    with pytest.raises(DataError, match="row 1: has no answer after ####"):
        judge("gsm8k")([question("7", "8", row=without)])
    with pytest.raises(DataError, match="row 1: its prompt is not in --prompts"):
        judge("gsm8k")([question("7", "8")])


def test_an_empty_response_loses_before_the_judge_is_asked() -> None:
    asked: list[int] = []

    class Counting:
        name = "counting"

        def notes(self) -> list[str]:
            return []

        def __call__(self, questions: Any) -> list[Vote]:
            asked.append(len(questions))
            return [Vote(((1,), (0,)))] * len(questions)

    given = [question("a", " \n"), question("", "b"), question("", ""), question("a", "b")]
    found, empty = vote_with_empty(Counting(), given)
    assert ([tier_outcome(v.tiers) for v in found], empty, asked) == ([1.0, 0.0, 0.5, 0.0], 3, [1])


def test_the_implied_reward_is_the_log_ratio(model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from data.small import small_tokenizer
    from prefopt.data.comparisons import parse_comparisons
    from prefopt.data.load import load_groups

    other = write_model(tmp_path / "other", seed=1)
    rows = pairs(8)
    groups = load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64).groups
    one, two = (AutoModelForCausalLM.from_pretrained(m) for m in (model, other))
    with torch.no_grad():
        ratio = torch.stack([response_logprobs(one, g) - response_logprobs(two, g) for g in groups])
    implicit = judge(f"implicit:{model},{other}", dtype="float32", device="cpu")
    asked = [Question(c) for c in parse_comparisons(rows, "data") if isinstance(c, Comparison)]
    assert [tier_outcome(v.tiers) for v in implicit(asked)] == (ratio[:, 0] > ratio[:, 1]).double().tolist()
    with pytest.raises(ConfigError, match="write implicit:MODEL,REFERENCE"):
        judge("implicit:one")


def test_a_reward_model_judges_by_its_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from data.small import small_tokenizer
    from prefopt.model.scalar import scalar_from

    scalar_from(tiny_llama(2), small_tokenizer()).save_pretrained(tmp_path / "reward")
    small_tokenizer().save_pretrained(tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float64)
    tokenizer = small_tokenizer()

    def score(text: str) -> float:
        with torch.no_grad():
            return float(plain(torch.tensor([tokenizer(text + "</s>")["input_ids"]])).logits[0, 0])

    rows = pairs(6)
    found = judge(str(tmp_path / "reward"), dtype="float64", device="cpu")(
        [question(r["chosen"], r["rejected"], r["prompt"]) for r in rows]
    )
    assert [tier_outcome(v.tiers) for v in found] == [
        float(score(r["prompt"] + r["chosen"]) > score(r["prompt"] + r["rejected"])) for r in rows
    ]


def test_models_with_other_tokens_imply_no_reward_together(model: str, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    path = Path(other) / "tokenizer.json"
    tokens = json.loads(path.read_text("utf-8"))
    vocab = tokens["model"]["vocab"]
    a, b = list(vocab)[10:12]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tokens), "utf-8")
    with pytest.raises(ModelError, match="has another tokenizer than"):
        judge(f"implicit:{model},{other}")


def test_a_language_model_is_asked_in_both_orders_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.generate.judged.PAUSE", 0.0)
    with serving() as server:
        options = {"judge_url": server.url, "judge_model": "big"}

        def asked(says: str, *pair: str) -> tuple[float, int]:
            server.pieces = ["The first is clear. ", says]
            before = len(server.requests)
            return votes(judge("llm", **options), pair)[0], len(server.requests) - before  # type: ignore[arg-type]

        assert asked("[[1]]", "good", "bad") == (0.5, 2), "whichever stands first wins: a tie"
        assert asked("[[2]]", "good", "bad") == (0.5, 0), "kept on disk"
        assert asked("[[tie]]", "one", "two") == (0.5, 2)
        both = [r[2]["messages"][1]["content"] for r in server.requests[:2]]
        first, second = sorted(both, key=lambda text: text.index("good"))  # they are asked at once
        assert first.index("good") < first.index("bad") and second.index("bad") < second.index("good")
        assert server.requests[0][2]["temperature"] == 0
        score, tries = asked("I cannot say.", "x", "y")
        assert score != score and tries == 6, "two questions, three attempts each, no vote"
        assert asked("[[1]]", "x", "y") == (0.5, 2), "and no such answer is kept"
    assert list((cache_root() / "judgements").rglob("*.json"))


def test_a_language_model_that_holds_to_its_view_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.generate.chat_model import RemoteChatModel

    def answer(self: Any, asked: Any, attempt: int) -> Any:
        text = asked[1].content
        yield "because [[2]] no: " + ("[[1]]" if text.index("good") < text.index("bad") else "[[2]]")

    monkeypatch.setattr(RemoteChatModel, "answer", answer)
    llm = judge("llm", judge_url="http://localhost:1/v1", judge_model="big")
    assert votes(llm, ("good", "bad"), ("bad", "good")) == [1.0, 0.0]
    (vote,) = llm([question("good", "bad")])
    assert "because" in vote.rationale


def test_a_judge_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.generate.judged.PAUSE", 0.0)
    with serving() as server:
        url = server.url
    with pytest.raises(RunError, match="cannot be reached") as caught:
        votes(judge("llm", judge_url=url, judge_model="big"), ("a", "b"))
    assert "\n" not in str(caught.value)


def test_a_judge_that_refuses_is_not_asked_again_and_one_that_fails_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.generate.judged.PAUSE", 0.0)
    for status, tries, said in (
        (401, 1, "^--judge-url http.* answers 401 .wrong key.; check --judge-key, the environment variable"),
        (403, 1, "answers 403 .wrong key.; check --judge-key"),
        (404, 1, "answers 404 .wrong key.; check --judge-model, and the path in --judge-url"),
        (503, 4, "^no server of --judge-url is left .* 503 .*; start it again and repeat the command"),
    ):
        with serving(status=status, message="wrong key") as server:
            asked = judge("llm", judge_url=server.url, judge_model="big")
            monkeypatch.setattr("prefopt.generate.judged.AT_ONCE", 1)
            with pytest.raises(RunError, match=said):
                votes(asked, (f"a {status}", "b"))
            assert len(server.requests) == tries


def test_votes_of_people_are_counted_with_their_weights(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["aa", "b"], "tiers": [[0], [1]], "models": ["m", "n"]},
        {"prompt": "p", "responses": ["a", "b"], "tiers": [[0, 1]], "models": ["n", "m"]},
        {"prompt": "q", "responses": ["a", "b", "c"], "votes": [[0, 1, 3], [1, 0, 1]], "models": ["m", "n", "o"]},
    ]
    found = recorded_votes([write_rows(tmp_path / "v.jsonl", rows)])
    assert [(f.models, f.outcome, f.longer) for f in found] == [
        (("m", "n"), 1.0, 1),
        (("m", "n"), 0.5, 0),
        (("m", "n"), 0.75, 0),
    ]
    assert found[0].prompt == found[1].prompt != found[2].prompt
    bad = write_rows(tmp_path / "w.jsonl", [{"prompt": "p", "responses": ["a", "b"], "tiers": [[0], [1]]}])
    with pytest.raises(DataError, match=r"w\.jsonl, row 1: does not name the model of each response"):
        recorded_votes([bad])


def test_votes_of_a_study_are_counted_person_by_person(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.db", items=3, overlap=2)
    anna, ben = people(study, "anna", "ben")
    for n in range(3):
        say(study, anna, 1, 0)
        say(study, ben, *((0, 1) if n == 1 else (1, 0)))
    found = recorded_votes([str(tmp_path / "s.db")])
    assert {f.models for f in found} == {("model-0", "model-1")} and len({f.prompt for f in found}) == 3
    assert sorted(f.outcome for f in found) == [0.0] * 5 + [1.0]
    (v,) = run(CompareConfig(votes=[str(tmp_path / "s.db")])).versus
    assert (v.first, v.rate.wins, v.rate.losses, v.rate.prompts, v.rate.rate) == ("model-0", 1, 5, 3, None)


def test_a_planted_preference_is_seen_by_the_implied_reward(model: str, tmp_path: Path) -> None:
    trained = dpo(model, pairs(32), tmp_path / "out", learning_rate=3e-3).output
    implicit = judge(f"implicit:{trained},{model}", dtype="float32", device="cpu")
    asked = [question(r["chosen"], r["rejected"], r["prompt"]) for r in pairs(12, seed=9)]
    assert sum(tier_outcome(v.tiers) for v in implicit(asked)) >= 10


def test_a_function_judges_whatever_its_name(tmp_path: Path) -> None:
    def llm(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(len(text)) for text in responses]

    llm.__qualname__ = "llm"
    for name, text in (("a", "long"), ("b", "s")):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": p, "responses": [text], "models": [name]} for p in "pqr"])
    found = prefopt.compare(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), judge=llm)
    assert "llm()" in str(found)
