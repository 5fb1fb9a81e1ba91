"""K responses to a prompt in a list, with ranks or scores, as public data sets keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.data.layouts.layout import (
    CannotHold,
    Layout,
    best_first,
    need_one_turn,
    need_pair,
    need_user,
    score_columns,
)
from prefopt.data.layouts.llama_factory import instructed
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row, answer, text_prompt
from prefopt.data.layouts.shapes import SCORES, look, scored_sides, whole_chats
from prefopt.data.layouts.trl import split_turns
from prefopt.data.layouts.two_responses import asked, replied, there
from prefopt.data.layouts.values import BadRow, kind, number_of
from prefopt.data.validate import Tiers
from prefopt.records import Comparison, Message, Response, tiers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ListSignature:
    """Where a public data set keeps a prompt and a list of objects, each with a response and a rank or a score.

    Of ranks the lowest is best; of scores the highest. Equal ones are a tie.
    """

    prompt: str
    items: str
    response: str
    rank: str = ""
    score: str = ""

    def read(self, row: Row) -> Comparison:
        """The comparison. Where no item has a rank there is no preference; where some have, the row is bad."""
        key, responses, given = self.rank or self.score, [], []
        found = there(row, self.items)
        if not isinstance(found, (list, tuple)):
            raise BadRow("wrong type", f"{self.items} is {kind(found)}, not a list")
        for k, item in enumerate(found, 1):
            if not isinstance(item, Mapping):
                raise BadRow("wrong type", f"{self.items} holds {kind(item)}, not an object with {self.response}")
            responses.append(replied(row, item.get(self.response), f"{self.response} of item {k} of {self.items}"))
            given.append(item.get(key))
            row.tags.unread.update(f"{self.items}.{name}" for name in item if name not in (self.response, key))
        prompt = asked(row, self.prompt)
        if self.rank and all(value is None for value in given):
            return row.comparison(prompt, responses)
        numbers = numbers_of(row, given, key)
        if self.rank:
            return row.comparison(prompt, responses, ranked(numbers))
        return row.comparison(prompt, responses, tiers_of(numbers), scores=numbers)

    def fits(self, row: Mapping[str, object]) -> bool:
        """Some item of the list has the response and the rank or score."""
        parts: object = row
        for key in self.items.split("."):
            parts = parts.get(key) if isinstance(parts, Mapping) else None
        items = parts if isinstance(parts, (list, tuple)) else ()
        need = {self.response, self.rank or self.score}
        return any(isinstance(item, Mapping) and need <= item.keys() for item in items)


def numbers_of(row: Row, values: list[object], name: str) -> tuple[float, ...]:
    """A number for each response. Raises :class:`BadRow` where one lacks its own."""
    if (lacking := next((k for k, value in enumerate(values, 1) if value is None), None)) is not None:
        raise BadRow("missing score", f"response {lacking} has no {name}, and another has one")
    return tuple(row.number_of(value, name) for value in values)


def ranked(ranks: tuple[float, ...]) -> Tiers:
    """Tiers of ranks, the lowest best; a single response is in no order."""
    return tiers_of([-rank for rank in ranks]) if len(ranks) > 1 else ()


def _read_ranks(row: Row) -> Comparison:
    text = isinstance(row.given("prompt"), str)
    responses = [row.response_of(value, "an item of responses", text=text) for value in row.items("responses")]
    ranks = numbers_of(row, list(row.items("ranks")), "rank")
    _same(len(responses), len(ranks), "ranks")
    prompt = text_prompt(row.text("prompt")) if text else row.chat("prompt")
    return row.comparison(prompt, responses, ranked(ranks), text=text)


def _read_generations(row: Row) -> Comparison:
    responses = [replied(row, value, "an item of generations") for value in row.items("generations")]
    scores = numbers_of(row, list(row.items("ratings")), "rating")
    _same(len(responses), len(scores), "ratings")
    return row.comparison(instructed(row), responses, tiers_of(scores), scores=scores)


def _read_output(row: Row) -> Comparison:
    responses = [replied(row, value, "an item of output") for value in row.items("output")]
    tiers = tuple((k,) for k in range(len(responses))) if len(responses) > 1 else ()
    return row.comparison(instructed(row), responses, tiers)


def _read_lists(row: Row) -> Comparison:
    sides = [[replied(row, text, f"an item of {name}") for text in row.items(name)] for name in ("chosen", "rejected")]
    if not all(sides):
        raise BadRow("missing field", "has an empty list of chosen or rejected responses")
    good, bad = map(len, sides)
    tiers = tuple(range(good)), tuple(range(good, good + bad))
    return row.comparison(asked(row, "prompt"), [*sides[0], *sides[1]], tiers)


def _read_rating(row: Row) -> Comparison:
    score = row.number_of(row.given("helpfulness"), "helpfulness")
    response = answer(row.text("response"))
    return row.comparison(asked(row, "prompt"), [response], scores=(score,))


def _same(responses: int, others: int, name: str) -> None:
    if responses != others:
        raise BadRow("wrong number", f"has {responses} responses and {others} {name}")


def lists(row: Mapping[str, object]) -> bool:
    """The sides are lists of texts, not of messages."""
    sides = [look(row[name]) for name in ("chosen", "rejected")]
    return "texts" in sides and set(sides) <= {"texts", "list"}


def listed_output(row: Mapping[str, object]) -> bool:
    """The output is a list of texts."""
    return look(row["output"]) == "texts"


RANKS = Layout(
    name="ranks",
    fields=("prompt", "responses", "ranks"),
    optional=("system", "tools"),
    gives="ranking",
    says="K responses with a rank each, the lowest best; where the highest is best, --columns scores=... names it",
    origin="rankings of any origin",
    example={"prompt": "2 + 2 =", "responses": [" 22", " 4", " four"], "ranks": [2, 1, 1]},
    reader=_read_ranks,
)
GENERATIONS = Layout(
    name="distilabel",
    fields=("instruction", "generations", "ratings"),
    optional=("system",),
    words={"responses": "generations", "scores": "ratings", "prompt": "instruction"},
    gives="ranking",
    says="an instruction and responses with a rating each",
    origin="distilabel",
    example={"instruction": "What is 2 + 2?", "generations": ["22", "4"], "ratings": [1.0, 5.0]},
    reader=_read_generations,
)
OUTPUTS = Layout(
    name="alpaca-outputs",
    fields=("instruction", "output"),
    optional=("input", "system", "history"),
    shape=listed_output,
    gives="ranking",
    says="an instruction and a list of responses, best first",
    origin="LLaMA-Factory before 0.7",
    example={"instruction": "What is 2 + 2?", "output": ["4", "Four, I think.", "22"]},
    reader=_read_output,
)
SIDES = Layout(
    name="lists-of-sides",
    fields=("prompt", "chosen", "rejected"),
    optional=("system",),
    shape=lists,
    also=("ultrafeedback-binarized", "preference-text", "preference-chat"),
    gives="ranking",
    says="a prompt, a list of good responses and a list of bad ones; within a list, none is preferred",
    origin="RewardBench 2",
    example={"prompt": "What is 2 + 2?", "chosen": ["4"], "rejected": ["22", "Five."]},
    reader=_read_lists,
)
RATING = Layout(
    name="helpsteer",
    fields=("prompt", "response", "helpfulness"),
    optional=("system",),
    words={"score": "helpfulness"},
    gives="ranking",
    says="a response and its ratings; rows of one prompt that follow each other are compared",
    origin="HelpSteer, HelpSteer2",
    example={"prompt": "What is 2 + 2?", "response": "4", "helpfulness": 4},
    reader=_read_rating,
    also=("completion-text", "completion-chat"),
    joins=True,
    note="helpfulness is the score; --columns score=correctness takes another rating",
)


READ = {"response", "overall_score", "score"}


def _read_completions(row: Row) -> Comparison:
    responses, scores = [], []
    for k, completion in enumerate(row.items("completions"), 1):
        if not isinstance(completion, dict):
            raise BadRow("wrong type", f"completions holds {kind(completion)}, not an object with a response")
        text = completion.get("response")
        if not isinstance(text, str):
            raise BadRow("wrong type", f"the response of completion {k} is {kind(text)}, not text")
        responses.append(answer(text))
        scores.append(_score(row, completion, k))
        row.tags.unread.update(f"completions.{key}" for key in completion.keys() - READ)
    prompt = row.with_system((Message("user", row.text("instruction")),))
    return row.comparison(prompt, responses, tiers_of(scores), scores=tuple(scores))


def _score(row: Row, completion: dict[str, object], k: int) -> float:
    """The overall score, or else the mean of the ratings."""
    for name in ("overall_score", "score"):
        if completion.get(name) is not None:
            return row.number_of(completion[name], f"{name} of completion {k}")
    annotations = completion.get("annotations")
    rated = [_rating(a) for a in annotations.values()] if isinstance(annotations, dict) else []
    found = [rating for rating in rated if rating is not None]
    if not found:
        raise BadRow("missing score", f"completion {k} has neither overall_score nor ratings")
    return sum(found) / len(found)


def _rating(annotation: object) -> float | None:
    """What an annotator gave, which is text in these files ("4"); nothing where there is none ("N/A")."""
    given = annotation.get("Rating") if isinstance(annotation, dict) else None
    if given is None or (isinstance(given, str) and given.strip().upper() in ("N/A", "")):
        return None
    if not isinstance(given, str):
        return number_of(given, "a Rating")
    try:
        return number_of(float(given), "a Rating")
    except ValueError:
        raise BadRow("wrong type", f"a Rating is {given[:20]!r}, not a number") from None


def _write_completions(c: Comparison) -> dict[str, object]:
    if c.scores is None:
        raise CannotHold("responses without scores")
    texts = [need_one_turn(response) for response in c.responses]
    completions = [{"response": text, "overall_score": s} for text, s in zip(texts, c.scores, strict=True)]
    return {"instruction": need_user(c), "completions": completions}


def _read_pair(row: Row) -> Comparison:
    """The sides are whole conversations that begin with the prompt, or answers to it."""
    asked, chosen, rejected = row.text("prompt"), row.turns("chosen"), row.turns("rejected")
    if not any(m.role == "user" for side in (chosen, rejected) for m in side):
        chosen, rejected = ((Message("user", asked), *side) for side in (chosen, rejected))
    at = split_turns(chosen, rejected)
    if at == 0:
        raise BadRow("differing prompts", "chosen and rejected do not begin with the same turns")
    return row.pair(row.with_system(chosen[:at]), Response(chosen[at:]), Response(rejected[at:]))


def _write_pair(c: Comparison) -> dict[str, object]:
    chosen, rejected = (write_messages((*c.prompt, *side.messages)) for side in need_pair(c))
    asked = next((m.content for m in c.prompt if m.role == "user"), "")
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, **score_columns(c), **write_tools(c.tools)}


USER = {"role": "user", "content": "What is 2 + 2?"}
COMPLETIONS = Layout(
    name="ultrafeedback",
    fields=("instruction", "completions"),
    optional=("system",),
    gives="ranking",
    says="an instruction and responses with scores",
    origin="UltraFeedback",
    example={
        "instruction": "What is 2 + 2?",
        "completions": [{"response": "22", "overall_score": 1.0}, {"response": "4", "overall_score": 9.0}],
    },
    reader=_read_completions,
    writer=_write_completions,
)
PAIR = Layout(
    name="ultrafeedback-binarized",
    fields=("prompt", "chosen", "rejected"),
    optional=("system", "tools", *SCORES),
    shape=whole_chats,
    gives="pairs",
    says="a prompt as text, and two whole conversations that begin with it",
    origin="UltraFeedback binarized (Zephyr)",
    example={
        "prompt": "What is 2 + 2?",
        "chosen": [USER, {"role": "assistant", "content": "4"}],
        "rejected": [USER, {"role": "assistant", "content": "22"}],
        "score_chosen": 9.0,
        "score_rejected": 1.0,
    },
    reader=_read_pair,
    writer=_write_pair,
    reads=scored_sides,
    arranged=best_first,
)
