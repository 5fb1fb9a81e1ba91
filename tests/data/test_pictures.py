"""Pictures in rows: layouts, limits, tokens and the token cache."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from model.vision import picture, tokenizer_of, write_folder
from prefopt.config.dpo import DpoConfig
from prefopt.config.tools import DataCheckConfig, DataSplitConfig
from prefopt.core.terminal import Reporter
from prefopt.data import pictures
from prefopt.data.audit import run_check
from prefopt.data.chat.pictures import PictureProcessor
from prefopt.data.chat.render import Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import open_comparisons, parse_comparisons, read_comparisons, run_split
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.group import Group, Placed
from prefopt.data.layouts import LAYOUTS
from prefopt.data.load import load_groups
from prefopt.data.pictures import BadPicture, PictureFolder, data_url, decoded, of_bytes, read_picture, reencoded
from prefopt.data.table import GroupTable, Selection, keep_responses
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import ConfigError, DataError
from prefopt.records import PICTURE, Comparison, Picture

ANSWERS: dict[str, Any] = {
    "chosen": [{"role": "assistant", "content": "a dog"}],
    "rejected": [{"role": "assistant", "content": "two cats"}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with two pictures, a.png and b.png."""
    for name, seed in (("a.png", 0), ("b.png", 1)):
        (tmp_path / name).write_bytes(picture(seed=seed).data)
    return tmp_path


def written(folder: Path, *rows: Mapping[str, object]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def source_of(path: Path) -> Source:
    return find_sources([str(path)])[0]


def only(path: Path) -> Comparison:
    reading = read_comparisons(path)
    assert not reading.problems, reading.problems
    (found,) = reading.comparisons
    return found


def test_every_layout_gives_the_same_row(files: Path) -> None:
    """TRL's column with places, LLaMA-Factory's tags, OpenAI's data: URLs, a column without places, bytes in Arrow."""
    data = picture().data
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    words = {"type": "text", "text": "what is it?"}
    user = {
        "trl": [{"role": "user", "content": [{"type": "image"}, words]}],
        "openai": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, words]}],
        "plain": [{"role": "user", "content": "what is it?"}],
    }
    rows = [
        {"images": ["a.png"], "prompt": user["trl"], **ANSWERS},
        {"images": "a.png", "prompt": user["plain"], **ANSWERS},
        {"image": {"bytes": base64.b64encode(data).decode(), "path": None}, "prompt": user["plain"], **ANSWERS},
        {"prompt": user["openai"], **ANSWERS},
        {
            "images": ["a.png"],
            "conversations": [{"from": "human", "value": "<image>what is it?"}],
            "chosen": {"from": "gpt", "value": "a dog"},
            "rejected": {"from": "gpt", "value": "two cats"},
        },
    ]
    found = [only(written(files, row)) for row in rows]
    table = pa.Table.from_pylist([{"images": [{"bytes": data, "path": None}], "prompt": user["plain"], **ANSWERS}])
    pq.write_table(table, files / "rows.parquet")
    found.append(only(files / "rows.parquet"))
    image = Image.open(io.BytesIO(data))
    found += parse_comparisons([{"images": [image], "prompt": user["trl"], **ANSWERS}], "memory").comparisons
    assert {c.prompt[0].content for c in found} == {f"{PICTURE}what is it?"}
    sizes = {(p.width, p.height) for c in found for p in c.pictures}
    assert sizes == {(20, 12)} and all(len(c.pictures) == 1 for c in found)
    digests = {c.pictures[0].digest for c in found[:-1]}
    assert digests == {picture().digest}  # the last is written anew by Pillow
    assert np.array_equal(np.asarray(decoded(found[-1].pictures[0])), np.asarray(decoded(picture())))


def test_dataset_info_names_the_column(files: Path) -> None:
    path = written(files, {"pics": ["a.png"], "conversations": [{"from": "human", "value": "<image>hm?"},
                                                                {"from": "gpt", "value": "a dog"}]})  # fmt: skip
    entry = {"file_name": path.name, "formatting": "sharegpt", "columns": {"images": "pics"}}
    (files / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    assert [p.source for p in only(path).pictures] == [str(files / "a.png")]


def test_pictures_survive_writing(files: Path) -> None:
    """The canonical layout holds files by path and others as data: URLs."""
    url = "data:image/png;base64," + base64.b64encode(picture(seed=3).data).decode()
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "image": url}]
    c = only(written(files, {"images": ["a.png"], "prompt": [{"role": "user", "content": parts}], **ANSWERS}))
    again = only(written(files, LAYOUTS["canonical"].write(c)))
    assert again.prompt == c.prompt and again.pictures[1].data == picture(seed=3).data


BAD: dict[str, tuple[object, str]] = {
    "address": ("https://example.org/a.png", "never fetched"),
    "missing": ("c.png", "no such file"),
    "folder": (".", "is no file"),
    "text": ("words.txt", "not a picture in a supported format"),
    "cut": ("cut.png", "damaged"),
    "base64": ({"bytes": "%%"}, "not base64"),
    "number": (3, "int"),
    "svg": ("data:image/svg+xml,<svg/>", "not of the form"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused_in_a_line(files: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "words.txt").write_text("no picture")
    (files / "cut.png").write_bytes(picture(seed=1).data[:20])
    value, what = BAD[kind]
    reading = read_comparisons(
        written(files, {"images": [value], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS})
    )
    (problem,) = reading.problems
    assert problem.kind == ("picture by address" if kind == "address" else "bad picture")
    assert what in problem.what or kind == "cut"
    assert "\n" not in problem.what


def test_no_path_leads_out_of_the_folder(files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Relative, absolute, by links of files and of folders, in a column and in a message; what is there is not told.
    Another folder permits it, which relative paths then start at."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.png").write_bytes(picture(seed=5).data)
    (files / "link.png").symlink_to(outside / "a.png")
    (files / "within.png").symlink_to(files / "a.png")
    (files / "linked").symlink_to(outside)
    up = os.path.relpath(outside, files)
    user = [{"role": "user", "content": "hm"}]
    names = [f"{up}/a.png", f"{up}/absent.png", str(outside / "a.png"), f"file://{outside}/a.png", "link.png"]
    names += ["linked/a.png", "linked/absent.png", "x/../../nothing.png"]
    rows = [{"images": [name], "prompt": user, **ANSWERS} for name in names]
    part = {"type": "image_url", "image_url": {"url": str(outside / "a.png")}}
    rows.append({"prompt": [{"role": "user", "content": [part]}], **ANSWERS})
    inside = ["within.png", "./a.png", f"../{files.name}/b.png", str(files / "b.png")]
    path = written(files, *rows, {"images": inside, "prompt": user, **ANSWERS})
    reading = read_comparisons(path)
    assert {p.kind for p in reading.problems} == {"picture outside of its folder"} and len(reading.problems) == 9
    assert all("--picture-folder" in p.what and "no such file" not in p.what for p in reading.problems)
    assert len(reading.comparisons) == 1
    both = os.path.commonpath([outside, files])
    named = DpoConfig(model="m", output="o", data=["d"], picture_folder=both).column_words
    written(files, {"images": [f"{outside.name}/a.png", str(outside / "a.png")], "prompt": user, **ANSWERS})
    (c,) = open_comparisons(source_of(path), columns=named).comparisons
    assert [p.digest for p in c.pictures] == [picture(seed=5).digest] * 2
    with pytest.raises(ConfigError, match="--picture-folder nowhere: there is no such folder"):
        open_comparisons(source_of(path), columns=["--picture-folder=nowhere"])


def test_links_of_a_hub_snapshot_stay_inside(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "datasets--a--b" / "snapshots" / "123", tmp_path / "datasets--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "456").write_bytes(picture().data)
    (snapshot / "a.png").symlink_to(Path("../../blobs/456"))
    (tmp_path / "datasets--a--b" / "b.png").write_bytes(picture().data)
    user = [{"role": "user", "content": "hm"}]
    rows = [{"images": [name], "prompt": user, **ANSWERS} for name in ("a.png", "../../b.png")]
    reading = read_comparisons(written(snapshot, *rows))
    assert [c.row for c in reading.comparisons] == [1] and [p.row for p in reading.problems] == [2]


def test_a_folder_that_is_called_snapshots_is_not_one_of_the_hub(tmp_path: Path) -> None:
    rows, blobs = tmp_path / "snapshots" / "2026", tmp_path / "blobs"
    for folder in (rows, blobs):
        folder.mkdir(parents=True)
    (blobs / "s.png").write_bytes(picture().data)
    user = [{"role": "user", "content": "hm"}]
    reading = read_comparisons(written(rows, {"images": [str(blobs / "s.png")], "prompt": user, **ANSWERS}))
    assert not reading.comparisons and "outside" in reading.problems[0].what
    hub = tmp_path / "snapshots" / "hub" / "models--a--b"  # a cache that lies below such a folder
    for folder in (hub / "snapshots" / "1", hub / "blobs"):
        folder.mkdir(parents=True)
    (hub / "blobs" / "s").write_bytes(picture().data)
    (hub / "snapshots" / "1" / "a.png").symlink_to(Path("../../blobs/s"))
    held = written(hub / "snapshots" / "1", {"images": ["a.png"], "prompt": user, **ANSWERS})
    assert len(read_comparisons(held).comparisons) == 1


def test_the_token_cache_keeps_the_folder_of_pictures(model: Path, files: Path, tmp_path: Path) -> None:
    """The same rows in another folder have the pictures of that one."""
    row = {"images": ["a.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.png").write_bytes(picture(seed=9).data)
    tokenizer = load_tokenizer(model)
    paths = [str(written(folder, row)) for folder in (files, other)]
    for cached in (0, 1):
        found = [load_groups([path], tokenizer) for path in paths]
        digests = [groups.groups[0].pictures[0].picture.digest for groups in found]
        assert digests == [picture(seed=s).digest for s in (0, 9)] and [f.cached for f in found] == [cached] * 2
    (other / "a.png").unlink()
    (other / "a.png").symlink_to(files / "a.png")
    with pytest.raises(DataError, match="outside of"):
        load_groups([paths[1]], tokenizer)
    assert load_groups([paths[1]], tokenizer, columns=[f"--picture-folder={files}"]).kept == 1


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 239)
    with pytest.raises(BadPicture, match="20 x 12 pixels"):
        of_bytes(picture().data)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 240)
    of_bytes(picture().data)
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(BadPicture, match="at most 100"):
        of_bytes(picture().data)


def test_an_animation_is_refused_and_cameras_turn() -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 255)]
    written = io.BytesIO()
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadPicture, match="2 frames"):
        read_picture(written.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (30, 10)).save(turned, "JPEG", exif=exif)
    found = of_bytes(turned.getvalue())
    assert (found.width, found.height) == (10, 30) == decoded(found).size


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a.png", "never fetched.png"])
def test_names_mean_nothing_but_files(files: Path, name: str) -> None:
    row = {"images": [name], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    (problem,) = read_comparisons(written(files, row)).problems
    assert problem.kind == "bad picture" and "no such file" in problem.what
    (files / name).parent.mkdir(exist_ok=True)
    (files / name).write_bytes(picture().data)
    assert only(written(files, row)).pictures[0].source == str(files / name)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    found = io.BytesIO()
    image.save(found, kind, **options)
    return found.getvalue()


def test_pixels_are_those_of_the_processor(model: Path) -> None:
    """Also of pictures that are transparent in part, and in grey."""
    processor = PictureProcessor(str(model), load_tokenizer(model))
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 4), dtype=np.uint8)
    whole = Image.fromarray(noise)
    few = whole.convert("RGB").quantize(8)
    few.info["transparency"] = 3
    for image in (whole, whole.convert("LA"), few, whole.convert("L"), whole.convert("RGB"), whole.convert("1")):
        data = encoded(image)
        given = Image.open(io.BytesIO(data))
        text = {"text": [processor.token], "text_kwargs": {"add_special_tokens": False}}
        wanted = processor._inner(images=[given], return_tensors="pt", **text)["pixel_values"]
        assert torch.equal(processor.pixels([of_bytes(data)])["pixel_values"], wanted), image.mode
    assert np.asarray(decoded(of_bytes(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))))).min() == 255


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_greys_of_many_bits_are_refused(mode: str, kind: str) -> None:
    with pytest.raises(BadPicture, match="more than 8 bits"):
        read_picture(encoded(Image.new(mode, (4, 4)), kind))
    with pytest.raises(BadPicture, match=r"Pillow|8 bits"):
        read_picture(Image.new("F", (4, 4)))


def test_photographs_of_telephones_are_their_first_picture() -> None:
    shades = [Image.new("RGB", (8, 4), (shade,) * 3) for shade in (200, 0)]
    found = of_bytes(encoded(shades[0], "MPO", save_all=True, append_images=shades[1:]))
    assert (found.width, found.height) == (8, 4) and np.asarray(decoded(found)).min() > 190
    assert data_url(found).startswith("data:image/jpeg;base64,")


def test_encoding_again_leaves_pixels_alone() -> None:
    data = encoded(Image.new("RGB", (4, 4)), "JPEG", icc_profile=b"mine", comment=b"mine")
    image = Image.open(io.BytesIO(reencoded(of_bytes(data)).data))
    image.load()
    assert not image.info and image.size == (4, 4)


def test_a_row_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (8, 4)))
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert of_bytes(data).size == "8x4"


def test_pictures_in_what_is_worse_are_refused(files: Path) -> None:
    worse = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "two cats"}]
    answer = {"role": "assistant", "content": "a dog", "rejected": [{"role": "assistant", "content": worse}]}
    turns = [{"role": "user", "content": "hm"}, answer]
    (problem,) = read_comparisons(written(files, {"messages": turns})).problems
    assert "rejected" in problem.what and "picture" in problem.what


def test_numbers_of_pictures_must_agree(files: Path) -> None:
    tagged = {"images": ["a.png"], "prompt": [{"role": "user", "content": "<image> or <image>?"}], **ANSWERS}
    text = {"images": ["a.png"], "prompt": "2 + 2 =", "chosen": "4", "rejected": "22"}
    placed = {"prompt": [{"role": "user", "content": [{"type": "image"}]}], **ANSWERS}
    what = [read_comparisons(written(files, row)).problems[0].what for row in (tagged, text, placed)]
    assert "1 images and 2 places" in what[0] and "images" in what[1] and "0 images and 1 parts" in what[2]


def test_image_tokens_are_never_trained(model: Path, files: Path) -> None:
    """Also where every token trains, and where pictures are in later turns of the user."""
    turns = [("human", "<image>what is it?"), ("gpt", "a dog"), ("human", "and <image>?"), ("gpt", "two cats")]
    conversation = [{"from": who, "value": words} for who, words in turns]
    path = written(files, {"images": ["a.png", "b.png"], "conversations": conversation})
    tokenizer = load_tokenizer(model)
    for train_on in ("responses", "all"):
        renderer = Renderer(tokenizer, Rendering(train_on=train_on))
        group = renderer.render(only(path)).group
        ids, trained = group.sequence(0)
        images = ids == renderer.pictures.token_id
        assert int(images.sum()) == 32 and not trained[images].any()
        assert [int(images[p.start : p.stop].sum()) for p in group.placed(0)] == [16, 16]
        if train_on == "all":
            assert int((~trained[1:]).sum()) == 32


def test_same_tokens_of_other_pictures_are_not_shared() -> None:
    ids = np.array([5, 9, 9, 6, 1, 2])
    trained = np.array([0, 0, 0, 0, 1, 1], bool)
    same, other = (picture(seed=s) for s in (0, 1))
    group = Group.from_sequences([(ids, trained)] * 2, 1, (), pictures=[(Placed(same, 1, 3),), (Placed(other, 1, 3),)])
    assert len(group.prefix) == 1 and [c.pictures[0].picture for c in group.continuations] == [same, other]
    assert group.placed(1) == (Placed(other, 1, 3),)


def test_stray_image_tokens_and_long_prompts_are_refused(model: Path, files: Path) -> None:
    tokenizer = load_tokenizer(model)
    stray = {"prompt": [{"role": "user", "content": "what is <image>?"}], **ANSWERS}
    long = {"images": ["a.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    with pytest.raises(DataError, match="image token in text"):
        load_groups([str(written(files, stray))], tokenizer)
    with pytest.raises(DataError, match="pictures too long"):
        load_groups([str(written(files, long))], tokenizer, max_length=12)


def test_the_token_cache_sees_pixels_and_the_processor(model: Path, files: Path) -> None:
    path = written(files, {"images": ["a.png", "b.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS})
    tokenizer = load_tokenizer(model)
    first, again = (load_groups([str(path)], tokenizer) for _ in range(2))
    assert (first.cached, again.cached) == (0, 1)
    one, other = first.groups[0], again.groups[0]
    assert one.pictures == other.pictures and len(one.pictures) == 2
    (files / "a.png").write_bytes(picture(seed=7).data)
    changed = load_groups([str(path)], tokenizer)
    assert changed.cached == 0 and changed.groups[0].pictures[0].picture.digest == picture(seed=7).digest
    assert changed.groups.key_N[0] != first.groups.key_N[0]
    settings = model / "preprocessor_config.json"
    before = settings.read_text()
    try:
        settings.write_text(json.dumps({**json.loads(before), "do_normalize": False}))
        assert load_groups([str(path)], tokenizer).cached == 0
    finally:
        settings.write_text(before)


def test_a_missing_picture_may_come_back(model: Path, files: Path) -> None:
    row = {"images": ["c.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    path = written(files, row, {**row, "images": ["a.png"]})
    tokenizer = load_tokenizer(model)
    assert load_groups([str(path)], tokenizer, on_bad_row="skip").refused == 1
    (files / "c.png").write_bytes(picture(seed=8).data)
    assert load_groups([str(path)], tokenizer).kept == 2


def test_one_bad_picture_leaves_the_token_cache_in_use(model: Path, files: Path) -> None:
    """Damaged or missing, now or later: the rows are read again where such a file has changed, and only there."""
    (files / "cut.png").write_bytes(picture(seed=1).data[:-40])
    row = {"images": ["c.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    path = written(files, *({**row, "images": [name]} for name in ("a.png", "b.png", "c.png", "cut.png")))
    time.sleep(0.05)  # what has just changed is looked at again
    tokenizer = load_tokenizer(model)

    def found() -> tuple[int, int]:
        groups = load_groups([str(path)], tokenizer, on_bad_row="skip")
        return groups.kept, groups.cached

    assert found() == (2, 0) and found() == (2, 4)
    (files / "b.png").unlink()
    assert found() == (1, 0) and found() == (1, 4)
    (files / "cut.png").write_bytes(picture(seed=1).data)
    time.sleep(0.05)
    assert found() == (2, 0) and found() == (2, 4)


def test_tables_hold_pictures(model: Path, files: Path) -> None:
    """Whichever rows and responses are kept, paths and bytes come back with them."""
    tokenizer = load_tokenizer(model)
    url = "data:image/png;base64," + base64.b64encode(picture(seed=4).data).decode()
    rows = [
        {"images": [source], "prompt": [{"role": "user", "content": f"hm {n}"}], **ANSWERS}
        for n, source in enumerate(("a.png", url, "b.png"))
    ]
    rows.insert(1, {"prompt": [{"role": "user", "content": "no picture"}], **ANSWERS})
    groups = load_groups([str(written(files, *rows))], tokenizer).groups
    assert groups.has_pictures and groups.pictures_G.tolist() == [1, 0, 1, 1]
    some = GroupTable.of(Selection(groups, [2, 3]))
    fewer = keep_responses(some, np.array([True, False, True, True]))
    for table, numbers in ((some, (2, 3)), (fewer, (2, 3))):
        for group, number in zip(table, numbers, strict=True):
            assert group.pictures == groups[number].pictures
    held: Picture = fewer[0].pictures[0].picture
    assert held.data == picture(seed=4).data and fewer[1].pictures[0].picture.source.endswith("b.png")
    assert [len(g.continuations) for g in fewer] == [1, 2]


def test_a_tokenizer_without_a_processor_says_so(files: Path, tmp_path: Path) -> None:
    tokenizer_of("llava").save_pretrained(tmp_path / "bare")
    path = written(files, {"images": ["a.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS})
    with pytest.raises(Exception, match="has no processor"):
        load_groups([str(path)], load_tokenizer(tmp_path / "bare"), reporter=Reporter("none"))


def test_data_check_counts_pictures(model: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"images": ["a.png", "b.png"], "prompt": [{"role": "user", "content": "hm"}], **ANSWERS}
    path = written(
        files, row, {**row, "images": ["a.png"]}, {**row, "images": [], "prompt": [{"role": "user", "content": "?"}]}
    )
    assert run_check(DataCheckConfig(data=[str(path)], model=str(model), json=True)) == 0
    found = json.loads(capsys.readouterr().out)["pictures"]
    assert (found["rows"], found["count"], found["different"], found["total_tokens"]) == (2, 3, 2, 48)
    assert found["width"]["max"] == 20 and found["tokens"]["min"] == 16
    assert run_check(DataCheckConfig(data=[str(path)])) == 0
    assert "3 pictures in 2 rows, 1.5 each; 2 different" in capsys.readouterr().out


def test_split_files_keep_their_pictures(files: Path, tmp_path: Path) -> None:
    """Rows whose paths are relative are not copied as they are to a folder where those lead nowhere."""
    rows = [{"images": ["a.png"], "prompt": [{"role": "user", "content": f"hm {n}"}], **ANSWERS} for n in range(4)]
    path, other = written(files, *rows), tmp_path / "elsewhere"
    other.mkdir()
    outputs = {"output_train": str(other / "train.jsonl"), "output_eval": str(other / "eval.jsonl")}
    assert run_split(DataSplitConfig(data=[str(path)], fraction=0.5, **outputs)) == 0
    for name in outputs.values():
        (problem, *_) = read_comparisons(name).problems
        assert problem.kind == "picture outside of its folder" and "--picture-folder" in problem.what
        found = read_comparisons(name, pictures=PictureFolder(files))
        assert not found.problems and all(c.pictures for c in found.comparisons)
