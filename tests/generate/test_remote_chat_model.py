"""Chatting with a server: what is asked, what comes back, what is said where it fails."""

from __future__ import annotations

import pickle
import socket
from typing import Any

import pytest

from generate.fake_server import serving
from prefopt import errors
from prefopt.core.endpoint import Endpoint, ServerRefusal, Unreachable, base_url
from prefopt.errors import ConfigError, RunError
from prefopt.generate.chat_model import ContextLengthError, Messages, RemoteChatModel
from prefopt.generate.judged import CachedJudge
from prefopt.records import Message

TURNS: Messages = (Message("system", "s"), Message("user", "hi"))


def talker(url: str, model: str | None = "tiny", key: str | None = None, **options: Any) -> RemoteChatModel:
    return RemoteChatModel(url, model, key_variable=key, options=options)


def test_an_answer_comes_in_pieces_and_the_request_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc")
    with serving() as server:
        remote = talker(server.url, key="SECRET", max_tokens=7, seed=3)
        assert remote.name == f"tiny at {server.url.removeprefix('http://')}"
        assert list(remote.answer(TURNS, 2)) == ["Hel", "lo ", "wörld"]
        path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer abc"
    assert body == {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "seed": 5,
    }


def test_text_is_continued_by_the_older_interface() -> None:
    with serving() as server:
        assert "".join(talker(f"{server.url}/v1/").complete("Once", 0)) == "Hello wörld"
        assert server.requests[0][0] == "/v1/completions" and server.requests[0][2]["prompt"] == "Once"


@pytest.mark.parametrize("path", ["", "/v1/", "/v1/chat/completions"])
def test_urls_as_people_copy_them(path: str) -> None:
    with serving(streams=False) as server:
        assert list(talker(server.url + path).answer(TURNS, 0)) == ["Hello wörld"]
        assert server.requests[0][0] == "/v1/chat/completions"


def test_reasoning_kept_apart_is_shown_as_models_write_it() -> None:
    parts = ['{"reasoning_content": "hm"}', '{"reasoning_content": "!"}', '{"content": "yes"}', '{"content": "."}']
    events = [f'data: {{"choices": [{{"delta": {part}}}]}}' for part in parts]
    with serving(events=[*events, "data: [DONE]", "data: never"]) as server:
        assert "".join(talker(server.url).answer(TURNS, 0)) == "<think>\nhm!\n</think>\n\nyes."


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with serving() as server:
        assert talker(server.url, None).name.startswith("tiny at ")
    with serving(models=["a", "b"]) as server, pytest.raises(ConfigError, match=r"--url-model is missing.* a, b"):
        talker(server.url, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"status": 401, "message": "bad key"}, r"answers 401 \(bad key\)"),
        ({"status": 500}, "answers 500"),
        ({"events": ['data: {"error": {"message": "out of memory"}}']}, "out of memory"),
        ({"events": ["data: {broken"]}, "broke off"),
        ({"breaks": True, "events": ['data: {"choices": [{"delta": {"content": "x"}}]}']}, "broke off"),
    ],
)
def test_what_goes_wrong_is_one_line(options: dict[str, Any], said: str) -> None:
    with serving(**options) as server, pytest.raises(RunError, match=said) as error:
        list(talker(server.url).answer(TURNS, 0))
    assert "\n" not in str(error.value)


def test_a_conversation_that_is_too_long_is_told_apart() -> None:
    with serving(limit=1) as server, pytest.raises(ContextLengthError, match="context length"):
        list(talker(server.url).answer(TURNS, 0))


def test_no_server_no_url_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=r"cannot be reached .* is the server running"):
        list(talker(f"http://127.0.0.1:{port}").answer(TURNS, 0))
    for url in ("localhost:8000", "file:///etc/passwd", "ftp://x/y", ""):
        with pytest.raises(ConfigError, match="should begin with http"):
            talker(url)
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(ConfigError, match="--url-key NOT_THERE"):
        talker("http://localhost", key="NOT_THERE")


def test_an_answer_that_is_not_wanted_any_more_closes_the_connection() -> None:
    with serving(pieces=["x"] * 200, pause=0.05) as server:
        pieces = talker(server.url).answer(TURNS, 0)
        assert next(pieces) == "x"
        pieces.close()  # the server would hang on shutdown otherwise


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_is_not_sent_to_where_a_server_redirects(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc")
    with serving() as other, serving(redirects=(status, f"{other.url}/v1")) as server:
        remote = talker(server.url, key="SECRET")
        with pytest.raises(RunError, match=rf"it redirects to {other.url}/v1; name that URL"):
            list(remote.answer(TURNS, 0))
        with pytest.raises(RunError, match="name that URL"):
            talker(server.url, None, key="SECRET")
        assert not other.requests


@pytest.mark.parametrize("key", ["sk-1\r\nX: y", "sk 1", "sk-\xfc", "sk-\u20ac"])
def test_a_key_that_cannot_be_sent_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", key)
    with pytest.raises(ConfigError, match="--url-key SECRET: the key in this environment variable contains") as error:
        talker("http://localhost", key="SECRET")
    assert "sk" not in str(error.value)
    monkeypatch.setenv("SECRET", " sk-1\r\n")
    assert Endpoint("http://localhost", key_variable="SECRET").headers["Authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("url", ["http://[::1/v1", "http://h:x/v1", "http://h:99999", "http://:8000", "http://a..ü:1"])
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--teacher .* is not the address of a server"):
        base_url(url, "--teacher")


def test_addresses_beyond_ascii_and_with_names() -> None:
    assert base_url("http://müller.de:80/ü/é%20x") == "http://xn--mller-kva.de:80/%C3%BC/%C3%A9%20x"
    assert base_url("http://[::1]:8000") == "http://[::1]:8000/v1"
    for url in ("http://me:pass@host/v1", "https://pass@host", "ftp://me:pass@host", "http://me:pa/pass@host"):
        with pytest.raises(ConfigError) as error:
            base_url(url)
        assert "pa" not in str(error.value).replace("password", "")


def test_a_judge_names_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    given: dict[str, Any] = {"instructions": "", "valid": bool}
    with pytest.raises(ConfigError, match=r"^--judge-key NOPE"):
        CachedJudge("http://localhost", "m", key_variable="NOPE", **given)
    with pytest.raises(ConfigError, match=r"^--judge-url localhost:8000"):
        CachedJudge("localhost:8000", "m", key_variable=None, **given)
    with serving(models=["a", "b"]) as server, pytest.raises(ConfigError, match=r"^--judge-model is missing"):
        CachedJudge(server.url, None, key_variable=None, **given)


def test_a_judge_counts_questions_that_were_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the attempts to ask one."""
    replies = iter([False, False, True, True])

    def answer(self: RemoteChatModel, messages: Any, attempt: int) -> Any:
        if not next(replies):
            raise Unreachable("http://localhost cannot be reached")
        yield "yes"

    monkeypatch.setattr(RemoteChatModel, "answer", answer)
    given: dict[str, Any] = {"key_variable": None, "instructions": "", "valid": bool, "pause": 0.0}
    judge = CachedJudge("http://localhost", "counted", **given)
    assert judge.answers(["one", "two", "one"], at_once=1) == ["yes"] * 3
    assert judge.answers(["one"]) == ["yes"]
    assert (judge.asked, judge.cached) == (2, 1)


def test_errors_reach_other_processes_as_they_are() -> None:
    every, left = set(), [errors.PrefoptError]
    while left:
        every.add(kind := left.pop())
        left += kind.__subclasses__()
    given: dict[type, tuple[Any, ...]] = {
        ServerRefusal: ("http://u", 404, "none"),
        errors.ConfigErrors: ("two", ["one", "two"]),
        errors.DataError: ("bad",),
        errors.Diverged: ("far", "a lower rate"),
        errors.Interrupted: ("stopped", 15),
    }
    assert {*given} <= every
    for kind in every:
        error = kind(*given[kind]) if kind in given else kind.__new__(kind, "what")
        vars(error)["more"] = kind.__name__
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
