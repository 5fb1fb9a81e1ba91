"""Samples that are compared are drawn once: a judge that fails, or a kill, loses none of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import prefopt
from generate.fake_server import serving
from prefopt.cli import main
from prefopt.core.cache_folder import SAMPLES, sample_entries, samples_folder
from prefopt.errors import CacheError, RunError
from train.small import write_model, write_rows

QUICK: dict[str, Any] = {"dtype": "float32", "device": "cpu", "progress": "none", "max_new_tokens": 6}
WORDS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]


@pytest.fixture
def models(model: str, tmp_path: Path) -> tuple[str, str, str]:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"k{i}: "} for i in range(12)])
    return model, write_model(tmp_path / "other", seed=1), prompts


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts every call of the sampler is given, from now on."""
    from prefopt.generate.transformers_sampler import TransformersSampler

    calls: list[int] = []
    whole = TransformersSampler.sample

    def counted(self: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return whole(self, prompts, *args, **options)

    monkeypatch.setattr(TransformersSampler, "sample", counted)
    return calls


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(r)) for r in responses]


def test_a_judge_that_raises_loses_no_sample(models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = drawn(monkeypatch)

    def fails(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        raise ValueError("the judge fell over")

    with pytest.raises(RunError, match="fell over"):
        prefopt.compare(*models, judge=fails, **QUICK)
    assert sum(calls) == 24 and len(sample_entries()) == 2
    found = prefopt.compare(*models, judge=length, **QUICK)
    assert sum(calls) == 24, "nothing is drawn again"
    monkeypatch.setenv("PREFOPT_CACHE", str(Path(models[1]).parent / "another cache"))
    assert prefopt.compare(*models, judge=length, **QUICK).to_dict() == found.to_dict() and sum(calls) == 48


def test_a_server_that_dies_midway_is_gone_on_from(
    models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prefopt.generate.judged.PAUSE", 0.0)
    calls = drawn(monkeypatch)
    a, b, prompts = models
    words = ["compare", "--a", a, "--b", b, "--prompts", prompts, "--judge", "llm", "--judge-model", "big", *WORDS]
    from prefopt.generate.chat_model import RemoteChatModel

    whole, left = RemoteChatModel.answer, [9]

    def mortal(self: Any, asked: Any, attempt: int) -> Any:
        if not left[0]:
            raise RunError("http://localhost cannot be reached")
        left[0] -= 1
        return whole(self, asked, attempt)

    with serving() as server:
        server.pieces = ["[[tie]]"]
        with monkeypatch.context() as patch:
            patch.setattr(RemoteChatModel, "answer", mortal)
            assert main([*words, "--judge-url", server.url]) == 2
        said = capsys.readouterr().err
        assert "cannot be reached" in said and len(said.splitlines()) == 1
        asked, before = len(server.requests), sum(calls)
        assert asked >= 9 and before == 24
        assert main([*words, "--judge-url", server.url]) == 0
        assert sum(calls) == 24
        told = capsys.readouterr().out
        assert "9 answers came from the cache" in told and "12 prompts: won 0, tied 12, lost 0" in told


def test_a_kill_while_sampling_costs_what_was_not_written(
    models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefopt.generate.sample_file import SampleFile

    monkeypatch.setattr("prefopt.methods.sample.BATCHES", 1)
    from prefopt.generate.transformers_sampler import TransformersSampler

    monkeypatch.setattr(TransformersSampler, "estimate_rows", lambda *_: 4)
    calls = drawn(monkeypatch)
    whole, left = SampleFile.write, [2]

    def dies(self: Any, rows: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        whole(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleFile, "write", dies)
        prefopt.compare(*models, judge=length, **QUICK)
    (entry,) = sample_entries()
    assert len((entry / SAMPLES).read_text().splitlines()) == 8
    calls.clear()
    prefopt.compare(*models, judge=length, **QUICK)
    assert calls == [4, 4, 4, 4]


def test_other_models_prompts_and_options_are_other_samples(
    models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = drawn(monkeypatch)
    a, b, prompts = models
    for more, fresh in (({}, 24), ({}, 0), ({"seed": 1}, 24), ({"temperature": 0.5}, 24), ({"num": 2}, 24)):
        calls.clear()
        prefopt.compare(a, b, prompts, judge=length, **{**QUICK, **more})
        assert sum(calls) == fresh, more
    calls.clear()
    write_rows(Path(prompts), [{"prompt": f"m{i}: "} for i in range(12)])
    write_model(Path(b), seed=2)  # the same folder with other weights
    prefopt.compare(a, b, prompts, judge=length, **QUICK)
    assert sum(calls) == 24
    write_model(Path(b), seed=3)
    prefopt.compare(a, b, prompts, judge=length, **QUICK)
    assert sum(calls) == 36


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def more_stops(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 200))}))


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def other_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "k"}, "content": "m"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [more_stops, template, other_tokens])
def test_what_else_decides_answers_is_part_of_the_model(
    change: Callable[[Path], None], models: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and config.json stay as they were: the same folder answers otherwise, and is drawn from again."""
    a, b, _ = models
    turns = [{"prompt": [{"role": "user", "content": f"k{i}"}]} for i in range(12)]
    prompts = write_rows(Path(b).parent / "turns.jsonl", turns)
    before = prefopt.compare(a, b, prompts, judge=length, **QUICK)
    calls = drawn(monkeypatch)
    change(Path(b))
    after = prefopt.compare(a, b, prompts, judge=length, **QUICK)
    assert sum(calls) == 12
    assert [before.identities[m] == after.identities[m] for m in (a, b)] == [True, False]
    assert before.models[b] != after.models[b] and before.models[a] == after.models[a]
    with monkeypatch.context() as patch:  # and nothing that was kept stands in the way of a fresh start
        patch.setenv("PREFOPT_CACHE", str(Path(b).parent / "another cache"))
        assert prefopt.compare(a, b, prompts, judge=length, **QUICK).to_dict() == after.to_dict()


def test_samples_are_not_gone_on_with_where_something_else_ends_them(
    models: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, b, prompts = models
    words = ["sample", "--model", b, "--prompts", prompts, "--output", str(tmp_path / "o.jsonl"), *WORDS]
    assert main(words) == 0 and main([*words, "--resume"]) == 0
    more_stops(Path(b))
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    assert "what ends an answer changed since" in capsys.readouterr().err


def test_kept_samples_are_listed_and_removed(models: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    prefopt.compare(*models, judge=length, **QUICK)
    entry = sample_entries()[0]
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert f"{samples_folder()}: 2 sets of samples" in said and entry.name in said and models[1] in said
    assert main(["cache", "clear", "--space", entry.name]) == 0 and len(sample_entries()) == 1
    assert main(["cache", "clear"]) == 0 and not sample_entries()


def test_kept_samples_that_were_altered_are_refused(models: tuple[str, str, str]) -> None:
    prefopt.compare(*models, judge=length, **QUICK)
    path = sample_entries()[0] / SAMPLES
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["prompt"] += "?"
    write_rows(path, rows)
    with pytest.raises(CacheError, match=r"cache verify --repair"):
        prefopt.compare(*models, judge=length, **QUICK)
    assert main(["cache", "verify"]) == 1 and main(["cache", "verify", "--repair"]) == 0
    assert len(sample_entries()) == 1
    assert prefopt.compare(*models, judge=length, **QUICK)
