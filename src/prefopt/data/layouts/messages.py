"""Messages in rows: OpenAI's ``role`` and ``content``, ShareGPT's ``from`` and ``value``, tool calls, transcripts.

>>> turns = [{"from": "human", "value": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]
>>> [(m.role, m.content) for m in read_messages(turns)]
[('user', 'hi'), ('assistant', 'ho')]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefopt.data.layouts.pictures import checked, picture_of_part
from prefopt.data.layouts.values import BadRow, json_of, object_text, type_name
from prefopt.data.pictures import PictureFolder, data_url
from prefopt.records import PICTURE, Message, Picture, ToolCall

# Role of an assistant turn whose text is JSON: one function call or a list of them.
CALL = "call"
ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "function_call": CALL,
}
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("loss_weight", "weight")
JUDGED = ("label", "rejected")
READ = frozenset((*REASONING, *WEIGHTS, *JUDGED, "trained", "tool_calls", "function_call", "tool_call_id", "name"))
NOT_READ = ("images", "videos", "audios", "image", "video", "audio", "refusal")
PICTURE_PARTS = ("image", "image_url", "input_image")
# What the parts of a message hold, by their type, and the keys that hold it.
PARTS = {
    "text": ("text", ("text", "value")),
    **dict.fromkeys(("reasoning", "thinking"), ("reasoning", ("value", "text", "thinking"))),
    **dict.fromkeys(("tool_call", "tool_calls"), ("calls", ("value",))),
}


@dataclass(frozen=True, slots=True)
class Tags:
    """The keys and role names of messages; of several keys the first that a message has is read.

    ``verbatim`` keeps JSON text and empty text unchanged, as the canonical layout needs. Files of pictures are in
    ``folder``. Keys of messages that are not read are collected in ``unread``.
    """

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    verbatim: bool = False
    folder: PictureFolder | None = None
    unread: set[str] = field(default_factory=set, compare=False)

    def exactly(self, verbatim: bool) -> Tags:
        return self if verbatim == self.verbatim else replace(self, verbatim=verbatim)


TAGS = Tags()


def read_messages(value: object, name: str = "messages", tags: Tags = TAGS) -> tuple[Message, ...]:
    """Messages from a list of objects; ``name`` is its place in the row. Raises :class:`BadRow`."""
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{name} is {type_name(value)}, not a list of messages")
    return tuple(read_message(item, name, tags) for item in value)


def read_message(item: object, name: str = "messages", tags: Tags = TAGS) -> Message:
    """One message. Content is text, a list of parts, or null with tool calls or reasoning."""
    if not isinstance(item, dict):
        raise BadRow("wrong type", f"{name} holds {type_name(item)}, not a message")
    if len(item) == 2 and (plain := _plain(item, tags)) is not None:
        return plain
    pair = next((i for i, key in enumerate(tags.role) if item.get(key) is not None), 0)
    role = _role(item, tags.role[pair], name, tags)
    for key in NOT_READ:
        if item.get(key):
            raise BadRow("field that cannot be used", f"a message of {name} has {key}, which is not read")
    key = tags.content[pair]
    content, reasoning, calls, pictures = _content(item.get(key), key, name, tags)
    for more in (_text(item, word, name) for word in REASONING):
        reasoning = reasoning if more is None else (reasoning or "") + more
    calls += _calls(item, name, tags.verbatim)
    if role == CALL:
        calls, content, role = [*calls, *_calls_of_text(content or "", name)], "", "assistant"
    if calls and role != "assistant":
        raise BadRow("wrong type", f"a message of {name} calls a tool, but its role is {role}")
    if content is None and not calls and not reasoning:
        raise BadRow("missing field", f"a message of {name} lacks {key}")
    answers, called = _text(item, "tool_call_id", name), _text(item, "name", name)
    if not tags.verbatim:  # empty text counts as absent
        reasoning, answers, called = reasoning or None, answers or None, called or None
    trained = _trained(item, role, name, tags.verbatim)
    label, rejected = _judgement(item, role, name, tags)
    if unread := item.keys() - READ:
        tags.unread.update(str(k) for k in unread if k not in (tags.role[pair], key) and item[k] is not None)
    judged = (trained, label, rejected)
    return checked(Message(role, content or "", reasoning, tuple(calls), answers, called, *judged, pictures))


def _judgement(item: Mapping[str, object], role: str, name: str, tags: Tags) -> tuple[bool | None, tuple[Message, ...]]:
    """Whether a turn is desirable, and what is worse in its place: text, a message or a list of messages."""
    label, rejected = (item.get(key) for key in JUDGED)
    if label is None and not rejected:
        return None, ()
    if role != "assistant":
        key = "label" if label is not None else "rejected"
        raise BadRow("wrong type", f"a message of {name} has {key}, but its role is {role}; only answers are judged")
    if label is not None and label not in (0, 1):
        raise BadRow("wrong type", f"label of a message of {name} is {label!r}, not true or false")
    if isinstance(rejected, str):
        turns: tuple[Message, ...] = (Message("assistant", rejected),)
    else:
        turns = read_messages([rejected] if isinstance(rejected, dict) else rejected or (), f"rejected of {name}", tags)
    if any(m.label is not None or m.rejected for m in turns):
        raise BadRow("wrong type", f"rejected of a message of {name} holds judgements of its own")
    if any(m.pictures for m in turns):
        raise BadRow("field that cannot be used", f"rejected of a message of {name} has a picture, which is not read")
    return None if label is None else bool(label), turns


def _plain(item: Mapping[str, object], tags: Tags) -> Message | None:
    """Fast path for a message with a role and text alone; None for any other."""
    for role, content in zip(tags.role, tags.content, strict=True):
        name, text = item.get(role), item.get(content)
        if isinstance(name, str) and isinstance(text, str) and tags.roles.get(name, CALL) != CALL:
            return Message(tags.roles[name], text)
    return None


def read_tools(value: object, *, verbatim: bool = False) -> tuple[str, ...]:
    """The functions a model may call, as JSON objects, from a list or the JSON text of a list."""
    if isinstance(value, str):
        value = json_of(value, "tools") if value.strip() else None
    if value is None or value in ([], {}, ()):
        return ()
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, (list, tuple)):
        raise BadRow("wrong type", f"tools is {type_name(value)}, not a list of functions")
    return tuple(object_text(item, "an item of tools", verbatim=verbatim) for item in items)


def _role(item: Mapping[str, object], key: str, name: str, tags: Tags) -> str:
    value = _text(item, key, name)
    if value is None:
        raise BadRow("missing field", f"a message of {name} lacks {key}")
    if value not in tags.roles:
        raise BadRow("unknown role", f"{name} has the role {value!r}; known are {', '.join(tags.roles)}")
    return tags.roles[value]


def _text(item: Mapping[str, object], key: str, name: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow("wrong type", f"{key} of a message of {name} is {type_name(value)}, not text")
    return value


def _content(
    value: object, key: str, name: str, tags: Tags
) -> tuple[str | None, str | None, list[ToolCall], tuple[Picture, ...]]:
    """Text, reasoning, tool calls and pictures from text, or from the parts of LLaMA-Factory v1 and OpenAI."""
    if value is None or isinstance(value, str):
        return value, None, [], ()
    if not isinstance(value, (list, tuple)):
        raise BadRow("wrong type", f"{key} of a message of {name} is {type_name(value)}, not text")
    found: dict[str, list[str]] = {"text": [], "reasoning": [], "calls": []}
    pictures: list[Picture] = []
    for part in value:
        what = part.get("type") if isinstance(part, dict) else None
        if not isinstance(what, str):
            raise BadRow("wrong type", f"{key} of a message of {name} holds {type_name(part)}, not parts with a type")
        if what in PICTURE_PARTS:
            found["text"].append(PICTURE)
            pictures.append(picture_of_part(part, f"a part of a message of {name}", tags.folder))
            continue
        if what not in PARTS:
            raise BadRow("field that cannot be used", f"a message of {name} has a part of type {what!r}, not text")
        kind, keys = PARTS[what]
        text = next((part[key] for key in keys if part.get(key) is not None), None)
        if not isinstance(text, str):
            raise BadRow("wrong type", f"a part of a message of {name} holds {type_name(text)}, not text")
        found[kind].append(text)
    calls = [call for text in found["calls"] for call in _calls_of_text(text, name, tags.verbatim)]
    content, reasoning = ("".join(found[kind]) if found[kind] else None for kind in ("text", "reasoning"))
    return content, reasoning, calls, tuple(pictures)


def _calls(item: Mapping[str, object], name: str, verbatim: bool) -> Iterator[ToolCall]:
    given = item.get("tool_calls")
    if given is not None and not isinstance(given, (list, tuple)):
        raise BadRow("wrong type", f"tool_calls of a message of {name} is {type_name(given)}, not a list")
    for call in given or ():
        yield _call(call, name, verbatim)
    if item.get("function_call") is not None:
        yield _call(item["function_call"], name, verbatim)


def _calls_of_text(text: str, name: str, verbatim: bool = False) -> list[ToolCall]:
    """Tool calls from JSON text, as in ShareGPT's function_call turns."""
    found = json_of(text, f"the call of a message of {name}")
    return [_call(call, name, verbatim) for call in (found if isinstance(found, list) else [found])]


def _call(call: object, name: str, verbatim: bool) -> ToolCall:
    if not isinstance(call, dict):
        raise BadRow("wrong type", f"a tool call of {name} is {type_name(call)}, not an object")
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    called, id = inner.get("name"), call.get("id")
    if not isinstance(called, str) or not (called or verbatim):
        raise BadRow("missing field", f"a tool call of {name} lacks the name of its function")
    if id is not None and not isinstance(id, str):
        raise BadRow("wrong type", f"the id of a tool call of {name} is {type_name(id)}, not text")
    arguments = inner.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    text = object_text(arguments, f"the arguments of a tool call of {name}", verbatim=verbatim)
    return ToolCall(called, text, id if verbatim else id or None)


def _trained(item: Mapping[str, object], role: str, name: str, verbatim: bool) -> bool:
    """Whether a turn is trained on: ``trained``, or a weight of 0 or 1. Only assistant turns can be."""
    trained = item.get("trained")
    if trained is not None and not isinstance(trained, bool):
        raise BadRow("wrong type", f"trained of a message of {name} is {type_name(trained)}, not true or false")
    weight = next((item[key] for key in WEIGHTS if item.get(key) is not None), None)
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise BadRow("wrong type", f"a message of {name} has the weight {weight!r}; it should be 0 or 1")
        if weight and role != "assistant":
            raise BadRow("wrong type", f"a message of {name} has the weight 1, but its role is {role}")
        return role != "assistant" or weight == 1
    return trained is not False or (role != "assistant" and not verbatim)


def write_messages(turns: Sequence[Message], weight: str | None = None) -> list[dict[str, object]]:
    """Messages in OpenAI's layout, with ``reasoning_content`` as in chat templates; absent fields are left out.

    A turn that is not trained has ``"trained": false``, or 0 under the key ``weight`` if that is given.
    """
    untrained = {weight: 0} if weight else {"trained": False}
    return [_write_message(m) | ({} if m.trained else untrained) for m in turns]


def _write_message(m: Message) -> dict[str, object]:
    ids = [{} if call.id is None else {"id": call.id} for call in m.tool_calls]
    functions = [{"name": call.name, "arguments": call.arguments} for call in m.tool_calls]
    calls = [{**id, "type": "function", "function": f} for id, f in zip(ids, functions, strict=True)] or None
    found: dict[str, object] = {
        "role": m.role,
        "content": write_parts(m) if m.pictures else m.content,
        "reasoning_content": m.reasoning,
        "tool_calls": calls,
    }
    found |= {"tool_call_id": m.tool_call_id, "name": m.name, "label": m.label}
    found |= {"rejected": write_messages(m.rejected) or None}
    return {key: value for key, value in found.items() if value is not None}


def write_parts(m: Message, *, urls: bool = False) -> list[dict[str, object]]:
    """The content of a message with pictures as parts, in order: files by their path, others as ``data:`` URLs; all so
    and in OpenAI's form with ``urls``."""
    words = m.content.split(PICTURE)
    parts: list[dict[str, object]] = [{"type": "text", "text": words[0]}] if words[0] else []
    for picture, text in zip(m.pictures, words[1:], strict=True):
        if urls:
            parts.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
        else:
            parts.append({"type": "image", "image": picture.source or data_url(picture)})
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def write_tools(tools: Sequence[str]) -> dict[str, object]:
    return {"tools": [json.loads(tool) for tool in tools]} if tools else {}


MARK = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_transcript(text: str) -> tuple[tuple[Message, ...], list[int]]:
    """The turns of text as in Anthropic's HH, which begins with a mark, and the offset of each turn in the text."""
    marks = list(MARK.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = (Message(SPEAKERS[m[1]], text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True))
    return tuple(turns), [mark.start() for mark in marks]


def split_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """The number of turns in the shared prompt: up to an assistant turn that both conversations keep."""
    limit = min(len(chosen), len(rejected))
    at = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while at and not all(at < len(side) and side[at].role == "assistant" for side in (chosen, rejected)):
        at -= 1
    return at


def last_answer(turns: Sequence[Message]) -> int:
    """The number of turns before a final assistant turn; all of them if the last is another role's."""
    return len(turns) - bool(turns and turns[-1].role == "assistant")
