"""Public data sets of comparisons: what each row of each kind means, ties and damaged rows included."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data.comparisons import Reading, parse_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import convert
from prefopt.errors import ConfigError, DataError
from prefopt.records import Comparison, Message

FIRST, SECOND, TIE = ((0,), (1,)), ((1,), (0,)), ((0, 1),)
USER = {"role": "user", "content": "Why?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(*rows: dict[str, Any], columns: list[str] | None = None) -> Reading:
    return parse_comparisons(rows, "f", columns=columns)


def tiers(*rows: dict[str, Any], columns: list[str] | None = None) -> list[Any]:
    """The tiers of each row, or what is wrong with it."""
    return [x.tiers if isinstance(x, Comparison) else x.kind for x in read(*rows, columns=columns)]


SHP = {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2}
PKU = {"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
WEBGPT = {"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}
SUMMARY = {"info": {"post": "Why?"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
STRENGTH = {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -1}
HELPSTEER3 = {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 2}
ARENA = {"conversation_a": [USER, said("a")], "conversation_b": [USER, said("b")], "winner": "model_b"}
COLUMNS = {"prompt": '["Why?"]', "response_a": '["a"]', "response_b": '["b"]'}
COLUMNS |= {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
ARGILLA = {"fields": {"prompt": "Why?", "response-a": "a", "response-b": "b"}, "responses": {"q": [{"value": "b"}]}}


PAIRS: list[tuple[dict[str, Any], str, Any]] = [
    (SHP, "shp", FIRST),
    (SHP | {"labels": 0}, "shp", SECOND),
    (SHP | {"labels": "1"}, "shp", FIRST),
    (SHP | {"labels": 0.0}, "shp", SECOND),
    (SHP | {"labels": True}, "shp", FIRST),
    (SHP | {"labels": 2}, "shp", "unknown label"),
    (PKU, "pku-saferlhf", SECOND),
    (PKU | {"better_response_id": 0}, "pku-saferlhf", FIRST),
    (WEBGPT, "webgpt", SECOND),
    (WEBGPT | {"score_1": -0.5}, "webgpt", TIE),
    (SUMMARY, "summaries", FIRST),
    (SUMMARY | {"summaries": [{"text": "a"}]}, "summaries", "missing field"),
    (STRENGTH, "helpsteer-preference", FIRST),
    (STRENGTH | {"preference_strength": 0}, "helpsteer-preference", TIE),
    (STRENGTH | {"preference_strength": 3.0}, "helpsteer-preference", SECOND),
    (HELPSTEER3, "helpsteer3", SECOND),
    (ARENA, "arena", SECOND),
    (ARENA | {"winner": "model_a"}, "arena", FIRST),
    (ARENA | {"winner": "tie"}, "arena", TIE),
    (ARENA | {"winner": "tie (bothbad)"}, "arena", TIE),
    (ARENA | {"winner": "Model_A"}, "arena", FIRST),
    (ARENA | {"winner": "nobody"}, "arena", "label of unknown meaning"),
    (COLUMNS, "arena-columns", FIRST),
    (COLUMNS | {"winner_model_a": False, "winner_model_b": True}, "arena-columns", SECOND),
    (COLUMNS | {"winner_model_a": "0", "winner_tie": "1"}, "arena-columns", TIE),
    (COLUMNS | {"winner_model_b": 1}, "arena-columns", "unknown label"),
    (COLUMNS | {"response_b": "[null]"}, "arena-columns", "wrong type"),
    (ARGILLA, "argilla", SECOND),
    (ARGILLA | {"responses": {"q": [{"value": "response-a"}]}}, "argilla", FIRST),
    (ARGILLA | {"responses": {"q": [{"value": "tie"}]}}, "argilla", TIE),
    (ARGILLA | {"responses": {"q": []}}, "argilla", "missing field"),
    ({"messages": [USER, said("a")], "rejected_messages": [USER, said("b")]}, "swift-preference", FIRST),
    ({"messages": [USER, said("a")], "rejected_messages": [said("b")]}, "swift-preference", FIRST),
    ({"messages": [USER, said("a")], "rejected_response": "b"}, "swift-preference", FIRST),
    ({"prompt": "Why?", "pos": "a", "neg": "b"}, "preference-text", FIRST),
]


def test_which_of_two_responses_is_better() -> None:
    for row, layout, expected in PAIRS:
        reading = read(row)
        assert reading.layout == layout and tiers(row) == [expected]
        for c in reading.comparisons:
            assert [r.text for r in c.responses] == ["a", "b"] and c.prompt == (Message("user", "Why?"),)
            assert LAYOUTS["canonical"].parse(LAYOUTS["canonical"].write(c), 1, "f") == c


def ranking(key: str, *values: Any, text: str = "text") -> list[dict[str, Any]]:
    return [{text: word, key: value} for word, value in zip("abc", values, strict=False)]


def tree(*ranks: Any) -> dict[str, Any]:
    return {"message_tree_id": "t", "prompt": {"text": "Why?", "replies": ranking("rank", *ranks)}}


RANKINGS: list[tuple[dict[str, Any], str, Any]] = [
    ({"prompt": "Why?", "answers": ranking("rank", 3.0, 1.0, 2.0, text="answer")}, "nectar", ((1,), (2,), (0,))),
    ({"prompt": "Why?", "answers": ranking("rank", 2, 1, 1, text="answer")}, "nectar", ((1, 2), (0,))),
    ({"question": "Why?", "answers": ranking("pm_score", 2, 7, 2)}, "stack-exchange", ((1,), (0, 2))),
    ({"question": "Why?", "answers": ranking("pm_score", 2, None)}, "stack-exchange", "missing score"),
    (tree(None, None), "oasst-trees", ()),
    (
        {"message_tree_id": "t", "prompt": {"text": "Why?", "replies": ranking("rank", None, 0)}},
        "oasst-trees",
        "missing score",
    ),
    (tree(0), "oasst-trees", ()),
    (tree(1, 0), "oasst-trees", SECOND),
    ({"instruction": "Why?", "generations": ["a", "b"], "ratings": [2.0, 5.0]}, "distilabel", SECOND),
    ({"instruction": "Why?", "generations": ["a", "b"], "ratings": [2.0]}, "distilabel", "wrong number"),
    ({"instruction": "Why?", "generations": ["a", "b"], "ratings": [2, None]}, "distilabel", "missing score"),
    ({"prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c"]}, "lists-of-sides", ((0,), (1, 2))),
    ({"prompt": "Why?", "chosen": ["a"], "rejected": []}, "lists-of-sides", "missing field"),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, "ranks", ((1,), (0, 2))),
]


def test_how_several_responses_are_ordered() -> None:
    for row, layout, expected in RANKINGS:
        assert read(row).layout == layout and tiers(row) == [expected]
        for c in read(row).comparisons:
            assert (
                c.prompt == (Message("user", "Why?"),)
                and "".join(r.text for r in c.responses) == "abc"[: len(c.responses)]
            )


def test_ranks_of_which_the_lowest_is_best_and_completions_of_turns() -> None:
    completions = [{"rank": 1, "completion": [said("a")]}, {"rank": 0, "completion": [said("b")]}]
    assert tiers({"context": [USER], "completions": completions}) == [SECOND]
    highest = {"prompt": "Why?", "responses": ["a", "b"], "points": [2, 1]}
    assert tiers(highest, columns=["ranks=points"]) == [SECOND] and tiers(highest, columns=["scores=points"]) == [FIRST]


def test_messages_of_trees_are_read_with_their_replies_and_not_alone() -> None:
    flat = [
        {"message_id": "1", "parent_id": None, "text": "Q", "role": "prompter", "rank": None},
        {"message_id": "2", "parent_id": "1", "text": "A", "role": "assistant", "rank": 0},
    ]
    with pytest.raises(DataError, match=r"each row is one message of a tree .*\.trees\.jsonl") as caught:
        read(*flat)
    assert "\n" not in str(caught.value)
    assert parse_comparisons(flat, "f", format="raw-text").count == 2  # what the message says to type
    replies = [{"text": "A", "rank": 0}, {"text": "B", "rank": 0}, {"text": "C", "rank": 1}]
    tree = {"message_tree_id": "t", "prompt": {"text": "Q", "role": "prompter", "replies": replies}}
    reading = read(tree)
    assert reading.comparisons[0].tiers == ((0, 1), (2,))
    assert reading.notes == ["f: of each tree, the replies to its first message are compared; deeper ones are not read"]


CASES_A_SYSTEM_TURN_I = ["shp", "nectar", "pku-saferlhf", "argilla", "helpsteer3"]


def test_a_system_turn_is_read_and_not_said_to_be_unread() -> None:
    for name in CASES_A_SYSTEM_TURN_I:
        reading = read({**LAYOUTS[name].example, "system": "Be kind."})
        (found,) = reading.comparisons
        assert found.prompt[0] == Message("system", "Be kind.") and found.extra == {}
        assert not any("not read" in note for note in reading.notes)


def test_a_transcript_is_a_prompt_in_turns() -> None:
    asked = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant: "
    (c,) = read({"prompt": asked, "answers": ranking("rank", 1, 2, text="answer")}).comparisons
    assert [(m.role, m.content) for m in c.prompt] == [("user", "Hi"), ("assistant", "Ho"), ("user", "Why?")]


def test_turns_of_an_arena_go_on_within_the_responses() -> None:
    sides = {"response_a": ["a", "b"], "response_b": ["c", "d"]}
    (c,) = read(COLUMNS | {"prompt": ["Why?", "And?"]} | sides).comparisons
    assert [[(m.role, m.content) for m in r.messages] for r in c.responses] == [
        [("assistant", "a"), ("user", "And?"), ("assistant", "b")],
        [("assistant", "c"), ("user", "And?"), ("assistant", "d")],
    ]
    assert tiers(COLUMNS | {"prompt": ["Why?", "And?"]}) == ["wrong number"]


def test_several_people_of_argilla_are_votes_and_rankings_are_orders() -> None:
    answers = [{"value": "a"}, {"value": "b"}, {"value": "b"}, {"value": "tie"}]
    (c,) = read(ARGILLA | {"responses": {"q": answers}}).comparisons
    assert c.tiers == SECOND and c.votes == ((0, 1, 1.0), (1, 0, 2.0))
    order = [{"value": "response-b", "rank": 1}, {"value": "response-a", "rank": 2}]
    assert tiers(ARGILLA | {"responses": {"ranking": [{"value": order}]}}) == [SECOND]


def test_rows_of_one_prompt_that_follow_each_other_are_compared_and_counted() -> None:
    rows = [
        {"prompt": p, "response": r, "helpfulness": h, "correctness": -h}
        for p, r, h in zip("xxyzz", "abcde", (1, 3, 2, 4, 4), strict=True)
    ]
    reading = read(*rows, {"prompt": "z", "response": None, "helpfulness": 1})
    assert reading.count == 4 and "f: 6 rows are 4 prompts" in " ".join(reading.notes)
    assert [(x.row, x.tiers) if isinstance(x, Comparison) else (x.row, x.kind) for x in reading] == [
        (1, SECOND),
        (3, ()),
        (4, TIE),
        (6, "missing field"),
    ]
    assert tiers(*rows[:2], columns=["score=correctness"]) == [FIRST]


TWO = {"instruction": "Why?", "output_1": "a", "output_2": "b", "label": 1}
NAMED = ["first=output_1", "second=output_2"]


def test_bare_numbers_need_their_meaning_and_the_error_says_how() -> None:
    with pytest.raises(DataError, match=r"first=output_1 second=output_2 label=label --label-means 0=first,1=second"):
        read(TWO)
    (problem,) = read(TWO, columns=NAMED).problems
    assert problem.kind == "label of unknown meaning" and "--label-means 0=first,1=second,2=tie" in problem.what
    for means, expected in (("0=first,1=second", SECOND), ("1=first,0=second", FIRST), ("1=tie", TIE)):
        assert tiers(TWO, columns=[*NAMED, f"--label-means={means}"]) == [expected]
    said_otherwise = [*NAMED, "--label-means=x=first", "--label-means=2=second,true=tie"]
    rows = [TWO | {"label": label} for label in ("X ", 2.0, "2", True, "True", 3)]
    assert tiers(*rows, columns=said_otherwise) == [FIRST, SECOND, SECOND, TIE, TIE, "unknown label"]
    for wrong in ("0", "0=better", "=first", "0=first,0=second"):
        with pytest.raises(ConfigError, match="--label-means"):
            read(TWO, columns=[*NAMED, f"--label-means={wrong}"])


CASES_LABELS_THAT_NAM = [("first", FIRST), ("B", SECOND), ("tie", TIE), ("output_2", SECOND)]


def test_labels_that_name_a_side_need_no_meaning() -> None:
    for label, expected in CASES_LABELS_THAT_NAM:
        assert tiers(TWO | {"label": label}, columns=NAMED) == [expected]


def test_scores_and_votes_of_two_responses() -> None:
    row = {"prompt": "Why?", "first": "a", "second": "b"}
    assert tiers(row | {"score_first": 1, "score_second": 1.5}) == [SECOND]
    assert tiers(row | {"score_first": 1, "score_second": 1}, row | {"score_first": 1}) == [TIE, "missing score"]
    (c,) = read(row | {"votes_first": 3, "votes_second": 1}).comparisons
    assert c.tiers == FIRST and c.votes == ((0, 1, 3.0), (1, 0, 1.0)) and c.text
    assert (
        tiers(row | {"votes_first": 2, "votes_second": 2}, row | {"votes_first": -1, "votes_second": 2})[1]
        == "wrong type"
    )


SIDES: dict[str, dict[str, Any]] = {
    name: {k: v for k, v in LAYOUTS[name].example.items() if not k.startswith("score")}
    for name in (
        *("preference-text", "preference-chat", "implicit-text", "implicit-chat", "ultrafeedback-binarized", "hh"),
        *("sharegpt-ranking", "alpaca-ranking", "messages-ranking", "v1-preference", "openai-preference"),
        "swift-preference",
    )
}


CASES_SCORES_BESIDE_C = ["score_chosen", "chosen_score", "chosen-rating", "rating_chosen", "chosen_avg_rating"]


def test_scores_beside_chosen_and_rejected_are_those_of_the_pair() -> None:
    for scores in CASES_SCORES_BESIDE_C:
        for name, pair in SIDES.items():
            other = scores.replace("chosen", "rejected")
            reading = read(*({**pair, scores: good, other: bad} for good, bad in ((5, 1), (3, 3), (1, 5))))
            better, tie = reading.comparisons
            assert reading.layout == name and reading.notes == []
            assert (better.tiers, better.scores, tie.tiers, tie.scores) == (FIRST, (5.0, 1.0), TIE, (3.0, 3.0))
            assert better.extra == tie.extra == {}
            (against,) = reading.problems
            assert against.kind == "scores against the preference" and f"{scores} is 1" in against.what
            ignored = [f"--ignore-columns={column}" for column in (scores, other)]  # as the message suggests
            assert tiers({**pair, scores: 1, other: 5}, columns=ignored) == [FIRST]


def test_columns_that_are_no_scores_of_both_sides_stay_what_they_are() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for columns in (
        {"chosen_score": 9.0},
        {"chosen_rating": "good", "rejected_rating": "good"},
        {"chosen_length": 3, "rejected_length": 3},
        {"chosen_rank": 1, "rejected_rank": 1},
    ):
        reading = read(pair | columns)
        (found,) = reading.comparisons
        assert found.tiers == FIRST and found.scores is None and found.extra == columns
        assert reading.notes == [f"f: columns not read: {', '.join(columns)}"]
    gap = read(pair | {"chosen_score": 3, "rejected_score": 1}, pair | {"chosen_score": 3, "rejected_score": None})
    assert [c.scores for c in gap] == [(3.0, 1.0), None]
    assert gap.notes == ["f: keys inside of columns not read: chosen_score where rejected_score is null"]
    both = read(pair | {"chosen_score": 3, "rejected_score": 1, "chosen_rating": 2, "rejected_rating": 2})
    assert both.comparisons[0].scores == (3.0, 1.0)
    assert both.notes == ["f: columns not read: chosen_rating, rejected_rating"]


def test_a_label_or_an_order_goes_before_equal_scores() -> None:
    labelled = {"prompt": "q", "first": "a", "second": "b", "label": "first", "score_first": 3, "score_second": 3}
    ordered = {"prompt": "q", "responses": ["a", "b"], "order": [0, 1], "scores": [3, 3]}
    assert tiers(labelled) == tiers(ordered) == [FIRST]


def test_whole_conversations_beside_a_prompt_and_a_question_are_not_repeated() -> None:
    row = {"prompt": "Why?", "question": "Why?", "chosen": [USER, said("a")], "rejected": [USER, said("b")]}
    reading = read(row)
    assert reading.layout == "ultrafeedback-binarized"
    assert [r.text for r in reading.comparisons[0].responses] == ["a", "b"]
    assert read({"question": "Why?", "chosen": [said("a")], "rejected": [said("b")]}).layout == "alpaca-ranking"


def test_a_prompt_that_is_in_no_known_column_is_not_taken_for_none() -> None:
    for asks in ({"problem": "2 + 2?"}, {"trajectory": [USER]}):
        row = {**asks, "chosen": "4", "rejected": "22"}
        (name,) = asks
        (found,) = read(row).problems
        assert found.what.endswith(f"may be their prompt: --columns prompt={name}, or --ignore-columns {name}")
        (named,) = read(row, columns=[f"prompt={name}"]).comparisons
        assert named.prompt[0].content in ("2 + 2?", "Why?")
        assert tiers(row, columns=[f"--ignore-columns={name}"]) == [FIRST]
        shared = {**asks, "chosen": "2 + 2? 4", "rejected": "2 + 2? 22"}
        assert read(shared).comparisons[0].prompt[0].content == "2 + 2?"


def test_the_safer_response_is_an_option() -> None:
    assert tiers(PKU, columns=["label=safer_response_id"]) == [FIRST]
    assert "--columns label=safer_response_id" in read(PKU).notes[0]


def test_a_label_of_one_response_means_what_is_said() -> None:
    row = {"prompt": "Why?", "completion": "a", "label": "liked"}
    assert [c.labels for c in read(row, columns=["--label-means=liked=good,not=bad"]).comparisons] == [(True,)]
    (problem,) = read(row | {"label": 1}, columns=["--label-means=liked=good,not=bad"]).problems
    assert problem.kind == "unknown label"


LOST: list[tuple[dict[str, Any], bool]] = [
    ({"response_a": "a", "response_b": "b", "winner": "a"}, True),
    ({"good": "a", "bad": "b"}, True),
    ({"answer_text": ["a", "b"]}, True),
    ({"model_a": "m", "response_model": "m", "answer_id": "3", "output_tokens": 4, "reply_url": "u"}, False),
    (
        {"source": "s", "category": "c", "reference_answer": "r", "correct_answers": ["a"], "response_source": "x"},
        False,
    ),
]


def test_columns_that_hold_responses_and_are_not_read_are_told() -> None:
    for columns, lost in LOST:
        reading = read({"prompt": "Why?", **columns})
        assert reading.layout == "prompt-text" and bool(reading.lost) is lost
        ignored = [f"--ignore-columns={name}" for name in columns]
        again = read({"prompt": "Why?", **columns}, columns=ignored)
        assert not again.lost and not again.notes
        with pytest.raises(DataError, match="no row has the column other"):
            read({"prompt": "Why?"}, columns=["--ignore-columns=other"])


def test_what_to_type_names_the_columns() -> None:
    with pytest.raises(DataError, match="--columns prompt=prompt chosen=response rejected=rejected"):
        read({"prompt": "q", "response": "a", "rejected": "b"})
    judged = read({"prompt": "Why?", "response_a": "a", "response_b": "b", "winner": "model_a"}).lost
    assert judged.startswith("response_a, response_b seem to hold responses")
    assert "--columns prompt=prompt first=response_a second=response_b label=winner" in judged
    assert "chosen=winner rejected=loser" in read({"prompt": "Why?", "winner": "a", "loser": "b"}).lost
    assert not read({"prompt": "Why?", "winner": "model_a", "preference": "strong"}).lost
    assert "--columns prompt=prompt chosen=good rejected=bad" in read({"prompt": "Why?", "good": "a", "bad": "b"}).lost
    with pytest.raises(DataError, match="prompt=question chosen=good rejected=bad"):
        read({"question": "Why?", "good": "a", "bad": "b"})


def test_every_layout_that_compares_gives_pairs() -> None:
    for layout in LAYOUTS.values():
        if layout.kind in ("pairs", "ranking") and not layout.joins:
            c = layout.parse(json.loads(json.dumps(layout.example)), 1, "f")
            assert isinstance(found := convert(c, "pairs"), Comparison) and found.pairs, layout.name


def test_a_row_that_lacks_a_column_is_a_bad_row_among_good_ones() -> None:
    for name, layout in LAYOUTS.items():
        for field in {*layout.fields} & {*layout.example}:
            reading = read(dict(layout.example), {**layout.example, field: None})
            assert reading.layout == name
            assert [(p.row, p.kind) for p in reading.problems] == [(2, "missing field")], (name, field)
