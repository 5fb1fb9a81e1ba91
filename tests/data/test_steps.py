"""Trajectories of several turns are trained as they were generated, whatever a template makes of earlier turns.

The oracle knows nothing of spans: it renders with ``apply_chat_template`` of transformers. What a turn was generated
behind is the conversation before it with the generation prompt. What was generated there is what the same turn shows in
a conversation whose earlier answers held no reasoning, behind that conversation's own generation prompt.

Templates of real models are read from the folder that PREFOPT_CHAT_TEMPLATES names (``*.jinja``), and from the shared
data; the others are written for the tests, in the manner of those models.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.small import small_tokenizer
from data.templates import TEMPLATES
from prefopt.data.chat.render import STEPS_DROPPED, Rendered, Renderer
from prefopt.data.chat.spans import ELSEWHERE, STEPS
from prefopt.data.chat.template import EARLIER_REASONING, Rendering
from prefopt.data.group import show
from prefopt.data.table import GroupTable
from prefopt.data.validate import Problem
from prefopt.records import Comparison, Message, Response, ToolCall

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ADD = json.dumps({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}})


def ask(words: str) -> Message:
    return Message("user", words)


def say(words: str, thought: str | None = None) -> Message:
    return Message("assistant", words, reasoning=thought)


def call(a: int, thought: str | None = None) -> Message:
    made = ToolCall("add", json.dumps({"a": a, "b": 2}), f"call0000{a}")
    return Message("assistant", "", reasoning=thought, tool_calls=(made,))


def result(a: int) -> Message:
    return Message("tool", str(a + 2), tool_call_id=f"call0000{a}", name="add")


TRAJECTORIES: dict[str, tuple[Message, ...]] = {
    "answers": (ask("Hello."), say("Hi."), ask("Bye."), say("See you.")),
    "thoughts": (ask("Hello."), say("Hi.", "A greeting."), ask("Bye."), say("See you.", "A farewell.")),
    "calls": (ask("Add 1, 2 and 2."), call(1), result(1), call(3), result(3), say("It is 5.")),
    "calls with thoughts": (
        *(ask("Add 1, 2 and 2."), call(1, "One first."), result(1)),
        *(call(3, "Then three."), result(3), say("It is 5.", "That is all.")),
    ),
    "two questions": (
        *(ask("Hello."), say("Hi.", "A greeting."), ask("Add 1 and 2."), call(1, "One call.")),
        *(result(1), say("Three.", "So it is three."), ask("Bye."), say("See you.", "A farewell.")),
    ),
}
# gpt-oss: what was thought before a call is shown until an answer follows, and answers end otherwise while they last.
HARMONY = """
{%- if tools %}{{- '<|start|>tools<|message|>' }}{% for t in tools %}{{ t.function.name }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
    {%- set answered = namespace(later=false) %}
    {%- for n in messages[loop.index:] %}
        {%- if n.role == 'assistant' and not n.tool_calls %}{% set answered.later = true %}{% endif %}
    {%- endfor %}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking and not answered.later %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '<|start|>assistant to=' + call.function.name + '<|channel|>commentary<|message|>' }}
            {{- (call.function.arguments | tojson) + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
            {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
        {%- endfor %}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
# GLM: the mark of the next speaker ends a turn.
SPEAKERS = """<sop>{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}
{%- set at = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\\n<think>' + (m.reasoning_content or '' if loop.index0 > at.asked else '') + '</think>' }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}
    {%- else %}{{- ('<|user|>' if m.role == 'user' else '<|system|>') + '\\n' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
# Mistral: marks around instructions, calls and results; words between.
BRACKETS = """{{- bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {%- endfor %}{{- ']' + eos_token }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Qwen3.5: the generation prompt opens the block, which answers since the last question show.
OPENED = (
    TEMPLATES["thinking"]
    .text.replace("(loop.last or reasoning)", "true")
    .replace("{%- if enable_thinking is defined", "{{- '<think>\\n' }}{%- if enable_thinking is defined")
)
WRITTEN: dict[str, tuple[str, str, str]] = {  # template, EOS, BOS
    "Qwen3": (TEMPLATES["thinking"].text, "<|im_end|>", ""),
    "Qwen3.5": (OPENED, "<|im_end|>", ""),
    "Llama 3": (TEMPLATES["headers"].text, "<|eot|>", "<|begin|>"),
    "Mistral": (BRACKETS, "</s>", "<s>"),
    "DeepSeek": (TEMPLATES["forgets"].text, "</s>", "<s>"),
    "GLM": (SPEAKERS, "<|endoftext|>", ""),
    "gpt-oss": (HARMONY, "<|return|>", ""),
    "Gemma": (TEMPLATES["strict"].text, "<end>", "<bos>"),
    "Gemma 4": (TEMPLATES["quoted"].text, "<end>", ""),
}
# Steps of each trajectory. What a template cannot show is refused.
EXPECTED: dict[str, dict[str, int]] = {
    "Qwen3": {"answers": 2, "thoughts": 2, "calls": 3, "calls with thoughts": 1, "two questions": 3},
    "Qwen3.5": {"answers": 2, "thoughts": 2, "calls": 1, "calls with thoughts": 1, "two questions": 3},
    "Llama 3": {"answers": 1, "thoughts": 1, "calls": 1},
    "Mistral": {"answers": 1, "thoughts": 1, "calls": 1},
    "DeepSeek": {"answers": 1, "thoughts": 2, "calls": 1, "calls with thoughts": 1, "two questions": 3},
    "GLM": {"answers": 1, "thoughts": 2, "calls": 1, "calls with thoughts": 1, "two questions": 3},
    "gpt-oss": {"answers": 2, "thoughts": 2, "calls": 1, "calls with thoughts": 1, "two questions": 3},
    "Gemma": {"answers": 1, "thoughts": 1},
    "Gemma 4": {"answers": 1, "thoughts": 1, "calls": 1, "calls with thoughts": 1, "two questions": 1},
}
MARK = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z_]+\]|</?s>|<sop>|<seed:[a-z]+>|</?(?:turn|end|bos|wait|call|q)>"
)


def renderer(text: str, eos: str, bos: str = "", **options: Any) -> Renderer:
    marks = sorted({*MARK.findall(text), eos, *filter(None, [bos])})
    special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer = small_tokenizer(marks=marks, **special)
    tokenizer.chat_template = text
    return Renderer(tokenizer, Rendering(**options))


def comparison(r: Renderer, turns: tuple[Message, ...]) -> Comparison:
    """The turns behind the first as a response; with tools where the template shows them before anything else."""
    shows = "tools" in r._template.sources[1].partition("for m")[0]
    tools = (ADD,) if shows and any(m.tool_calls for m in turns) else ()
    return Comparison(turns[:1], (Response(turns[1:]),), (), row=1, tools=tools)


def shown(r: Renderer, c: Comparison, turns: tuple[Message, ...], *, generation: bool) -> str:
    """The turns as transformers shows them."""
    messages = [r._template._message(turn) for turn in turns]
    tools = [json.loads(tool) for tool in c.tools] or None
    how = {"tokenize": False, "add_generation_prompt": generation}
    return str(r.tokenizer.apply_chat_template(messages, tools=tools, **how))


def generated(r: Renderer, c: Comparison, turns: tuple[Message, ...], before: str) -> str | None:
    """What the last of the turns was, behind ``before``, with what the template puts behind its end; None where the
    template changes the turn before it, too."""
    bare = (*(replace(m, reasoning=None) for m in turns[:-1]), turns[-1])
    whole, start = shown(r, c, bare, generation=False), shown(r, c, bare[:-1], generation=True)
    if whole.startswith(start):
        return whole[len(start) :]
    if not before.endswith("<think>\n") or not turns[-1].reasoning:
        return None
    silent = shown(r, c, (*bare[:-1], replace(turns[-1], reasoning=None)), generation=False)
    return f"{turns[-1].reasoning}\n</think>\n\n" + silent[silent.rindex(turns[-1].content) :]


def decode(r: Renderer, ids: Any) -> str:
    return str(r.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check(r: Renderer, c: Comparison, rendered: Rendered) -> None:
    """Every assistant turn is trained once, behind what it was generated behind; nothing else is."""
    turns = (*c.prompt, *c.responses[0].messages)
    runs = []
    for ids, trained in rendered.group.sequences(0):
        edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
        runs += [(decode(r, ids[:a]), decode(r, ids[:b])) for a, b in edges]
    answers = [j for j, m in enumerate(turns) if m.role == "assistant"]
    assert len(runs) == len(answers)
    for j, (context, whole) in zip(answers, runs, strict=True):
        before = shown(r, c, turns[:j], generation=True)
        assert context == before
        said, expected = whole.removeprefix(context), generated(r, c, turns[: j + 1], before)
        assert all(words in said for words in (turns[j].content, turns[j].reasoning or ""))
        if expected is None:
            continue
        # The turn is trained to its end-of-turn token, or to the one that must end it where the template shows none.
        rest = expected.removeprefix(said)
        if rest == expected:
            end = said.removeprefix(expected)
            assert said.startswith(expected) and end in {*MARK.findall(end), r.tokenizer.eos_token}
        else:
            assert not rest.strip() and said.endswith(tuple(r._spans._marks))


@pytest.mark.parametrize("name", WRITTEN)
def test_turns_are_trained_as_they_were_generated(name: str) -> None:
    found = {}
    for kind, turns in TRAJECTORIES.items():
        r = renderer(*WRITTEN[name])
        c = comparison(r, turns)
        (rendered,) = r.render_all([c])
        if isinstance(rendered, Problem):
            assert rendered.kind == "chat template"
            continue
        found[kind] = rendered.group.count
        assert (STEPS in r.warnings) == (found[kind] > 1) and EARLIER_REASONING not in r.warnings
        if ELSEWHERE not in r.warnings:
            check(r, c, rendered)
        # DeepSeek's answers without reasoning stand behind something else than its generation prompt.
        assert (ELSEWHERE in r.warnings) == (name == "DeepSeek" and kind in ("answers", "calls"))
    assert found == EXPECTED[name]


# Families whose special tokens MARK knows, and that show at least some trajectory behind their own generation prompt.
KNOWN = re.compile("qwen|llama-?3|mistral|deepseek|glm|gpt-?oss|gemma", re.IGNORECASE)


def real_templates() -> list[Path]:
    folders = [
        os.environ.get("PREFOPT_CHAT_TEMPLATES", ""),
        f"{os.environ.get('PREFOPT_SHARED', '')}/data/chat_templates",
    ]
    patterns = ("*.jinja", "*.tokenizer_config.json")
    files = [file for folder in folders if folder for p in patterns for file in sorted(Path(folder).glob(p))]
    return [file for file in files if KNOWN.search(file.name)]


@pytest.mark.skipif(not real_templates(), reason="needs templates in PREFOPT_CHAT_TEMPLATES or in the shared data")
def test_templates_of_real_models() -> None:
    checked: dict[str, int] = {}
    for file in real_templates():
        text = file.read_text("utf-8")
        text = json.loads(text)["chat_template"] if file.suffix == ".json" else text
        ends = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|return|>", "<end_of_turn>", "<turn|>", "</s>")
        r = renderer(text, next((end for end in ends if end in text), "</s>"), "<s>")
        found = KNOWN.search(file.name)
        assert found
        family = found[0].lower().replace("-", "")
        checked.setdefault(family, 0)
        for turns in TRAJECTORIES.values():
            r.warnings.clear()
            (rendered,) = r.render_all([c := comparison(r, turns)])
            if not isinstance(rendered, Problem) and ELSEWHERE not in r.warnings:
                check(r, c, rendered)
                checked[family] += 1
    assert all(checked.values()), checked


def test_as_shown_is_one_sequence() -> None:
    r = renderer(*WRITTEN["Qwen3"], earlier_turns="as-shown")
    (rendered,) = r.render_all([comparison(r, TRAJECTORIES["two questions"])])
    assert isinstance(rendered, Rendered) and rendered.group.count == 1
    assert STEPS not in r.warnings and r.warnings[EARLIER_REASONING] == [1]
    ids, trained = rendered.group.sequence(0)
    assert "A greeting." not in decode(r, ids) and "A farewell." in decode(r, ids[trained])


def test_steps_of_a_pair_share_its_prompt_and_are_named_where_rows_are_shown() -> None:
    r = renderer(*WRITTEN["Qwen3"])
    turns = TRAJECTORIES["thoughts"]
    other = (*turns[1:3], say("Good bye.", "A farewell."))
    c = Comparison(turns[:1], (Response(turns[1:]), Response(other)), ((0,), (1,)), row=1)
    (rendered,) = r.render_all([c])
    assert isinstance(rendered, Rendered)
    group = rendered.group
    assert [len(x.steps) for x in group.continuations] == [2, 2] and group.count == 4
    assert decode(r, group.prefix) == shown(r, c, turns[:1], generation=True)
    text = show(group, r.tokenizer)
    assert "chosen, step 1 of 2 (" in text and "rejected, step 2 of 2 (" in text
    assert text.count("⟦<think>↵A greeting.".replace("↵", "\n")) == 2
    (same,) = r.render_all([replace(c, responses=(c.responses[0], c.responses[0]))])
    assert isinstance(same, Problem) and same.kind == "identical responses"
    # The key of a response knows its steps: the same tokens in one sequence are another response.
    assert len({*GroupTable.of([group]).key_N.tolist()}) == 2


def test_steps_that_do_not_fit_are_counted() -> None:
    whole = renderer(*WRITTEN["Qwen3"])
    turns = TRAJECTORIES["thoughts"]
    c = comparison(whole, (*turns[:2], ask("Well then, it is time to go. Bye."), turns[3]))
    (rendered,) = whole.render_all([c])
    assert isinstance(rendered, Rendered)
    first, second = rendered.group.sequences(0)
    answer = int(np.argmax(second[1]))
    assert answer > len(first[0])
    for limit, steps, lost in ((answer + 1, 2, len(second[0]) - answer - 1), (answer, 1, len(second[0]))):
        r = renderer(*WRITTEN["Qwen3"], max_length=limit)
        (short,) = r.render_all([c])
        assert isinstance(short, Rendered)
        assert short.group.count == steps and short.responses_cut == (lost,)
        assert (STEPS_DROPPED in r.warnings) == (steps == 1)
        assert np.array_equal(short.group.sequences(0)[0][0], first[0])
