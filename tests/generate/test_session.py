"""``prefopt chat`` from its options, typed to through a pipe: every one does something, contradictions are refused."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from generate.fake_server import serving
from prefopt.cli import main
from prefopt.config.sample import ChatConfig
from prefopt.model.adapter import new_lora
from train.small import write_model

QUICK = ["--seed=1", "--max-new-tokens=8", "--device=cpu", "--dtype=float64"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models ``one`` and ``two``, and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "one")
    write_model(folder / "two", seed=1)
    made: Any = new_lora(AutoModelForCausalLM.from_pretrained(folder / "one"), rank=4, alpha=8, dropout=0, targets=None)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    made.save_pretrained(folder / "lora")
    return folder


@dataclasses.dataclass
class Bench:
    """Sessions over a pipe; ``said`` is what was shown of one, ``answers`` the same less what tells the settings."""

    place: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def said(self, *words: str, typed: str = "hi\n", model: str | None = "one", quick: list[str] | None = None) -> str:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        self.capsys.readouterr()
        given = [] if model is None else [f"--model={self.place / model}"]
        given += (
            [w for w in QUICK if w.split("=")[0] not in {x.split("=")[0] for x in words}] if quick is None else quick
        )
        assert main(["chat", *given, *words]) == 0
        return self.capsys.readouterr().out

    def answers(self, *words: str, **options: Any) -> str:
        return self.said(*words, **options).partition("Ctrl-D ends\n")[2]

    def differs(self, *words: str, **options: Any) -> bool:
        return self.answers(*words, **options) != self.answers(**options)


@pytest.fixture
def bench(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(place, tmp_path, monkeypatch, capsys)


def _saved(b: Bench, *words: str, typed: str = "hi\n") -> list[dict[str, Any]]:
    path = b.folder / "saved.jsonl"
    path.unlink(missing_ok=True)
    b.said(*words, typed=f"{typed}/save {path}\n")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _template(b: Bench) -> bool:
    (b.folder / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if x is defined %}{{ x }}{% endif %}"
    )
    given = f"--chat-template={b.folder / 't.jinja'}"
    return len({b.answers(), b.answers(given), b.answers(given, "--template-variables=x=abc")}) == 3


def _url(b: Bench) -> bool:
    b.monkeypatch.setenv("KEY", "abc")
    with serving(models=["m", "n"]) as server:
        shown = b.said(f"--url={server.url}", "--url-model=n", "--url-key=KEY", model=None, quick=["--temperature=0.5"])
        _, headers, body = server.requests[0]
    sent = {"model": "n", "temperature": 0.5, "max_tokens": 512}
    return "Hello wörld" in shown and headers["Authorization"] == "Bearer abc" and sent.items() <= body.items()


def _blind(b: Bench) -> bool:
    shown = b.said(f"--against={b.place / 'two'}", "--blind", "--votes=mine.jsonl", typed="hi\na\n")
    row = json.loads((b.folder / "mine.jsonl").read_text("utf-8"))
    b.said(f"--against={b.place / 'two'}", "--blind", typed="hi\nb\n")
    return row["tiers"] == [[0], [1]] and "[A]" in shown and (b.folder / "votes.jsonl").exists()


def _tokens(b: Bench) -> bool:
    return len(b.answers("--max-new-tokens=1")) < len(b.answers("--max-new-tokens=30"))


def _threads(b: Bench) -> bool:
    b.said("--threads=1")
    return torch.get_num_threads() == 1


def _quantise(b: Bench) -> bool:
    if find_spec("bitsandbytes") is None:
        return main(["chat", f"--model={b.place / 'one'}", "--quantise=nf4"]) == 2
    return b.answers("--dtype=float32", "--quantise=nf4") != b.answers("--dtype=float32")


OPTIONS: dict[str, Callable[[Bench], bool]] = {
    "model": lambda b: b.answers() != b.answers(model="two"),
    "adapter": lambda b: b.differs(f"--adapter={b.place / 'lora'}"),
    "against": lambda b: (
        [r["model"] for r in _saved(b, f"--against={b.place / 'two'}")] == [str(b.place / n) for n in ("one", "two")]
    ),
    "against_adapter": lambda b: (
        [r["model"] for r in _saved(b, f"--against-adapter={b.place / 'lora'}")]
        == [str(b.place / "one"), f"{b.place / 'one'} with lora"]
    ),
    "url": _url,
    "url_model": _url,
    "url_key": _url,
    "blind": _blind,
    "votes": _blind,
    "system": lambda b: _saved(b, "--system=be")[0]["messages"][0] == {"role": "system", "content": "be"},
    "complete": lambda b: _saved(b, "--complete")[0]["text"].startswith("hi"),
    "max_new_tokens": _tokens,
    "temperature": lambda b: b.differs("--temperature=5"),
    "top_p": lambda b: b.differs("--top-p=0.05"),
    "top_k": lambda b: b.answers("--top-k=1") == b.answers("--temperature=0"),
    "seed": lambda b: b.differs("--seed=2") and b.said() == b.said(),
    "chat_template": _template,
    "template_variables": _template,
    "dtype": lambda b: "float64 on cpu" in b.said() and "float32 on cpu" in b.said("--dtype=float32"),
    "device": lambda b: main(["chat", "--model=x", "--device=cuda:7"]) == 2,
    "threads": _threads,
    "quantise": _quantise,
}


def test_there_is_an_entry_for_every_option() -> None:
    assert set(OPTIONS) == {f.name for f in dataclasses.fields(ChatConfig)}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_does_something(name: str, bench: Bench) -> None:
    assert OPTIONS[name](bench)


def test_settings_are_those_of_the_generation_config_unless_given(bench: Bench) -> None:
    folder = bench.folder / "m"
    write_model(folder)
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=1).save_pretrained(folder)
    shown = bench.said(model=str(folder))
    assert "temperature 0.6, top-p 0.9 as its generation_config.json says" in shown
    assert "temperature 0.7, top-p 0.9" in bench.said("--temperature=0.7", model=str(folder))
    assert "temperature 1" in bench.said()


def test_two_models_of_one_name_are_told_apart(bench: Bench) -> None:
    shown = bench.said(f"--against={bench.place / 'one'}")
    assert all(re.search(rf"\[{re.escape(str(bench.place / 'one'))} \({n}\)\]", shown) for n in (1, 2))


REFUSED: list[tuple[list[str], str]] = [
    ([], "--model is missing"),
    (["--model=m", "--against=n", "--url=http://x"], "--against and --url both name the second model"),
    (["--url=http://x", "--against=n"], "--against and --url both name"),
    (["--against=n"], "--model is missing"),
    (["--url=http://x", "--adapter=a"], "--adapter does nothing without --model"),
    (["--model=m", "--url-model=n"], "--url-model does nothing without --url"),
    (["--model=m", "--url-key=K"], "--url-key does nothing without --url"),
    (["--model=m", "--blind"], "--blind needs two models"),
    (["--model=m", "--against=n", "--votes=v.jsonl"], "--votes does nothing without --blind"),
    (["--model=m", "--complete", "--system=s"], "--complete continues text"),
    (["--model=m", "--temperature=-1"], "--temperature is -1.0"),
    (["--model=m", "--device=gpu"], "--device is 'gpu'"),
    (["--model=./none"], "./none: no such folder"),
    (["--url=localhost:8000", "--url-model=m"], "should begin with http"),
    (["--url=http://x", "--url-model=m", "--url-key=NO_SUCH_KEY"], "no such environment variable"),
]


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in REFUSED:
        assert main(["chat", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
