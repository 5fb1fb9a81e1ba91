"""The walls of the local page, its table and curves, samples, the form, and the commands that it starts."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from collect.site import Client
from prefopt.config.tools import UiConfig
from prefopt.core.yaml_file import read_document
from prefopt.errors import ConfigError, RunError
from prefopt.studies.served import lock_of, note_address
from prefopt.studies.study import Study, StudySettings
from prefopt.ui.chats import ChatTopic, Room, Side
from prefopt.ui.jobs import Jobs, RunJob
from prefopt.ui.run_pages import PREFIX
from prefopt.ui.runs import Runs, panels_of, rows_of
from prefopt.ui.serve import _leading_to, serve
from prefopt.ui.site import LANGUAGES
from prefopt.web.security import HEADERS
from ui.site import Served, append_steps, served, some_runs, token, write_rows, write_run

PAGES = ("/", "/run?name=dpo-a", "/new", "/samples", "/data", "/chat", "/more")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Served]:
    with served(some_runs(tmp_path / "runs")) as found:
        yield found


def wait_for(done: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return found


def cookie_of(client: Client) -> str:
    return "; ".join(f"{name}={value}" for name, value in client.cookies.items())


def events(site: Served, client: Client, query: str, count: int) -> list[tuple[str, Any]]:
    """The first ``count`` events of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    connection.request("GET", f"/events?{query}", headers={"Cookie": cookie_of(client)})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    found: list[tuple[str, Any]] = []
    name = ""
    while len(found) < count:
        line = answer.readline().decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, json.loads(line.removeprefix("data: "))))
    answer.close()
    connection.close()
    return found


# -- walls ---------------------------------------------------------------------------------------------------------


def test_without_the_link_there_is_nothing(site: Served) -> None:
    stranger = Client(site.port)
    for path in (*PAGES, "/events?runs=1", "/report?name=x.html"):
        answer = stranger.get(path)
        assert answer.status == 401 and "dpo-a" not in answer.text, path
        assert all(answer.headers[name.lower()] == value for name, value in HEADERS.items())
    assert stranger.get("/enter/wrong").status == 404
    for path in ("/new", "/run/stop", "/data", "/chat", "/chat/say", "/serve", "/report"):
        assert stranger.post(path, {"token": "x"}).status == 401, path
    assert not site.site.jobs.all()


def test_forms_of_other_pages_and_other_hosts_are_refused(site: Served) -> None:
    client = site.signed_in()
    good = token(client.get("/new"))
    fields = {"token": good, "verb": "dpo", "action": "start"}
    assert client.post("/new", fields | {"token": "f" * 64}).status == 403
    assert client.post("/new", fields, {"Origin": "http://evil.example"}).status == 403
    assert client.post("/new", fields, {"Origin": f"http://localhost:{site.port + 1}"}).status == 403
    assert client.get("/", {"Host": "evil.example"}).status == 421
    assert client.post("/new", fields).status == 422  # ours, and incomplete


def test_every_page_is_there_in_both_languages_and_policy(site: Served) -> None:
    client = site.signed_in()
    for language, words in LANGUAGES.items():
        for path in PAGES:
            answer = client.get(path, {"Accept-Language": language})
            assert answer.status == 200 and words["new run"] in answer.text, path
            assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
            assert "style=" not in answer.text and not re.search(r"<script(?! type=)", answer.text)
    for path in ("/run?name=../x", "/run?name=nothing", "/job?id=1", "/report?name=../../etc/passwd", "/nowhere"):
        assert client.get(path).status == 404, path


def test_pages_say_the_same_in_both_languages() -> None:
    assert LANGUAGES["en"].keys() == LANGUAGES["zh"].keys()
    for name, text in LANGUAGES["en"].items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", LANGUAGES["zh"][name])), name


def test_reports_are_shown_without_any_right_of_the_page(site: Served) -> None:
    evil = "<style>p{color:red}</style><script>alert(1)</script><p>report"
    (site.site.base / "reports").mkdir()
    (site.site.base / "reports" / "r.html").write_text(evil)
    (site.site.base.parent / "outside.html").write_text("secret")
    client = site.signed_in()
    assert "reports%2Fr.html" in client.get("/more").text
    answer = client.get("/report?name=reports/r.html")
    assert answer.text == evil
    policy = answer.headers["content-security-policy"]
    assert "sandbox" in policy and "script" not in policy and answer.headers["x-frame-options"] == "DENY"
    assert client.get("/report?name=../outside.html").status == 404


def test_signing_out_ends_the_session(site: Served) -> None:
    client = site.signed_in()
    cookies = dict(client.cookies)
    assert client.post("/leave", {"token": token(client.get("/"))}).status == 200
    client.cookies = cookies
    assert client.get("/").status == 401


# -- the stream ----------------------------------------------------------------------------------------------------


def test_the_stream_tells_the_table_and_what_changes(site: Served) -> None:
    client = site.signed_in()
    (name, table), (other, curves) = events(site, client, "runs=1&curve=dpo-a&curve=kto", 2)
    assert (name, other) == ("runs", "curves") and curves["runs"] == ["dpo-a", "kto"]
    rows = {row["name"]: row for row in table["rows"]}
    assert rows.keys() == {"dpo-a", "dpo-b", "kto", "nested/sft"}
    assert rows["dpo-a"]["options"] == "beta=0.1" and rows["nested/sft"]["status"] == "interrupted"
    assert (rows["nested/sft"]["step"], rows["nested/sft"]["steps"]) == (12, 30)
    assert rows["kto"]["kind"] == "kto" and rows["dpo-a"]["took"] == "1 min 02 s"


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    base = some_runs(tmp_path / "runs")
    runs = Runs(base)
    before, version = runs.look(), runs.version
    runs._looked = -10
    assert runs.look() == before and runs.version == version
    append_steps(base / "nested" / "sft", 13, 20)
    (base / "dpo-b" / "run.json").write_text("{")
    write_run(base / "new", loss="dpo")

    def changed() -> bool:
        runs._looked = -10
        found = runs.look()
        return found["nested/sft"].run.step == 19 and "new" in found and "dpo-b" not in found

    wait_for(changed)
    after = runs.look()
    assert "dpo-b" in runs.damaged()[0] and after["dpo-a"] is before["dpo-a"] and runs.version > version


def test_losses_of_two_kinds_never_share_an_axis(tmp_path: Path) -> None:
    found = Runs(some_runs(tmp_path / "runs")).look()
    shown = {name: f.run for name, f in found.items()}
    panels = panels_of(shown)
    kinds = {n: f.run.loss_kind for n, (name, f) in enumerate(found.items())}
    losses = [p for p in panels if p["unit"] == "loss"]
    assert len(losses) == 3
    for panel in losses:
        assert len({kinds[s["run"]] for s in panel["series"]}) == 1, panel["title"]
    dpo = next(p for p in losses if len(p["series"]) == 2)
    assert dpo["line_name"] == "ln 2" and len(dpo["series"][0]["marks"]) == 3 and dpo["words"]
    # The accuracy of both kinds is one number: they are laid over each other.
    assert max(len(p["series"]) for p in panels if p["unit"] == "fraction of rows") == 3
    assert panels_of(shown, "epoch")[0]["series"][0]["points"][-1][0] == pytest.approx(1.0)
    assert [row["name"] for row in rows_of(found)] == list(found)


def test_a_chat_is_told_whole_and_then_by_what_it_grows() -> None:
    woken: list[int] = []
    room = Room(lambda: woken.append(1))
    pieces = iter(["Hel", "lo", " there"])

    class Echo:
        name = "echo"

        def answer(self, messages: Any, attempt: int) -> Iterator[str]:
            assert messages[-1].content == "hi"
            yield from pieces

    with pytest.raises(ConfigError):
        room.say("nobody is here")
    room.sides, room.state = [Side(Echo())], "ready"
    topic = ChatTopic(room)
    assert topic.changes()[0][1]["state"] == "ready" and topic.changes() == []
    with pytest.raises(ConfigError):
        room.say("  ")
    room.say("hi")
    wait_for(lambda: room.state == "ready")
    ((name, chat),) = topic.changes()
    assert name == "chat" and [t["text"] for t in chat["sides"][0]["turns"]] == ["hi", "Hello there"] and len(woken) > 3
    room.sides[0].streaming = True
    room.sides[0].messages[-1] = type(room.sides[0].messages[-1])("assistant", "Hello there!")
    assert topic.changes() == [("chunk", {"side": 0, "text": "!"})] and topic.changes() == []


def test_a_message_that_nobody_answers_is_given_back() -> None:
    room = Room(lambda: None)

    class Broken:
        name = "broken"

        def answer(self, messages: Any, attempt: int) -> Iterator[str]:
            raise RunError("the server is away; start it")
            yield ""

    room.sides, room.state = [Side(Broken())], "ready"
    room.say("a long message")
    wait_for(lambda: room.state == "ready")
    values = room.values()
    assert values["problem"] == "the server is away; start it" and values["draft"] == "a long message"
    assert values["sides"][0]["turns"] == []


# -- samples -------------------------------------------------------------------------------------------------------


def test_samples_stand_side_by_side_and_are_searched(site: Served) -> None:
    client = site.signed_in()
    page = client.get("/samples?file=dpo-a/samples.jsonl").text
    assert "before training" in page and "after 19 你好" in page and "after 20" not in page
    assert "before 1 &lt;b&gt;" in page and "1 to 20" in page
    second = client.get("/samples?file=dpo-a/samples.jsonl&start=40").text
    assert "after 44" in second and "after 39" not in second
    found = client.get("/samples?file=dpo-a/samples.jsonl&q=AFTER+7").text
    assert "<mark>after 7</mark>" in found and "after 8" not in found and "1 rows" in found
    beside = client.get("/samples?file=dpo-a/samples.jsonl&file=other.jsonl").text
    assert "elsewhere 3" in beside and "elsewhere 77" not in beside and "44 prompts are in one of the files" in beside
    assert "choose one of the list" in client.get("/samples?file=../../etc/passwd").text


# -- the form ------------------------------------------------------------------------------------------------------


def test_mistakes_stand_at_their_fields_and_nothing_is_lost(site: Served) -> None:
    client = site.signed_in()
    fields = {"token": token(client.get("/new")), "verb": "dpo", "action": "start"}
    texts = {"model": "prefopt:demo/tiny_imdb", "data": "a.jsonl\nb.jsonl", "beta": "much"}
    page = client.post("/new", fields | {f"{PREFIX}{name}": text for name, text in texts.items()})
    assert page.status == 422 and "--output is missing" in page.text and "a.jsonl\nb.jsonl" in page.text
    texts["output"] = str(site.site.base / "n")
    page = client.post("/new", fields | {f"{PREFIX}{name}": text for name, text in texts.items()})
    assert "--beta is &#39;much&#39;; it must be a number above 0" in page.text and 'value="much"' in page.text
    texts |= {"beta": "0.3", "output": str(site.site.base.parent / "elsewhere")}
    page = client.post("/new", fields | {f"{PREFIX}{name}": text for name, text in texts.items()})
    assert page.status == 422 and "is not below" in page.text and not site.site.jobs.all()


def test_the_form_writes_a_file_that_says_the_same(site: Served) -> None:
    client, base = site.signed_in(), site.site.base
    data = write_rows(base.parent / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    texts = {"model": "prefopt:demo/tiny_imdb", "data": str(data), "output": str(base / "n"), "beta": "0.3"}
    texts |= {"lora": "true", "loss_options": "", "track": "tensorboard"}
    fields = {f"{PREFIX}{name}": text for name, text in texts.items()}
    fields |= {"token": token(client.get("/new")), "verb": "dpo", "action": "write"}
    page = client.post("/new", fields)
    assert page.status == 200 and f"prefopt dpo --config {base / 'n.yaml'}" in page.text
    written = read_document(str(base / "n.yaml"))
    assert (written["beta"], written["lora"], written["track"], written["data"]) == (
        0.3,
        True,
        ["tensorboard"],
        [str(data)],
    )
    assert client.post("/new", fields).status == 200  # the same file
    page = client.post("/new", fields | {f"{PREFIX}beta": "0.4"})
    assert page.status == 422 and "holds other options" in page.text
    assert read_document(str(base / "n.yaml"))["beta"] == 0.3
    assert client.post("/new", fields | {f"{PREFIX}beta": "0.4", "replace": "1"}).status == 200
    assert read_document(str(base / "n.yaml"))["beta"] == 0.4
    like = client.get("/new?from=dpo-b").text
    assert 'name="o.beta" value="0.5"' in like and "run-1" in like


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path)
    yield found
    for job in found.all():
        if found.alive(job):
            os.kill(job.pid, signal.SIGKILL)


def test_a_command_outlives_its_server_and_is_found_again(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.start("layouts", ["data", "layouts"])
    wait_for(lambda: job.ended)
    assert (tmp_path / ".prefopt-ui").stat().st_mode & 0o077 == 0  # logs hold links of voting pages
    assert job.status == 0 and "canonical" in jobs.log(job, 0)[1]
    running = sleeping(jobs)
    assert os.getsid(running.pid) == running.pid != os.getsid(0)
    again = Jobs(tmp_path)
    found = again.get(running.id)
    assert found is not None and again.alive(found) and again.state(found)["state"] == "running"
    assert again.stop(found) and not again.stop(found)  # a second signal would kill a training
    wait_for(lambda: not again.alive(found))
    ended = again.get(job.id)
    assert ended is not None and ended.status == 0 and not again.alive(ended)


def sleeping(jobs: Jobs) -> RunJob:
    """A command that runs until it is stopped."""
    Study.create(jobs.base / "s.db", StudySettings(title="T")).close()
    job = jobs.start("collect serve", ["collect", "serve", str(jobs.base / "s.db"), "--port", "0"])
    wait_for(lambda: "/join/" in jobs.log(job, 0)[1])
    return job


def test_a_number_that_went_to_another_process_is_not_stopped(jobs: Jobs) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        try:
            job = RunJob(
                id="x", kind="run", words=[], pid=other.pid, born=psutil.Process(other.pid).create_time() - 100
            )
            assert not jobs.alive(job) and not jobs.stop(job) and other.poll() is None
        finally:
            other.kill()


def test_a_study_that_is_served_has_a_link(site: Served) -> None:
    client, study = site.signed_in(), site.site.base / "votes.db"
    Study.create(study, StudySettings(title="T")).close()
    assert 'action="/serve"' in client.get("/more").text
    with lock_of(study):
        note_address(study, "http://127.0.0.1:8700")
        page = client.get("/more").text
        assert 'href="http://127.0.0.1:8700"' in page and 'action="/serve"' not in page


def test_runs_of_others_have_no_stop(site: Served) -> None:
    client = site.signed_in()
    with FileLock(site.site.base / "nested" / "sft" / ".lock"):
        wait_for(lambda: "not started here" in client.get("/run?name=nested/sft").text)
        page = client.get("/run?name=nested/sft")
        assert 'id="stop"' not in page.text and 'id="resume"' not in page.text
        assert client.post("/run/stop", {"token": token(page), "job": "nested/sft"}).status == 404
        assert client.post("/run/resume", {"token": token(page), "run": "nested/sft"}).status == 404


def test_the_server_stops_while_pages_listen(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt", "ui", "runs", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(re.search(r":(\d+)/enter/", line)[1])  # type: ignore[index]
    client = Client(port)
    assert client.get("/enter/" + line.strip().rpartition("/")[2]).status == 200
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(
        "GET", "/events?runs=1", headers={"Cookie": "; ".join(f"{n}={v}" for n, v in client.cookies.items())}
    )
    assert connection.getresponse().status == 200
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and time.monotonic() - started < 4
    connection.close()
    process.stdout.close()


def test_the_browser_is_opened_without_telling_others_the_link(tmp_path: Path) -> None:
    link = "http://127.0.0.1:1/enter/secret"
    address = _leading_to(link, tmp_path)
    assert address.startswith("file://") and "secret" not in address
    path = Path(address.removeprefix("file://"))
    assert f"url={link}" in path.read_text() and path.parent.stat().st_mode & 0o077 == 0


def test_what_cannot_be_served_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        serve(UiConfig(folder=str(tmp_path / "no")))
    with served(tmp_path) as site, pytest.raises(ConfigError, match=f"port {site.port}: is unavailable"):
        serve(UiConfig(folder=str(tmp_path), port=site.port))
