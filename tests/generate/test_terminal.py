"""``prefopt chat`` in a real terminal: with models on disk and with a server, up to its last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from generate.fake_server import serving
from generate.terminal import terminal
from prefopt.cli import main
from prefopt.data.comparisons import read_comparisons
from prefopt.data.validate import check
from train.small import write_model

pytestmark = pytest.mark.slow

READY = "Ctrl-D ends"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models that never stop by themselves within a context that a long answer does not fill."""
    folder = tmp_path_factory.mktemp("models")
    options = {"max_position_embeddings": 4096, "eos_token_id": None}
    return write_model(folder / "one", **options), write_model(folder / "two", seed=1, **options)


def test_a_conversation(models: tuple[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    options = ["--model", models[0], "--max-new-tokens", "8", "--seed", "1", "--device", "cpu", "--threads", "1"]
    with terminal("chat", *options) as t:
        t.wait(READY)
        t.wait("> ")
        t.enter("/help")
        assert "/retry" in t.wait("Ctrl-C stops an answer")
        t.wait("> ")
        t.enter("hello")
        first = t.wait("\n> ").strip()
        t.enter("/retry")
        second = t.wait("\n> ").strip()
        assert first and second and first != second
        t.enter("two \\")
        t.wait("... ")
        t.enter("lines")
        t.wait("\n> ")
        t.enter('"""a')
        t.wait("... ")
        t.enter('b"""')
        t.wait("\n> ")
        t.type("half a line\x03")  # Ctrl-C while typing takes the line away
        t.wait("(Ctrl-D ends)")
        t.wait("> ")
        t.enter(f"/save {saved}")
        t.wait("(saved to")
        t.wait("> ")
        t.type("\x04")
        assert t.end() == 0
    messages = json.loads(saved.read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello", "two \nlines", "a\nb"]
    assert messages[1]["content"].split() == second.split()
    reading = read_comparisons(saved)
    assert reading.layout == "messages" and not any(check(c, "demonstrations") for c in reading.comparisons)


def test_ctrl_c_stops_an_answer_and_not_the_program(models: tuple[str, str]) -> None:
    options = ["--model", models[0], "--max-new-tokens", "3000", "--device", "cpu", "--threads", "1", "--complete"]
    with terminal("chat", *options) as t:
        t.wait(READY)
        t.wait("> ")
        t.enter("Once upon a time")
        t.wait("Once upon a time")  # shown again, with what follows
        t.type("\x03")
        t.wait("(stopped)")
        t.wait("> ")
        t.enter("/exit")
        assert t.end() == 0


def test_blind_votes(models: tuple[str, str], tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    options = ["--model", models[0], "--against", models[1], "--blind", "--votes", str(votes), "--max-new-tokens", "12"]
    with terminal("chat", *options, "--seed", "3", "--device", "cpu", "--threads", "1") as t:
        t.wait("votes are written to")
        t.wait(READY)
        for vote in ("a", "b", "tie"):
            t.wait("> ")
            t.enter(f"question {vote}")
            t.wait("[A]")
            t.wait("[B]")
            t.wait("or skip? ")
            t.enter(vote)
        t.wait("> ")
        t.type("\x04")
        t.wait("3 votes: ")
        assert t.end() == 0
    rows = [json.loads(line) for line in votes.read_text("utf-8").splitlines()]
    assert [row["tiers"] for row in rows] == [[[0], [1]], [[1], [0]], [[0, 1]]]
    one, other, tie = read_comparisons(votes).comparisons
    assert (one.pairs, other.pairs) == (((0, 1),), ((1, 0),)) and [p.kind for p in check(tie, "pairs")] == ["only ties"]
    # What was voted on trains: the file is one of preferences as any other.
    assert main(["dpo", "--model", models[0], "--data", str(votes), "--output", str(tmp_path / "out"), "--device=cpu",
                 "--progress=none", "--max-steps=1"]) == 0  # fmt: skip


def test_a_server_streams_and_is_stopped(models: tuple[str, str]) -> None:
    with serving(pieces=["Grüß", " Gott", *[" und"] * 300], pause=0.05) as server:
        with terminal("chat", "--url", server.url) as t:
            t.wait("tiny at")
            t.wait("> ")
            t.enter("hello")
            t.wait("Grüß Gott")
            t.type("\x03")
            t.wait("(stopped)")
            t.wait("> ")
            server.pieces = ["done"]
            t.enter("again")
            t.wait("done")
            t.wait("> ")
            t.type("\x04")
            assert t.end() == 0
        asked = server.requests[-1][2]["messages"]
    assert asked[0]["content"] == "hello" and asked[1]["content"].startswith("Grüß Gott")
    assert asked[2] == {"role": "user", "content": "again"}
    with terminal("chat", "--model", models[0], "--url", server.url, "--url-model", "tiny", "--threads", "1") as t:
        t.wait("> ")
        t.enter("hello")
        t.wait("cannot be reached")
        t.wait("> ")
        t.type("\x04")
        assert t.end() == 0
