"""The token cache: nothing is tokenised twice, nothing is stale, and no row is lost on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.small import small_tokenizer
from data.tokenising import TEMPLATE, chat_rows, contents, start, wait_for, write
from prefopt.cli import main
from prefopt.core import cache_folder
from prefopt.data import load, token_cache, workers
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import Reading, parse_comparisons
from prefopt.data.load import GroupSet, load_groups
from prefopt.data.validate import check
from prefopt.data.workers import Preparer
from prefopt.errors import CacheError, DataError
from prefopt.records import Comparison

BAD = [
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]},
    {**chat_rows(1)[0], "chosen": chat_rows(1)[0]["rejected"]},
    [1, 2],
]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the renderer was given."""
    seen: list[int] = []
    render = Renderer.render_all

    def counted(self: Renderer, comparisons: Any) -> Any:
        rows = list(comparisons)
        seen.append(len(rows))
        return render(self, rows)

    monkeypatch.setattr(Renderer, "render_all", counted)
    return seen


def test_a_second_start_tokenises_nothing(tmp_path: Path, tokenised: list[int]) -> None:
    file = write(tmp_path / "rows.jsonl", [*chat_rows(30), *BAD])
    rendering = Rendering(40, chat_template=TEMPLATE)
    first = load_groups([file], small_tokenizer(), rendering, on_bad_row="skip")
    assert sum(tokenised) == 30 and first.truncated and not first.cached
    assert (first.read, first.kept, first.refused) == (33, 30, 3) and first.template == TEMPLATE
    tokenised.clear()
    second = load_groups([file], small_tokenizer(), rendering, on_bad_row="skip")
    assert not tokenised and contents(second) == contents(first) and second.cached == 33
    assert "33 rows from the token cache" in second.summary()
    # Refusing is another answer to the same rows: it needs no other tokens.
    with pytest.raises(
        DataError, match=r"3 of 33 rows cannot be used.*rows\.jsonl|rows\.jsonl.*3 of 33 rows"
    ) as caught:
        load_groups([file], small_tokenizer(), rendering)
    assert not tokenised and "\n" not in str(caught.value)
    # Half of the rows from another file that is there already.
    more = write(tmp_path / "more.jsonl", chat_rows(12, seed=1))
    both = load_groups([file, more], small_tokenizer(), rendering, on_bad_row="skip")
    assert tokenised == [12] and "33 of 45 rows from the token cache" in both.summary()
    assert both.groups.source_G.tolist() == [0] * 30 + [1] * 12
    assert any(line.startswith(f"refused: {file}: missing field: 1") for line in both.summary())


def test_groups_are_those_of_rendering_row_by_row(tmp_path: Path) -> None:
    rows = [*chat_rows(20), BAD[1], *chat_rows(20, seed=3)]
    file = write(tmp_path / "rows.jsonl", rows)
    rendering = Rendering(60, chat_template=TEMPLATE)
    loaded = load_groups([file], small_tokenizer(), rendering, on_bad_row="skip")
    again = load_groups([file], small_tokenizer(), rendering, on_bad_row="skip")
    memory = load_groups([parse_comparisons(rows, str(file))], small_tokenizer(), rendering, on_bad_row="skip")
    good = [c for c in parse_comparisons(rows, "f").comparisons if not check(c, "pairs")]
    renderer = Renderer(small_tokenizer(), rendering)
    for data in (loaded, again, memory):
        assert contents(data) == contents(memory) and data.groups.row_G.tolist() == [c.row for c in good]
        for n, comparison in enumerate(good):
            expected, group = renderer.render(comparison), data.groups[n]
            assert group.prefix.tolist() == expected.group.prefix.tolist() and group.pairs == expected.group.pairs
            for mine, theirs in zip(group.continuations, expected.group.continuations, strict=True):
                assert mine.ids.tolist() == theirs.ids.tolist() and mine.trained.tolist() == theirs.trained.tolist()
            assert data.groups.prompt_key_G[n] == comparison.prompt_key.rstrip(b"\0")
            assert int(data.groups.prompt_cut_G[n]) == expected.prompt_cut


def same_size_and_times(file: Path) -> None:
    """The worst case: another word of the same length, and the times of the file set back."""
    before = file.stat()
    file.write_text(file.read_text("utf-8").replace("yes 1", "yet 1"), "utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


SWAPPED = {
    "columns": {"messages": "prompt", "chosen": "rejected", "rejected": "chosen"},
    "tags": {"role_tag": "role", "content_tag": "content"},
}
PLAIN: dict[str, Any] = {"rendering": Rendering(64, chat_template=TEMPLATE)}
STALE: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "a row more": (lambda file: write(file, chat_rows(7)), PLAIN),
    "the same size and times": (same_size_and_times, PLAIN),
    "another length": (lambda file: None, {"rendering": Rendering(48, chat_template=TEMPLATE)}),
    "no length": (lambda file: None, {"rendering": Rendering(chat_template=TEMPLATE)}),
    "another template": (lambda file: None, {"rendering": Rendering(64, chat_template=TEMPLATE + " ")}),
    "a variable of it": (
        lambda file: None,
        {"rendering": Rendering(64, chat_template=TEMPLATE, variables={"shout": True})},
    ),
    "no EOS": (lambda file: None, {"rendering": Rendering(64, False, chat_template=TEMPLATE)}),
    "reasoning": (lambda file: None, {"rendering": Rendering(64, chat_template=TEMPLATE, reasoning="strip")}),
    "another tokenizer": (lambda file: None, PLAIN | {"tokenizer": small_tokenizer([("a", "b")])}),
    "another EOS": (lambda file: None, PLAIN | {"tokenizer": small_tokenizer(bos_token="<s>", eos_token="<|im_end|>")}),
    "another kind": (lambda file: None, PLAIN | {"kind": "demonstrations"}),
    "a layout by name": (lambda file: None, PLAIN | {"format": "preference-chat"}),
    "sides the other way": (lambda file: None, PLAIN | {"columns": ["chosen=rejected", "rejected=chosen"]}),
    "a description beside the file": (
        lambda file: (file.parent / "dataset_info.json").write_text(
            json.dumps({"mine": {"file_name": file.name, "formatting": "sharegpt", "ranking": True, **SWAPPED}})
        ),
        PLAIN,
    ),
}


@pytest.mark.parametrize(("change", "options"), STALE.values(), ids=STALE.keys())
def test_no_stale_tokens(change: Callable[[Path], object], options: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(6))

    def loaded(tokenizer: Any = None, **how: Any) -> GroupSet:
        return load_groups([file], tokenizer or small_tokenizer(), **how)

    loaded(**PLAIN)
    assert loaded(**PLAIN).cached == 6
    change(file)
    changed = loaded(**options)
    assert not changed.cached
    os.environ["PREFOPT_CACHE"] += "-another"
    assert contents(changed) == contents(loaded(**options))


def test_the_ending_of_a_name_that_tells_how_to_read_is_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\np,a,b\n", "utf-8")
    assert load_groups([tmp_path / "rows.csv"], small_tokenizer()).kept == 1
    (tmp_path / "rows.csv").rename(tmp_path / "rows.tsv")
    with pytest.raises(DataError, match="unknown layout"):
        load_groups([tmp_path / "rows.tsv"], small_tokenizer())


def test_another_version_makes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(4))
    load_groups([file], small_tokenizer())
    (tmp_path / "code").mkdir()
    for change in ({"CODE": (tmp_path / "code",)}, {"unidata_version": "99"}, {"version": lambda library: "99.9"}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(token_cache, name, value)
            assert not load_groups([file], small_tokenizer()).cached
    assert load_groups([file], small_tokenizer()).cached == 4


def test_code_is_known_by_all_of_its_sources(tmp_path: Path) -> None:
    room, record = tmp_path / "data", tmp_path / "records.py"
    (room / "layouts").mkdir(parents=True)
    found = set()
    for file, text in ((record, "a"), (record, "b"), (room / "layouts" / "one.py", "b"), (room / "two.py", "b")):
        file.write_text(text, "utf-8")
        token_cache.code_digest.cache_clear()
        found.add(token_cache.code_digest((room, record)))
    assert len(found) == 4
    assert {file.name for file in token_cache.CODE} == {"data", "records.py"}


def test_the_same_contents_elsewhere_are_told_by_their_own_name(tmp_path: Path, tokenised: list[int]) -> None:
    rows = [{**row, "note": 1} for row in chat_rows(4)]
    one = write(tmp_path / "one.jsonl", [*rows, *BAD])
    load_groups([one], small_tokenizer(), on_bad_row="skip")
    tokenised.clear()
    other = one.rename(tmp_path / "other.jsonl")
    os.utime(other)
    moved = load_groups([other], small_tokenizer(), on_bad_row="skip")
    assert not tokenised and {p.file for p in moved.problems} == {str(other)}
    assert any(str(other) in note and "note" in note for note in moved.notes)
    assert not any("one.jsonl" in line for line in moved.summary())


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("damage", ["ids_T.bin", "key_N.bin", "manifest.json", "a folder alone"])
def test_a_damaged_entry_is_made_again_with_a_word(
    damage: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not small:  # as for many rows: checksums are remembered
        monkeypatch.setattr("prefopt.data.token_cache.SMALL", 0)
        monkeypatch.setattr(cache_folder, "RACY_SECONDS", 0.0)
    file = write(tmp_path / "rows.jsonl", chat_rows(5))
    good = contents(load_groups([file], small_tokenizer()))
    assert load_groups([file], small_tokenizer()).cached
    (entry,) = [p for p in cache_folder.tokens_folder().iterdir() if p.is_dir()]
    if damage == "a folder alone":
        for path in entry.iterdir():
            path.unlink()
    else:
        data = bytearray((entry / damage).read_bytes())
        data[len(data) // 2] ^= 1
        (entry / damage).write_bytes(data)
    again = load_groups([file], small_tokenizer())
    assert not again.cached and contents(again) == good
    (line,) = [r.message for r in caplog.records if "is damaged" in r.message]
    assert str(file) in line and "\n" not in line
    assert load_groups([file], small_tokenizer()).cached


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(5))
    (tmp_path / "taken").touch()
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "taken"))
    with pytest.raises(CacheError, match="set PREFOPT_CACHE to another folder"):
        load_groups([file], small_tokenizer())


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(5))
    prepared = Preparer.__call__

    def meanwhile(self: Preparer, rows: Any) -> Any:
        write(file, chat_rows(5, seed=9))
        return prepared(self, rows)

    monkeypatch.setattr(Preparer, "__call__", meanwhile)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; run the command again"):
        load_groups([file], small_tokenizer())
    assert not [p for p in cache_folder.tokens_folder().iterdir() if p.is_dir()]


pieces = st.sampled_from([*chat_rows(6), *BAD, {"prompt": "p", "chosen": 3, "rejected": ""}, "{not json", None, {}])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(pieces, max_size=12), chunk=st.integers(1, 5), length=st.sampled_from([None, 8, 24]))
def test_every_row_is_kept_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, length: int | None
) -> None:
    rows = [chat_rows(1)[0], *rows]
    file = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "CHUNK_ROWS", chunk)
        rendering = Rendering(length, chat_template=TEMPLATE)
        for _ in range(2):
            try:
                data = load_groups([file], small_tokenizer(), rendering, on_bad_row="skip", format="preference-chat")
            except DataError as error:
                assert length == 8 and f"none of {len(rows)} rows can be used" in str(error)
                continue
            refused = {p.row for p in data.problems}
            assert data.read == len(rows) == data.kept + data.refused
            assert refused | set(data.groups.row_G.tolist()) == set(range(1, len(rows) + 1))
            assert not refused & set(data.groups.row_G.tolist())
            assert [p.row for p in data.problems] == sorted(p.row for p in data.problems)


def test_ties_are_left_out_and_counted_and_no_fault() -> None:
    scores = [(3, 1), (1, 1), (5, 1)]
    comparisons = [Comparison.scored("p", ["a", "b"], scores=s, row=n) for n, s in enumerate(scores, 1)]

    class Scored(Reading):
        def __init__(self) -> None:
            self.file, self.count, self.notes, self.lost = "rows", len(comparisons), [], ""

        def __iter__(self) -> Any:
            return iter(comparisons)

    data = load_groups([Scored()], small_tokenizer())
    assert (data.read, data.kept, data.refused) == (3, 2, 1)
    assert any("only ties: 1 (row 2" in line for line in data.summary())


def test_the_commands_know_what_is_tokenised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", chat_rows(8))
    load_groups([file], small_tokenizer())
    load_groups([file], small_tokenizer(), max_length=30)
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "0 spaces" in out and "2 tokenised" in out and out.count("8 groups") == 2 and out.count(str(file)) == 2
    assert main(["cache", "verify"]) == 0
    entries = [p for p in cache_folder.tokens_folder().iterdir() if p.is_dir()]
    with (entries[0] / "ids_T.bin").open("r+b") as handle:
        handle.write(b"\xff")
    capsys.readouterr()
    assert main(["cache", "verify"]) == 1
    assert f"{entries[0]}: the checksum of ids_T.bin does not match" in capsys.readouterr().out
    assert main(["cache", "verify", "--repair"]) == 0 and main(["cache", "verify"]) == 0
    assert [p for p in cache_folder.tokens_folder().iterdir() if p.is_dir()] == [entries[1]]
    capsys.readouterr()
    assert main(["cache", "clear", "--space", entries[1].name]) == 0
    assert "bytes freed" not in capsys.readouterr().out.removeprefix("0 ")
    assert main(["cache", "list"]) == 0 and "tokenised" not in capsys.readouterr().out


def test_a_killed_process_leaves_nothing_half_used(tmp_path: Path) -> None:
    file, other = (write(tmp_path / f"{n}.jsonl", chat_rows(60, seed=n)) for n in range(2))
    root = cache_folder.tokens_folder()
    for path in (file, other):
        log = path.with_suffix(".log")
        process = start(path, log=log, hold_at=3)
        wait_for(lambda log=log: log.exists() and log.read_text().count("\n") == 4, process)
        assert any((p / "ids_T.bin").exists() for p in root.glob("*.building"))
        process.kill()
        process.communicate()
        assert list(root.glob("*.building")) and not [p for p in root.iterdir() if p.is_dir() and "." not in p.name]
        if path == file:
            kept = list(root.glob("*.building"))
    data = load_groups([other], small_tokenizer())
    assert not data.cached and data.kept == 60
    assert not list(root.glob("*.building")), f"of another file: {kept}"
    assert load_groups([other], small_tokenizer()).cached == 60


@pytest.mark.slow
def test_two_processes_tokenise_a_file_once(tmp_path: Path) -> None:
    file, log = write(tmp_path / "rows.jsonl", chat_rows(60)), tmp_path / "log"
    processes = [start(file, seconds=0.1, log=log) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 1 and sum(int(n) for _, n in lines) == 60
    assert sorted("60 rows from the token cache" in out for out, _ in results) == [False, True]
    assert len({out.split()[-1] for out, _ in results}) == 1


def test_a_report_tells_all_that_it_was_told() -> None:
    data = load_groups([parse_comparisons([*chat_rows(3), *BAD], "f")], small_tokenizer(), on_bad_row="skip")
    report = token_cache.Report("f", 6, data.problems, ["f: note"], {"said": [], "rows": [1, 2]}, "template")
    stored = json.loads(json.dumps(report.to_dict()))
    assert token_cache.Report.from_dict(stored, "f") == report
    moved = token_cache.Report.from_dict(stored, "g")
    assert moved.notes == ["g: note"] and {p.file for p in moved.problems} == {"g"}
    assert stored["warnings"] == {"said": [], "rows": [1, 2]}
    assert load.NO_FAULT == ("only ties",)
