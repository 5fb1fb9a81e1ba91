"""``prefopt sample``, from prompts to a file that the data room reads: invariance, going on, refusals, every option."""

from __future__ import annotations

import dataclasses
import gzip
import json
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.config.sample import SampleConfig
from prefopt.data.comparisons import read_comparisons
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ConfigError
from prefopt.generate import model_io
from prefopt.generate.sample_file import FREE
from prefopt.generate.sampler import Sample, group_of
from prefopt.generate.vllm import VllmSampler
from prefopt.model.adapter import new_lora
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, response_sums
from train.small import start, write_model, write_rows

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
TEXTS: list[dict[str, Any]] = [
    {"prompt": text, "id": n} for n, text in enumerate(["k", "lmk ", "mmmmmm", "k", "a longer prompt ", "é", "q", "zz"])
]
CHATS: list[dict[str, Any]] = [
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
    {"prompt": [{"role": "user", "content": "hello there"}]},
]
QUICK = {"max_new_tokens": 12, "dtype": "float64", "device": "cpu", "progress": "none"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a chat template."""
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with one, whose turns end with another token than EOS."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    write_model(folder, seed=1)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(model: str, prompts: Any, output: Path, **options: Any) -> list[str]:
    given = {"model": model, "output": str(output), **QUICK, **options}
    words = [f"--{n.replace('_', '-')}={str(v).lower() if isinstance(v, bool) else v}" for n, v in given.items()]
    return ["sample", *words, "--prompts", *map(str, prompts if isinstance(prompts, list) else [prompts])]


def sample(model: str, prompts: Any, output: Path, **options: Any) -> list[dict[str, Any]]:
    assert main(arguments(model, prompts, output, **options)) == 0
    return read(output)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_rows_hold_what_was_drawn_and_the_data_room_reads_them(base: str, tmp_path: Path) -> None:
    rows = sample(base, write_rows(tmp_path / "p.jsonl", TEXTS), tmp_path / "s.jsonl", num=3, batch_size=5)
    tokenizer = load_tokenizer(base)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in TEXTS]
    assert [row["source_row"] for row in rows] == list(range(1, 9)) and [row["id"] for row in rows] == list(range(8))
    scorer = Scorer(load_model(base, dtype=torch.float64, device=torch.device("cpu")))
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        samples = []
        for text, ids, tokens, finish in zip(
            row["responses"], row["token_ids"], row["tokens"], row["finish"], strict=True
        ):
            assert len(ids) == tokens <= 12 and (finish == "stop") == (ids[-1] == 1) and 1 not in ids[:-1]
            assert text == tokenizer.decode([i for i in ids if i != 1])
            samples.append(Sample(np.array(ids, np.int32), np.zeros(tokens), np.zeros(tokens), False))
        batch = pack([group_of(prompt, samples)], scorer.layout)
        with torch.no_grad():
            sums = response_sums(scorer(batch), batch)
        assert sums.tolist() == pytest.approx(row["logprobs"], abs=1e-5)
        assert row["sampling_logprobs"] == row["logprobs"]
    assert {f for row in rows for f in row["finish"]} == {"stop", "length"}
    found = read_comparisons(tmp_path / "s.jsonl")
    assert found.layout == "canonical" and not found.problems
    for comparison, row in zip(found.comparisons, rows, strict=True):
        assert [r.text for r in comparison.responses] == row["responses"] and comparison.text
        assert comparison.prompt[0].content == row["prompt"] and not comparison.tiers
    # Equal prompts draw different samples.
    assert rows[0]["token_ids"] != rows[3]["token_ids"]


def test_conversations_are_rendered_and_end_at_the_templates_token(chat: str, tmp_path: Path) -> None:
    rows = sample(chat, write_rows(tmp_path / "p.jsonl", CHATS), tmp_path / "s.jsonl", num=40, max_new_tokens=40)
    ends = {ids[-1] for row in rows for ids in row["token_ids"] if len(ids) < 40}
    assert ends == {1, 3}  # EOS, and <|im_end|>
    comparison = read_comparisons(tmp_path / "s.jsonl").comparisons[0]
    assert [m.role for m in comparison.prompt] == ["system", "user"] and not comparison.text
    for row in rows:
        assert all(side[0]["role"] == "assistant" for side in row["responses"])
        assert all(side[0]["content"] == side[0]["content"].strip() for side in row["responses"])


def test_lines_of_text_files(base: str, chat: str, tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_bytes("\ufeffone\r\n\n  two \nthree".encode())
    for model, option, text in (
        (base, "auto", True),
        (chat, "auto", False),
        (chat, "text", True),
        (base, "user", False),
    ):
        rows = sample(model, lines, tmp_path / f"{Path(model).name}-{option}.jsonl", lines=option)
        prompts = [row["prompt"] if text else row["prompt"][0]["content"] for row in rows]
        assert prompts == ["one", "  two ", "three"] and [row["source_row"] for row in rows] == [1, 3, 4]


def test_lines_may_be_compressed(base: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert [row["prompt"] for row in sample(base, tmp_path / "p.txt.gz", tmp_path / "s.jsonl")] == ["one", "two"]


def test_names_objects_and_the_command_draw_the_same(base: str, tmp_path: Path) -> None:
    rows = sample(base, write_rows(tmp_path / "p.jsonl", TEXTS), tmp_path / "s.jsonl", num=2)
    named = prefopt.sample(base, tmp_path / "p.jsonl", num=2, **QUICK)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    attention = model.config._attn_implementation
    options = {"max_new_tokens": 12, "progress": "none"}
    given = prefopt.sample(model, TEXTS, tokenizer=AutoTokenizer.from_pretrained(base), num=2, **options)
    assert named.rows == rows and named.output is None and model.config._attn_implementation == attention
    drawn = ("prompt", "responses", "token_ids", "finish", "logprobs")
    assert [{n: row[n] for n in drawn} for row in given.rows] == [{n: row[n] for n in drawn} for row in rows]
    assert (given.prompts, given.samples, given.tokens) == (8, 16, sum(sum(row["tokens"]) for row in rows))
    assert given.mismatch is not None and given.mismatch.largest < 1e-6 and given.mismatch.tokens == given.tokens
    assert given.finished == sum(row["finish"].count("stop") for row in rows) / 16
    written = prefopt.sample(base, tmp_path / "p.jsonl", num=2, output=tmp_path / "py.jsonl", **QUICK)
    assert written.rows == [] and read(tmp_path / "py.jsonl") == rows


def test_batches_order_and_company_change_nothing(base: str, tmp_path: Path) -> None:
    rows = sample(base, write_rows(tmp_path / "p.jsonl", TEXTS), tmp_path / "s.jsonl", num=3, batch_size=64)
    for size in (1, 4, 7):
        again = sample(base, tmp_path / "p.jsonl", tmp_path / f"s{size}.jsonl", num=3, batch_size=size)
        assert [row["token_ids"] for row in again] == [row["token_ids"] for row in rows]
        np.testing.assert_allclose([r["logprobs"] for r in again], [r["logprobs"] for r in rows], atol=2e-6)
    some = [TEXTS[i] for i in (5, 0, 2)]
    fewer = sample(base, write_rows(tmp_path / "q.jsonl", some), tmp_path / "t.jsonl", num=2)
    assert [row["token_ids"] for row in fewer] == [rows[i]["token_ids"][:2] for i in (5, 0, 2)]


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over 60 prompts in ten windows."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "p.jsonl", [{"prompt": "k" * (n % 7 + 1) + str(n)} for n in range(60)])
    sample(base, folder / "p.jsonl", folder / "s.jsonl", **MANY)
    return folder


MANY = {"num": 2, "batch_size": 3, "dtype": "float32"}


def killed(whole: Path, cut: Path, size: int) -> dict[str, Any]:
    """What a run leaves that is killed after so many bytes: rows, and a record that counts those of batches before."""
    cut.write_bytes((whole / "s.jsonl").read_bytes()[:size])
    record: dict[str, Any] = json.loads((whole / "s.jsonl.run.json").read_text())
    del record["results"]
    lines = cut.read_bytes().splitlines(keepends=True)
    counted = lines[: max(0, len(lines) - 2)]
    return record | {"written": {"rows": len(counted), "digests": record["written"]["digests"][: 16 * len(counted)]}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda lines: [*lines[:3], lines[3].replace(b'"finish"', b'"Finish"'), *lines[4:]],
            "has a row 4 that is not what was written",
        ),
        (lambda lines: [*lines[:3], *lines[4:]], "has a row 4 that is not"),
        (lambda lines: lines[:-1], "holds 59 of the 60 rows"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "has a row 1 that is not"),
        (lambda lines: [*lines, lines[-1]], "holds more rows than were written"),
    ],
    ids=["altered", "one is gone", "the last is gone", "reordered", "one is there twice"],
)
def test_rows_that_were_changed_are_not_gone_on_with(
    change: Any, told: str, base: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join(change((whole / "s.jsonl").read_bytes().splitlines(keepends=True))))
    (tmp_path / "s.jsonl.run.json").write_bytes((whole / "s.jsonl.run.json").read_bytes())
    before = path.read_bytes()
    refused(arguments(base, whole / "p.jsonl", path, **MANY, resume=True), told, capsys)
    assert path.read_bytes() == before


def test_kept_samples_are_verified(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path))
    for name in ("0" * 20, "1" * 20):
        folder = tmp_path / "samples" / name
        folder.mkdir(parents=True)
        for file in ("s.jsonl", "s.jsonl.run.json"):
            (folder / file.replace("s.jsonl", "samples.jsonl")).write_bytes((whole / file).read_bytes())
    assert main(["cache", "verify"]) == 0
    spoilt = tmp_path / "samples" / ("1" * 20)
    text = (spoilt / "samples.jsonl").read_bytes()
    (spoilt / "samples.jsonl").write_bytes(text[:100] + b"#" + text[101:])
    assert main(["cache", "verify"]) == 1
    assert "has a row 1 that is not what was written" in capsys.readouterr().out
    assert main(["cache", "verify", "--repair"]) == 0 and not spoilt.exists()
    assert (tmp_path / "samples" / ("0" * 20)).exists() and main(["cache", "verify"]) == 0


@pytest.mark.parametrize("part", [0.0, 0.01, 0.33, 0.5, 0.999])
def test_a_file_cut_off_anywhere_is_gone_on_with_to_the_same_bytes(
    part: float, base: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (whole / "s.jsonl").read_bytes()
    cut = tmp_path / "s.jsonl"
    record = killed(whole, cut, int(part * len(data)))
    (tmp_path / "s.jsonl.run.json").write_text(json.dumps(record))
    words = arguments(base, whole / "p.jsonl", cut, **MANY)
    refused(words, "exists; continue it with --resume", capsys)
    assert main([*words, "--resume", "--progress=plain"][:-1]) == 0
    assert cut.read_bytes() == data and not (tmp_path / "s.jsonl.lock").exists()
    assert json.loads((tmp_path / "s.jsonl.run.json").read_text())["status"] == "finished"
    assert main([*words, "--resume"]) == 0 and cut.read_bytes() == data


def test_a_row_that_nobody_counted_is_drawn_again(
    base: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row of the right prompt with another answer, added by hand where a run was stopped."""
    data, cut = (whole / "s.jsonl").read_bytes(), tmp_path / "s.jsonl"
    record = killed(whole, cut, 4000)
    counted = record["written"]["rows"]
    lines = data.splitlines(keepends=True)
    added = json.loads(lines[counted]) | {"responses": ["mine", "mine"]}
    cut.write_bytes(b"".join(lines[:counted]) + json.dumps(added).encode() + b"\n")
    (tmp_path / "s.jsonl.run.json").write_text(json.dumps(record))
    assert main(arguments(base, whole / "p.jsonl", cut, **MANY, resume=True, progress="plain")) == 0
    assert f"after the first {counted}" in capsys.readouterr().out and cut.read_bytes() == data


def test_samples_of_an_earlier_version_are_said_to_be_unchecked(
    base: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, path = (whole / "s.jsonl").read_bytes(), tmp_path / "s.jsonl"
    words = arguments(base, whole / "p.jsonl", path, **MANY, resume=True, progress="plain")
    for size in (4000, len(data)):
        record = killed(whole, path, size)
        del record["written"]
        (tmp_path / "s.jsonl.run.json").write_text(json.dumps(record))
        assert main(words) == 0 and path.read_bytes() == data
        assert "its rows cannot be checked" in capsys.readouterr().out
        assert main(words) == 0 and "cannot be checked" not in capsys.readouterr().out


def test_a_resume_that_is_not_the_same_run_is_refused(
    base: str, chat: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, beside = tmp_path / "s.jsonl", tmp_path / "s.jsonl.run.json"
    record = killed(whole, half, 4000)
    beside.write_text(json.dumps(record))
    go_on = {**MANY, "resume": True}
    prompts = whole / "p.jsonl"
    refused(arguments(base, prompts, half, **{**go_on, "temperature": 0.5}), "--temperature was 1.0 and is 0.5", capsys)
    refused(arguments(base, prompts, half, **{**go_on, "seed": 1}), "--seed was 0 and is 1", capsys)
    beside.write_text(json.dumps({**record, "model": "other"}))
    refused(arguments(base, prompts, half, **go_on), "the model changed", capsys)
    beside.write_text(json.dumps({**record, "prompts": "other"}))
    refused(arguments(base, prompts, half, **go_on), "the prompts changed", capsys)
    for damage in ("{", "[]", "{}", "[" * 100_000, json.dumps({**record, "rows": "many"})):
        beside.write_text(damage)
        refused(arguments(base, prompts, half, **go_on), "s.jsonl.run.json cannot be read", capsys)
    beside.unlink()
    refused(arguments(base, prompts, half, **go_on), "s.jsonl.run.json cannot be read", capsys)
    beside.write_text(json.dumps(record))
    kept = half.read_bytes()
    half.write_bytes(b'{"prompt": "x"}\n' + kept)
    refused(arguments(base, prompts, half, **go_on), "has a row 1 that is not what was written", capsys)
    del record["written"]  # as of an earlier version
    beside.write_text(json.dumps(record))
    refused(arguments(base, prompts, half, **go_on), "row 1 of", capsys)
    half.write_bytes(kept)
    with FileLock(tmp_path / "s.jsonl.lock"):
        refused(arguments(base, prompts, half, **go_on), "is being written by another process", capsys)
    assert half.read_bytes() == kept


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"prompt": ""}\n{"prompt": "a"}\n', "1 of 2 rows cannot be used: empty prompt: 1 (row 1"),
        ("p.jsonl", json.dumps({"prompt": "x" * 200}) + "\n", "prompt too long: 1 (row 1; has 20"),
        ("p.txt", "\n \n", "p.txt: is empty"),
        ("p.txt", "", "p.txt: is empty"),
        ("p.jsonl", "{", "p.jsonl"),
        ("none.jsonl", None, "no such file"),
    ],
)
def test_bad_prompts_are_one_line(
    name: str, content: str | None, said: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    refused(arguments(base, tmp_path / name, tmp_path / "s.jsonl"), said, capsys)
    assert not (tmp_path / "s.jsonl").exists()


def test_bytes_that_are_no_text_are_one_line(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, said in ((b"ab\xff\n", "is not UTF-8 (byte 3)"), (gzip.compress(b"abc" * 99)[:-9], "p.txt")):
        (tmp_path / "p.txt").write_bytes(data)
        refused(arguments(base, tmp_path / "p.txt", tmp_path / "s.jsonl"), said, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_new_tokens": 13}, "--min-new-tokens 13 is more than --max-new-tokens 12"),
        ({"temperature": 0, "num": 2}, "draws the same sample 2 times"),
        ({"temperature": 0, "top_p": 0.5}, "--top-p and --top-k do nothing"),
        ({"temperature": -1}, "--temperature is -1.0"),
        ({"engine": "vllm", "batch_size": 4}, "--batch-size does nothing with --engine vllm"),
        ({"engine": "vllm"}, "--engine vllm needs vllm"),
        ({"adapter": "none"}, "none"),
        ({"device": "gpu"}, "--device is 'gpu'"),
    ],
)
def test_contradictions_are_one_line(
    options: dict[str, Any],
    said: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    (tmp_path / "p.txt").write_text("a\n")
    refused(arguments(base, tmp_path / "p.txt", tmp_path / "s.jsonl", **options), said, capsys)


def test_what_python_gets_wrong_is_said(base: str) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with pytest.raises(ConfigError, match=r"prefopt.sample\(model, tokenizer=tokenizer"):
        prefopt.sample(model, TEXTS)
    with pytest.raises(ConfigError, match="dtype is for a model named by its folder"):
        prefopt.sample(model, TEXTS, tokenizer=tokenizer, dtype="float32")
    with pytest.raises(ConfigError, match="engine vllm loads a folder"):
        prefopt.sample(model, TEXTS, tokenizer=tokenizer, engine="vllm")
    with pytest.raises(ConfigError, match="--resume does nothing without --output"):
        prefopt.sample(base, TEXTS, resume=True)
    assert main(["sample", "--model", base, "--prompts", "x.txt"]) == 2


def test_rows_that_cannot_be_used_are_skipped_and_counted(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}, {"prompt": "x" * 300}]
    options = {"on_bad_row": "skip", "progress": "plain", "max_new_tokens": 126}
    found = sample(base, write_rows(tmp_path / "p.jsonl", rows), tmp_path / "s.jsonl", **options)
    shown = capsys.readouterr().out
    assert [row["source_row"] for row in found] == [1, 3] and "4 read, 2 kept, 2 refused" in shown
    assert "sampler and scorer differ by" in shown and "samples end at </s>" in shown
    assert "leave room for fewer than 126" not in shown
    sample(base, tmp_path / "p.jsonl", tmp_path / "t.jsonl", **{**options, "max_new_tokens": 128})
    assert "2 of 2 leave room for fewer than 128 tokens in the model's context of 128" in capsys.readouterr().out


def test_vllm_writes_the_same_kind_of_file(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from generate.test_vllm import FakeVllm, install

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    fake = FakeVllm(model)
    install(monkeypatch, fake)
    left: list[bool] = []
    leave = VllmSampler.__exit__
    monkeypatch.setattr(VllmSampler, "__exit__", lambda self, *e: left.append(True) or leave(self, *e))
    rows = sample(base, write_rows(tmp_path / "p.jsonl", TEXTS), tmp_path / "s.jsonl", num=2, engine="vllm")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in TEXTS] and left == [True]
    assert {"model": base, "dtype": "float64", "max_model_len": 128}.items() <= fake.engine.items()
    record = json.loads((tmp_path / "s.jsonl.run.json").read_text())
    assert record["results"]["sampler_scorer_difference"]["largest"] < 1e-5


def test_vllm_does_not_quantise_what_an_adapter_was_trained_on(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads the base by itself: the run said that it was quantised, and its samples were of another model."""
    from generate.test_vllm import FakeVllm, install

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    new_lora(model, rank=4, alpha=8, dropout=0.0, targets=None).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora/run.json").write_text(json.dumps({"options": {"quantise": "nf4"}}))
    monkeypatch.setattr(model_io, "check_quantisable", lambda *given: None)  # which needs bitsandbytes
    install(monkeypatch, FakeVllm(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)))
    given: dict[str, Any] = {"adapter": str(tmp_path / "lora"), "engine": "vllm", "num": 2}
    prompts = write_rows(tmp_path / "p.jsonl", TEXTS)
    with pytest.raises(ConfigError, match=r"trained on one in nf4: add --quantise none, or leave --engine out"):
        prefopt.sample(base, prompts, device="cpu", dtype="float64", progress="none", max_new_tokens=4, **given)
    with pytest.raises(ConfigError, match="--quantise does nothing with --engine vllm"):
        SampleConfig(model=base, quantise="nf4", engine="vllm", prompts=[prompts])
    rows = sample(base, prompts, tmp_path / "s.jsonl", quantise="none", **given)
    assert len(rows) == len(TEXTS)
    record = json.loads((tmp_path / "s.jsonl.run.json").read_text())
    assert record["results"]["sampler_scorer_difference"]["largest"] < 1e-5


# -- every option does something -------------------------------------------------------------------------------


def _ids(rows: list[dict[str, Any]]) -> Any:
    return [row["token_ids"] for row in rows]


@dataclasses.dataclass
class Bench:
    """Two runs that differ in one option."""

    base: str
    chat: str
    folder: Path

    def run(self, model: str | None = None, prompts: Any = None, **options: Any) -> list[dict[str, Any]]:
        name = f"s{len(list(self.folder.iterdir()))}.jsonl"
        prompts = prompts or write_rows(self.folder / f"p-{name}", TEXTS)
        return sample(model or self.base, prompts, self.folder / name, **options)

    def differs(self, **options: Any) -> bool:
        return _ids(self.run(**options)) != _ids(self.run())


def _adapter(b: Bench) -> bool:
    made: Any = new_lora(AutoModelForCausalLM.from_pretrained(b.base), rank=4, alpha=8, dropout=0.0, targets=None)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    made.save_pretrained(b.folder / "lora")
    return b.differs(adapter=b.folder / "lora")


def _chat_template(b: Bench) -> bool:
    other = b.folder / "t.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if x is defined %}{{ x }}{% endif %}")
    rows = write_rows(b.folder / "chats.jsonl", CHATS)
    one = b.run(b.chat, rows, chat_template=other)
    two = b.run(b.chat, rows, chat_template=other, template_variables="x=y")
    return len({json.dumps(_ids(r)) for r in (one, two, b.run(b.chat, rows))}) == 3


def _format(b: Bench) -> bool:
    rows = write_rows(b.folder / "f.jsonl", [{"question": "k"}, {"question": "l"}])
    found = b.run(prompts=rows, columns="prompt=question", format="prompt-text")
    return [row["prompt"] for row in found] == ["k", "l"]


def _header(b: Bench) -> bool:
    rows = b.folder / "bare.csv"
    rows.write_text("k\nl\n")
    found = b.run(prompts=rows, columns="prompt=1", header="none")
    return [row["prompt"] for row in found] == ["k", "l"]


def _threads(b: Bench) -> bool:
    b.run(threads=1)
    return torch.get_num_threads() == 1


def _quantise(b: Bench) -> bool:
    if find_spec("bitsandbytes") is None:
        prompts = write_rows(b.folder / "p.jsonl", TEXTS)
        return main(arguments(b.base, prompts, b.folder / "none.jsonl", quantise="int8")) == 2
    one, two = (b.run(dtype="float32", **more) for more in ({"quantise": "int8"}, {}))
    return bool([r["logprobs"] for r in one] != [r["logprobs"] for r in two])


OPTIONS: dict[str, Callable[[Bench], bool]] = {
    "model": lambda b: _ids(b.run(b.chat)) != _ids(b.run()),
    "adapter": _adapter,
    "prompts": lambda b: len(b.run(prompts=[write_rows(b.folder / f"{n}.jsonl", TEXTS[n:]) for n in (1, 5)])) == 10,
    "lines": lambda b: True,  # test_lines_of_text_files
    "on_bad_row": lambda b: True,  # test_rows_that_cannot_be_used_are_skipped_and_counted
    "format": _format,
    "columns": _format,
    "header": _header,
    "label_means": lambda b: True,  # what a row says is read as for every verb: tests/data/layouts/test_columns.py
    "ignore_columns": lambda b: True,
    "picture_folder": lambda b: True,  # tests/data/test_pictures.py
    "chat_template": _chat_template,
    "template_variables": _chat_template,
    "num": lambda b: all(len(row["responses"]) == 4 for row in b.run(num=4)),
    "max_new_tokens": lambda b: max(t for row in b.run(max_new_tokens=3, num=9) for t in row["tokens"]) == 3,
    "min_new_tokens": lambda b: min(t for row in b.run(min_new_tokens=9, num=9) for t in row["tokens"]) >= 9,
    "temperature": lambda b: b.differs(temperature=3.0),
    "top_p": lambda b: b.differs(top_p=0.3),
    "top_k": lambda b: _ids(b.run(top_k=1)) == _ids(b.run(temperature=0)),
    "seed": lambda b: b.differs(seed=4),
    "best_of": lambda b: b.differs(best_of=3, reward="length"),
    "reward": lambda b: True,  # test_every_sample_is_the_best_of_its_draws
    "engine": lambda b: True,  # test_vllm_writes_the_same_kind_of_file
    "output": lambda b: True,  # every test
    "resume": lambda b: True,  # test_a_file_cut_off_anywhere_...
    "progress": lambda b: True,  # test_rows_that_cannot_be_used_are_skipped_and_counted reads plain lines
    "batch_size": lambda b: b.run(batch_size=3) and _record(b)["rows"] == 3,
    "dtype": lambda b: [r["logprobs"] for r in b.run(dtype="bfloat16")] != [r["logprobs"] for r in b.run()],
    "device": lambda b: main(arguments(b.base, "x.txt", b.folder / "none.jsonl", device="cuda:7")) == 2,
    "threads": _threads,
    "quantise": _quantise,
}


def _record(b: Bench) -> dict[str, Any]:
    newest = max(b.folder.glob("*.run.json"), key=lambda p: p.stat().st_mtime_ns)
    found: dict[str, Any] = json.loads(newest.read_text())
    return found


def test_there_is_an_entry_for_every_option() -> None:
    assert set(OPTIONS) == {f.name for f in dataclasses.fields(SampleConfig)} and set(OPTIONS) > FREE


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_does_something(name: str, base: str, chat: str, tmp_path: Path) -> None:
    assert OPTIONS[name](Bench(base, chat, tmp_path))


# -- killed and stopped ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(base: str, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "k" * (n % 7 + 1) + str(n)} for n in range(120)])
    options = {"num": 3, "batch_size": 4, "max_new_tokens": 40, "dtype": "float32", "threads": 1}
    sample(base, prompts, tmp_path / "whole.jsonl", **options)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    parts, log = tmp_path / "parts.jsonl", tmp_path / "log"
    words = [*arguments(base, prompts, parts, **options), "--resume"]
    sizes = []
    for n in range(3):
        process = start(words, log)
        more = (parts.stat().st_size if parts.exists() else 0) + 1 + n * 3000
        deadline = time.monotonic() + 120
        while process.is_alive() and (not parts.exists() or parts.stat().st_size < more):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -9, log.read_text()
        sizes.append(parts.stat().st_size)
    assert sizes == sorted(sizes) and 0 < sizes[0] < sizes[-1] < len(whole)
    process = start(words, log)
    process.join(200)
    assert process.exitcode == 0 and parts.read_bytes() == whole, log.read_text()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_written(base: str, tmp_path: Path) -> None:
    import os

    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "k" * (n % 7 + 1) + str(n)} for n in range(120)])
    options = {"num": 3, "batch_size": 4, "max_new_tokens": 40, "dtype": "float32", "threads": 1}
    words, log = arguments(base, prompts, tmp_path / "s.jsonl", **options), tmp_path / "log"
    process = start(words, log)
    while process.is_alive() and not (tmp_path / "s.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and "--resume" in log.read_text()
    assert main([*words, "--resume"]) == 0 and len(read(tmp_path / "s.jsonl")) == 120
