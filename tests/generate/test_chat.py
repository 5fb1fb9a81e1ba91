"""Conversations with talkers that say what a test wants: commands, history, votes, what Ctrl-C does."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.vision import picture
from prefopt.chat.conversation import Chat, VoteFile
from prefopt.chat.input import LineReader
from prefopt.data.comparisons import read_comparisons
from prefopt.errors import RunError
from prefopt.generate.chat_model import ContextLengthError, Messages, drop_oldest
from prefopt.records import PICTURE, Message

STOP, FAIL = "\x03", "\x00"


class Echo:
    """Answers with what it was asked, in words; ``limit`` characters are all that it takes in."""

    def __init__(self, name: str, limit: int = 10**6) -> None:
        self.name, self.limit = name, limit
        self.seen: list[list[tuple[str, str]]] = []

    def answer(self, messages: Messages, attempt: int) -> Iterator[str]:
        if sum(len(m.content) for m in messages) > self.limit:
            raise ContextLengthError("too long")
        self.seen.append([(m.role, m.content) for m in messages])
        yield from self._said(f"{self.name}{attempt}: {messages[-1].content}")

    def complete(self, text: str, attempt: int) -> Iterator[str]:
        self.seen.append([("text", text)])
        yield from self._said(f"<{self.name}{attempt}>")

    def _said(self, text: str) -> Iterator[str]:
        for word in text.split(" "):
            if STOP in word:
                raise KeyboardInterrupt
            if FAIL in word:
                raise RunError("it is gone")
            yield word + " "


def chat(typed: str, *talkers: Echo, **options: Any) -> tuple[Chat, str]:
    out = io.StringIO()
    found = Chat(talkers, LineReader(io.StringIO(typed), None), out, **options)
    found.run()
    return found, out.getvalue()


def history(found: Chat, side: int = 0) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in found.participants[side].messages]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_history_system_retry_and_reset_reach_the_model() -> None:
    talker = Echo("m")
    found, shown = chat("/system be kind\none\ntwo\n/retry\n/retry\n/system\nthree\n/reset\nfour\n", talker)
    assert talker.seen[0] == [("system", "be kind"), ("user", "one")]
    assert talker.seen[1][1:] == [("user", "one"), ("assistant", "m0: one"), ("user", "two")]
    assert talker.seen[1] == talker.seen[2] == talker.seen[3]
    assert talker.seen[4][0] == ("user", "one") and talker.seen[4][-2:] == [("assistant", "m2: two"), ("user", "three")]
    assert history(found) == [("user", "four"), ("assistant", "m0: four")]
    assert "m1: two" in shown and "m2: two" in shown and "(a new conversation)" in shown


def test_messages_of_several_lines_and_with_a_slash() -> None:
    talker = Echo("m")
    chat('one \\\ntwo\n"""a\n\n/b\nc"""\n"""d"""\n//path\n\n   \n', talker)
    assert [seen[-1][1] for seen in talker.seen] == ["one \ntwo", "a\n\n/b\nc", "d", "/path"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    talker = Echo("m")
    found, shown = chat(f"well then {STOP} more\nnext\n", talker)
    assert history(found)[1] == ("assistant", "m0: well then") and "(stopped)" in shown
    assert history(found)[-1] == ("assistant", "m0: next")


def test_where_no_answer_comes_the_message_is_taken_back() -> None:
    talker = Echo("m")
    found, shown = chat(f"one\na {FAIL}\ntwo\n", talker)
    assert "error: it is gone" in shown
    assert history(found) == [("user", "one"), ("assistant", "m0: one"), ("user", "two"), ("assistant", "m0: two")]

    class Silent(Echo):
        def answer(self, messages: Messages, attempt: int) -> Iterator[str]:
            yield "  "

    found, shown = chat("one\n", Silent("m"))
    assert history(found) == [] and "the message is removed" in shown


def test_a_mistake_is_an_error_line_and_ends_nothing() -> None:
    for typed, named in (
        ("/retri", "/retri; did you mean /retry?"),
        ("/what", "/help"),
        ("/retry", "to answer again"),
        ("/save", "name of a file"),
        ("/save x", "to save"),
    ):
        _, shown = chat(f"{typed}\nhello\n", Echo("m"))
        assert shown.startswith("error: ") and named in shown.splitlines()[0] and "m0: hello" in shown


def test_help_and_exit() -> None:
    talker = Echo("m")
    _, shown = chat("/help\n/exit\nnever\n", talker)
    assert all(name in shown for name in ("/system", "/reset", "/retry", "/save", "Ctrl-C")) and not talker.seen


def test_saved_conversations_are_what_the_data_room_reads(tmp_path: Path) -> None:
    path = tmp_path / "saved" / "talk.jsonl"
    _, shown = chat(f"/system s\nfirst é\n/save {path}\n/reset\nsecond\n/save {path}\n", Echo("m"))
    assert f"(saved to {path})" in shown
    first, second = rows(path)
    assert first["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first é"},
        {"role": "assistant", "content": "m0: first é"},
    ]
    assert second["messages"][1:] == [
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "m0: second"},
    ]
    other = tmp_path / "other.jsonl"
    for text in ('{"prompt": "x"}\n', '{"messages": []}', "hello\n"):
        other.write_text(text)
        _, shown = chat(f"one\n/save {other}\n", Echo("m"))
        assert "holds other rows" in shown and other.read_text() == text


def test_two_models_keep_a_conversation_each(tmp_path: Path) -> None:
    one, two = Echo("one"), Echo("two")
    found, shown = chat(f"hi\nagain\n/save {tmp_path / 'both.jsonl'}\n", one, two)
    assert shown.index("[one]") < shown.index("one0: hi") < shown.index("[two]") < shown.index("two0: hi")
    assert one.seen[1][1] == ("assistant", "one0: hi") and two.seen[1][1] == ("assistant", "two0: hi")
    assert [row["model"] for row in rows(tmp_path / "both.jsonl")] == ["one", "two"]
    assert history(found, 1)[-1] == ("assistant", "two0: again")


def test_blind_votes_are_written_at_once_and_the_better_answer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    one, two = Echo("one"), Echo("two")
    typed = "/system s\nq1\na\nq2\nnonsense\nB\nq3\ntie\nq4\nskip\nq5\n"  # the input ends before the last vote
    found, shown = chat(typed, one, two, votes=VoteFile(path, ["one", "two"]), seed=5)
    assert "[one]" not in shown and "[two]" not in shown and shown.count("[A]") == 5
    kept = rows(path)
    assert [row["tiers"] for row in kept] == [[[0], [1]], [[1], [0]], [[0, 1]]]
    assert {tuple(row["models"]) for row in kept} <= {("one", "two"), ("two", "one")}
    answers = [[r[0]["content"] for r in row["responses"]] for row in kept]
    for number, (row, (a, b)) in enumerate(zip(kept, answers, strict=True), 1):
        assert {a, b} == {f"one0: q{number}", f"two0: q{number}"} and a.startswith(row["models"][0])
        assert row["prompt"][0] == {"role": "system", "content": "s"} and row["prompt"][-1]["content"] == f"q{number}"
    assert one.seen[1] == two.seen[1] and ("assistant", answers[0][0]) in one.seen[1]
    assert ("assistant", answers[1][1]) in one.seen[2]
    assert kept[2]["prompt"][2]["content"] == answers[0][0] and kept[2]["prompt"][4]["content"] == answers[1][1]
    wins = {name: sum(r["models"][r["tiers"][0][0]] == name for r in kept[:2]) for name in ("one", "two")}
    assert f"3 votes: one won {wins['one']}, two won {wins['two']}, ties 1" in shown
    assert history(found)[-1][0] == "assistant"


def test_ctrl_c_at_a_vote_is_no_vote_and_both_go_on_with_one_conversation(tmp_path: Path) -> None:
    typed = iter(["q1", STOP, "q2", "b"])

    def ask(prompt: str) -> str:
        line = next(typed, "")
        if line == STOP:
            raise KeyboardInterrupt
        if not line:
            raise EOFError
        return line

    one, two, path = Echo("one"), Echo("two"), tmp_path / "v.jsonl"
    Chat([one, two], LineReader(io.StringIO(), ask), io.StringIO(), votes=VoteFile(path, ["one", "two"]), seed=5).run()
    (row,) = rows(path)
    assert one.seen[1] == two.seen[1] == [(m["role"], m["content"]) for m in row["prompt"]] and len(one.seen[1]) == 3


def test_who_is_a_changes_from_question_to_question(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    chat("q\na\n" * 30, Echo("one"), Echo("two"), votes=VoteFile(path, ["one", "two"]), seed=1)
    first = [row["models"][0] for row in rows(path)]
    assert 5 < first.count("one") < 25


def test_equal_and_empty_answers_get_no_vote(tmp_path: Path) -> None:
    _, shown = chat("q\n", Echo("m"), Echo("m"), votes=VoteFile(tmp_path / "v.jsonl", ["m (1)", "m (2)"]))
    assert "both answers are the same" in shown and not (tmp_path / "v.jsonl").exists() and "no votes" in shown


def test_votes_are_never_added_to_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(RunError, match="holds other rows"):
        VoteFile(path, ["one", "two"])
    path.write_text('{"responses": ["a", "b"]')
    with pytest.raises(RunError, match="holds other rows"):
        VoteFile(path, ["one", "two"])
    with pytest.raises(RunError, match="is a folder"):
        VoteFile(tmp_path, ["one", "two"])


def test_the_oldest_turns_leave_a_full_context_and_that_is_said() -> None:
    talker = Echo("m", limit=40)
    _, shown = chat("/system s\n" + "word word word\n" * 3 + "x" * 50 + "\n", talker)
    assert "the 2 oldest turns are left out" in shown
    assert talker.seen[-1][0] == ("system", "s") and len(talker.seen[-1]) == 2
    assert "error: too long" in shown

    class Remote(Echo):
        def answer(self, messages: Messages, attempt: int) -> Iterator[str]:
            if len(messages) > 3:
                raise ContextLengthError("the context is 3 turns")
            yield from super().answer(messages, attempt)

    remote = Remote("r")
    _, shown = chat("a\nb\nc\nd\n", remote)
    assert [len(seen) for seen in remote.seen] == [1, 3, 3, 3] and shown.count("are left out") == 2


def test_text_is_continued_goes_on_and_is_drawn_again(tmp_path: Path) -> None:
    talker = Echo("m")
    path = tmp_path / "texts.jsonl"
    _, shown = chat(f"Once upon \n\n/retry\n/save {path}\n", talker, complete=True)
    assert [seen[0][1] for seen in talker.seen] == ["Once upon ", "Once upon <m0> ", "Once upon <m0> "]
    assert rows(path) == [{"text": "Once upon <m0> <m1> ", "model": "m"}] and "Once upon <m0> <m1> " in shown
    _, shown = chat("\n/system x\n", Echo("m"), complete=True)
    assert "nothing to continue yet" in shown and "no system prompt" in shown


def test_blind_votes_on_texts(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    found, _ = chat("Once \na\n\nb\n", Echo("o"), Echo("t"), complete=True, votes=VoteFile(path, ["o", "t"]), seed=2)
    first, second = rows(path)
    assert first["prompt"] == "Once " and sorted(first["responses"]) == ["<o0> ", "<t0> "]
    assert second["prompt"] == "Once " + first["responses"][0] and second["tiers"] == [[1], [0]]
    assert history(found, 0) == history(found, 1)


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    _, shown = chat("a\x1b[2Jb\tc\n", Echo("m"))
    assert "\x1b" not in shown and "b\tc" in shown


def test_turns_leave_question_by_question() -> None:
    turns = (Message("system", "s"), *(Message(r, str(i)) for i, r in enumerate(["user", "assistant"] * 2 + ["user"])))
    once = drop_oldest(turns)
    assert once is not None and [m.content for m in once] == ["s", "2", "3", "4"]
    twice = drop_oldest(once)
    assert twice is not None and [m.content for m in twice] == ["s", "4"]
    assert drop_oldest(twice) is None


def test_a_picture_goes_with_the_next_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no answer came, and into a saved file. Only a user's ``~`` is their folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path, saved = tmp_path / "a.png", tmp_path / "saved.jsonl"
    path.write_bytes(picture().data)
    typed = f"/image {tmp_path / 'none.png'}\n/image {path}\n{FAIL}\nwhat is it?\nand now?\n/save {saved}\n"
    found, out = chat(typed, Echo("m"))
    assert "no such file" in out and "20x12 pixels" in out and "it is gone" in out
    turns = found.participants[0].messages
    assert [(m.content, len(m.pictures)) for m in turns if m.role == "user"] == [
        (f"{PICTURE}what is it?", 1),
        ("and now?", 0),
    ]
    (c,) = read_comparisons(saved).comparisons
    assert [p.source for p in c.pictures] == [str(path)]
    out = chat("/image ~/a.png\n/image ~nobody-of-this-name/a.png\nhm\n", Echo("m"))[1]
    assert "20x12 pixels" in out and "no such file" in out and "m0: " in out
    assert "/image needs the path" in chat("/image\n", Echo("m"))[1]
