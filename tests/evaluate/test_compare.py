"""``prefopt compare``, from two models to a verdict: planted differences, refusals, every option."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from prefopt.cli import main
from prefopt.config.compare import CompareConfig
from prefopt.core.files import expanded
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.compare import run
from prefopt.evaluate.result import CompareResult
from prefopt.evaluate.samples import repetition, sampling_model
from train.small import write_model, write_rows

PROMPTS: list[dict[str, Any]] = [{"prompt": f"{'klm'[i % 3]}{i}: ", "kind": "ab"[i % 2]} for i in range(16)]
QUICK: dict[str, Any] = {"dtype": "float32", "device": "cpu", "progress": "none", "max_new_tokens": 8}


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_rows(tmp_path / "prompts.jsonl", PROMPTS)


def samples(path: Path, texts: list[list[str]], prompts: list[dict[str, Any]] = PROMPTS) -> str:
    """A file as prefopt sample writes it, but for tokens."""
    return write_rows(path, [row | {"responses": many} for row, many in zip(prompts, texts, strict=True)])


def compared(a: str, b: str, **options: Any) -> CompareResult:
    return run(CompareConfig(a=a, b=b, **{"judge": "length", "json": True, **options}))


def test_a_planted_difference_is_found_and_one_of_length_alone_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many: list[dict[str, Any]] = [{"prompt": f"p{i} ", "kind": "ab"[i % 2]} for i in range(120)]

    def texts(wins: float, words: int) -> list[list[str]]:
        return [[("good " if rng.random() < wins else "") + "w " * int(rng.integers(1, words))] for _ in many]

    best, worse = samples(tmp_path / "a.jsonl", texts(0.7, 9), many), samples(tmp_path / "b.jsonl", texts(0.3, 9), many)
    result = compared(best, worse, judge="regex:good", category="kind")
    (v,) = result.versus
    assert v.rate.rate is not None and v.rate.rate.low > 0.5 and v.rate.p is not None and v.rate.p < 0.01
    assert v.rate.wins + v.rate.ties + v.rate.losses == 120 and v.rate.needed is not None and v.rate.needed[0] < 120
    assert set(v.categories) == {"a", "b"} and all(c.prompts == 60 and c.rate for c in v.categories.values())
    longer = samples(tmp_path / "c.jsonl", texts(0.5, 30), many)
    (v,) = compared(longer, worse, judge="length").versus
    assert v.rate.rate is not None and v.rate.rate.low > 0.5
    assert v.equal_length is not None and v.equal_length.rate is not None and not v.equal_length.rate.excludes(0.5)
    turned = compared(worse, best, judge="regex:good").versus[0].rate
    assert turned.rate is not None and turned.wins == result.versus[0].rate.losses


def test_lines_are_one_kind_of_prompt_for_all_models(model: str, tmp_path: Path) -> None:
    """One model has a chat template, the other has none: both answer user turns."""
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] != 'user' }}{% endfor %}a"
    )
    (chat / "chat_template.jinja").write_text(template)
    lines = tmp_path / "prompts.txt"
    lines.write_text("k1\nk2\n")
    options: dict[str, Any] = {"prompts": [str(lines)], **QUICK}
    for one, two, turns in ((model, str(chat), True), (model, f"{model}/", False), (str(chat), f"{chat}/", True)):
        result = compared(one, two, output=str(tmp_path / f"{turns}{one == model}.jsonl"), **options)
        assert result.output is not None
        (first, _) = map(json.loads, result.output.read_text().splitlines())
        assert first["prompt"] == ([{"role": "user", "content": "k1"}] if turns else "k1")
        assert any("user's turns for all models" in note for note in result.notes) == (one != two.rstrip("/"))


def test_models_are_sampled_with_the_same_seed_and_told_about(
    model: str, other: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "k1: ", "chosen": "aeiou", "rejected": "xyz"}] * 3)
    out = tmp_path / "judged.jsonl"
    words = ["compare", "--a", model, "--b", other, "--prompts", prompts, "--judge", "length", "--reference", model]
    words += ["--held-out", held, "--num", "2", "--category", "kind", "--output", str(out)]
    words += [f"--{n.replace('_', '-')}={v}" for n, v in QUICK.items()]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert main([*words, "--json"]) == 2
    assert "judged.jsonl exists; name another file, or add --overwrite" in capsys.readouterr().err
    assert main([*words, "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    own, theirs = (result["models"][m] for m in (model, other))
    (v,) = result["versus"]
    assert f"won {v['rate']['wins']}, tied {v['rate']['ties']}, lost {v['rate']['losses']}" in said
    assert v["rate"]["wins"] + v["rate"]["ties"] + v["rate"]["losses"] == 32 and "KL to the reference" in said
    assert "a: 8 prompts, too few for a rate" in said
    assert own["distance"]["k1"]["mean"] == 0, "a model is its own reference"
    rows = prefopt.sample(other, prompts, num=2, **QUICK).rows
    reference = AutoModelForCausalLM.from_pretrained(model)
    ratios = []
    for row in rows:
        prompt = tokens_of(model, row["prompt"])
        for ids, logp in zip(row["token_ids"], row["logprobs"], strict=True):
            whole = torch.tensor([[*prompt, *ids]])
            with torch.no_grad():
                logits = reference(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
            at = logits[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])
            ratios.append(logp - float(at.sum()))
    k1 = np.array(ratios).reshape(-1, 2).mean(1)
    assert theirs["distance"]["k1"]["mean"] == pytest.approx(k1.mean(), abs=1e-3)
    assert theirs["distance"]["error"] == pytest.approx(k1.std(ddof=1) / 4, rel=1e-3)
    assert theirs["distance"]["k3"] == pytest.approx(np.mean(np.expm1(-np.array(ratios)) + ratios), rel=1e-3)
    tokens = [t for row in rows for t in row["tokens"]]
    assert theirs["tokens"] == pytest.approx(np.mean(tokens))
    assert theirs["entropy"] == pytest.approx(-sum(sum(r["logprobs"]) for r in rows) / sum(tokens))
    ids = torch.tensor([tokens_of(model, "k1: aeiou", end=True)])
    start = len(tokens_of(model, "k1: "))
    with torch.no_grad():
        logits = reference(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    nll = -logits[start - 1 : -1].gather(1, ids[0, start:, None]).mean()
    assert own["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4) and own["perplexity"] != theirs["perplexity"]
    judged = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(judged) == 32 and judged[0]["models"] == [model, other] and "token_ids" not in judged[0]
    # What was written is votes: counting them gives the same.
    (again,) = run(CompareConfig(votes=[str(out)])).versus
    turn = again.first != model
    wins, losses = (again.rate.losses, again.rate.wins) if turn else (again.rate.wins, again.rate.losses)
    assert (wins, again.rate.ties, losses) == (v["rate"]["wins"], v["rate"]["ties"], v["rate"]["losses"])


def tokens_of(model: str, text: str, *, end: bool = False) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if end else [])]


def test_three_models_are_put_on_one_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    many: list[dict[str, Any]] = [{"prompt": f"p{i} "} for i in range(80)]
    files = [
        samples(tmp_path / f"{name}.jsonl", [["w " * int(rng.integers(1, most))] for _ in many], many)
        for name, most in (("short", 6), ("middle", 9), ("long", 14))
    ]
    result = compared(files[0], files[1], others=[files[2]])
    assert len(result.versus) == 3
    found = [result.strengths[f].mean for f in files]
    assert found == sorted(found) and sum(found) == pytest.approx(0, abs=1e-9)
    assert result.strengths[files[2]].low > result.strengths[files[0]].high
    assert main(["compare", "--a", files[0], "--b", files[1], "--others", files[2], "--judge", "length"]) == 0
    said = capsys.readouterr().out
    assert said.index(f"]  {files[2]}") < said.index(f"]  {files[0]}") and "Bradley-Terry" in said


def test_the_kl_of_a_model_to_itself_is_zero_in_bfloat16(model: str, prompts: str, tmp_path: Path) -> None:
    """Drawn here, or read from a file whose record says which model drew it. Without the record the file's own numbers
    are used, and a note says so."""
    file = tmp_path / "drawn.jsonl"
    quick = {**QUICK, "dtype": "bfloat16"}
    prefopt.sample(model, prompts, output=str(file), num=2, **quick)
    given: dict[str, Any] = {"prompts": [prompts], "num": 2, "reference": model, **quick}
    here = compared(model, str(file), **given)
    for found in here.models.values():
        assert found.distance is not None
        assert (found.distance.k1.mean, found.distance.error, found.distance.k3) == (0.0, 0.0, 0.0)
    assert not here.notes
    (tmp_path / "drawn.jsonl.run.json").unlink()
    without = compared(model, str(file), **given)
    distance = without.models[str(file)].distance
    assert distance is not None and 0 < abs(distance.k1.mean) < 0.5
    assert len(without.notes) == 1 and "the model that drew it was not found" in without.notes[0]


def test_a_model_quantised_at_loading_is_found_by_the_record_of_its_samples(
    model: str, prompts: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    file = str(tmp_path / "drawn.jsonl")
    prefopt.sample(model, prompts, output=file, num=2, **QUICK, quantise="int8")
    result = compared(model, file, prompts=[prompts], num=2, reference=model, **QUICK)
    distance = result.models[file].distance
    assert not result.notes and distance is not None and distance.k3 > 0


@pytest.mark.parametrize("name", ["~/model", "prefopt:demo/tiny_imdb"])
def test_a_model_is_found_by_a_short_name_in_the_record_of_its_samples(
    name: str, model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    file = tmp_path / "drawn.jsonl"
    prefopt.sample(name, prompts, output=str(file), num=2, **QUICK)
    found = sampling_model(file, CompareConfig(a=str(file), b=str(file) + ".jsonl", judge="length"))
    assert found is not None and Path(found.source) == expanded(name)


def test_too_few_prompts_and_empty_answers_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = PROMPTS[:4]
    a = samples(tmp_path / "a.jsonl", [["x y"], ["x"], [""], ["z"]], few)
    b = samples(tmp_path / "b.jsonl", [["x"], ["  "], ["y"], ["z z"]], few)
    assert main(["compare", "--a", a, "--b", b, "--judge", "length"]) == 0
    said = capsys.readouterr().out
    assert "4 prompts: won 2, tied 0, lost 2" in said and "%" not in said.split("\n\n")[1]
    assert "2 decided without the judge" in said and "1 empty" in said


def test_what_does_not_compare_is_refused(tmp_path: Path, model: str) -> None:
    a = samples(tmp_path / "a.jsonl", [["x"]] * 16)
    others = [row | {"prompt": "another " if i == 4 else row["prompt"]} for i, row in enumerate(PROMPTS)]
    for texts, prompts, said in (
        ([["x"]] * 16, others, r"b\.jsonl, row 5: .*prompt"),
        ([["x"]] * 5, PROMPTS[:5], "16 prompts.* 5: "),
        ([["x", "y"]] * 16, PROMPTS, "has 2 samples, and .* 1: draw the same number"),
    ):
        b = samples(tmp_path / "b.jsonl", texts, prompts)
        with pytest.raises(DataError, match=said):
            compared(a, b)
    b = samples(tmp_path / "b.jsonl", [["y"]] * 16)
    for options, said in (
        ({"category": "colour"}, "--category colour: the prompt has no such column"),
        ({"reference": model}, "row 1: has no token ids"),
        ({"judge": "gsm8k"}, "--prompts is missing: --judge gsm8k reads the answers there"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            compared(a, b, **options)


FILES: dict[str, Any] = {"a": "a.jsonl", "b": "b.jsonl", "judge": "length"}
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"a": "m", "b": "n"}, "--judge is missing"),
    ({"a": "m", "judge": "length"}, "--b is missing"),
    ({"a": "m", "b": "n", "judge": "length"}, "--prompts is missing: m is to answer"),
    ({"a": "m", "b": "m", "judge": "length", "prompts": ["p"]}, "named twice"),
    ({"a": "m", "b": "n", "judge": "llm", "prompts": ["p"]}, "--judge llm needs --judge-url"),
    (
        {"a": "m", "b": "n", "judge": "length", "prompts": ["p"], "judge_model": "x"},
        "--judge-model belongs to --judge llm",
    ),
    (
        {"a": "m", "b": "n", "judge": "length", "prompts": ["p"], "reference": "r", "temperature": 0.5},
        "leave --temperature",
    ),
    ({"a": "m", "b": "n", "judge": "length", "prompts": ["p"], "temperature": 0.0, "num": 2}, "leave --num out"),
    ({"votes": ["v"], "a": "m"}, "--a: --votes counts existing votes"),
    *(
        ({"votes": ["v"], **more}, "--votes counts existing votes")
        for more in (
            {"num": 3},
            {"temperature": 0.5},
            {"max_new_tokens": 3},
            {"on_bad_row": "skip"},
            {"held_out": ["h"]},
            {"overwrite": True},
            {"threads": 1},
            {"seed": 1},
        )
    ),
    ({**FILES, "prompts": ["nowhere.txt"]}, "--prompts are for models to answer"),
    ({**FILES, "held_out": ["nowhere.jsonl"]}, "--held-out measures models"),
    *(({**FILES, **more}, "configures sampling") for more in ({"num": 7}, {"max_new_tokens": 3})),
    ({**FILES, "temperature": 0.5}, "--temperature configures sampling"),
    *(
        ({**FILES, **more}, "is for prompts and held-out data")
        for more in ({"format": "canonical"}, {"columns": ["prompt=q"]}, {"on_bad_row": "skip"})
    ),
    *(
        ({**FILES, **more}, "is for running models")
        for more in ({"threads": 2}, {"device": "cpu"}, {"dtype": "float32"})
    ),
    ({**FILES, "overwrite": True}, "--overwrite does nothing without --output"),
]


def test_contradictions_are_refused_and_what_is_read_is_accepted() -> None:
    for options, said in OPTIONS:
        with pytest.raises(ConfigError, match=said):
            CompareConfig(**options)
    accepted: tuple[dict[str, Any], ...] = (
        {"judge": "gsm8k", "prompts": ["p"], "on_bad_row": "skip", "format": "canonical"},
        {"judge": "owner/reward", "device": "cpu", "threads": 1},
        {"judge": "implicit:m,n", "dtype": "float32"},
        {"reference": "r", "device": "cpu"},
        {"b": "model", "prompts": ["p"], "num": 7, "held_out": ["h"], "threads": 1},
    )
    for options in accepted:
        CompareConfig(**{**FILES, **options})


def test_gsm8k_reads_answers_for_files_and_says_which_prompts_have_none(tmp_path: Path) -> None:
    a, b = (samples(tmp_path / f"{n}.jsonl", [[f"it is {i * (n == 'a')}"] for i in range(16)]) for n in "ab")
    rows = [{"prompt": row["prompt"], "completion": f"so\n#### {i}"} for i, row in enumerate(PROMPTS)]
    how: dict[str, Any] = {"judge": "gsm8k", "prompts": [write_rows(tmp_path / "p.jsonl", rows)]}
    assert compared(a, b, **how).versus[0].rate.wins == 15
    write_rows(tmp_path / "p.jsonl", [*rows[:4], *rows[5:]])
    with pytest.raises(DataError, match="row 5: its prompt is not in --prompts"):
        compared(a, b, **how)
    bad = tmp_path / "p.jsonl"
    write_rows(bad, rows)
    bad.write_text(bad.read_text() + '{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(DataError, match=r"row 17: 1 of 17 rows cannot be used.*--on-bad-row skip"):
        compared(a, b, **how)
    assert compared(a, b, **how, on_bad_row="skip").notes == [
        "1 rows of the prompts were left out: they cannot be used"
    ]


def test_rows_that_ask_the_same_are_one_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty rows with one question, and the same answers as two rows of ten samples each."""
    asked = [{"prompt": "Say hello."}] * 20
    a = samples(tmp_path / "a.jsonl", [["hello there"]] * 20, asked)
    b = samples(tmp_path / "b.jsonl", [["hello"]] * 20, asked)
    assert main(["compare", "--a", a, "--b", b, "--judge", "length"]) == 0
    said = capsys.readouterr().out
    assert "20 rows ask 1 different prompt: rows" in said and "1 prompts: won 20, tied 0, lost 0" in said
    assert "is better" not in said

    rng = np.random.default_rng(2)
    words = ["w " * int(n) for n in rng.integers(1, 9, 4 * 48)]
    once = [{"prompt": f"p{i} "} for i in range(12)]
    apart = [row for row in once for _ in range(4)]
    found = []
    for name, many, num in (("once", once, 8), ("apart", apart, 2)):
        files = []
        for side, start in (("a", 0), ("b", 96)):
            texts = [words[start + i * num : start + (i + 1) * num] for i in range(len(many))]
            files.append(samples(tmp_path / f"{name}_{side}.jsonl", texts, many))
        found.append(compared(*files))
    (once_v,), (apart_v,) = (f.versus for f in found)
    assert once_v.rate == apart_v.rate and once_v.equal_length == apart_v.equal_length
    assert once_v.longer == apart_v.longer and once_v.rate.prompts == 12
    assert [[m.prompts for m in f.models.values()] for f in found] == [[12, 12], [12, 12]]
    assert not found[0].notes and found[1].notes[0].startswith("48 rows ask 12 different prompts")


def test_what_is_there_is_replaced_when_asked_and_what_is_read_never(tmp_path: Path) -> None:
    a, b = (samples(tmp_path / f"{n}.jsonl", [[n * 2 if n == "a" else n]] * 16) for n in "ab")
    before = Path(a).read_bytes()
    for output in (a, str(tmp_path / "." / "b.jsonl")):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="read by this comparison"):
                compared(a, b, output=output, overwrite=overwrite)
    asked = write_rows(tmp_path / "asked.jsonl", [{**row, "completion": "#### 1"} for row in PROMPTS])
    with pytest.raises(ConfigError, match="is read by this comparison"):
        compared(a, b, judge="gsm8k", prompts=[str(tmp_path / "ask*.jsonl")], output=asked, overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is a folder; name a file in it"):
            compared(a, b, output=str(tmp_path), overwrite=overwrite)
    kept = tmp_path / "kept.jsonl"
    kept.write_text("mine")
    with pytest.raises(RunError, match=r"kept\.jsonl exists.*--overwrite"):
        compared(a, b, output=str(kept))
    with pytest.raises(RunError, match="--overwrite"):
        prefopt.compare("m", "n", PROMPTS, judge="length", output=str(kept))
    assert kept.read_text() == "mine" and Path(a).read_bytes() == before
    found = compared(a, b, output=str(kept), overwrite=True)
    assert found.output_sha256 == hashlib.sha256(kept.read_bytes()).hexdigest() and len(kept.read_text()) > 100


def test_distances_count_prompts_not_rows(model: str, other: str, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"k{i % 3}: "} for i in range(6)])
    found = compared(model, other, prompts=[prompts], reference=model, **QUICK).models[other]
    assert found.distance is not None and (found.distance.k1.count, found.prompts, found.samples) == (3, 3, 6)


@pytest.mark.parametrize("bridge", [False, True])
def test_models_that_never_met_are_on_no_common_scale(
    bridge: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    met = [("A", "B"), ("C", "D"), *([("B", "C")] if bridge else [])]
    rows = [
        {"prompt": f"p{i}", "responses": ["x", "y"], "models": list(two), "tiers": [[i % 3 != 0], [i % 3 == 0]]}
        for two in met
        for i in range(20)
    ]
    rows = [row | {"tiers": [[int(k)] for (k,) in row["tiers"]]} for row in rows]
    votes = write_rows(tmp_path / "votes.jsonl", rows)
    assert main(["compare", "--votes", votes]) == 0
    said = capsys.readouterr().out
    assert ("strength (Bradley-Terry" in said) == bridge
    assert ("A, B; C, D" in said) != bridge


def test_of_a_model_that_never_lost_the_distance_is_not_claimed(tmp_path: Path) -> None:
    many: list[dict[str, Any]] = [{"prompt": f"p{i} "} for i in range(40)]
    files = [
        samples(tmp_path / f"{name}.jsonl", [["w " * (1 + (i * k) % 5 + more)] for i in range(40)], many)
        for name, k, more in (("long", 1, 9), ("x", 2, 0), ("y", 3, 0))
    ]
    found = compared(files[0], files[1], others=[files[2]])
    (note,) = found.notes
    assert f"{files[0]}; {files[1]}, {files[2]}" in note
    assert found.strengths == {}
    some = compared(files[1], files[2], others=[samples(tmp_path / "z.jsonl", [["w w"]] * 40, many)])
    assert some.notes == [] and len(some.strengths) == 3


@pytest.mark.parametrize("option", [{"num": 2}, {"max_new_tokens": 2}, {"temperature": 0.0}, {"seed": 3}])
def test_an_option_of_sampling_does_something(option: dict[str, Any], model: str, other: str, prompts: str) -> None:
    given: dict[str, Any] = {"prompts": [prompts], **QUICK}
    results = [compared(model, other, **{**given, **more}).models for more in ({}, option)]
    assert dataclasses.asdict(results[0][model]) != dataclasses.asdict(results[1][model])


def test_repetition_is_told_of_texts_with_and_without_spaces() -> None:
    assert repetition("the cat sat down the cat sat down") == pytest.approx(1 / 5)
    assert repetition("好的好的好的好的") > 0.5 and repetition("") == 0.0


def test_bad_rows_stop_a_comparison_or_are_counted(model: str, other: str, prompts: str, tmp_path: Path) -> None:
    rows = [{"prompt": "k1: ", "chosen": "aeiou", "rejected": "xyz"}] * 3
    good, bad = write_rows(tmp_path / "good.jsonl", rows), tmp_path / "bad.jsonl"
    bad.write_text(Path(good).read_text() + '{"prompt": "k1: ", "chosen": "", "rejected": "x"}\n')
    given: dict[str, Any] = {"prompts": [prompts], **QUICK}
    with pytest.raises(DataError, match=r"row 4: 1 of 4 rows cannot be used.*--on-bad-row skip"):
        compared(model, other, held_out=[str(bad)], **given)
    whole = compared(model, other, held_out=[good], **given)
    found = compared(model, other, held_out=[str(bad)], on_bad_row="skip", **given)
    assert found.notes == [
        f"{name}: 1 rows of the held-out data were left out: they cannot be used" for name in (model, other)
    ]
    assert [m.perplexity for m in found.models.values()] == [m.perplexity for m in whole.models.values()]


def test_models_that_say_nothing_tie_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (samples(tmp_path / f"{name}.jsonl", [[" "]] * 16) for name in "ab")
    assert main(["compare", "--a", a, "--b", b, "--judge", "length"]) == 0
    said = capsys.readouterr().out
    assert "won 0, tied 16, lost 0" in said and "16 decided without the judge" in said
    assert "no difference is shown" in said and said.count("16 empty") == 2
