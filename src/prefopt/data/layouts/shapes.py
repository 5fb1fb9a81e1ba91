"""How the value of a column looks: all that may tell layouts with the same columns apart."""

from __future__ import annotations

from collections.abc import Mapping

TURNS = ("\n\nHuman:", "\n\nAssistant:")
LISTS = ("messages", "replies", "weighted", "texts", "list")
# ColumnMap that may well hold a prompt: where one is there, none is guessed from what chosen and rejected share.
PROMPTS = ("prompt", "question", "instruction", "input", "query", "context", "conversations")
# More of them, which stand beside whole conversations and texts as well.
TOPICS = ("problem", "post", "history", "request", "dialogue", "conversation", "user", "user_prompt", "prompt_text")

# ColumnMap that may well hold responses: where one is there, a row is more than a prompt.
RESPONSES = ("completion", "response", "responses", "completions", "output", "outputs", "answer", "answers")

# Scores of a pair, and what else their columns are called: chosen_rating, rating_chosen, chosen-rating and the like.
# Ranks and counts are none, and neither are rewards, which most often are those of a model.
SCORES = ("score_chosen", "score_rejected")
_MEASURES = [f"{mean}{what}" for what in ("score", "rating") for mean in ("", "avg_", "average_", "mean_", "overall_")]
_UNDERSCORED = [
    pair
    for what in _MEASURES
    for pair in ((f"chosen_{what}", f"rejected_{what}"), (f"{what}_chosen", f"{what}_rejected"))
]
SPELT = [(good.replace("_", sign), bad.replace("_", sign)) for sign in "_-" for good, bad in _UNDERSCORED]


def look(value: object) -> str:
    """What it is, in one word of the code below.

    ``replies`` are messages that begin with the assistant's, ``weighted`` are messages in the manner of LLaMA-Factory
    v1, ``transcript`` is text in that of Anthropic's HH, ``scores`` are those of chosen and rejected.
    """
    if isinstance(value, str):
        return "transcript" if value.startswith(TURNS) else "text"
    if isinstance(value, (list, tuple)):
        first = value[0] if value else None
        if isinstance(first, dict):
            if _weighted(first):
                return "weighted"
            return "replies" if first.get("role", first.get("from")) in ("assistant", "gpt") else "messages"
        return "texts" if isinstance(first, str) else "list"
    if isinstance(value, dict):
        if "solution" in value and "is_correct" in value:
            return "solution"
        if "score_chosen" in value and "score_rejected" in value:
            return "scores"
        return "message" if ("role" in value or "from" in value) else "object"
    if isinstance(value, bool):
        return "truth"
    return "null" if value is None else "number"


def _weighted(message: dict[object, object]) -> bool:
    content = message.get("content")
    part = content[0] if isinstance(content, list) and content else None
    return message.get("loss_weight") is not None or (isinstance(part, dict) and part.get("value") is not None)


def scored_sides(looks: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of a pair, by look, with the scores of its sides under other names than those of the fields: one for
    chosen and one for rejected, or ``metadata`` with both; none beside the fields themselves."""
    if any(looks.get(name, "null") != "null" for name in SCORES):
        return ()
    metadata = ("metadata",) if looks.get("metadata") == "scores" else ()
    return next((pair for pair in SPELT if all(looks.get(name) in ("number", "cell") for name in pair)), metadata)


def always(_: Mapping[str, object]) -> bool:
    """The shape of a layout that its columns alone tell."""
    return True


def chat_prompt(row: Mapping[str, object]) -> bool:
    """The prompt is a list of messages."""
    return look(row["prompt"]) in LISTS


def prompt_alone(row: Mapping[str, object]) -> bool:
    """No column may well hold a response."""
    return not any(row.get(name) is not None for name in RESPONSES)


def chat_prompt_alone(row: Mapping[str, object]) -> bool:
    """No column may well hold a response, and the prompt is a list of messages."""
    return prompt_alone(row) and chat_prompt(row)


def whole_chats(row: Mapping[str, object]) -> bool:
    """The prompt is text, and the sides are lists of messages: whole conversations."""
    return not chat_prompt(row) and all(look(row[name]) in LISTS for name in ("chosen", "rejected"))


def no_whole_chats(row: Mapping[str, object]) -> bool:
    """There is no prompt as text beside sides that are whole conversations."""
    return row.get("prompt") is None or not whole_chats(row)


def may_ask(name: str, value: object) -> bool:
    """Whether a column may well hold the prompt of sides that have no words in common."""
    return name in TOPICS or look(value) in ("messages", "weighted")


def implicit(row: Mapping[str, object]) -> bool:
    """No column but the sides holds a prompt."""
    return not any(row.get(name) is not None for name in PROMPTS)


def implicit_text(row: Mapping[str, object]) -> bool:
    """The sides are no lists of messages and no transcripts, and hold the prompt."""
    return implicit(row) and not implicit_chat(row) and not transcripts(row)


def implicit_chat(row: Mapping[str, object]) -> bool:
    """The sides are lists of messages, and hold the prompt."""
    return implicit(row) and look(row["chosen"]) in LISTS


def transcripts(row: Mapping[str, object]) -> bool:
    """The sides are transcripts in the manner of Anthropic's HH."""
    return implicit(row) and all(look(row[name]) == "transcript" for name in ("chosen", "rejected"))


def solutions(row: Mapping[str, object]) -> bool:
    """Some column holds a solution that is said to be correct or not."""
    return any(look(value) == "solution" for value in row.values())


def replies(row: Mapping[str, object]) -> bool:
    """The sides are answers to the messages, and no whole conversations."""
    return look(row["chosen"]) in ("text", "message", "replies")


def listed_order(row: Mapping[str, object]) -> bool:
    """The responses are put into an order, or compared in pairs, by index."""
    return any(row.get(name) is not None for name in ("order", "ranking", "pairs"))


def weighted(row: Mapping[str, object]) -> bool:
    """The messages have weights or parts in the manner of LLaMA-Factory v1."""
    return look(row["messages"]) == "weighted"
