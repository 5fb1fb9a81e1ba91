"""UltraFeedback: completions with scores, and the pairs that were made of them."""

from __future__ import annotations

from prefopt.data.layouts.holding import CannotHold, best_first, need_one_turn, need_pair, need_user, score_columns
from prefopt.data.layouts.implicit import split_turns
from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.messages import write_messages, write_tools
from prefopt.data.layouts.row import Row, answer
from prefopt.data.layouts.shapes import SCORES, scored_sides, whole_chats
from prefopt.data.layouts.values import BadRow, kind, number_of
from prefopt.records import Comparison, Message, Response, tiers_of

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
