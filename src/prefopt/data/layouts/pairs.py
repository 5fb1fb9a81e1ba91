"""Two responses and which is better, by a label, scores or votes; and public data sets of such pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.layouts.conversations import instruction_prompt
from prefopt.data.layouts.layout import BAD, GOOD, QUESTION, SIDES, USER, Layout, pair_layout
from prefopt.data.layouts.messages import read_transcript, split_turns
from prefopt.data.layouts.row import RowReader, text_prompt
from prefopt.data.layouts.trl import chat_prompt, transcripts
from prefopt.data.layouts.values import LISTS, SCORES, TIERS, TRANSCRIPT_STARTS, BadRow, look, type_name, verdict
from prefopt.records import Comparison, Message, Response, Tiers, tiers_of

JUDGEMENTS = ("label", "score_first", "score_second", "votes_first", "votes_second")


def _judged(row: Mapping[str, object]) -> bool:
    sides = [look(row[name]) for name in ("first", "second")]
    return not {"number", "truth"} & set(sides) and any(row.get(name) is not None for name in JUDGEMENTS)


def _read_two(row: RowReader, prompt: tuple[Message, ...], *, text: bool) -> Comparison:
    sides = [row.response("first", text=text), row.response("second", text=text)]
    scores, votes = (_two_numbers(row, f"{what}_first", f"{what}_second") for what in ("score", "votes"))
    if row.has("label"):
        tiers = TIERS[verdict(row.given("label"), "label", row.means, row.sides)]
        return row.comparison(prompt, sides, tiers, text=text, scores=scores)
    if scores is not None:
        return row.comparison(prompt, sides, tiers_of(scores), text=text, scores=scores)
    if votes is None:
        raise BadRow("missing field", "lacks label, score_first and score_second, or votes_first and votes_second")
    return _by_votes(row, prompt, sides, votes, text=text)


def _two_numbers(row: RowReader, *names: str) -> tuple[float, ...] | None:
    found = [name for name in names if row.has(name)]
    if len(found) == 1:
        raise BadRow("missing score", f"has only one of {' and '.join(names)}")
    return tuple(row.number_of(row.given(name), name) for name in names) if found else None


def _by_votes(
    row: RowReader, prompt: tuple[Message, ...], sides: list[Response], votes: tuple[float, ...], *, text: bool = False
) -> Comparison:
    """Two responses with the number of votes for each; equal numbers are a tie."""
    if min(votes) < 0:
        raise BadRow("wrong type", f"has {min(votes):g} votes for a response; it should be 0 or more")
    cast = tuple((k, 1 - k, v) for k, v in enumerate(votes) if v)
    both = cast if len(cast) == 2 else None
    return row.comparison(prompt, sides, tiers_of(votes), text=text, votes=both)


def _read_two_responses(row: RowReader) -> Comparison:
    text = isinstance(row.given("prompt"), str)
    return _read_two(row, text_prompt(row.text("prompt")) if text else row.chat("prompt"), text=text)


def _read_transcripts(row: RowReader) -> Comparison:
    (before, prompt, chosen), (other, _, rejected) = (_last_answer_of(row, name) for name in SIDES)
    if before != other:
        raise BadRow("differing prompts", "the sides differ before their last answers, so they answer two prompts")
    return row.pair(prompt, Response(chosen), Response(rejected))


def _last_answer_of(row: RowReader, name: str) -> tuple[str, tuple[Message, ...], tuple[Message, ...]]:
    """The text before the last assistant turn of a transcript, the turns in it, and the turns from there on."""
    text = row.text(name)
    if not text.startswith(TRANSCRIPT_STARTS):
        raise BadRow("no transcript", f"{name} does not begin with an empty line and 'Human:'")
    turns, starts = read_transcript(text)
    last = next((i for i in reversed(range(len(turns))) if turns[i].role == "assistant"), None)
    if last is None:
        raise BadRow("response without an answer", f"{name} has no turn of the assistant")
    return text[: starts[last]], turns[:last], turns[last:]


def _read_binarized(row: RowReader) -> Comparison:
    """Chosen and rejected are conversations that begin with the prompt, or answers to it."""
    asked, chosen, rejected = row.text("prompt"), row.turns("chosen"), row.turns("rejected")
    if not any(m.role == "user" for side in (chosen, rejected) for m in side):
        chosen, rejected = ((Message("user", asked), *side) for side in (chosen, rejected))
    at = split_turns(chosen, rejected)
    if at == 0:
        raise BadRow("differing prompts", "chosen and rejected do not begin with the same turns")
    return row.pair(row.with_system(chosen[:at]), Response(chosen[at:]), Response(rejected[at:]))


def _read_arena(row: RowReader) -> Comparison:
    first, second = (row.turns(name) for name in ("conversation_a", "conversation_b"))
    at = split_turns(first, second)
    if at == 0:
        raise BadRow("differing prompts", "the conversations do not begin with the same turns")
    found = verdict(row.given("winner"), "winner", row.means)
    return row.comparison(row.with_system(first[:at]), [Response(first[at:]), Response(second[at:])], TIERS[found])


def _read_arena_columns(row: RowReader) -> Comparison:
    users = row.texts("prompt")
    sides = [_arena_side(users, row.texts(name), name) for name in ("response_a", "response_b")]
    names = {"first": "winner_model_a", "second": "winner_model_b", "tie": "winner_tie"}
    won = [side for side, name in names.items() if row.has(name) and row.label_of(row.given(name), name)]
    if len(won) != 1:
        raise BadRow("unknown label", f"{len(won)} of {', '.join(names.values())} are 1; it should be one of them")
    return row.comparison((Message("user", users[0]),), sides, TIERS[won[0]])


def _arena_side(users: list[str], answers: list[str], name: str) -> Response:
    if len(users) != len(answers):
        raise BadRow("wrong number", f"prompt has {len(users)} turns and {name} has {len(answers)}")
    turns = [m for u, a in zip(users, answers, strict=True) for m in (Message("user", u), Message("assistant", a))]
    return Response(tuple(turns[1:]))


ARGILLA_PROMPTS = ("prompt", "instruction", "question", "input", "context", "query")


def _read_argilla(row: RowReader) -> Comparison:
    """``fields`` hold prompt and responses, ``responses`` the answers of annotators to questions."""
    fields, given = row.given("fields"), row.given("responses")
    if not isinstance(fields, Mapping) or not isinstance(given, Mapping):
        raise BadRow("wrong type", "fields and responses should be objects")
    key = next((name for name in ARGILLA_PROMPTS if fields.get(name) is not None), None)
    names = [str(name) for name, value in fields.items() if name not in ARGILLA_PROMPTS and value is not None]
    if key is None or len(names) < 2:
        raise BadRow("missing field", "fields lack a prompt, or two responses to it")
    answers = [item.get("value") for item in _argilla_answers(given) if isinstance(item, Mapping)]
    answers = [value for value in answers if value is not None]
    if not answers:
        raise BadRow("missing field", "has no answer of an annotator")
    prompt = row.prompt_at(f"fields.{key}")
    responses = [row.response_of(fields[name], f"fields.{name}") for name in names]
    if isinstance(answers[0], (list, tuple)):
        if len(answers) > 1:
            raise BadRow("wrong number", f"has {len(answers)} rankings; export one for each record")
        return row.comparison(prompt, responses, _argilla_ranking(row, answers[0], names))
    if len(names) != 2:
        raise BadRow("wrong number", f"has {len(names)} responses and a label; a label compares two")
    verdicts = [verdict(value, "an answer", row.means, names) for value in answers]
    votes = tuple(float(verdicts.count(side)) for side in ("first", "second"))
    return _by_votes(row, prompt, responses, votes)


def _argilla_answers(given: Mapping[str, object]) -> list[object]:
    """The answers to the one question about the responses."""
    found = {name: value for name, value in given.items() if isinstance(value, (list, tuple)) and value}
    if len(found) > 1:
        found = {name: value for name, value in found.items() if "prefer" in name or "rank" in name} or found
    if len(found) > 1:
        raise BadRow("wrong number", f"has answers to several questions ({', '.join(found)}); export one of them")
    return [item for value in found.values() for item in value]


def _argilla_ranking(row: RowReader, ranking: Sequence[object], names: Sequence[str]) -> Tiers:
    ranks = {}
    for item in ranking:
        if not isinstance(item, Mapping):
            raise BadRow("wrong type", f"a ranking holds {type_name(item)}, not an object with value and rank")
        ranks[str(item.get("value"))] = row.number_of(item.get("rank"), "a rank")
    if lacking := [name for name in names if name not in ranks]:
        raise BadRow("wrong order", f"the ranking leaves out {', '.join(lacking)}")
    return tiers_of([-ranks[name] for name in names])


def _labelled(paths: tuple[str, str, str, str], means: Mapping[str, str], **more: Any) -> Layout:
    """A data set with labelled pairs. ``paths``, such as ``info.post``, lead to prompt, first and second response, and
    label; ``means`` is the meaning of its labels."""
    prompt, first, second, label = paths

    def read(row: RowReader) -> Comparison:
        sides = [row.response(path) for path in (first, second)]
        asked = row.prompt_at(prompt)
        return row.comparison(asked, sides, TIERS[verdict(row.given(label), label, row.means or means)])

    return pair_layout(optional=("system",), option_names={"label": label}, reader=read, **more)


def _read_webgpt(row: RowReader) -> Comparison:
    sides = [row.response(name) for name in ("answer_0", "answer_1")]
    prompt = row.prompt_at("question.full_text")
    scores = tuple(row.number_of(row.given(name), name) for name in ("score_0", "score_1"))
    return row.comparison(prompt, sides, tiers_of(scores), scores=scores)


def _one_prompt(row: Mapping[str, object]) -> bool:
    return isinstance(row["prompt"], (str, list, tuple))


BY_NUMBER = {"0": "first", "1": "second"}
BY_STRENGTH = {str(k): "first" if k < 0 else "second" if k > 0 else "tie" for k in range(-3, 4)}
PUBLIC = (
    _labelled(
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {"1": "first", "0": "second"},
        name="shp",
        description="a post and two replies to it; labels is 1 where A is preferred and 0 where B is",
        origin="SHP",
        example={"history": QUESTION, "human_ref_A": "22", "human_ref_B": "4", "labels": 0},
    ),
    _labelled(
        ("prompt", "response_0", "response_1", "better_response_id"),
        BY_NUMBER,
        name="pku-saferlhf",
        description="a prompt and two responses, and the number of the better, 0 or 1",
        origin="PKU-SafeRLHF",
        example={"prompt": QUESTION, "response_0": "22", "response_1": "4", "better_response_id": 1},
        matches=_one_prompt,
        note="better_response_id says which response is preferred; --columns label=safer_response_id takes the safer",
    ),
    pair_layout(
        name="arena",
        optional=("system", "tools"),
        option_names={"label": "winner"},
        description="two conversations, and which won: model_a, model_b, tie or tie (bothbad), which is a tie too",
        origin="Chatbot Arena (33k)",
        example={"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},
        reader=_read_arena,
    ),
    pair_layout(
        name="arena-columns",
        optional=("winner_tie",),
        description="lists of the turns of a user and of two models, and a column that is 1 for each outcome",
        origin="Chatbot Arena (55k, LMSYS on Kaggle)",
        example={"prompt": f'["{QUESTION}"]', "response_a": '["22"]', "response_b": '["4"]'}
        | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        reader=_read_arena_columns,
    ),
    pair_layout(
        name="webgpt",
        optional=("system",),
        matches=lambda row: look(row["question"]) == "object",
        description="a question and two answers with scores from -1 to 1, the higher is better",
        origin="WebGPT comparisons",
        example={"question": {"full_text": QUESTION}, "answer_0": "22", "answer_1": "4"}
        | {"score_0": -1.0, "score_1": 1.0},
        reader=_read_webgpt,
    ),
    _labelled(
        ("info.post", "summaries.0.text", "summaries.1.text", "choice"),
        BY_NUMBER,
        name="summaries",
        description="a post and two summaries of it, and the number of the better, 0 or 1",
        origin="OpenAI, summarize from feedback",
        example={"info": {"post": "2 and 2 are 4."}, "summaries": [{"text": "22"}, {"text": "4"}], "choice": 1},
    ),
    _labelled(
        ("prompt", "response_1", "response_2", "preference_strength"),
        BY_STRENGTH,
        name="helpsteer-preference",
        description="a prompt and two responses; preference_strength is below 0 where the first is better, else above",
        origin="HelpSteer2, preference",
        example={"prompt": QUESTION, "response_1": "22", "response_2": "4", "preference_strength": 3},
        matches=_one_prompt,
    ),
    _labelled(
        ("context", "response1", "response2", "overall_preference"),
        BY_STRENGTH,
        name="helpsteer3",
        description="a conversation and two responses; overall_preference is below 0 if the first is better, or above",
        origin="HelpSteer3",
        example={"context": [USER], "response1": "22", "response2": "4", "overall_preference": 3},
    ),
    pair_layout(
        name="argilla",
        optional=("system",),
        matches=lambda row: isinstance(row["fields"], Mapping) and isinstance(row["responses"], Mapping),
        description="a record with a prompt and responses, and the annotators' answers: labels of two, or a ranking",
        origin="Argilla, exported records",
        example={
            "fields": {"prompt": QUESTION, "response-a": "22", "response-b": "4"},
            "responses": {"preference": [{"value": "b", "user_id": "u"}]},
        },
        reader=_read_argilla,
    ),
)
BINARIZED = pair_layout(
    name="ultrafeedback-binarized",
    optional=("system", "tools", *SCORES),
    matches=lambda row: not chat_prompt(row) and all(look(row[name]) in LISTS for name in SIDES),
    description="a prompt as text, and two conversations that begin with it",
    origin="UltraFeedback binarized (Zephyr)",
    example={"prompt": QUESTION, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    | {"score_chosen": 9.0, "score_rejected": 1.0},
    reader=_read_binarized,
)
TRANSCRIPT = f"\n\nHuman: {QUESTION}\n\nAssistant: "
TRANSCRIPTS = pair_layout(
    name="hh",
    optional=SCORES,
    matches=transcripts,
    description="two transcripts; the prompt is all before the last answer",
    origin="Anthropic HH-RLHF",
    example={
        name: f"\n\nHuman: {QUESTION}\n\nAssistant: {text}" for name, text in zip(SIDES, ("4", "22"), strict=True)
    },
    reader=_read_transcripts,
)
BETTER = "two responses, and a label that says which is better (--label-means), scores, or votes"
TWO_CHAT = pair_layout(
    name="two-responses-chat",
    optional=("input", "system", "history", *JUDGEMENTS),
    matches=_judged,
    aliases={"question": "instruction"},
    option_names={"prompt": "instruction", "query": "input"},
    description=f"an instruction, {BETTER}",
    origin="judges and annotators",
    example={"instruction": QUESTION, "first": "22", "second": "4", "label": "second"},
    reader=lambda row: _read_two(row, instruction_prompt(row), text=False),
)
TWO = pair_layout(
    name="two-responses",
    optional=("system", "tools", *JUDGEMENTS),
    matches=_judged,
    description=f"a prompt, as messages or plain text, {BETTER}",
    origin="judges and annotators",
    example={"prompt": "2 + 2 =", "first": " 22", "second": " 4", "score_first": 1.0, "score_second": 9.0},
    reader=_read_two_responses,
)
LAYOUTS = {20: PUBLIC, 45: (BINARIZED,), 56: (TRANSCRIPTS,), 65: (TWO_CHAT, TWO)}
