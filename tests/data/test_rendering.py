"""Options of rendering: what a file and NAME=VALUE say, and which cache keys they make."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from data.templates import CHATML, TEMPLATES
from prefopt.config.data import RenderOptions
from prefopt.data.chat.render import DATED, NO_BOS, Renderer
from prefopt.data.chat.template import Rendering, parse_variables, read_template
from prefopt.data.tokenizer import tokenizer_digest
from prefopt.data.validate import Problem
from prefopt.errors import ConfigError, ModelError
from prefopt.records import Comparison, Message

PAIR = Comparison.pair([Message("user", "q")], chosen="yes", rejected="no", row=1)


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_from_options(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jinja", "\ufeff" + CHATML)
    options = RenderOptions(chat_template=file, template_variables=["a=1", "b=x y"], reasoning="strip")
    rendering = Rendering.from_options(options, 99)
    day = "2026-01-01"
    assert replace(rendering, date=day) == Rendering(99, True, CHATML, {"a": 1, "b": "x y"}, "strip", date=day)
    assert pickle.loads(pickle.dumps(rendering)) == rendering
    config = write(tmp_path / "tokenizer_config.json", json.dumps({"chat_template": CHATML}))
    assert read_template(config) == CHATML


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "absent.jinja", "No such file"),
        (b"\xff\xfe{{", "t.jinja", "is not UTF-8 (byte 1)"),
        (" \n", "t.jinja", "is empty"),
        ("{{ a }}\n{% for m in messages %}", "t.jinja", "Jinja template: line 2: "),
        ("{{ a }}\n\n{% fro m in messages %}", "t.jinja", "line 3: Encountered unknown tag 'fro'"),
        ("{{ a | nope }}", "t.jinja", "No filter named 'nope'"),
        ("{", "t.json", "line 1 column"),
        ('{"chat_template": 1}', "t.json", "holds no text chat_template"),
    ],
)
def test_templates_that_cannot_be_read(tmp_path: Path, content: str | bytes | None, name: str, message: str) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(ConfigError) as caught:
        read_template(str(tmp_path / name))
    assert str(caught.value).startswith(f"--chat-template {tmp_path / name}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder; name the file in it"):
        read_template(str(tmp_path))


def test_variables() -> None:
    given = ["a=false", "b=False", "c=None", "d=1.5", "e=[1]", 'f="x"', "g=x=y", "h=", "i=NaN", "j= 2 "]
    values = [False, False, None, 1.5, [1], "x", "x=y", "", "NaN", 2]
    assert parse_variables(given) == dict(zip("abcdefghij", values, strict=True))
    for given, message in (
        (["enable_thinking"], "should be NAME=VALUE"),
        (["1=2"], "should be NAME=VALUE"),
        (["a=1", "a=2"], "gives a twice"),
        (["tools=[]"], "tools is filled in by prefopt"),
        (["bos_token=<s>"], "bos_token is filled in by prefopt"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_variables(given)
    with pytest.raises(ConfigError, match="plain values"):
        Rendering(variables={"a": object()})


def test_digest_covers_everything_that_changes_tokens() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHATML
    one = Rendering(512, variables={}, date="2026-01-01")
    digests = [Renderer(tokenizer, one).digest()]
    changed: list[dict[str, Any]] = [
        {"max_length": 256},
        {"add_eos": False},
        {"reasoning": "strip"},
        {"chat_template": CHATML + " "},
        {"chat_template": CHATML + "{{ x }}", "variables": {"x": 1}},
        {"chat_template": CHATML + "{{ x }}", "variables": {"x": 2}},
    ]
    digests += [Renderer(tokenizer, replace(one, **c)).digest() for c in changed]
    for change in ("chat_template", "eos_token", "split_special_tokens", "added"):
        other = copy.deepcopy(tokenizer)
        if change == "added":
            other.add_tokens(["zz"])
        else:
            setattr(other, change, {"chat_template": CHATML + "!", "eos_token": "<s>"}.get(change, True))
        digests.append(Renderer(other, one).digest())
    digests.append(Renderer(with_merge(CHATML), one).digest())
    assert len(set(digests)) == len(digests)
    # What changes nothing: another day, a length that the tokenizer was asked for once.
    other = copy.deepcopy(tokenizer)
    other("a", truncation=True, max_length=3)
    assert Renderer(other, replace(one, date="2026-01-02")).digest() == digests[0]


def with_merge(template: str) -> Any:
    tokenizer = small_tokenizer([("a", "b")])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.slow
def test_digest_is_the_same_in_every_process(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys; from prefopt.data.tokenizer import load_tokenizer; from prefopt.data.chat.render import Renderer;"
        "print(Renderer(load_tokenizer(sys.argv[1])).digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1 and tokenizer_digest(small_tokenizer()) == tokenizer_digest(small_tokenizer())


def test_date_counts_where_the_template_shows_it() -> None:
    tokenizer = small_tokenizer()
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
    tokenizer.chat_template = dated + "{{ date_string }}" + CHATML
    may, june = Rendering(date="2026-05-01"), Rendering(date="2026-06-01")
    assert Renderer(tokenizer, may).digest() != Renderer(tokenizer, june).digest()
    (prompt,) = Renderer(tokenizer, may).prompts([PAIR])
    assert not isinstance(prompt, Problem) and tokenizer.decode(prompt.tolist()).startswith("01 May<|im_start|>")
    fixed = {"date_string": "01 May"}
    one, other = (Renderer(tokenizer, replace(r, variables=fixed)) for r in (may, june))
    assert one.digest() == other.digest()
    for renderer, said in ((Renderer(tokenizer, may), True), (one, False)):
        renderer.render(PAIR)
        assert (DATED in renderer.warnings) == said


def test_a_chat_template_without_bos_is_said(stories: Any) -> None:
    renderer = Renderer(stories, Rendering(chat_template=CHATML))
    renderer.render(PAIR)
    assert NO_BOS in renderer.warnings
    renderer = Renderer(stories, Rendering(chat_template="{{ bos_token }}" + CHATML))
    renderer.render(PAIR)
    assert NO_BOS not in renderer.warnings and renderer.template == "{{ bos_token }}" + CHATML


def test_the_model_carries_variables_as_defaults() -> None:
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ x.a }}|{{ y }}|{{ z }}|"
    macro = "{% macro f() %}{{ x['b'][1] }}{% endmacro %}{{ f() }}{% if w %}w{% else %}-{% endif %}"
    variables = {"x": {"a": "'\"\\\n{{ é }}%}", "b": [1, 2.5]}, "y": None, "z": True, "w": False}
    for start in ("", "\n", "\n\n", "x\n"):
        tokenizer = small_tokenizer()
        tokenizer.chat_template = start + shown + macro
        renderer = Renderer(tokenizer, Rendering(variables=variables))
        (prompt,) = renderer.prompts([PAIR])
        assert not isinstance(prompt, Problem)
        trained_on = tokenizer.decode(prompt.tolist())
        assert trained_on == f"{start}q|'\"\\\n{{{{ é }}}}%}}|None|True|2.5-"
        tokenizer.chat_template = renderer.template
        # Other readers of Jinja know only its own spelling.
        assert all(f"= {word} %}}" in renderer.template for word in ("none", "true", "false"))
        asked = [{"role": "user", "content": "q"}]
        assert tokenizer.apply_chat_template(asked, tokenize=False) == trained_on
        assert tokenizer.apply_chat_template(asked, tokenize=False, w=True) == trained_on[:-1] + "w"
        # So do runs of prefopt on the trained model, and give the same tokens.
        (again,) = Renderer(tokenizer).prompts([PAIR])
        (other,) = Renderer(tokenizer, Rendering(variables={"w": True})).prompts([PAIR])
        assert not isinstance(again, Problem) and not isinstance(other, Problem)
        assert again.tolist() == prompt.tolist() and tokenizer.decode(other.tolist()) == trained_on[:-1] + "w"


def test_several_templates_of_one_tokenizer() -> None:
    tokenizer = small_tokenizer(marks=TEMPLATES["thinking"].marks, eos_token="<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TEMPLATES["thinking"].text}
    tools = ('{"name": "f"}',)
    (plain, tooled) = Renderer(tokenizer).prompts([PAIR, replace(PAIR, tools=tools)])
    assert not isinstance(plain, Problem) and not isinstance(tooled, Problem)
    assert "Functions:" not in tokenizer.decode(plain.tolist()) and "Functions:" in tokenizer.decode(tooled.tolist())
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(ModelError, match="give one with --chat-template"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, Rendering(chat_template=CHATML)).template == CHATML
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ModelError, match="Jinja: line 1"):
        Renderer(tokenizer)


def test_warnings_name_their_rows() -> None:
    rows = [replace(PAIR, row=i, prompt=(Message("user", "</s>" if i % 2 else "q"),)) for i in range(1, 40)]
    whole = Renderer(small_tokenizer())
    list(whole.render_all(rows))
    assert "20 rows (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...)" in "\n".join(whole.notes)
    # A warning about all rows comes again after the warnings were taken.
    whole.warnings.clear()
    list(whole.render_all(rows[1:2]))
    assert list(whole.warnings.values()) == [[]]
