"""Questions with an answer, with predictions compared in pairs, with solutions right or wrong; and raw text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations

from prefopt.data.layouts.layout import (
    CannotHold,
    Layout,
    need_demonstration,
    need_no_preference,
    need_one_turn,
    need_text,
    need_user,
    with_columns,
    words,
)
from prefopt.data.layouts.orders import from_pair_labels, pair_label
from prefopt.data.layouts.row import Row, answer, text_prompt
from prefopt.data.layouts.shapes import look, solutions
from prefopt.data.layouts.values import BadRow, kind
from prefopt.records import Comparison, Message, Response

PREDICTION = re.compile(r"prediction \d+")


def _question(row: Row) -> tuple[Message, ...]:
    return row.with_system((Message("user", row.text("question")),))


def _read_pair_labels(row: Row) -> Comparison:
    responses: list[Response] = []
    while row.has(name := f"prediction {len(responses) + 1}"):
        responses.append(answer(row.text(name)))
    count = len(responses)
    labels = row.items("preference")
    if len(labels) != count * (count - 1) // 2:
        what = f"has {count} predictions, so {count * (count - 1) // 2} pairs, and {len(labels)} labels"
        raise BadRow("wrong number", what)
    numbers = []
    for label in labels:
        number = row.number_of(label, "an item of preference")
        if number not in (0, 1, 2):
            raise BadRow("wrong type", f"preference holds {number:g}; it should be 0 (equal), 1 (first) or 2 (second)")
        numbers.append(int(number))
    tiers, votes = from_pair_labels(numbers, count)
    return row.comparison(_question(row), responses, tiers, votes=votes)


def _write_pair_labels(c: Comparison) -> dict[str, object]:
    if c.scores is not None or c.labels is not None:
        raise CannotHold("scores and labels")
    texts = [need_one_turn(response) for response in c.responses]
    if c.votes is None:
        level = {k: -place for place, tier in enumerate(c.tiers) for k in tier}
        if len(level) != len(texts):
            raise CannotHold("responses that are in no order")
        labels = [pair_label(level[i], level[j]) for i, j in combinations(range(len(texts)), 2)]
    else:
        better = {(best, worse) for best, worse, _ in c.votes}
        labels = [pair_label((i, j) in better, (j, i) in better) for i, j in combinations(range(len(texts)), 2)]
    predictions = {f"prediction {k}": text for k, text in enumerate(texts, 1)}
    return {"question": need_user(c), **predictions, "preference": labels}


def _own_solutions(looks: Mapping[str, str]) -> list[str]:
    return [name for name, seen in looks.items() if seen == "solution"]


def _read_solutions(row: Row) -> Comparison:
    """The names of the columns, models most often, are kept as a further column ``solutions``."""
    responses, labels, names = [], [], []
    for name, value in row.values.items():
        if not isinstance(value, dict) or look(value) != "solution":
            continue
        text = value["solution"]
        if not isinstance(text, str):
            raise BadRow("wrong type", f"the solution of {name} is {kind(text)}, not text")
        responses.append(answer(text))
        labels.append(row.label_of(value["is_correct"], f"is_correct of {name}"))
        names.append(str(name))
        row.tags.unread.update(f"{name}.{key}" for key in value.keys() - {"solution", "is_correct"})
    if not responses:
        raise BadRow("missing field", "has no column with a solution and is_correct")
    if "solutions" in row.extra:
        raise BadRow("field that cannot be used", "has a column solutions, which names the columns of solutions")
    row.extra["solutions"] = names
    return row.comparison(_question(row), responses, labels=tuple(labels))


def _write_solutions(c: Comparison) -> dict[str, object]:
    asked = need_user(c)
    labels = c.labels
    if labels is None or c.tiers or c.scores is not None or c.votes is not None or not c.responses:
        raise CannotHold("anything but responses that are right or wrong")
    texts = [need_one_turn(response) for response in c.responses]
    sides = [{"is_correct": good, "solution": text} for good, text in zip(labels, texts, strict=True)]
    return {"question": asked, **{f"solution {k}": side for k, side in enumerate(sides, 1)}}


def _by_name(row: dict[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    """The row with every solution under the name that it had."""
    rest = {name: value for name, value in extra.items() if name != "solutions"}
    names = extra.get("solutions")
    columns = [name for name, value in row.items() if look(value) == "solution"]
    if not isinstance(names, list) or len(names) != len(columns) or not all(isinstance(n, str) for n in names):
        raise CannotHold("solutions without a further column of that name, a list of what to call their columns")
    if len({*names, *row} - set(columns)) != len(names) + len(row) - len(columns):
        raise CannotHold("two columns of one name")
    named = {"question": row["question"], **{n: row[column] for n, column in zip(names, columns, strict=True)}}
    return with_columns(named, rest)


def _read_answer(row: Row) -> Comparison:
    return row.comparison(_question(row), [answer(row.text("answer"))])


def _write_answer(c: Comparison) -> dict[str, object]:
    return {"question": need_user(c), "answer": need_one_turn(need_demonstration(c))}


def _read_text(row: Row) -> Comparison:
    return row.comparison(text_prompt(""), [answer(row.text("text"))], text=True)


def _write_text(c: Comparison) -> dict[str, object]:
    need_text(c)
    need_no_preference(c)
    if words(c.prompt):
        raise CannotHold("where a prompt ends and a response begins")
    return {"text": words(need_demonstration(c).messages)}


def _own_predictions(looks: Mapping[str, str]) -> list[str]:
    return [name for name in looks if PREDICTION.fullmatch(name)]


PAIR_LABELS = Layout(
    name="pair-labels",
    fields=("question", "prediction 1", "prediction 2", "preference"),
    optional=("system",),
    reads=_own_predictions,
    gives="ranking",
    says="K predictions and a label of each pair, in the order 12, 13, ..., 23, ...: 0 equal, 1 first, 2 second",
    origin="FineGrainedRLHF",
    example={
        "question": "What is 2 + 2?",
        "prediction 1": "4",
        "prediction 2": "22",
        "prediction 3": "Four.",
        "preference": [1, 0, 2],
    },
    reader=_read_pair_labels,
    writer=_write_pair_labels,
)
SOLUTIONS = Layout(
    name="solutions",
    fields=("question",),
    optional=("system",),
    shape=solutions,
    reads=_own_solutions,
    gives="ranking",
    says="a question, and columns of any name that hold solutions, correct or not",
    origin="GSM8K's example_model_solutions",
    example={
        "question": "What is 2 + 2?",
        "small model": {"is_correct": False, "solution": "22"},
        "large model": {"is_correct": True, "solution": "4"},
    },
    reader=_read_solutions,
    writer=_write_solutions,
    finish=_by_name,
)
ANSWER = Layout(
    name="question-answer",
    fields=("question", "answer"),
    optional=("system",),
    gives="demonstrations",
    says="a question and an answer to learn",
    origin="GSM8K",
    example={"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
    reader=_read_answer,
    writer=_write_answer,
)
RAW_TEXT = Layout(
    name="raw-text",
    fields=("text",),
    words={"prompt": "text"},
    gives="demonstrations",
    says="text for language modelling; a label beside it is not read",
    origin="TRL, IMDb",
    example={"text": "It was the best film that I saw in years."},
    reader=_read_text,
    writer=_write_text,
)
