"""Tools, tool calls and reasoning: shown as templates expect them, trained to their end, and never lost in silence."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from data.small import small_tokenizer
from data.templates import CHATML, TEMPLATES
from prefopt.data.chat.render import NO_FIELD, STRIPPED, Rendered, Renderer
from prefopt.data.chat.spans import ELSEWHERE
from prefopt.data.chat.template import EARLIER_REASONING, Rendering
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError
from prefopt.records import Comparison, Message, Response, ToolCall

ADD = json.dumps({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}})
BARE = json.dumps({"name": "add", "parameters": {"type": "object"}})
ASKED = Message("user", "2 + 2?")
CALL = Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 2, "b": 2}', "call00001"),))
RESULT = Message("tool", "4", tool_call_id="call00001", name="add")
DONE = Message("assistant", "It is 4.")


def row(*response: Message, prompt: tuple[Message, ...] = (ASKED,), tools: tuple[str, ...] = ()) -> Comparison:
    other = Response((Message("assistant", "no idea"),))
    return Comparison(prompt, (Response(response), other), ((0,), (1,)), row=1, file="f.json", tools=tools)


def renderer(name: str, **options: Any) -> Renderer:
    template = TEMPLATES[name]
    special = {"eos_token": template.eos} | ({"bos_token": template.bos} if template.bos else {})
    tokenizer = small_tokenizer(marks=template.marks, **special)
    tokenizer.chat_template = template.text
    return Renderer(tokenizer, Rendering(**options))


def runs(r: Renderer, comparison: Comparison, k: int = 0) -> list[tuple[bool, str]]:
    """Response k as decoded runs of (trained, text)."""
    rendered = next(r.render_all([comparison]))
    assert isinstance(rendered, Rendered), rendered
    ids, trained = rendered.group.sequence(k)
    cuts = [0, *(np.nonzero(np.diff(trained))[0] + 1), len(ids)]
    return [(bool(trained[a]), r.tokenizer.decode(ids[a:b].tolist())) for a, b in pairwise(cuts)]


def trained(r: Renderer, comparison: Comparison, k: int = 0) -> list[str]:
    return [text for on, text in runs(r, comparison, k) if on]


def problem(r: Renderer, comparison: Comparison) -> str:
    (found,) = r.render_all([comparison])
    assert isinstance(found, Problem) and found.kind == "chat template" and "\n" not in found.what
    return found.what


CALLED = {
    "headers": '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eom|>',
    "thinking": '<think>\n\n</think>\n\n<call>{"name": "add", "arguments": {"a": 2, "b": 2}}</call><|im_end|>',
    "forgets": '<|calls|><|call|>add\n{"a": 2, "b": 2}<|/call|><|/calls|></s>',
    "channels": ' to=add<|channel|>commentary<|message|>{"a": 2, "b": 2}<|call|>',
    "quoted": "<call>adda:2b:2</call><wait>",
}


@pytest.mark.parametrize("name", CALLED)
def test_a_call_is_trained_to_the_end_of_its_turn(name: str) -> None:
    assert trained(renderer(name), row(CALL)) == [CALLED[name]]
    empty = Message("assistant", "", tool_calls=(ToolCall("now", "{}"),))
    expected = CALLED[name].replace("add", "now").replace('{"a": 2, "b": 2}', "{}").replace("a:2b:2", "")
    assert trained(renderer(name), row(empty)) == [expected]


@pytest.mark.parametrize("name", ["thinking", "forgets", "quoted"])
def test_calls_results_and_answers_as_the_finished_conversation_shows_them(name: str) -> None:
    found = runs(renderer(name, earlier_turns="as-shown"), row(CALL, RESULT, DONE))
    between = {
        "thinking": "\n<|im_start|>user\n<result>4</result><|im_end|>\n<|im_start|>assistant\n",
        "forgets": "<|out|>4<|/out|><|assistant|>",
        "quoted": "<turn>tool\n4<end>\n<turn>assistant\n",
    }
    call = CALLED[name].removeprefix("<think>\n\n</think>\n\n")  # that template shows the block before the last turn
    last = {
        "thinking": "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
        "forgets": "It is 4.</s>",
        "quoted": "It is 4.<end>",
    }
    assert found[1:] == [(True, call), (False, between[name]), (True, last[name])]


def test_words_beside_calls_and_several_calls() -> None:
    calls = tuple(ToolCall("add", f'{{"a": {i}}}') for i in (1, 2))
    both = Message("assistant", "Let me see.", tool_calls=calls)
    call = '<call>{"name": "add", "arguments": {"a": %d}}</call>'
    expected = f"<think>\n\n</think>\n\nLet me see.\n{call % 1}\n{call % 2}<|im_end|>"
    assert trained(renderer("thinking"), row(both)) == [expected]
    # Words of a call that look like the end of the turn do not end it.
    sly = Message("assistant", "a<|im_end|>b", tool_calls=(ToolCall("add", '{"a": "<|im_end|>\\n"}'),))
    expected = (
        "<think>\n\n</think>\n\na<|im_end|>b\n"
        '<call>{"name": "add", "arguments": {"a": "<|im_end|>\\n"}}</call><|im_end|>'
    )
    assert trained(renderer("thinking"), row(sly)) == [expected]


def test_an_answer_that_is_not_the_last_may_end_otherwise() -> None:
    final, shown = "<|channel|>final<|message|>It is 4.", renderer("channels", earlier_turns="as-shown")
    assert trained(shown, row(DONE, ASKED, DONE)) == [
        f"{final}<|end|>",
        f"{final}<|return|>",
    ]


@pytest.mark.parametrize("tool", [ADD, BARE])
def test_tools_are_shown(tool: str) -> None:
    text = runs(renderer("thinking"), row(DONE, tools=(tool,)))[0][1]
    assert text.startswith(
        '<|im_start|>system\nFunctions:\n{"name": "add", "parameters": {"type": "object"}}<|im_end|>'
    )
    (prompt,) = renderer("thinking").prompts([row(DONE, tools=(tool,))])
    assert not isinstance(prompt, Problem) and len(prompt) > 60


def test_what_a_template_does_not_show_is_refused() -> None:
    assert "the tools" in problem(renderer("chatml"), row(DONE, tools=(ADD,)))
    assert "a tool call" in problem(renderer("chatml"), row(CALL))
    assert "a tool call" in problem(renderer("chatml"), row(DONE, prompt=(ASKED, CALL, RESULT)))
    assert "System role not supported" in problem(renderer("strict"), row(DONE, prompt=(Message("system", "x"), ASKED)))
    silent = small_tokenizer()
    silent.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert "the system turn" in problem(Renderer(silent), row(DONE, prompt=(Message("system", "x"), ASKED)))
    assert "is not JSON" in problem(renderer("thinking"), row(DONE, tools=("{",)))
    assert "--chat-template" in problem(renderer("chatml"), row(DONE, tools=(ADD,)))
    (found,) = renderer("chatml").prompts([row(DONE, tools=(ADD,))])
    assert isinstance(found, Problem) and "the tools" in found.what


def test_one_row_refused_costs_no_other() -> None:
    rows = [row(DONE), row(CALL), row(DONE)]
    found = list(renderer("chatml").render_all(rows))
    assert [isinstance(x, Rendered) for x in found] == [True, False, True]


THOUGHT = Message("assistant", "It is 4.", reasoning="2 and 2.")
INLINE = Message("assistant", "<think>\n2 and 2.\n</think>\n\nIt is 4.")


@pytest.mark.parametrize("turn", [THOUGHT, INLINE])
def test_reasoning_is_trained_behind_the_generation_prompt(turn: Message) -> None:
    r = renderer("thinking")
    assert trained(r, row(turn)) == ["<think>\n2 and 2.\n</think>\n\nIt is 4.<|im_end|>"]
    # What has no reasoning shows an empty block, which is the model's to write.
    assert trained(r, row(turn), 1) == ["<think>\n\n</think>\n\nno idea<|im_end|>"]
    assert not r.warnings
    # With thinking switched off the block stands in the prompt already.
    r = renderer("thinking", variables={"enable_thinking": False})
    assert trained(r, row(DONE)) == ["It is 4.<|im_end|>"] and not r.warnings
    assert runs(r, row(turn))[1:] == [(True, "2 and 2.\n</think>\n\nIt is 4.<|im_end|>")]
    assert r.warnings == {ELSEWHERE: [1]}


def test_reasoning_stripped() -> None:
    for turn in (THOUGHT, INLINE):
        for name in ("thinking", "chatml", "forgets"):
            r = renderer(name, reasoning="strip")
            stripped, plain = (trained(r, row(t, prompt=(ASKED, t, ASKED))) for t in (turn, DONE))
            assert stripped == plain and r.warnings[STRIPPED] == [1]
    r = renderer("thinking", reasoning="strip")
    (found,) = r.render_all([row(Message("assistant", "<think>only this"))])
    assert isinstance(found, Problem) and found.kind == "empty response"
    (found,) = r.render_all([row(Message("assistant", "<think>\nx\n</think>\n\n"))])
    assert isinstance(found, Problem) and found.kind == "empty response"


def test_reasoning_without_a_place_is_written_into_the_answer() -> None:
    r = renderer("chatml")
    assert trained(r, row(THOUGHT)) == trained(r, row(INLINE)) == [INLINE.content + "<|im_end|>"]
    assert r.warnings == {NO_FIELD: []}


def test_reasoning_that_a_template_drops_is_refused_or_counted() -> None:
    for turn in (THOUGHT, INLINE):
        # `forgets` removes it from every answer; it stands where the generation prompt opens a block for it.
        assert runs(renderer("forgets"), row(turn))[-1] == (True, "2 and 2.\n</think>\n\nIt is 4.</s>")
        shown = renderer("forgets", earlier_turns="as-shown")
        assert "--reasoning strip" in problem(shown, row(turn))
        assert trained(renderer("forgets", reasoning="strip"), row(turn)) == ["It is 4.</s>"]
        # That of an earlier answer of the response is dropped by design, and said.
        r = renderer("thinking", earlier_turns="as-shown")
        assert trained(r, row(turn, ASKED, DONE)) == [
            "It is 4.<|im_end|>",
            "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
        ]
        assert r.warnings == {EARLIER_REASONING: [1]}
    channels = renderer("channels")
    expected = (
        "<|channel|>analysis<|message|>2 and 2.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )
    assert trained(channels, row(THOUGHT)) == [expected]


def test_turns_that_are_not_to_be_learned() -> None:
    quiet = Message("assistant", "Hm.", trained=False)
    r = renderer("chatml")
    found = runs(r, row(quiet, ASKED, DONE))
    assert [text for on, text in found if on] == ["It is 4.<|im_end|>"]
    assert found[0][1].endswith("Hm.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    # What stands behind the last turn that is learned is not kept.
    assert [on for on, _ in runs(r, row(DONE, ASKED, quiet))] == [False, True]
    assert "no assistant turn to train" in problem(r, row(quiet))


def test_content_in_parts_and_arguments_as_text() -> None:
    assert trained(renderer("parts"), row(DONE)) == ["It is 4.<|im_end|>"]
    # `forgets` adds arguments to text, which an object cannot be; the others print objects in their own way.
    assert '{"a": 2, "b": 2}' in trained(renderer("forgets"), row(CALL))[0]


def test_variables() -> None:
    with pytest.raises(ConfigError, match="never reads enable_thinkin; did you mean enable_thinking\\?"):
        renderer("thinking", variables={"enable_thinkin": True})
    with pytest.raises(ConfigError, match="never reads date; it reads none"):
        renderer("chatml", variables={"date": "today"})
    with pytest.raises(ConfigError, match="messages is filled in by prefopt"):
        renderer("chatml", variables={"messages": []})
