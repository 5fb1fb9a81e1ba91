"""What the page starts: names of files, one command for a run, and the folder that its paths are read from."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prefopt.config.methods import SftConfig
from prefopt.errors import ConfigError
from prefopt.runs.folder import RunFolder
from prefopt.runs.history import read_history
from prefopt.ui.form import file_of, texts_of_run
from prefopt.ui.jobs import Jobs, RunJob, private_folder
from prefopt.ui.run_pages import PREFIX
from prefopt.ui.runs import files_below
from prefopt.ui.samples import Samples
from ui.site import served, token, write_rows, write_run


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path)
    yield found
    for job in found.all():
        if found.alive(job):
            os.kill(job.pid, signal.SIGKILL)


def test_the_file_of_a_run_is_beside_its_folder(tmp_path: Path) -> None:
    for output in ("z", "z/", "z//"):
        config = SftConfig(model="m", data=["d"], output=f"{tmp_path}/{output}")
        assert file_of(config) == tmp_path / "z.yaml", output


def test_a_run_is_started_once(jobs: Jobs) -> None:
    found: list[RunJob] = []
    start = threading.Barrier(4)

    def click() -> None:
        start.wait()
        found.append(jobs.start("run", ["data", "layouts"], run="one"))

    clicks = [threading.Thread(target=click) for _ in range(4)]
    for click_ in clicks:
        click_.start()
    for click_ in clicks:
        click_.join()
    assert len({job.id for job in found}) == len(jobs.all()) == 1
    while jobs.live("one"):
        time.sleep(0.05)
    assert jobs.start("run", ["data", "layouts"], run="one").id != found[0].id


def test_other_options_are_not_written_beside_a_run_that_trains(tmp_path: Path) -> None:
    with served(tmp_path) as site:
        client = site.signed_in()
        data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
        texts = {"model": "prefopt:demo/tiny_imdb", "data": str(data), "output": f"{tmp_path}/n", "beta": "0.3"}
        fields = {f"{PREFIX}{name}": text for name, text in texts.items()} | {"verb": "dpo", "token": ""}
        fields |= {"token": token(client.get("/new")), "action": "write"}
        assert client.post("/new", fields).status == 200
        before = (tmp_path / "n.yaml").read_text()
        site.site.jobs.start("run", ["data", "layouts"], run="n")
        page = client.post("/new", fields | {f"{PREFIX}beta": "0.4", "replace": "1", "action": "start"})
        assert page.status == 422 and (tmp_path / "n.yaml").read_text() == before


def test_a_run_is_gone_on_with_where_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths may be relative, and the page's server may stand anywhere."""
    home, base = tmp_path / "home", tmp_path / "runs"
    for folder in (home, base):
        folder.mkdir()
    write_rows(home / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    write_run(base / "a", upto=5, loss="dpo")
    options = {"model": "owner/model", "data": ["pairs.jsonl", "gone.jsonl"], "output": "a", "loss": "dpo"}
    monkeypatch.chdir(home)
    folder = RunFolder(tmp_path / "made", options, resume=False)
    folder.take()
    folder.remember()
    folder.leave()
    record = json.loads((base / "a" / "run.json").read_text())
    made = json.loads((tmp_path / "made" / "run.json").read_text())
    (base / "a" / "run.json").write_text(json.dumps(record | made | {"status": "interrupted"}))
    monkeypatch.chdir(tmp_path)
    texts = texts_of_run(read_history(base / "a"))
    assert texts["data"] == f"{home / 'pairs.jsonl'}\ngone.jsonl" and texts["model"] == "owner/model"
    with served(base) as site:
        client = site.signed_in()
        page = client.get("/run?name=a")
        assert client.post("/run/resume", {"token": token(page), "run": "a"}).status == 303
        (job,) = site.site.jobs.all()
        assert psutil.Process(job.pid).cwd() == str(home.resolve())
        config = (site.site.jobs.place(job) / "options.yaml").read_text()
        assert "pairs.jsonl" in config and str(home) not in config and str(base / "a") in config


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    base, outside = tmp_path / "runs", tmp_path / "outside.html"
    base.mkdir()
    outside.write_text("secret")
    (base / "own.html").write_text("mine")
    (base / "evil.html").symlink_to(outside)
    (base / "inner.html").symlink_to(base / "own.html")
    assert [path.name for path in files_below(base, [".html"])] == ["inner.html", "own.html"]
    with served(base) as site:
        assert site.signed_in().get("/report?name=evil.html").status == 404


def test_the_folder_of_the_page_is_private_again(tmp_path: Path) -> None:
    (tmp_path / ".prefopt-ui").mkdir(mode=0o755)
    assert private_folder(tmp_path).stat().st_mode & 0o077 == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".prefopt-ui").symlink_to(tmp_path / ".prefopt-ui")
    with pytest.raises(ConfigError, match="is a link or another user's"):
        private_folder(tmp_path / "b")


def test_what_is_known_of_files_does_not_grow_with_their_changes(tmp_path: Path) -> None:
    samples = Samples(tmp_path)
    for count in range(1, 5):
        path = write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "responses": ["x" * count]}])
        assert samples.page(["a.jsonl"], "", 0).rows[0].answers[0].text == "x" * count
    assert len(samples._sniffed) == len(samples._held) == 1
    path.unlink()
    assert samples.files() == [] and not samples._sniffed
