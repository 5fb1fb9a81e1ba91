"""Public data sets of comparisons, told by their columns: a table of where each keeps what and what labels mean."""

from __future__ import annotations

from collections.abc import Mapping

from prefopt.data.layouts.layout import Layout
from prefopt.data.layouts.responses import ListSignature
from prefopt.data.layouts.row import Row
from prefopt.data.layouts.shapes import LISTS, SCORES, look, scored_sides
from prefopt.data.layouts.trl import last_answer, split_turns
from prefopt.data.layouts.two_responses import Signature, asked, by_votes, replied, turns_of_texts
from prefopt.data.layouts.values import TIERS, BadRow, kind, verdict
from prefopt.records import Comparison, Message, Response, tiers_of

INDEX = {"0": "first", "1": "second"}
STRENGTH = {
    **{str(k): "first" for k in (-3, -2, -1)},
    "0": "tie",
    **{str(k): "second" for k in (1, 2, 3)},
}
PROMPTS = ("prompt", "instruction", "question", "input", "context", "query")
USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "22"}


def _read_arena(row: Row) -> Comparison:
    """Two whole conversations; both begin with the prompt."""
    first, second = (row.turns(name) for name in ("conversation_a", "conversation_b"))
    at = split_turns(first, second)
    if at == 0:
        raise BadRow("differing prompts", "the conversations do not begin with the same turns")
    found = verdict(row.given("winner"), "winner", row.means)
    return row.comparison(row.with_system(first[:at]), [Response(first[at:]), Response(second[at:])], TIERS[found])


def _read_arena_columns(row: Row) -> Comparison:
    """Turns of the user and of two models by turns, in lists that may be written as JSON; 0 or 1 says who won."""
    users = turns_of_texts(row, "prompt")
    sides = [_side(users, turns_of_texts(row, name), name) for name in ("response_a", "response_b")]
    names = {"first": "winner_model_a", "second": "winner_model_b", "tie": "winner_tie"}
    won = [side for side, name in names.items() if row.has(name) and row.label_of(row.given(name), name)]
    if len(won) != 1:
        raise BadRow("unknown label", f"{len(won)} of {', '.join(names.values())} are 1; it should be one of them")
    return row.comparison((Message("user", users[0]),), sides, TIERS[won[0]])


def _side(users: list[str], answers: list[str], name: str) -> Response:
    if len(users) != len(answers):
        raise BadRow("wrong number", f"prompt has {len(users)} turns and {name} has {len(answers)}")
    turns = [Message("assistant", answers[0])]
    for asks, answers_it in zip(users[1:], answers[1:], strict=True):
        turns += [Message("user", asks), Message("assistant", answers_it)]
    return Response(tuple(turns))


def _read_argilla(row: Row) -> Comparison:
    """A record of Argilla: ``fields`` hold prompt and responses, ``responses`` what each person said of a question."""
    fields, said = row.given("fields"), row.given("responses")
    if not isinstance(fields, Mapping) or not isinstance(said, Mapping):
        raise BadRow("wrong type", "fields and responses should be objects")
    key = next((name for name in PROMPTS if fields.get(name) is not None), None)
    names = [str(name) for name, value in fields.items() if name not in PROMPTS and value is not None]
    if key is None or len(names) < 2:
        raise BadRow("missing field", "fields lack a prompt, or two responses to it")
    answers = [item.get("value") for item in _answers(said) if isinstance(item, Mapping)]
    answers = [value for value in answers if value is not None]
    if not answers:
        raise BadRow("missing field", "has no answer of anybody to a question")
    prompt = asked(row, f"fields.{key}")
    responses = [replied(row, fields[name], f"fields.{name}") for name in names]
    if isinstance(answers[0], (list, tuple)):
        if len(answers) > 1:
            raise BadRow("wrong number", f"has {len(answers)} rankings; export one for each record")
        return row.comparison(prompt, responses, tiers_of([-r for r in _ranks(row, answers[0], names)]))
    if len(names) != 2:
        raise BadRow("wrong number", f"has {len(names)} responses and a label; a label compares two")
    verdicts = [verdict(value, "an answer", row.means, names) for value in answers]
    votes = tuple(float(verdicts.count(side)) for side in ("first", "second"))
    return by_votes(row, prompt, responses, votes)


def _answers(said: Mapping[str, object]) -> list[object]:
    """What people answered to the one question that was asked of the responses."""
    found = {name: value for name, value in said.items() if isinstance(value, (list, tuple)) and value}
    if len(found) > 1:
        found = {name: value for name, value in found.items() if "prefer" in name or "rank" in name} or found
    if len(found) > 1:
        raise BadRow("wrong number", f"has answers to several questions ({', '.join(found)}); export one of them")
    return [item for value in found.values() for item in value]


def _ranks(row: Row, ranking: list[object] | tuple[object, ...], names: list[str]) -> list[float]:
    ranks = {}
    for item in ranking:
        if not isinstance(item, Mapping):
            raise BadRow("wrong type", f"a ranking holds {kind(item)}, not an object with value and rank")
        ranks[str(item.get("value"))] = row.number_of(item.get("rank"), "a rank")
    if lacking := [name for name in names if name not in ranks]:
        raise BadRow("wrong order", f"the ranking leaves out {', '.join(lacking)}")
    return [ranks[name] for name in names]


def _read_rejected_messages(row: Row) -> Comparison:
    """The rejected conversation is whole, or the last answer alone."""
    chosen = row.chat("messages")
    value = row.given("rejected_messages" if row.has("rejected_messages") else "rejected_response")
    if isinstance(value, str):
        at = last_answer(chosen)
        return row.pair(chosen[:at], Response(chosen[at:]), replied(row, value, "rejected_response"))
    rejected = row.response_of(value, "the rejected side").messages
    if rejected and rejected[0].role == "assistant":
        at = last_answer(chosen)
        return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected))
    if chosen and chosen[0].role == "system" and rejected and rejected[0].role != "system":
        rejected = (chosen[0], *rejected)
    at = split_turns(chosen, rejected)
    if at == 0:
        raise BadRow("differing prompts", "the sides do not begin with the same turns")
    return row.pair(chosen[:at], Response(chosen[at:]), Response(rejected[at:]))


def _numbered(row: Mapping[str, object]) -> bool:
    return look(row["prompt"]) in ("text", "transcript", *LISTS)


SHP = Signature(
    prompt="history", first="human_ref_A", second="human_ref_B", label="labels", means={"1": "first", "0": "second"}
)
PKU = Signature(prompt="prompt", first="response_0", second="response_1", label="better_response_id", means=INDEX)
WEBGPT = Signature(prompt="question.full_text", first="answer_0", second="answer_1", scores=("score_0", "score_1"))
SUMMARIES = Signature(
    prompt="info.post", first="summaries.0.text", second="summaries.1.text", label="choice", means=INDEX
)
STRENGTHS = Signature(
    prompt="prompt", first="response_1", second="response_2", label="preference_strength", means=STRENGTH
)
HELPSTEER3 = Signature(
    prompt="context", first="response1", second="response2", label="overall_preference", means=STRENGTH
)
NECTAR = ListSignature(prompt="prompt", items="answers", response="answer", rank="rank")
STACK = ListSignature(prompt="question", items="answers", response="text", score="pm_score")
NEMO = ListSignature(prompt="context", items="completions", response="completion", rank="rank")
OASST = ListSignature(prompt="text", items="replies", response="text", rank="rank")
TREES = ListSignature(prompt="prompt.text", items="prompt.replies", response="text", rank="rank")


def _read_replies(row: Row) -> Comparison:
    """A message of a user; what users reply to the assistant is nothing to learn."""
    if row.has("role") and row.given("role") != "prompter":
        said = str(row.given("role"))[:20]
        raise BadRow("unknown role", f"role is {said!r}: only replies to a prompter are responses")
    return OASST.read(row)


PUBLIC = (
    Layout(
        name="shp",
        fields=("history", "human_ref_A", "human_ref_B", "labels"),
        optional=("system",),
        reader=SHP.read,
        gives="pairs",
        example={"history": "What is 2 + 2?", "human_ref_A": "22", "human_ref_B": "4", "labels": 0},
        says="a post and two replies to it; labels is 1 where A is preferred and 0 where B is",
        origin="SHP",
        words={"label": "labels"},
    ),
    Layout(
        name="pku-saferlhf",
        fields=("prompt", "response_0", "response_1", "better_response_id"),
        optional=("system",),
        reader=PKU.read,
        gives="pairs",
        example={"prompt": "What is 2 + 2?", "response_0": "22", "response_1": "4", "better_response_id": 1},
        says="a prompt and two responses, and the number of the better, 0 or 1",
        origin="PKU-SafeRLHF",
        words={"label": "better_response_id"},
        shape=_numbered,
        note="better_response_id says which response is preferred; --columns label=safer_response_id takes the safer",
    ),
    Layout(
        name="arena",
        fields=("conversation_a", "conversation_b", "winner"),
        reader=_read_arena,
        gives="pairs",
        example={"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},
        says="two conversations, and which won: model_a, model_b, tie or tie (bothbad), which is a tie too",
        origin="Chatbot Arena (33k)",
        optional=("system", "tools"),
        words={"label": "winner"},
    ),
    Layout(
        name="arena-columns",
        fields=("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        reader=_read_arena_columns,
        gives="pairs",
        example={
            "prompt": '["What is 2 + 2?"]',
            "response_a": '["22"]',
            "response_b": '["4"]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        says="turns of a user and of two models, in lists, and a column that is 1 for each way that it can end",
        origin="Chatbot Arena (55k, LMSYS on Kaggle)",
        optional=("winner_tie",),
    ),
    Layout(
        name="webgpt",
        fields=("question", "answer_0", "answer_1", "score_0", "score_1"),
        optional=("system",),
        reader=WEBGPT.read,
        gives="pairs",
        example={
            "question": {"full_text": "What is 2 + 2?"},
            "answer_0": "22",
            "answer_1": "4",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        says="a question and two answers with scores from -1 to 1, the higher is better",
        origin="WebGPT comparisons",
        shape=lambda row: look(row["question"]) == "object",
    ),
    Layout(
        name="summaries",
        fields=("info", "summaries", "choice"),
        optional=("system",),
        reader=SUMMARIES.read,
        gives="pairs",
        example={"info": {"post": "2 and 2 are 4."}, "summaries": [{"text": "22"}, {"text": "4"}], "choice": 1},
        says="a post and two summaries of it, and the number of the better, 0 or 1",
        origin="OpenAI, summarize from feedback",
        words={"label": "choice"},
    ),
    Layout(
        name="helpsteer-preference",
        fields=("prompt", "response_1", "response_2", "preference_strength"),
        optional=("system",),
        reader=STRENGTHS.read,
        gives="pairs",
        example={"prompt": "What is 2 + 2?", "response_1": "22", "response_2": "4", "preference_strength": 3},
        says="a prompt and two responses; preference_strength is below 0 where the first is better, else above",
        origin="HelpSteer2, preference",
        words={"label": "preference_strength"},
        shape=_numbered,
    ),
    Layout(
        name="helpsteer3",
        fields=("context", "response1", "response2", "overall_preference"),
        optional=("system",),
        reader=HELPSTEER3.read,
        gives="pairs",
        example={"context": [USER], "response1": "22", "response2": "4", "overall_preference": 3},
        says="a conversation and two responses; overall_preference is below 0 where the first is better, else above",
        origin="HelpSteer3",
        words={"label": "overall_preference"},
    ),
    Layout(
        name="argilla",
        fields=("fields", "responses"),
        optional=("system",),
        reader=_read_argilla,
        gives="pairs",
        example={
            "fields": {"prompt": "What is 2 + 2?", "response-a": "22", "response-b": "4"},
            "responses": {"preference": [{"value": "b", "user_id": "u"}]},
        },
        says="a record with a prompt and responses, and what people answered: a label of two, or a ranking",
        origin="Argilla, exported records",
        shape=lambda row: isinstance(row["fields"], Mapping) and isinstance(row["responses"], Mapping),
    ),
    Layout(
        name="swift-preference",
        fields=("messages", "rejected_messages"),
        reader=_read_rejected_messages,
        gives="pairs",
        example={"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        says="a conversation, and a rejected one that begins with the same turns",
        origin="ms-swift",
        optional=("system", "tools", *SCORES),
        reads=scored_sides,
    ),
    Layout(
        name="swift-rejected-response",
        fields=("messages", "rejected_response"),
        reader=_read_rejected_messages,
        gives="pairs",
        example={"messages": [USER, GOOD], "rejected_response": "22"},
        says="a conversation, and a response that its last answer is preferred to",
        origin="ms-swift",
        optional=("system", "tools", *SCORES),
        reads=scored_sides,
    ),
    Layout(
        name="nectar",
        fields=("prompt", "answers"),
        optional=("system",),
        shape=NECTAR.fits,
        gives="ranking",
        reader=NECTAR.read,
        example={"prompt": "What is 2 + 2?", "answers": [{"answer": "22", "rank": 2}, {"answer": "4", "rank": 1}]},
        says="a prompt and answers with a rank each, 1 the best",
        origin="Nectar",
    ),
    Layout(
        name="stack-exchange",
        fields=("question", "answers"),
        optional=("system",),
        shape=STACK.fits,
        gives="ranking",
        reader=STACK.read,
        example={
            "question": "What is 2 + 2?",
            "answers": [{"text": "22", "pm_score": 0}, {"text": "4", "pm_score": 9}],
        },
        says="a question and answers with a score each, the higher is better",
        origin="Stack Exchange preferences",
    ),
    Layout(
        name="nemo-ranks",
        fields=("context", "completions"),
        optional=("system",),
        shape=NEMO.fits,
        gives="ranking",
        reader=NEMO.read,
        example={
            "context": [USER],
            "completions": [{"completion": [BAD], "rank": 1}, {"completion": [GOOD], "rank": 0}],
        },
        says="a conversation and completions with a rank each, the lowest the best",
        origin="NeMo RL",
    ),
    Layout(
        name="oasst-replies",
        fields=("text", "replies"),
        optional=("system", "role"),
        shape=OASST.fits,
        gives="ranking",
        reader=_read_replies,
        example={"text": "What is 2 + 2?", "replies": [{"text": "22", "rank": 1}, {"text": "4", "rank": 0}]},
        says="a message and its replies with a rank each, 0 the best",
        origin="OpenAssistant",
    ),
    Layout(
        name="oasst-trees",
        fields=("message_tree_id", "prompt"),
        optional=("system",),
        shape=TREES.fits,
        gives="ranking",
        reader=TREES.read,
        example={
            "message_tree_id": "t",
            "prompt": {"text": "What is 2 + 2?", "replies": [{"text": "22", "rank": 1}, {"text": "4", "rank": 0}]},
        },
        says="a tree of messages: its prompt, and the replies to it with a rank each, 0 the best",
        origin="OpenAssistant, trees",
        note="of each tree, the replies to its first message are compared; deeper ones are not read",
    ),
)
