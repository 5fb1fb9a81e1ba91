"""Names: what they stand for, what is passed over, and the line where they stand for nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.errors as hub_errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from prefopt.data.files import hub
from prefopt.data.files.hub import HubSplit
from prefopt.data.files.sources import Source, find_sources, read_rows
from prefopt.errors import DataError, UserError

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "\n".join(json.dumps(row) for row in rows or [ROW]).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows or [ROW])), path)
    else:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def names(*given: str | Path) -> list[str]:
    return [source.name for source in find_sources(list(given))]


def error(*given: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        for source in find_sources(list(given)):
            list(source.rows())
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_a_source_can_be_read_again_sent_to_a_process_and_told_by_its_contents(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", ROW, ROW | {"prompt": "r"})
    (source,) = find_sources([str(path)])
    assert (source.name, source.path, source.entry, source.notes) == (str(path), path, 0, ())
    assert list(source.rows()) == list(source.rows()) == [ROW, ROW | {"prompt": "r"}]
    assert source.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert pickle.loads(pickle.dumps(source)) == source
    (copy,) = find_sources([write(tmp_path, "other/b.jsonl", ROW, ROW | {"prompt": "r"})])
    assert copy.digest() == source.digest()
    write(tmp_path, "a.jsonl", ROW)
    assert source.digest() != copy.digest()
    path.write_text('{"a": 1}\n{')
    bad = list(source.rows(keep_going=True))
    assert bad[0] == {"a": 1} and isinstance(bad[1], DataError)


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    wanted = ["a.jsonl", "b/c.csv.gz", "b/d.PARQUET", "z.json"]
    for name in [*wanted, "README.md", "LICENSE", "dataset_info.json", ".hidden.jsonl", ".git/x.jsonl", "b/p.png"]:
        write(tmp_path, name)
    sources = find_sources([tmp_path])
    assert [source.name for source in sources] == [str(tmp_path / name) for name in wanted]
    note = f"{tmp_path}: passed over LICENSE, README.md, b/p.png, dataset_info.json"
    assert [source.notes for source in sources] == [(note,), (), (), ()]
    assert [s.entry for s in find_sources([tmp_path / "a.jsonl", tmp_path / "b"])] == [0, 1, 1]
    empty = tmp_path / "empty"
    (empty / "inner").mkdir(parents=True)
    assert error(empty).startswith(f"{empty}: is an empty folder; it should hold files that end in .json")
    write(empty, "NOTES.txt")
    assert f"{empty}: holds no data files, only NOTES.txt;" in error(empty)


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "data/a.jsonl")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == [str(path)]


def test_splits_of_a_folder_are_not_mixed(tmp_path: Path) -> None:
    train = write(tmp_path, "data/train-00000-of-00002.parquet"), write(tmp_path, "data/train-00001-of-00002.parquet")
    test = write(tmp_path, "data/test-00000-of-00001.parquet")
    assert f"has several splits (test, train); name one: {tmp_path},split=" in error(tmp_path)
    assert names(f"{tmp_path},split=train") == [str(path) for path in train]
    (source,) = find_sources([f"{tmp_path},split=test"])
    assert source.path == test and "passed over data/train-00000-of-00002.parquet" in source.notes[0]
    assert "has no split 'dev'; its splits are test, train" in error(f"{tmp_path},split=dev")
    other = tmp_path / "other"
    held_out, rows = write(other, "eval.jsonl"), write(other, "train/rows.jsonl")
    assert names(f"{other},split=test") == [str(held_out)] and names(f"{other},split=train") == [str(rows)]
    # One split, or none, needs no name; what is only like a word is none.
    held_out.unlink()
    assert names(other) == [str(rows)]
    write(other, "contest.jsonl")
    assert len(names(other)) == 2


def test_globs(tmp_path: Path) -> None:
    for name in ("a/1.jsonl", "a/2.csv", "b/3.jsonl", "a/README.md"):
        write(tmp_path, name)
    assert names(f"{tmp_path}/*/*.jsonl") == [str(tmp_path / "a/1.jsonl"), str(tmp_path / "b/3.jsonl")]
    assert len(names(f"{tmp_path}/**/*.jsonl")) == 2
    (first, _) = find_sources([f"{tmp_path}/a/*"])
    assert first.notes == (f"{tmp_path}/a/*: passed over {tmp_path}/a/README.md",)
    assert "matches nothing; check the pattern" in error(f"{tmp_path}/c/*.jsonl")
    assert "matches no data file, only" in error(f"{tmp_path}/a/*.md")
    literal = write(tmp_path, "odd[1].jsonl")
    assert names(literal) == [str(literal)]


def test_what_exists_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "org/name/a.jsonl")
    comma = write(tmp_path, "a,split=b.jsonl")
    assert names("org/name") == ["org/name/a.jsonl"] and names(comma.name) == [comma.name]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/org/name/a.jsonl") == [str(tmp_path / "org/name/a.jsonl")]


def test_one_file_by_two_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl")
    assert f"{path} would be read twice" in error(path, path)
    assert f"would be read twice (through {tmp_path})" in error(tmp_path, path)
    link = tmp_path / "b.jsonl"
    link.symlink_to(path)
    assert f"{path} and {link}, one file, would be read twice" in error(path, link)
    assert "would be read twice" in error(f"{tmp_path}/*.jsonl")
    assert "org/name,split=train would be read twice" in error("org/name,split=train", "org/name,split=train")
    assert len(find_sources(["org/name,split=train", "org/name,split=test"])) == 2


NOTHING = [
    ("", "the name of a data file is empty"),
    ("absent/rows.jsonl", "there is no folder absent"),
    ("pairs.josnl", "did you mean pairs.jsonl?"),
    ("pears.jsonl", "did you mean pairs.jsonl?"),
    ("nope.jsonl", "no such file or folder; check the path"),
    ("nothing/like/it", "no such file or folder"),
    ("a\0b.jsonl", "no such file or folder"),
    ("x" * 5000, "too long for the name of a file or folder"),
    ("org/name,spilt=train", "known are config, split, revision; did you mean split?"),
    ("org/name,split=train,split=test", "split= is given twice"),
    ("org/name,split=", "split= has no value"),
    ("pairs.jsonl,split=train", "is one file, which has no splits"),
    (".,config=main", "config= is for data sets of the Hub"),
    ("*.jsonl,split=train", "a glob takes no options"),
]


def test_names_that_stand_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "pairs.jsonl")
    for name, message in NOTHING:
        assert message in error(name)


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as held:
        held.writestr("rows.jsonl", json.dumps(ROW))


def workbook(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as held:
        held.writestr("[Content_Types].xml", "")


LINE = json.dumps(ROW)


NO_ROWS: list[tuple[Callable[[Path], object], str]] = [
    (archive, "is a zip archive; unpack it first"),
    (workbook, "is an Excel workbook; export it as CSV"),
    (lambda p: p.write_bytes(pickle.dumps([ROW])), "is a Python pickle"),
    (lambda p: p.write_text("<!DOCTYPE html><html>"), "is a web page"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (lambda p: p.write_text(LINE, "utf-16"), "is not UTF-8 but UTF-16"),
    (lambda p: p.write_text(LINE, "utf-16-le"), "it looks like UTF-16"),
    (lambda p: p.write_text(LINE, "utf-32"), "is not UTF-8 but UTF-32"),
    (lambda p: p.write_text(LINE.replace("q", "é"), "latin-1"), "Latin-1 or Windows-1252"),
    (lambda p: p.write_bytes(gzip.compress(gzip.compress(LINE.encode()))), "compressed twice"),
    (lambda p: p.write_bytes(gzip.compress(b"PAR1" + bytes(9))), "is a parquet or arrow file inside gzip"),
    (lambda p: p.write_bytes(gzip.compress(b"a" * 257 + b"ustar")), "is a tar archive inside gzip"),
    (lambda p: p.write_bytes(bytes(range(254, 0, -1))), "not UTF-8 at line 1 (byte 0xfe)"),
    (lambda p: p.write_bytes(bytes(100)), "is neither text nor parquet nor arrow"),
    (lambda p: p.write_bytes(gzip.compress(b"")), "is empty"),
    (lambda p: os.mkfifo(p), "is a pipe or device"),
    (lambda p: p.write_text("prompt,chosen\n1,2\n"), "comma-separated values go by the name .csv"),
    (lambda p: p.write_text('{\n "a": 1\n}'), "is one JSON object over several lines"),
    (lambda p: p.write_text('{\n "a": "}",\n "b": {}\n'), "ends within the object that begins at line 1"),
    (lambda p: p.write_text('{"a": 1\n}'), "the row does not end in its line"),
]


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    for number, (make, message) in enumerate(NO_ROWS):
        path = tmp_path / str(number) / "rows.jsonl"
        path.parent.mkdir()
        make(path)
        said = error(path)
        assert message in said and str(path) in said, message


def test_names_that_do_not_fit_the_contents(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("hello")
    assert "is not a parquet file, despite its name" in error(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("hello")
    assert "is of no known kind; name it by what it holds" in error(tmp_path / "a.txt")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_files_and_folders_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "data/a.jsonl")
    path.chmod(0)
    assert "cannot be opened: Permission denied" in error(path)
    path.parent.chmod(0)
    try:
        assert "cannot be read: Permission denied" in error(path.parent)
    finally:
        path.parent.chmod(0o700)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library's cache, empty, and no bars on the terminal."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    hub._load.cache_clear()
    yield tmp_path / "hf"
    hub._load.cache_clear()
    datasets.enable_progress_bars()


CHAT = {"prompt": "q", "chosen": [{"role": "assistant", "content": "é"}], "score": 0.5}


@pytest.mark.usefixtures("cache")
def test_saved_data_sets_are_read_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [CHAT | {"prompt": str(n)} for n in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=data, test=data.select([3, 1])).save_to_disk(tmp_path / "dict")
    monkeypatch.setitem(sys.modules, "datasets", None)
    (one,) = find_sources([tmp_path / "one"])
    assert list(one.rows()) == rows and one.path is None and one.name == str(tmp_path / "one")
    (test,) = find_sources([f"{tmp_path / 'dict'},split=test"])
    assert list(test.rows()) == [rows[3], rows[1]] and test.digest() != one.digest()
    assert f"has several splits (train, test); name one: {tmp_path / 'dict'},split=train" in error(tmp_path / "dict")
    assert "has no split 'tset'; its splits are train, test" in error(f"{tmp_path / 'dict'},split=tset")
    assert "is one data set without splits" in error(f"{tmp_path / 'one'},split=test")
    assert "would be read twice" in error(tmp_path / "one", tmp_path / "one")
    shard = next((tmp_path / "one").glob("data-00001*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    assert f"{tmp_path / 'one'}: is damaged or cut off after row 2" in error(tmp_path / "one")
    shard.unlink()
    assert f"lacks {shard.name}; copy the whole folder" in error(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text('{"_data_files": 5}')
    assert "names no data files" in error(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "is damaged" in error(tmp_path / "one")
    (tmp_path / "dict" / "test" / "state.json").unlink()
    assert "is absent; copy the whole folder" in error(f"{tmp_path / 'dict'},split=test")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A data set as it lies on the Hub, with two configs."""
    folder = tmp_path / "repo"
    for config in ("en", "zh"):
        for split in ("train", "test"):
            write(folder, f"{config}/{split}.parquet", *({**CHAT, "prompt": f"{config} {split} {n}"} for n in range(3)))
    configs = [
        {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}.parquet"} for s in ("train", "test")]}
        for c in ("en", "zh")
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


def hub_rows(repo: Path, **options: str) -> list[Any]:
    wanted = HubSplit(str(repo), **options)
    return list(Source(wanted.name, None, wanted).rows())


@pytest.mark.usefixtures("cache")
def test_data_sets_of_the_hub(repo: Path) -> None:
    rows = [{**CHAT, "prompt": f"zh train {n}"} for n in range(3)]
    assert hub_rows(repo, config="zh") == hub_rows(repo, config="zh", split="train") == rows
    assert [row["prompt"] for row in hub_rows(repo, config="en", split="test[1:]+train[:1]")] == [
        "en test 1",
        "en test 2",
        "en train 0",
    ]
    digests = {HubSplit(str(repo), c, s).digest() for c in ("en", "zh") for s in ("train", "test", "train[:1]")}
    assert len(digests) == 6
    before = HubSplit(str(repo), "zh").digest()
    hub._load.cache_clear()
    assert HubSplit(str(repo), "zh").digest() == before
    for options, message in (
        ({}, f"{repo}: has several configs (en, zh); name one: {repo},config=en"),
        ({"config": "eng"}, "has no config 'eng'; its configs are en, zh; did you mean en?"),
        (
            {"config": "en", "split": "dev"},
            f"{repo},config=en,split=dev: has no split 'dev'; its splits are train, test",
        ),
        ({"config": "en", "split": "train[x]"}, "cannot be loaded ("),
    ):
        with pytest.raises(DataError) as caught:
            hub_rows(repo, **options)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


@pytest.mark.usefixtures("cache")
def test_a_data_set_with_one_split_or_damage(tmp_path: Path) -> None:
    write(tmp_path, "odd/dev.jsonl", CHAT)
    assert hub_rows(tmp_path / "odd") == [CHAT]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(DataError, match=r"bad: cannot be loaded \(An error occurred .*: "):
        hub_rows(tmp_path / "bad")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        hub_rows(tmp_path / "none")


def response(status: int) -> Any:
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


FAILURES: list[tuple[Callable[[], Exception], str]] = [
    (lambda: DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."), "no data set on"),
    (lambda: DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), "ask for access at https://hugg"),
    (lambda: DatasetNotFoundError("Revision 'abc' doesn't exist for dataset 'o/n'"), "has no revision 'abc'"),
    (lambda: ConnectionError("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE is set"),
    (lambda: hub_errors.RepositoryNotFoundError("401", response=response(401)), "hf auth login"),
    (lambda: hub_errors.GatedRepoError("403", response=response(403)), "is gated"),
    (lambda: hub_errors.HfHubHTTPError("502 Bad Gateway", response=response(502)), "(502 Bad Gateway; HF_HUB_"),
    (lambda: RuntimeError("Dataset scripts are no longer supported, but found n.py"), "its author's script"),
    (lambda: OSError(28, "No space left on device"), "No space left on device; the library keeps its files"),
    (lambda: DatasetGenerationError("An error\noccurred"), "cannot be loaded (An error occurred)"),
    (lambda: ZeroDivisionError(), "cannot be loaded (ZeroDivisionError)"),
]


@pytest.mark.usefixtures("cache")
def test_what_the_library_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(make: Callable[[], Exception]) -> None:
        raise make()

    for make, message in FAILURES:
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, make=make, **__: fail(make))
        said = error("o/n,revision=abc")
        assert said.startswith("o/n,revision=abc: ") and message in said, message


@pytest.mark.usefixtures("cache")
def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "o/n: is not a file or folder here, and the Hub cannot be asked (" in error("o/n")
    # The library takes the last one it has where it cannot ask; that may be another than the one that is wanted.
    cached = type("Cache", (SimpleNamespace,), {"__module__": "datasets.packaged_modules.cache.cache"})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: cached(builder_configs={}, repo_id="o/n"))
    assert "may be another revision than abc" in error("o/n,revision=abc")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error("o/m")


@pytest.mark.usefixtures("cache")
def test_readers_of_the_library_are_no_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "other.jsonl")
    assert "json: is not a file or folder here, and names no data set" in error("json")


def test_real_folders(shared: Path) -> None:
    (source,) = find_sources([shared / "data" / "hh_rlhf" / "harmless-base-test.jsonl.gz"])
    assert sum(1 for _ in source.rows()) == 2312
    sources = find_sources([shared / "data" / "llamafactory_demo"])
    assert [source.path.name for source in sources if source.path] == [
        "alpaca_en_demo.json",
        "alpaca_zh_demo.json",
        "dpo_en_demo.json",
        "dpo_zh_demo.json",
        "identity.json",
        "kto_en_demo.json",
        "v1_dpo_demo.jsonl",
        "v1_sft_demo.jsonl",
    ]
    assert sum(1 for source in sources for _ in source.rows()) == 3500
    assert list(read_rows(shared / "data" / "finegrained_qa" / "dev_feedback.json"))
