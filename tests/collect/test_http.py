"""The server without a browser: sessions by form posts alone, and everything forged is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from collect.site import Client, Served, served
from prefopt.studies.study import Study
from prefopt.studies.votes import StoredVote, stored_votes
from prefopt.web.security import HEADERS, Buckets, RateLimit
from studies.small import new_item, new_study


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Served]:
    study = new_study(tmp_path / "s.db", 4, overlap=2, title="A study", tags=("style", "safety"))
    with served(study) as found:
        yield found
    study.close()


def stored(study: Study) -> list[StoredVote]:
    with study.reading() as connection:
        return list(stored_votes(connection))


def test_a_session_by_form_posts_alone(site: Served) -> None:
    ann = Client(site.port)
    link = site.link("Ann")
    assert ann.get("/").status == 401
    for _ in range(2):  # looking at a link uses nothing up
        page = ann.get(link)
        assert page.status == 200 and "Welcome, Ann" in page.text and not ann.cookies
    answer = ann.post("/join", {"secret": page.field("secret", "/join")})
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "Path=/" in cookie
    page = ann.get("/")
    assert "Item 1" in page.text and "question 0" in page.text and page.field("ticket")
    answer = ann.vote(page, "b3", rationale="because\r\nof that", tag=["style"], active="0.2")
    assert (answer.status, answer.headers["location"]) == (303, "/?notice=saved")
    (j,) = stored(site.study)
    assert j.vote.tiers == ((j.shown[1],), (j.shown[0],)) and j.vote.strength == 3
    assert (j.vote.rationale, j.vote.tags, j.active) == ("because\nof that", ("style",), 0.2)
    assert ann.vote(page, "a1").headers["location"] == "/?notice=already+stored"  # sent again: nothing changes
    assert stored(site.study) == [j]
    page = ann.get("/?notice=saved")
    assert "Item 2" in page.text and "Saved." in page.text
    back = {"token": page.field("token", "/undo"), "ticket": page.field("ticket", "/undo")}
    assert ann.post("/undo", back).headers["location"] == "/?notice=undone"
    assert ann.post("/undo", back).headers["location"] == "/?notice=nothing+to+undo"
    assert stored(site.study) == []
    page = ann.get("/")
    assert "question 0" in page.text
    for choice in ("tie", "bad", "skip", "a2"):
        assert ann.vote(ann.get("/"), choice, reason="outside").status == 303
    said = [j.vote for j in stored(site.study)]
    assert len(said[0].tiers) == 1 and said[1].all_bad and said[2].skipped == "outside" and said[3].strength == 2
    page = ann.get("/")
    assert "Nothing is left" in page.text
    assert ann.post("/leave", {"token": page.field("token", "/leave")}).status == 200
    ann.cookies = {k: v for k, v in ann.cookies.items() if v.strip('"')}
    assert ann.get("/").status == 401


def test_rankings_by_form_posts(tmp_path: Path) -> None:
    with new_study(tmp_path / "s.db", 2, 4) as study, served(study) as site:
        ann = site.signed_in("Ann")
        page = ann.get("/")
        refused = ann.vote(page, "rank", rank0="1", rank1="", rationale="kept")
        assert refused.status == 422 and "rank at least two responses" in refused.text and "kept" in refused.text
        assert not stored(study) and refused.field("ticket") == page.field("ticket")
        assert ann.vote(page, "rank", rank0="2", rank1="1", rank2="2", rank3="").status == 303
        (j,) = stored(study)
        assert j.vote.tiers == ((j.shown[1],), (j.shown[0], j.shown[2]))
        for fields in ({"rank0": "5", "rank1": "1"}, {"rank0": ["1", "2"], "rank1": "1"}, {"rank0": "x", "rank1": "1"}):
            assert ann.vote(ann.get("/"), "rank", **fields).status == 422  # type: ignore[arg-type]
        assert ann.vote(ann.get("/"), "a2").status == 422 and len(stored(study)) == 1


def test_languages_and_colours(site: Served) -> None:
    ann = site.signed_in("Ann")
    page = ann.get("/", {"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.5"})
    assert "哪个回答更好？" in page.text and 'lang="zh-Hans"' in page.text
    token = page.field("token", "/display")
    assert ann.post("/display", {"language": "en", "theme": "dark", "back": "/", "token": token}).status == 303
    page = ann.get("/", {"Accept-Language": "zh-CN"})
    assert "Which response is better?" in page.text and 'data-theme="dark"' in page.text
    fields = {"language": "xx", "theme": "<b>", "back": "//evil.example", "token": token}
    assert ann.post("/display", fields).headers["location"] == "/"
    assert 'data-theme="dark"' in ann.get("/").text
    assert ann.post("/display", {"language": "zh"}).status == 403  # without the token of the session
    assert Client(site.port).post("/display", {"language": "zh"}).status == 303


def test_every_answer_carries_the_same_policy(site: Served) -> None:
    ann = site.signed_in("Ann", lead=True)
    stranger = Client(site.port)
    answers = [
        ann.get("/"),
        ann.get("/lead"),
        ann.get("/lead/item/1"),
        ann.get("/static/style.css"),
        ann.get("/static/vote.js"),
        ann.get("/favicon.ico"),
        ann.get("/none"),
        ann.post("/vote", {}),
        ann.vote(ann.get("/"), "a1"),
        stranger.get("/"),
        stranger.get("/join/none"),
        stranger.get("/", {"Host": "evil.example"}),
        stranger.send("PUT", "/"),
        stranger.post("/vote", {"x": "y" * 70_000}),
    ]
    assert [a.status for a in answers] == [200, 200, 200, 200, 200, 200, 404, 403, 303, 401, 404, 421, 405, 413]
    for answer in answers:
        assert {k: v for k, v in HEADERS.items() if answer.headers.get(k.lower()) != v} == {}
        assert "server" not in answer.headers and "no-" in answer.headers["cache-control"]
        if answer.text.startswith("<!doctype"):
            assert not re.search(r"<script(?! src=\"/static/vote.js\">)|\son\w+=|style=|https?://", answer.text)


FORGED_HEADERS = {
    "other host": ({"Host": "evil.example"}, 421),
    "own name of another": ({"Host": "127.0.0.1.evil.example"}, 421),
    "other port": ({"Host": "127.0.0.1:1"}, 421),
    "no port": ({"Host": "127.0.0.1"}, 421),
    "other origin": ({"Origin": "http://evil.example"}, 403),
    "null origin": ({"Origin": "null"}, 403),
    "longer origin": ({"Origin": "http://127.0.0.1.evil.example"}, 403),
    "empty origin": ({"Origin": ""}, 403),
    "other site": ({"Sec-Fetch-Site": "cross-site"}, 403),
    "same site, other origin": ({"Sec-Fetch-Site": "same-site"}, 403),
    "json": ({"Content-Type": "application/json"}, 415),
    "plain text": ({"Content-Type": "text/plain"}, 415),
    "parts": ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    "no cookie": ({"Cookie": "a=b"}, 401),
}


def test_forged_headers_are_refused(site: Served) -> None:
    ann = site.signed_in("Ann")
    page = ann.get("/")
    fields = {"token": page.field("token"), "ticket": page.field("ticket"), "choice": "a1"}
    for name, (headers, status) in FORGED_HEADERS.items():
        assert ann.post("/vote", fields, headers).status == status, name
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ann.send("POST", "/vote", urlencode(fields).encode(), form).status == 403, "no origin"
    assert not stored(site.study) and ann.post("/vote", fields).status == 303


def test_forged_tokens_cookies_and_tickets_are_refused(site: Served) -> None:
    ann, bob = site.signed_in("Ann"), site.signed_in("Bob")
    mine, other = ann.get("/"), bob.get("/")
    name, secret = next(iter(ann.cookies.items()))
    good = {"token": mine.field("token"), "ticket": mine.field("ticket"), "choice": "a1"}
    wrong = [
        (good | {"token": ""}, 403),
        (good | {"token": other.field("token")}, 403),
        (good | {"token": "\ud800"}, 403),
        (good | {"token": [good["token"], good["token"]]}, 400),
        ({k: v for k, v in good.items() if k != "token"}, 403),
        (good | {"ticket": other.field("ticket")}, 422),
        (good | {"ticket": "1"}, 422),
        (good | {"ticket": "' OR 1=1 --"}, 422),
        (good | {"choice": "a4"}, 422),
        (good | {"choice": ""}, 422),
        (good | {"choice": "rank", "rank0": "1"}, 422),
        (good | {"tag": ["made up"]}, 422),
        (good | {"rationale": "x" * 4001}, 422),
        (good | {f"f{n}": "" for n in range(300)}, 400),
    ]
    for fields, status in wrong:
        assert ann.post("/vote", fields).status == status, fields
    for cookie in (secret[:-1], secret + "x", secret[::-1], "", "\\" * 50, other.field("token")):
        assert ann.post("/vote", good, {"Cookie": f"{name}={cookie}"}).status == 401
    for form in ("/undo", "/leave"):
        assert ann.post(form, {"token": other.field("token")}).status == 403
    assert not stored(site.study) and ann.post("/vote", good).status == 303


NO_PATHS = (
    "/static/../app.py /static/..%2fapp.py /static/%2e%2e/app.py /static/..%5capp.py /static//etc/passwd"
    " /static/style.css%00.py /static/ /../../etc/passwd /s.db /lead/item/99999999999999999999999 /lead/item/-1"
    " /lead/item/0 /lead/item/1/ /join/%ff%fe /vote //evil.example/"
).split()


def test_paths_lead_nowhere_else(site: Served) -> None:
    lead = site.signed_in("Lee", lead=True)
    for path in (*NO_PATHS, "/join/" + "x" * 500):
        answer = lead.get(path)
        assert answer.status in (404, 405) and "import" not in answer.text and "root:" not in answer.text, path
        assert site.study.path.name not in answer.text, path


def test_what_is_too_long_too_much_or_too_often_is_refused(site: Served, tmp_path: Path) -> None:
    ann = site.signed_in("Ann")
    assert ann.get("/?x=" + "y" * 3000).status == 414
    assert ann.send("POST", "/vote", b"x" * 70_000, {"Content-Length": "70000"}).status == 403  # no origin
    with served(site.study, RateLimit(per_second=0.5, burst=5)) as slow:
        statuses = [Client(slow.port).get("/").status for _ in range(8)]
        assert statuses[:5] == [401] * 5 and set(statuses[5:]) == {429}
    stranger = Client(site.port)
    statuses = [stranger.get(f"/join/guess{n}").status for n in range(130)]
    assert statuses.count(404) < 130 and 429 in statuses


def test_buckets_fill_again_and_do_not_grow() -> None:
    buckets = Buckets(RateLimit(per_second=2, burst=3))
    assert [buckets.take("a", 0.0) for _ in range(3)] == [0, 0, 0] and buckets.take("a", 0.0) == 0.5
    assert buckets.take("b", 0.0) == 0 and buckets.take("a", 0.5) == 0 and buckets.take("a", 0.6) > 0
    for n in range(10_050):
        buckets.take(f"n{n}", 100.0 + n)
    assert len(buckets._held) < 10_010


def test_the_lead_alone_sees_figures(site: Served) -> None:
    ann, lead = site.signed_in("Ann"), site.signed_in("Lee", lead=True)
    ann.vote(ann.get("/"), "a3", rationale="for the lead's eyes")
    assert ann.get("/lead").status == 403 and ann.get("/lead/item/1").status == 403
    page = lead.get("/lead")
    assert page.status == 200 and "1 of 8 votes" in page.text and "<svg" in page.text
    assert "eyes" in lead.get("/lead/item/1").text and "model-0" in lead.get("/lead/item/1").text
    ann.vote(ann.get("/"), "tie")
    assert "2 of 8 votes" in lead.get("/lead").text


def test_annotators_see_neither_models_nor_votes_of_others_nor_what_is_gold(tmp_path: Path) -> None:
    gold = [new_item(70 + n, gold=((1,), (0,))) for n in range(2)]
    with new_study(tmp_path / "s.db", 4, gold=gold, overlap=2, gold_every=2) as study, served(study) as site:
        for name in ("Ann", "Bob"):
            client = site.signed_in(name)
            while "Nothing is left" not in (page := client.get("/")).text:
                assert not re.search(r"model-|Ann|Bob|secret reason|gold|prompts\.jsonl|answer \d\.\d.*\[", page.text)
                client.vote(page, "a1", rationale="secret reason")
        assert len(stored(study)) == 12


def test_no_trace_reaches_the_browser(
    site: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("inner words")

    ann = site.signed_in("Ann")
    monkeypatch.setattr("prefopt.collect.app.next_item", broken)
    with caplog.at_level(logging.ERROR, "prefopt.collect"):
        answer = ann.get("/")
    assert answer.status == 500 and "votes are safe" in answer.text
    assert "inner words" not in answer.text and "Traceback" not in answer.text
    assert "inner words" in caplog.text and "Traceback" in caplog.text


def test_a_full_disk_is_told_and_the_vote_can_be_sent_again(site: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.errors import StudyError

    def full(study: Study, *_: object, **__: object) -> None:
        raise StudyError(f"{study.path}: the disk is full, so nothing was stored; free some space and try again")

    ann = site.signed_in("Ann")
    page = ann.get("/")
    with monkeypatch.context() as patch:
        patch.setattr("prefopt.collect.app.record", full)
        answer = ann.vote(page, "a1")
    assert answer.status == 503 and "the disk is full" in answer.text and str(site.study.path) not in answer.text
    assert not stored(site.study)
    assert ann.vote(page, "a1").status == 303 and len(stored(site.study)) == 1
