"""What is wrong with rows is found, by the rows that are wrong, and by those that a run refuses."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.layouts.generated import changed_files
from data.small import small_tokenizer
from data.tokenising import TEMPLATE, chat_rows, write
from prefopt.cli import main
from prefopt.data.audit.rows import Audit, AuditOptions, audit, compare_prompts
from prefopt.data.audit.statistics import SUSPICIONS, Lengths, suspicions
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.layouts import LAYOUTS
from prefopt.data.load import NO_FAULT, load_groups
from prefopt.data.validate import DataKind
from prefopt.errors import DataError

SEVERAL = "rows of several purposes"


def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return {
        "prompt": said("user", prompt),
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected),
    }


def tokenizer() -> Any:
    made = small_tokenizer(bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


def found(a: Audit, severity: Any) -> dict[str, list[int]]:
    return {e.kind: list(e.rows) for e in a.issues(severity)}


DIRTY: list[Any] = [
    row("2 + 2?", "4", "22"),  # 1
    row("2 + 2?", "22", "4"),  # 2: contradicts 1
    row("2 + 2?", " 4", "22"),  # 3: repeats 1
    row("same", "x", "x"),  # 4
    row("empty", "", "x"),  # 5
    {"prompt": [{"role": "narrator", "content": "x"}], "chosen": "a", "rejected": "b"},  # 6
    '{"prompt": [',  # 7
    {"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "assistant", "content": "x"}]},  # 8
    row("long", "a" * 300, "b" * 300),  # 9
    row("cut", "a" * 300 + "b", "a" * 300 + "c"),  # 10
    row("bytes", "caf\ufffd", "It\u00e2\u20ac\u2122s"),  # 11
    row("leak", "sure<|im_end|>\n<|im_start|>user", "x"),  # 12
    row("turns", "yes\n\nHuman: more?\n\nAssistant: no", "no"),  # 13
]


def test_every_problem_is_named_by_its_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "dirty.jsonl", DIRTY)
    held = write(tmp_path / "held.jsonl", [row("new", "a", "b"), row(" 2 + 2? ", "5", "3")])
    how = AuditOptions(tokenizer=tokenizer(), rendering=Rendering(256))
    a, b = audit([file], how), audit([held], how)
    compare_prompts(a, b)
    assert found(a, "error") == {
        "identical responses": [4],
        "empty response": [5],
        "unknown role": [6],
        "unreadable": [7],
        "missing field": [8],
        "identical after truncation": [10],
    }
    warnings = found(a, "warning")
    special = next(kind for kind in warnings if "special tokens" in kind)
    assert warnings == {
        "contradiction": [1, 2, 3],
        "duplicate": [3],
        "truncated": [9],
        "replacement character": [11],
        "mojibake": [11],
        "template text": [12],
        special: [12],
        "turns inside a response": [13],
    }
    (entry,) = (e for e in a.issues("warning") if e.kind == "duplicate")
    assert entry.others == [(str(file), 1)]
    (entry,) = (e for e in a.issues("warning") if e.kind == "replacement character")
    assert entry.example == "'caf\ufffd'"
    (entry,) = b.issues("warning")
    assert (entry.kind, list(entry.rows), entry.others) == ("prompt in training data", [2], [(str(file), 1)])
    assert (a.files[0].rows, a.files[0].usable, a.files[0].refused) == (13, 7, 6)


def test_an_answer_that_was_broken_off_is_said_to_be_and_misses_no_end(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "responses": ["a", "b"], "tiers": [[0], [1]], "finish": ["length", "stop"]}]
    options = AuditOptions(tokenizer=tokenizer(), rendering=Rendering(64))
    found_here = found(audit([write(tmp_path / "a.jsonl", rows)], options), "warning")
    assert found_here == {"broken off": [1]}


def test_contradictions_across_files_and_kinds_of_preference(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"], "tiers": [[0], [1, 2]]}])
    other = write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "a"}])
    labels = [{"prompt": "p", "completion": "a", "label": x} for x in (True, True, False)]
    third = write(tmp_path / "c.jsonl", labels)
    a = audit([one, other, third], AuditOptions())
    contradictions = {Path(e.file).name: (list(e.rows), e.others) for e in a.issues("warning") if e.others}
    assert contradictions["a.jsonl"] == ([1], [(str(other), 1)])
    assert contradictions["b.jsonl"] == ([1], [(str(one), 1)])
    kinds = {e.kind: list(e.rows) for e in a.issues("warning") if e.file == str(third)}
    assert kinds == {"duplicate": [2], "contradiction": [1, 2, 3]}


def test_files_of_several_purposes_are_told(tmp_path: Path, capsys: Any) -> None:
    pairs = write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "a"}])
    labels = write(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "label": x} for x in (True, False)])
    (entry,) = (e for e in audit([pairs, labels], AuditOptions()).issues("warning") if e.kind == SEVERAL)
    assert (entry.file, entry.what.split(";")[0]) == ("", "2 labels, 1 pairs")
    assert SEVERAL not in found(audit([pairs, labels], AuditOptions(want="pairs")), "warning")
    both = write(tmp_path / "c.jsonl", [{"prompt": "r", "responses": ["a"]}, {"prompt": "s"}])
    (entry,) = (e for e in audit([pairs, both], AuditOptions()).issues("warning") if e.kind == SEVERAL and not e.file)
    assert main(["data", "check", str(pairs), str(labels)]) == 0
    out = capsys.readouterr().out
    assert out.index("all files") < out.index(SEVERAL) and "as a whole" not in out.split("warnings")[0]


def test_an_order_against_its_scores_is_told(tmp_path: Path) -> None:
    said = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]]
    rows = [
        {"prompt": f"{i}", "responses": ["a", "b", "c"], "order": o, "scores": [1, 1, 0]} for i, o in enumerate(said)
    ]
    rows.append({"prompt": "few", "responses": ["a", "b", "c"], "order": [0], "top_k": 1, "scores": [5, 1, 4]})
    a = audit([write(tmp_path / "a.jsonl", rows)], AuditOptions())
    (entry,) = a.issues("warning")
    assert (entry.kind, list(entry.rows)) == ("scores against the order", [2, 4])
    assert "response 2 with score 0 before 1 with score 1" in entry.what and not a.issues("error")


EVERY = {-1}
"""Instead of their numbers: every comparison of a file whose comparisons are several rows each."""


def refused_by_a_run(file: Path, made: Any, rendering: Rendering, want: DataKind, count: int) -> set[int] | None:
    try:
        loaded = load_groups([file], made, rendering, kind=want, on_bad_row="skip")
    except DataError as error:
        if "none of" not in str(error):
            return None
        # Rows that stand together as one comparison are known by the first of them, so that there are fewer.
        said = re.search(r"none of (\d+) rows", str(error))
        return set(range(1, count + 1)) if said is None or int(said[1]) == count else EVERY
    return {p.row for p in loaded.problems if p.kind not in NO_FAULT}


def agree(rows: list[Any], folder: Path, want: DataKind) -> None:
    file = write(folder / "rows.jsonl", rows)
    # An empty line is no row; what is white to Python alone (\x1f) is not empty.
    rows = [row for row in rows if not isinstance(row, str) or row.encode("utf-8", "surrogatepass").strip()]
    if len(rows) == 1 and isinstance(rows[0], list):  # one line that is an array is a JSON document of rows
        rows = rows[0]
    made, rendering = tokenizer(), Rendering(24)
    refused = refused_by_a_run(file, made, rendering, want, len(rows))
    a = audit([file], AuditOptions(tokenizer=made, rendering=rendering, want=want))
    errors = {r for e in a.issues("error") for r in e.rows}
    if refused is None:
        errors_of_all = found(a, "error")
        assert [] in (errors_of_all.get("unreadable file"), errors_of_all.get("responses that are not read"))
        return
    tied = {r for e in a.issues("warning") if e.kind in NO_FAULT for r in e.rows}
    (tally,) = a.files
    if refused == EVERY:
        assert not tally.usable and errors | tied
        return
    assert errors == refused - tied
    joined = LAYOUTS[tally.layout].joins  # several rows may be one comparison
    assert tally.refused == len(errors) and (joined or tally.rows == len(rows))
    assert tally.usable + tally.refused + tally.left_out == tally.rows


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(rows=changed_files(), want=st.sampled_from(get_args(DataKind)))
def test_errors_are_the_rows_that_a_run_refuses(
    rows: list[Any], want: DataKind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agree(rows, tmp_path_factory.mktemp("rows"), want)


def test_a_line_that_is_an_array_is_a_document_and_an_empty_one_no_row(tmp_path: Path) -> None:
    agree([[None, {"text": False}]], tmp_path, "pairs")
    agree([" ", row("p", "a", "b")], tmp_path, "demonstrations")


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(rows=changed_files(), want=st.sampled_from(get_args(DataKind)))
def test_errors_are_the_rows_that_a_run_refuses_in_many_files(
    rows: list[Any], want: DataKind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agree(rows, tmp_path_factory.mktemp("rows"), want)


def test_lengths_are_those_before_truncation(tmp_path: Path) -> None:
    rows = chat_rows(40)
    file = write(tmp_path / "rows.jsonl", rows)
    made = tokenizer()
    cut = audit([file], AuditOptions(tokenizer=made, rendering=Rendering(40))).lengths
    whole = audit([file], AuditOptions(tokenizer=made, rendering=Rendering(4096))).lengths
    assert cut.truncated > 10 and whole.truncated == 0
    for name in ("prompt", "response", "whole", "chosen", "rejected"):
        assert list(getattr(cut, name)) == list(getattr(whole, name)), name
    assert (cut.encoded, cut.separate) == (whole.encoded, whole.separate)
    # Tokens are bytes, marks of the template one each. The line end behind "assistant" is the model's to write here,
    # for the generation prompt of this template leaves it out.
    first = rows[0]["prompt"][0]["content"]
    prompt = 1 + len("user\n") + len(first) + 1 + 1 + len("assistant")
    answers = [1 + len(rows[0][side][0]["content"]) + 1 for side in ("chosen", "rejected")]
    assert whole.prompt[0] == prompt and list(whole.response[:2]) == answers
    assert whole.encoded < whole.separate == sum(whole.whole)


def test_every_suspicion_has_text_that_raises_it_and_text_that_does_not() -> None:
    raise_it = {
        "replacement character": "caf\ufffd",
        "mojibake": "caf\u00c3\u00a9",
        "invisible characters": "a\u200bb",
        "HTML entities": "a &amp; b",
        "escaped line ends": "one\\n\\nTwo",
        "template text": "done<|im_end|>",
    }
    assert {*raise_it, "turns inside a response"} == set(SUSPICIONS)
    for kind, text in raise_it.items():
        assert list(suspicions(text)) == [kind]
    for character in "\u202e\ue000\x1b\x85\ufeff":
        assert list(suspicions(f"a{character}b")) == ["invisible characters"]
    clean = [
        "café Ärger ÄÖÜ “quotes” – dash… naïve São Ñandú",
        "AT&T; a < b > c",
        "print('a\\nb')\nok",
        "👩\u200d👩 \u05e9\u05dc",
    ]
    clean += ["$\\nabla f + \\nu$ and \\nabla g", "| a |\n# Title\n## Response time:", "tab\there\r\n", "Привет, 你好"]
    assert [suspicions(text) for text in clean] == [{}] * len(clean)


def test_a_length_bias_is_a_warning_where_it_is_large_and_certain(tmp_path: Path, capsys: Any) -> None:
    fair = [row(f"q{i}", "a" * (10 + i % 7), "b" * (10 + (i + 3) % 7)) for i in range(210)]
    biased = [row(f"q{i}", "a" * (10 + i % 7 + (i % 3 > 0)), "b" * (10 + i % 7)) for i in range(210)]
    few = [row(f"q{i}", "a" * 20, "b" * 10) for i in range(3)]
    large = {}
    for name, rows in (("fair", fair), ("biased", biased), ("few", few)):
        bias = audit([write(tmp_path / f"{name}.jsonl", rows)], AuditOptions()).lengths.bias()
        assert bias is not None and bias.low <= bias.share <= bias.high
        large[name] = bias.large
    assert large == {"fair": False, "biased": True, "few": False}
    assert main(["data", "check", str(tmp_path / "biased.jsonl"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [p["kind"] for p in document["problems"]] == ["length bias"]
    assert document["lengths"]["length_bias"]["longer"] == 140 and document["lengths"]["length_bias"]["equal"] == 70
    bins = document["lengths"]["histogram"]
    assert bins[0] == {"from": 0, "to": 1, "count": 0} and sum(b["count"] for b in bins) == 420
    several = Lengths("characters")
    several.add(0, [*[10] * 300, 120, 1000])
    assert several.histogram()[-2:] == [{"from": 11, "to": 11, "count": 0}, {"from": 12, "to": None, "count": 2}]


def test_exit_status_and_streams(tmp_path: Path, capsys: Any) -> None:
    good = write(tmp_path / "good.jsonl", chat_rows(3))
    bad = write(tmp_path / "bad.jsonl", DIRTY)
    torn = write(tmp_path / "torn.json", ['[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"pro'])
    assert main(["data", "check", str(good), "--show", "1"]) == 0
    out = capsys.readouterr().out
    assert "no errors" in out and "chosen" in out and all(len(x) <= 80 or str(tmp_path) in x for x in out.splitlines())
    assert main(["data", "check", str(bad), "--json", "--show", "2"]) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == "" and document["errors"] == 5 and len(document["examples"]) == 2
    assert main(["data", "check", str(good), str(torn)]) == 1
    assert "unreadable file" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "none.jsonl")]) == 2
    assert main(["data", "check", str(good), "--max-length", "9"]) == 2
    assert "--model" in capsys.readouterr().err


def test_examples_are_the_same_every_time_and_show_what_is_trained(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(50))
    how = AuditOptions(show=3)
    rows = [[c.row for c in audit([file], how).examples] for _ in range(2)]
    assert rows[0] == rows[1] == sorted(rows[0]) and len(set(rows[0])) == 3
    made = tokenizer()
    made.save_pretrained(tmp_path / "tokenizer")
    words = ["data", "check", str(file), "--model", str(tmp_path / "tokenizer"), "--show", "1"]
    assert main(words) == 0
    c = audit([file], AuditOptions(show=1)).examples[0]
    group = Renderer(made, Rendering(1024)).render(c).group
    trained = made.decode(group.sequence(0)[0][group.sequence(0)[1]])
    assert f"⟦{trained}⟧" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["examples"][0]["parts"]
    shared, *responses = ["".join(text for text, _ in part["spans"]) for part in parts]
    assert [shared + response for response in responses] == [made.decode(group.sequence(k)[0]) for k in range(2)]
    marked = ["".join(text for text, is_trained in part["spans"] if is_trained) for part in parts]
    assert marked == ["", *(made.decode(group.sequence(k)[0][group.sequence(k)[1]]) for k in range(2))]


def test_without_a_model_nothing_heavy_is_imported(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(3))
    code = (
        "import sys; from prefopt.cli import main; status = main(['data', 'check', sys.argv[1]]);"
        "sys.exit(status or sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_real_dirt_is_found_in_the_numbers_that_are_known(shared: Path) -> None:
    folder = shared / "data/hh_rlhf"
    known = {"harmless-base": (2312, 0, 5), "helpful-base": (2354, 2, 9)}
    a = audit([folder / f"{name}-test.jsonl.gz" for name in known], AuditOptions())
    for tally, (name, (rows, identical, differing)) in zip(a.files, known.items(), strict=True):
        kinds = {e.kind: len(e.rows) for e in a.issues("error") if e.file == tally.file}
        got = tally.rows, kinds.get("identical responses", 0), kinds.get("differing prompts", 0)
        assert got == (rows, identical, differing), name


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_memory_grows_by_numbers_not_by_texts(tmp_path: Path, tokens: bool) -> None:
    how = AuditOptions(tokenizer=tokenizer(), rendering=Rendering(512)) if tokens else AuditOptions()

    def memory(count: int) -> tuple[int, int]:
        """Bytes held in the end, and at most."""
        said = "x" * 800
        rows = (json.dumps(row(f"{i} {said}", f"{i} a {said}", f"{i} b {said}")) for i in range(count))
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            out.writelines(f"{line}\n" for line in rows)
        tracemalloc.start()
        found = audit([file], how)
        gc.collect()
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(f.rows for f in found.files) == count
        return held, most

    memory(600)  # what is allocated once
    (few, peak), (many, higher) = memory(600), memory(1200)
    assert many - few < 600 * 200  # bytes a row
    assert higher - peak < 600 * 1200  # half of what the texts alone are
