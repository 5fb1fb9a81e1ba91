"""K responses to a prompt with ranks, scores, labels of pairs or of correctness, as public data sets keep them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from prefopt.data.layouts.canonical import Votes
from prefopt.data.layouts.conversations import instruction_prompt
from prefopt.data.layouts.layout import BAD, GOOD, QUESTION, SIDES, USER, Layout, ranking_layout
from prefopt.data.layouts.row import RowReader, answer, text_prompt, value_at
from prefopt.data.layouts.values import BadRow, items_of, look, type_name
from prefopt.records import Comparison, Response, Tiers, tiers_of

PREDICTION = re.compile(r"prediction \d+")


def _numbers(row: RowReader, values: Sequence[object], name: str, count: int) -> tuple[float, ...]:
    if (lacking := next((k for k, value in enumerate(values, 1) if value is None), None)) is not None:
        raise BadRow("missing score", f"response {lacking} has no {name}, and another has one")
    numbers = tuple(row.number_of(value, name) for value in values)
    if len(numbers) != count:
        raise BadRow("wrong number", f"has {count} responses and {len(numbers)} {name}s")
    return numbers


def _by_rank(ranks: tuple[float, ...]) -> Tiers:
    return tiers_of([-rank for rank in ranks]) if len(ranks) > 1 else ()


def _listed(paths: tuple[str, str, str], *, rank: str = "", score: str = "", **more: Any) -> Layout:
    """A data set with a list of objects. ``paths`` lead to prompt and list, and within its objects to the response.

    Each object has a rank (the lowest is best) or a score (the highest is best); equal ones are a tie. If no object has
    a rank there is no preference; if only some have, the row is refused.
    """
    (prompt, items, response), key = paths, rank or score

    def read(row: RowReader) -> Comparison:
        responses, given = [], []
        for k, item in enumerate(items_of(row.given(items), items), 1):
            if not isinstance(item, Mapping):
                raise BadRow("wrong type", f"{items} holds {type_name(item)}, not an object with {response}")
            responses.append(row.response_of(item.get(response), f"{response} of item {k} of {items}"))
            given.append(item.get(key))
            row.tags.unread.update(f"{items}.{other}" for other in item if other not in (response, key))
        asked = row.prompt_at(prompt)
        if rank and all(value is None for value in given):
            return row.comparison(asked, responses)
        numbers = _numbers(row, given, key, len(responses))
        if rank:
            return row.comparison(asked, responses, _by_rank(numbers))
        return row.comparison(asked, responses, tiers_of(numbers), scores=numbers)

    def matches(row: Mapping[str, object]) -> bool:
        found = value_at(row, items)
        listed = found if isinstance(found, (list, tuple)) else ()
        return any(isinstance(item, Mapping) and {response, key} <= item.keys() for item in listed)

    return ranking_layout(reader=read, matches=matches, optional=("system",), **more)


def _read_ranks(row: RowReader) -> Comparison:
    text = isinstance(row.given("prompt"), str)
    responses = [row.response_of(value, "an item of responses", text=text) for value in row.items("responses")]
    ranks = _numbers(row, row.items("ranks"), "rank", len(responses))
    prompt = text_prompt(row.text("prompt")) if text else row.chat("prompt")
    return row.comparison(prompt, responses, _by_rank(ranks), text=text)


def _read_generations(row: RowReader) -> Comparison:
    responses = [row.response_of(value, "an item of generations") for value in row.items("generations")]
    scores = _numbers(row, row.items("ratings"), "rating", len(responses))
    return row.comparison(instruction_prompt(row), responses, tiers_of(scores), scores=scores)


def _read_sides(row: RowReader) -> Comparison:
    sides = [[row.response_of(text, f"an item of {name}") for text in row.items(name)] for name in SIDES]
    if not all(sides):
        raise BadRow("missing field", "has an empty list of chosen or rejected responses")
    good, bad = map(len, sides)
    tiers = tuple(range(good)), tuple(range(good, good + bad))
    return row.comparison(row.prompt_at("prompt"), [*sides[0], *sides[1]], tiers)


def _lists_of_texts(row: Mapping[str, object]) -> bool:
    sides = {look(row[name]) for name in SIDES}
    return "texts" in sides and sides <= {"texts", "list"}


def _read_rating(row: RowReader) -> Comparison:
    score = row.number_of(row.given("helpfulness"), "helpfulness")
    response = answer(row.text("response"))
    return row.comparison(row.prompt_at("prompt"), [response], scores=(score,))


def _read_ultrafeedback(row: RowReader) -> Comparison:
    responses, scores = [], []
    for k, completion in enumerate(row.items("completions"), 1):
        if not isinstance(completion, dict):
            raise BadRow("wrong type", f"completions holds {type_name(completion)}, not an object with a response")
        text = completion.get("response")
        if not isinstance(text, str):
            raise BadRow("wrong type", f"the response of completion {k} is {type_name(text)}, not text")
        responses.append(answer(text))
        scores.append(_overall_score(row, completion, k))
        unread = completion.keys() - {"response", "overall_score", "score"}
        row.tags.unread.update(f"completions.{key}" for key in unread)
    return row.comparison(row.user_prompt("instruction"), responses, tiers_of(scores), scores=tuple(scores))


def _overall_score(row: RowReader, completion: dict[str, object], k: int) -> float:
    """The overall score, or the mean of the ratings."""
    for name in ("overall_score", "score"):
        if completion.get(name) is not None:
            return row.number_of(completion[name], f"{name} of completion {k}")
    annotations = completion.get("annotations")
    rated = annotations.values() if isinstance(annotations, dict) else ()
    given = [annotation.get("Rating") for annotation in rated if isinstance(annotation, dict)]
    given = [x for x in given if x is not None and not (isinstance(x, str) and x.strip().upper() in ("N/A", ""))]
    if not given:
        raise BadRow("missing score", f"completion {k} has neither overall_score nor ratings")
    cells = replace(row, cells=True)  # ratings are text in these files ("4")
    return sum(cells.number_of(rating, "a Rating") for rating in given) / len(given)


def _read_pair_labels(row: RowReader) -> Comparison:
    responses: list[Response] = []
    while row.has(name := f"prediction {len(responses) + 1}"):
        responses.append(answer(row.text(name)))
    count = len(responses)
    labels = row.items("preference")
    if len(labels) != count * (count - 1) // 2:
        what = f"has {count} predictions, so {count * (count - 1) // 2} pairs, and {len(labels)} labels"
        raise BadRow("wrong number", what)
    numbers = [row.number_of(label, "an item of preference") for label in labels]
    if strange := [n for n in numbers if n not in (0, 1, 2)]:
        raise BadRow("wrong type", f"preference holds {strange[0]:g}; it should be 0 (equal), 1 (first) or 2 (second)")
    tiers, votes = from_pair_labels([int(n) for n in numbers], count)
    return row.comparison(row.user_prompt("question"), responses, tiers, votes=votes)


def from_pair_labels(labels: Sequence[int], count: int) -> tuple[Tiers, Votes | None]:
    """Tiers from labels of all pairs in the order 12, 13, ..., 23, ...: 0 equal, 1 the first, 2 the second is better.

    If the labels form no order (cycles, ties that are not transitive), no tiers, but votes.

    >>> from_pair_labels([0, 1, 1], 3)  # the first two are tied and better than the third
    (((0, 1), (2,)), None)
    >>> from_pair_labels([1, 2, 1], 3)  # a cycle
    ((), ((0, 1, 1.0), (2, 0, 1.0), (1, 2, 1.0)))
    """
    pairs = list(zip(combinations(range(count), 2), labels, strict=True))
    votes = tuple((i, j, 1.0) if label == 1 else (j, i, 1.0) for (i, j), label in pairs if label)
    net = [sum((best == k) - (worse == k) for best, worse, _ in votes) for k in range(count)]
    if all(label == (net[i] > net[j]) + 2 * (net[i] < net[j]) for (i, j), label in pairs):
        return tuple(tuple(k for k in range(count) if net[k] == n) for n in sorted(set(net), reverse=True)), None
    return (), votes


def _read_solutions(row: RowReader) -> Comparison:
    """The names of the columns, mostly models, are kept in a further column ``solutions``."""
    responses, labels, names = [], [], []
    for name, value in row.values.items():
        if not isinstance(value, dict) or look(value) != "solution":
            continue
        text = value["solution"]
        if not isinstance(text, str):
            raise BadRow("wrong type", f"the solution of {name} is {type_name(text)}, not text")
        responses.append(answer(text))
        labels.append(row.label_of(value["is_correct"], f"is_correct of {name}"))
        names.append(str(name))
        row.tags.unread.update(f"{name}.{key}" for key in value.keys() - {"solution", "is_correct"})
    if not responses:
        raise BadRow("missing field", "has no column with a solution and is_correct")
    if "solutions" in row.extra:
        raise BadRow("field that cannot be used", "has a column solutions, which names the columns of solutions")
    row.extra["solutions"] = names
    return row.comparison(row.user_prompt("question"), responses, labels=tuple(labels))


PUBLIC = (
    _listed(
        ("prompt", "answers", "answer"),
        name="nectar",
        description="a prompt and answers with a rank each, 1 the best",
        origin="Nectar",
        rank="rank",
        example={"prompt": QUESTION, "answers": [{"answer": "22", "rank": 2}, {"answer": "4", "rank": 1}]},
    ),
    _listed(
        ("question", "answers", "text"),
        name="stack-exchange",
        description="a question and answers with a score each, the higher is better",
        origin="Stack Exchange preferences",
        score="pm_score",
        example={"question": QUESTION, "answers": [{"text": "22", "pm_score": 0}, {"text": "4", "pm_score": 9}]},
    ),
    _listed(
        ("context", "completions", "completion"),
        name="nemo-ranks",
        description="a conversation and completions with a rank each, the lowest the best",
        origin="NeMo RL",
        rank="rank",
        example={"context": [USER]}
        | {"completions": [{"completion": [BAD], "rank": 1}, {"completion": [GOOD], "rank": 0}]},
    ),
    _listed(
        ("prompt.text", "prompt.replies", "text"),
        name="oasst-trees",
        description="a tree of messages: its prompt, and the replies to it with a rank each, 0 the best",
        origin="OpenAssistant, trees",
        rank="rank",
        example={
            "message_tree_id": "t",
            "prompt": {"text": QUESTION, "replies": [{"text": "22", "rank": 1}, {"text": "4", "rank": 0}]},
        },
        note="of each tree, the replies to its first message are compared; deeper ones are not read",
    ),
)
RANKS = ranking_layout(
    name="ranks",
    optional=("system", "tools"),
    description="K responses with a rank each, the lowest best; if the highest is best, --columns scores=... names it",
    origin="rankings of any origin",
    example={"prompt": "2 + 2 =", "responses": [" 22", " 4", " four"], "ranks": [2, 1, 1]},
    reader=_read_ranks,
)
LISTS_OF_SIDES = ranking_layout(
    name="lists-of-sides",
    optional=("system",),
    matches=_lists_of_texts,
    accepts=("ultrafeedback-binarized", "preference-text", "preference-chat"),
    description="a prompt, a list of good responses and a list of bad ones, each without an order",
    origin="RewardBench 2",
    example={"prompt": QUESTION, "chosen": ["4"], "rejected": ["22", "Five."]},
    reader=_read_sides,
)
RATING = ranking_layout(
    name="helpsteer",
    optional=("system",),
    option_names={"score": "helpfulness"},
    accepts=("completion-text", "completion-chat"),
    description="a response and its ratings; consecutive rows with one prompt are compared",
    origin="HelpSteer, HelpSteer2",
    example={"prompt": QUESTION, "response": "4", "helpfulness": 4},
    reader=_read_rating,
    joins=True,
    note="helpfulness is the score; --columns score=correctness takes another rating",
)
GENERATIONS = ranking_layout(
    name="distilabel",
    optional=("system",),
    option_names={"responses": "generations", "scores": "ratings", "prompt": "instruction"},
    description="an instruction and responses with a rating each",
    origin="distilabel",
    example={"instruction": QUESTION, "generations": ["22", "4"], "ratings": [1.0, 5.0]},
    reader=_read_generations,
)
ULTRAFEEDBACK = ranking_layout(
    name="ultrafeedback",
    optional=("system",),
    description="an instruction and responses with scores",
    origin="UltraFeedback",
    example={"instruction": QUESTION}
    | {"completions": [{"response": "22", "overall_score": 1.0}, {"response": "4", "overall_score": 9.0}]},
    reader=_read_ultrafeedback,
)
PAIR_LABELS = ranking_layout(
    name="pair-labels",
    fields=("question", "prediction 1", "prediction 2", "preference"),
    optional=("system",),
    own_columns=lambda looks: [name for name in looks if PREDICTION.fullmatch(name)],
    description="K predictions and a label of each pair, in the order 12, 13, ..., 23, ...: 0 equal, 1 first, 2 second",
    origin="FineGrainedRLHF",
    example={"question": QUESTION, "prediction 1": "4", "prediction 2": "22", "prediction 3": "Four."}
    | {"preference": [1, 0, 2]},
    reader=_read_pair_labels,
)
SOLUTIONS = ranking_layout(
    name="solutions",
    fields=("question",),
    optional=("system",),
    matches=lambda row: any(look(value) == "solution" for value in row.values()),
    own_columns=lambda looks: [name for name, seen in looks.items() if seen == "solution"],
    description="a question, and columns of any name that hold solutions, correct or not",
    origin="GSM8K's example_model_solutions",
    example={
        "question": QUESTION,
        "small model": {"is_correct": False, "solution": "22"},
        "large model": {"is_correct": True, "solution": "4"},
    },
    reader=_read_solutions,
)
LAYOUTS = {
    5: (RANKS,),
    30: (*PUBLIC, LISTS_OF_SIDES),
    80: (RATING, GENERATIONS, ULTRAFEEDBACK, PAIR_LABELS, SOLUTIONS),
}
