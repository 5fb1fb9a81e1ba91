"""Pictures of items: stored without metadata, shown to those who were shown the item, and exported with the votes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from collect.site import Client, Served, served
from model.vision import write_folder
from prefopt.collect.import_items import items_from_files, items_from_models
from prefopt.config.collect import CollectNewConfig, ImportOptions
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.pictures import decoded
from prefopt.studies.export import ExportOptions, export_rows
from prefopt.studies.items import add_items
from prefopt.studies.study import Study, StudySettings
from prefopt.web.security import POLICY

SECRET = b"taken at home"


@pytest.fixture
def pixels(tmp_path: Path) -> list[np.ndarray]:
    """Of a.png, whose file says where it was taken, and b.png."""
    found = []
    for n, name in enumerate(("a.png", "b.png")):
        found.append(np.random.default_rng(n).integers(0, 255, (12, 20, 3), dtype=np.uint8))
        about = PngImagePlugin.PngInfo()
        about.add_text("Comment", SECRET.decode())
        Image.fromarray(found[-1]).save(tmp_path / name, pnginfo=about)
        assert SECRET in (tmp_path / name).read_bytes()
    return found


@pytest.fixture
def site(tmp_path: Path, pixels: list[np.ndarray]) -> Iterator[Served]:
    """Two items, each of a prompt with one picture and two responses."""
    rows = [
        {"images": [name], "prompt": [{"role": "user", "content": f"What is {name}?"}], "responses": ["a dog", "a cat"]}
        for name in ("a.png", "b.png")
    ]
    rows = [row | {"responses": [[{"role": "assistant", "content": x}] for x in row["responses"]]} for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    study = Study.create(tmp_path / "s.db", StudySettings(title="Pictures", overlap=2))
    found = items_from_files([str(path)], ImportOptions())
    assert not found.problems
    assert add_items(study, found.items) == (2, 0)
    with served(study) as site:
        yield site
    study.close()


def test_a_picture_is_shown_without_metadata(site: Served, pixels: list[np.ndarray]) -> None:
    ann = site.signed_in("Ann")
    page = ann.get("/")
    assert page.text.count("/picture/1/0") == 1 and "data:" not in page.text
    answer = ann.get("/picture/1/0")
    assert answer.status == 200 and answer.headers["content-type"] == "image/png"
    assert answer.headers["content-security-policy"] == POLICY and "data:" not in POLICY
    assert answer.headers["cache-control"] == "no-store"
    assert SECRET not in answer.data
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.data))), pixels[0])
    for missing in ("/picture/1/1", "/picture/2/0", "/picture/9/0", f"/picture/{2**70}/0"):
        assert ann.get(missing).status == 404, missing  # also of an item that Ann was not shown yet
    assert site.signed_in("Lee", lead=True).get("/picture/2/0").status == 200


def test_strangers_see_no_picture(site: Served) -> None:
    site.signed_in("Ann").get("/")
    assert Client(site.port).get("/picture/1/0").status == 401


def test_votes_are_exported_with_pictures(site: Served, pixels: list[np.ndarray]) -> None:
    ann = site.signed_in("Ann")
    assert ann.vote(ann.get("/"), "a1").status == 303
    (row,) = export_rows(site.study, ExportOptions(form="pairs")).rows
    (c,) = parse_comparisons([row], "exported").comparisons
    assert np.array_equal(np.asarray(decoded(c.pictures[0])), pixels[0])
    assert SECRET not in c.pictures[0].data and SECRET not in site.study.path.read_bytes()


def test_drawn_prompts_keep_pictures_in_files(pixels: list[np.ndarray], tmp_path: Path) -> None:
    """Samples lie in a folder of their own and name the pictures of the prompts' folder."""
    model = write_folder("llava", tmp_path / "llava")
    user = [{"role": "user", "content": "What is it?"}]
    rows = [{"images": [name], "prompt": user} for name in ("a.png", "b.png")]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"model": [str(model)], "prompts": [str(path)], "num": 2, "max_new_tokens": 6, "temperature": 2.0}
    config = CollectNewConfig.from_dict({"study": str(tmp_path / "s.db"), "title": "Pictures", **options})
    found = items_from_models(config, tmp_path / "samples")
    assert not found.problems and len(found.items) == 2
