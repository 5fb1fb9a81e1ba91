"""Chatting with a server: what is asked, what comes back, what is said where it fails."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from generate.fake_server import serving
from prefopt.errors import ConfigError, RunError
from prefopt.generate.chat_model import ContextLengthError, Messages, RemoteChatModel
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
