"""The verbs: from files to a study, and from votes to files; what is wrong is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from collect.hostile import TEXTS
from prefopt.cli import main
from prefopt.collect.serve import site_of
from prefopt.config.collect import CollectServeConfig
from prefopt.data.comparisons import read_comparisons
from prefopt.records import Comparison
from prefopt.studies.annotators import invite
from prefopt.studies.items import all_items, next_item
from prefopt.studies.study import Study
from prefopt.studies.votes import Vote, record
from studies.small import new_study, people, say


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def turn(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def items_of(path: Path) -> list[tuple[str, list[str], list[str | None]]]:
    with Study(path, read_only=True) as study, study.reading() as connection:
        return [
            (
                i.row["prompt"][-1]["content"],
                [r[-1]["content"] for r in i.row["responses"]],
                [o.model for o in i.origins],
            )
            for i in all_items(connection)
        ]


def test_items_from_files_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": turn("p1", "user"), "responses": [turn("a"), turn("b"), turn("c")], "models": ["x", "y", "z"]},
        {"prompt": turn("p2", "user"), "responses": [turn("a")], "model": "x"},
        {"prompt": turn("p2", "user"), "responses": [turn("b")], "model": "y"},
        {"prompt": turn("p1", "user"), "responses": [turn("d"), turn("e")], "scores": [1, 2]},
    ]
    gold = [{"prompt": turn("g", "user"), "chosen": turn("right"), "rejected": turn("wrong")}]
    words = ["--responses", write(tmp_path / "r.jsonl", rows), "--gold", write(tmp_path / "g.jsonl", gold)]
    (tmp_path / "how.md").write_text("Be *fair*.")
    more = ["--title", "T", "--tags", "a", "b", "--overlap", "3", "--instructions", str(tmp_path / "how.md")]
    study = tmp_path / "s.db"
    assert main(["collect", "new", str(study), *words, *more]) == 0
    assert "4 items added" in capsys.readouterr().out
    assert sorted(items_of(study)) == [
        ("g", ["right", "wrong"], [None, None]),
        ("p1", ["a", "b", "c"], ["x", "y", "z"]),
        ("p1", ["d", "e"], [None, None]),
        ("p2", ["a", "b"], ["x", "y"]),
    ]
    with Study(study) as opened:
        s = opened.settings
        assert (s.title, s.tags, s.overlap, s.instructions) == ("T", ("a", "b"), 3, "Be *fair*.")
        assert (
            opened.connection.execute("SELECT gold FROM item WHERE gold IS NOT NULL").fetchall()[0][0] == "[[0], [1]]"
        )
        assert opened.connection.execute("SELECT count(*) FROM queue").fetchone()[0] == 3
    assert main(["collect", "import", str(study), *words[:2]]) == 0
    assert "0 items added, 3 duplicates" in capsys.readouterr().out


def test_files_of_two_models_are_joined_by_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = [{"prompt": turn(f"p{n}", "user"), "responses": [turn(f"one {n}")]} for n in range(3)]
    two = [{"prompt": turn(f"p{n}", "user"), "responses": [turn(f"two {n}")]} for n in (2, 0, 1)]
    two.append({"prompt": turn("p9", "user"), "responses": [turn("alone")]})
    two[1]["responses"] = [turn("one 0")]
    words = ["--responses", write(tmp_path / "base.jsonl", one), write(tmp_path / "tuned.jsonl", two)]
    study = tmp_path / "s.db"
    assert main(["collect", "new", str(study), *words]) == 2
    error = capsys.readouterr().err
    assert "2 of 7 rows cannot be used" in error and "fewer than two different responses" in error
    assert not study.exists()
    assert main(["collect", "new", str(study), *words, "--on-bad-row", "skip"]) == 0
    assert "1 duplicate responses of an item left out" in capsys.readouterr().out
    assert items_of(study) == [
        ("p1", ["one 1", "two 1"], ["base", "tuned"]),
        ("p2", ["one 2", "two 2"], ["base", "tuned"]),
    ]


BAD_FILES = {
    "empty": ("", "is empty"),
    "no JSON": ('{"prompt": "a", "responses": ["b", "c"]}\n{"prompt"\n', "row 2"),
    "prompts alone": ('{"prompt": "a"}\n', "holds a prompt alone"),
    "another type": ('{"prompt": "a", "responses": ["b", 5]}\n', "row 1"),
    "ten": (
        json.dumps({"prompt": "a", "responses": list("0123456789")}) + "\n",
        "has 10 responses",
    ),
    "nothing said": ('{"prompt": "a", "responses": ["b", " "]}\n', "has an empty response"),
    "binary": ("PK\x03\x04", "zip"),
}


def test_bad_imports_are_one_line_and_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with new_study(tmp_path / "t.db") as study:
        before = list(map(tuple, study.connection.execute("SELECT * FROM item")))
    for name, (text, named) in BAD_FILES.items():
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        assert main(["collect", "new", str(tmp_path / "s.db"), "--responses", str(bad)]) == 2, name
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1 and str(bad) in error
        assert not (tmp_path / "s.db").exists(), name
        assert main(["collect", "import", str(tmp_path / "t.db"), "--responses", str(bad)]) == 2, name
        with Study(tmp_path / "t.db") as again:
            assert list(map(tuple, again.connection.execute("SELECT * FROM item"))) == before, name
        capsys.readouterr()


def test_gold_without_a_preference_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "g.jsonl", [{"prompt": "a", "responses": ["b", "c"]}])
    assert main(["collect", "new", str(tmp_path / "s.db"), "--gold", rows]) == 2
    assert "no response is preferred to another" in capsys.readouterr().err


CONTRADICTIONS = {  # words, and the options that the message names
    "new": ["--prompts", "--model", "--responses"],
    "new --prompts p": ["--prompts", "--model"],
    "new --prompts p --model a b --num 3": ["--num 3"],
    "new --prompts p --model a --num 1": ["--num is 1"],
    "new --prompts p --model a --temperature 0": ["--temperature 0"],
    "import": ["--responses", "--gold"],
    "serve --host 0.0.0.0": ["--host 0.0.0.0", "--allowed-hosts"],
    "serve --url votes.example.org/x": ["--url is 'votes.example.org/x'"],
    "invite --name A --lead --revoke": ["--revoke", "--lead"],
    "export --output o.jsonl --eval-fraction 0.1": ["--eval-fraction", "--eval-output"],
    "export --output o.jsonl --form soft --disagreement every": ["--form soft", "--disagreement every"],
}


def test_contradictions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in CONTRADICTIONS.items():
        verb, *options = words.split()
        assert main(["collect", verb, str(tmp_path / "s.db"), *options]) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(name in error for name in named), error


def test_serving_refuses_other_addresses_without_invitations_and_a_second_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: ran.append(sockets[0].getsockname()))
    path = str(tmp_path / "s.db")
    study = new_study(tmp_path / "s.db")
    open_to_all = ["collect", "serve", path, "--port", "0", "--host", "0.0.0.0", "--allowed-hosts", "votes.lan"]
    assert main(open_to_all) == 2
    assert "no annotator is invited" in capsys.readouterr().err and not ran
    invite(study, "Ann")
    assert main(open_to_all) == 0 and ran[0][0] == "0.0.0.0"
    out = capsys.readouterr().out
    assert "/join/" not in out and "TLS" in out
    assert main(["collect", "serve", path, "--port", "0"]) == 0 and ran[1][0] == "127.0.0.1"
    assert "/join/" in capsys.readouterr().out
    with FileLock(path + ".lock"):
        assert main(["collect", "serve", path, "--port", "0"]) == 2
    assert "is being served by another process" in capsys.readouterr().err and len(ran) == 2
    taken = ["collect", "serve", path, "--host", "203.0.113.1", "--port", "0"]
    assert main(taken) == 2 and "--host 203.0.113.1" in capsys.readouterr().err


def test_only_names_that_were_given_are_answered_to() -> None:
    def hosts(**options: Any) -> set[str]:
        origins = site_of(CollectServeConfig(study="s", **options), 8700).origins
        return {origin.removeprefix("http://") for origin in origins}

    assert hosts() == {"127.0.0.1:8700", "localhost:8700", "[::1]:8700"}
    assert hosts(host="192.168.1.5") == {"192.168.1.5:8700"}
    assert hosts(host="0.0.0.0", allowed_hosts=["votes.lan", "votes.lan:80"]) == {"votes.lan:8700", "votes.lan:80"}
    site = site_of(CollectServeConfig(study="s", url="https://Votes.example.org/"), 8700)
    assert (list(site.origins), site.secure) == (["https://votes.example.org"], True)


def voted(path: Path) -> Study:
    study = new_study(path, 20, overlap=2)
    for n, person in enumerate(people(study, "Ann", "Bob")):
        for k in range(20):
            say(study, person, *((0, 1) if (k + n) % 3 else (1, 0)), rationale=TEXTS[k], tags=("x",))
    return study


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_exports_are_files_that_are_read_and_prompts_stay_together(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voted(tmp_path / "s.db").close()
    train, held = tmp_path / f"train.{ending}", tmp_path / f"held.{ending}"
    words = ["collect", "export", str(tmp_path / "s.db"), "--output", str(train), "--disagreement", "every"]
    words += ["--eval-output", str(held), "--eval-fraction", "0.3"]
    assert main(words) == 0
    assert "40 votes used" in capsys.readouterr().out
    sides = [read_comparisons(path).comparisons for path in (train, held)]
    assert [len(side) for side in sides] != [40, 0] and sum(map(len, sides)) == 40
    prompts = [{c.prompt[0].content for c in side} for side in sides]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 20
    first = sides[0][0]
    assert isinstance(first, Comparison) and first.tiers == ((0,), (1,))
    assert {"annotations", "models", "sampling", "study", "item", "numbers", "source"} <= first.extra.keys()
    assert main(words) == 2 and "exists" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    for form in ("soft", "rankings"):
        output = tmp_path / f"{form}.{ending}"
        assert main(["collect", "export", str(tmp_path / "s.db"), "--output", str(output), "--form", form]) == 0
        assert len(read_comparisons(output).comparisons) == (20 if form == "soft" else 7)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = str(tmp_path / "s.db"), str(tmp_path / "o.jsonl")
    new_study(tmp_path / "s.db").close()
    assert main(["collect", "export", path, "--output", output]) == 2
    assert "the votes give no rows" in capsys.readouterr().err and not Path(output).exists()
    assert main(["collect", "export", path, "--output", output, "--exclude", "Nobody"]) == 2
    assert "there is no such annotator" in capsys.readouterr().err
    assert main(["data", "check", path]) == 1
    assert "holds no rows" in capsys.readouterr().out
    assert main(["collect", "stats", output]) == 2
    assert "no such study" in capsys.readouterr().err


def test_stats_invite_and_backup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s.db")
    study = voted(tmp_path / "s.db")
    assert main(["collect", "stats", path]) == 0
    out = capsys.readouterr().out
    assert "40 of 40 votes, 20 of 20 items complete" in out and "Krippendorff's alpha" in out and "Ann (annot" in out
    assert main(["collect", "stats", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["votes"] == 40 and told["annotators"][0]["gold"]["value"] is None
    assert main(["collect", "invite", path, "--name", "Cay", "--url", "https://votes.example.org"]) == 0
    link = capsys.readouterr().out.splitlines()[-1]
    assert link.startswith("https://votes.example.org/join/")
    assert main(["collect", "invite", path, "--name", "Cay", "--revoke"]) == 0
    assert "signed out everywhere" in capsys.readouterr().out
    copy = tmp_path / "copy.db"
    assert main(["collect", "backup", path, "--output", str(copy)]) == 0
    with Study(copy) as other:
        assert [tuple(r) for r in other.connection.execute("SELECT * FROM event")] == [
            tuple(r) for r in study.connection.execute("SELECT * FROM event")
        ]
    assert main(["collect", "backup", path, "--output", str(copy)]) == 2


def test_a_study_is_checked_and_read_without_the_extra(tmp_path: Path) -> None:
    voted(tmp_path / "s.db").close()
    script = (
        "import sys\nfor name in ('starlette', 'uvicorn', 'nh3', 'latex2mathml', 'torch'): sys.modules[name] = None\n"
        "from prefopt.cli import main\n"
        f"assert main(['data', 'check', {str(tmp_path / 's.db')!r}]) == 0\n"
        f"assert main(['collect', 'stats', {str(tmp_path / 's.db')!r}]) == 0\n"
        f"assert main(['collect', 'serve', {str(tmp_path / 's.db')!r}]) == 2\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pip install starlette uvicorn" in result.stderr


def test_a_vote_on_text_of_a_base_model(tmp_path: Path) -> None:
    rows = write(tmp_path / "r.jsonl", [{"prompt": "2 + 2 =", "responses": [" 4", " 22"]}])
    assert main(["collect", "new", str(tmp_path / "s.db"), "--responses", rows]) == 0
    with Study(tmp_path / "s.db") as study:
        person, _ = invite(study, "Ann")
        found = next_item(study, person)
        assert found is not None
        record(study, person, found.ticket, Vote(((0,), (1,)), 3))
    output = tmp_path / "o.jsonl"
    assert main(["collect", "export", str(tmp_path / "s.db"), "--output", str(output)]) == 0
    (c,) = read_comparisons(output).comparisons
    assert isinstance(c, Comparison) and c.text and [r.text for r in c.responses] == [" 4", " 22"]
