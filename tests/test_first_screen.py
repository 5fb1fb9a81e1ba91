"""What a newcomer meets first: the list of commands, help, what a command still needs, names of other trainers, and
completion in a shell."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.cli.completion import bash, fish
from prefopt.cli.screen import help_of
from prefopt.cli.verbs import VERBS, options_of
from prefopt.core.other_names import OTHER_NAMES
from prefopt.core.plugins import extras, how_to_install
from prefopt.errors import ConfigError


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert cli.main(words) == status
    out, err = capsys.readouterr()
    return err if status else out


def test_columns_of_the_overview_never_touch(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["collect", "--help"], ["help", "data"]):
        for line in printed(capsys, *words).splitlines():
            if line.startswith("  "):
                name = max((verb for verb in VERBS if line.strip().startswith(f"{verb} ")), key=len)
                assert line.strip().removeprefix(name).startswith("  "), line
    assert printed(capsys, "data", "--help").startswith("usage: prefopt data COMMAND [options]")


def test_help_is_found_where_people_look_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "help", "dpo") == printed(capsys, "dpo", "--help") == help_of("dpo") + "\n"
    assert printed(capsys, "help", "collect", "invite") == printed(capsys, "collect", "invite", "-h")
    assert printed(capsys, "help") == printed(capsys, "--help") == printed(capsys, "help", "--help")
    assert printed(capsys, "-V") == printed(capsys, "--version")
    assert "did you mean dpo?" in printed(capsys, "help", "dop", status=2)


def test_help_lists_an_argument_once() -> None:
    for name in VERBS:
        lines = help_of(name).splitlines()
        for o in options_of(name).values():
            starts = [line for line in lines if line.startswith(f"  {o.flag} ") or line == f"  {o.flag}"]
            assert len(starts) == (not o.positional), (name, o.flag)
    assert "arguments:\n  STUDY " in help_of("collect invite")


def test_every_command_has_an_example_that_it_takes() -> None:
    for name, verb in VERBS.items():
        verb.config.from_dict(cli.parse(name, shlex.split(verb.example)))
        assert help_of(name).endswith(f"example: prefopt {name} {verb.example}".rstrip())


def test_a_command_says_all_that_it_needs_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "dpo", status=2).splitlines()
    assert lines[0] == "prefopt: error: prefopt dpo needs:"
    assert [line.split()[0] for line in lines if line.startswith("  --")] == ["--model", "--data", "--output"]
    assert lines[-2].startswith("example: prefopt dpo --model ") and lines[-1] == "help: prefopt dpo --help"
    lines = printed(capsys, "dpo", "--model", "m", status=2).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  --")] == ["--data", "--output"]
    assert "  FOLDER " in printed(capsys, "push", status=2)
    # One option alone stays one line.
    assert printed(capsys, "dpo", "--model", "m", "--data", "d", status=2).count("\n") == 1


def test_unknown_options_are_told_together_with_our_names(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--lr 1e-5 --num-train-epochs 3 --per_device_train_batch_size=4 --betta 2 --zzz --beta 0.2".split()
    lines = printed(capsys, "dpo", *words, status=2).splitlines()
    assert lines[0] == "prefopt: error: 5 unknown options:"
    assert "'--lr'; it is called --learning-rate here" in lines[1]
    assert "'--num-train-epochs'; it is called --epochs here" in lines[2]
    assert "it is called --batch-size here (rows per optimiser step, over all devices)" in lines[3]
    assert "did you mean --beta?" in lines[4] and lines[5] == "  '--zzz'"
    assert lines[6] == "see prefopt dpo --help"
    one = printed(capsys, "dpo", "--lr", "1e-5", status=2)
    assert one == "prefopt: error: unknown option '--lr'; it is called --learning-rate here\n"


def test_unknown_options_of_a_file_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "o.yaml"
    file.write_text("lr: 1e-5\nnum_train_epochs: 3\n", "utf-8")
    said = printed(capsys, "dpo", "--config", str(file), status=2)
    assert f"{file}: 2 unknown options:\n  'lr'; it is called learning_rate here\n" in said


def test_names_of_other_trainers_are_none_of_ours_and_lead_to_one() -> None:
    ours = {flag[2:] for name in VERBS for flag in options_of(name)}
    assert not set(OTHER_NAMES) & ours
    assert {name for name, _ in OTHER_NAMES.values()} <= ours


def test_underscores_in_a_flag_are_dashes() -> None:
    given = cli.parse("dpo", ["--learning_rate", "1e-5", "--max_length=64"])
    assert given == {"learning_rate": 1e-5, "max_length": 64}


SPLIT = {"output_train": "t", "output_eval": "e", "fraction": 0.1}


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("collect invite", "s.db anna", {"study": "s.db", "name": "anna"}),
        ("collect invite", "--lead s.db anna", {"study": "s.db", "name": "anna", "lead": True}),
        ("collect invite", "s.db --name anna", {"study": "s.db", "name": "anna"}),
        ("collect invite", "s.db --days 3 anna", {"study": "s.db", "name": "anna", "days": 3.0}),
        ("collect backup", "s.db copy.db", {"study": "s.db", "output": "copy.db"}),
        ("data split", "a t e --fraction 0.1", {"data": ["a"], **SPLIT}),
        ("data split", "--fraction 0.1 a b t e", {"data": ["a", "b"], **SPLIT}),
        ("push", "--yes runs/dpo --repo me/m", {"folder": "runs/dpo", "yes": True, "repo": "me/m"}),
        ("push", "--repo me/m runs/dpo", {"folder": "runs/dpo", "repo": "me/m"}),
        ("push", "--yes false runs/dpo", {"folder": "runs/dpo", "yes": False}),
        ("push", "--yes -- -dpo", {"folder": "-dpo", "yes": True}),
        ("runs", "a -- -b c", {"folder": ["a", "-b", "c"]}),
        ("runs", "--folder a -- b", {"folder": ["a", "b"]}),
        ("collect invite", "anna -- s.db", {"study": "s.db", "name": "anna"}),
    ],
)
def test_arguments_stand_where_people_put_them(name: str, words: str, expected: dict[str, object]) -> None:
    assert cli.parse(name, words.split()) == expected


@pytest.mark.parametrize(
    ("name", "words", "flag"),
    [
        ("push", "--folder a b", "--folder"),
        ("losses", "--name kto dpo", "--name"),
        ("losses", "kto -- dpo", "--name"),
        ("collect serve", "--study a b", "--study"),
        ("collect serve", "b --study a", "--study"),
    ],
)
def test_a_second_value_is_not_dropped(name: str, words: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is given twice; leave one out"):
        cli.parse(name, words.split())


@pytest.mark.parametrize(
    ("words", "word"),
    [("losses -- kto dpo", "dpo"), ("collect stats s.db more", "more"), ("collect invite s.db --name anna bea", "bea")],
)
def test_a_word_too_many_is_refused(words: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{word!r} has no option before it" in printed(capsys, *words.split(), status=2)


def test_hints_install_packages_by_names_that_the_index_has() -> None:
    assert how_to_install("demo") == "pip install vaderSentiment matplotlib"
    assert not any("prefopt" in how_to_install(extra) for extra in extras())


# -- completion ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="completes in bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("prefopt da", {"data"}),
        ("prefopt col", {"collect"}),
        ("prefopt collect in", {"invite"}),
        ("prefopt dpo --schedule co", {"cosine", "constant"}),
        ("prefopt dpo --learn", {"--learning-rate"}),
        ("prefopt data split --output-", {"--output-train", "--output-eval"}),
        ("prefopt completion b", {"bash"}),
        ("prefopt help dp", {"dpo"}),
        ("prefopt dpo --model run", set()),  # files
    ],
)
def test_bash_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    words = line.split()
    ask = f"COMP_WORDS=({' '.join(map(shlex.quote, words))})\nCOMP_CWORD={len(words) - 1}\n_prefopt\n"
    script = tmp_path / "completion.sh"
    script.write_text(f"{bash()}\n{ask}printf '%s\\n' \"${{COMPREPLY[@]}}\"\n", "utf-8")
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == expected and not result.stderr


def test_scripts_are_printed_for_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "completion", "bash") == bash()
    assert printed(capsys, "completion", "zsh").endswith(f"autoload -U +X bashcompinit && bashcompinit\n{bash()}")
    assert "it must be one of bash, zsh, fish" in printed(capsys, "completion", "tcsh", status=2)
    lines = list(fish())
    assert printed(capsys, "completion", "fish").splitlines() == lines
    found = [shlex.split(line.replace("\\'", "’"))[2:] for line in lines[1:]]
    flags = {flag[2:] for name in VERBS for flag in options_of(name)}
    assert {words[words.index("-l") + 1] for words in found if "-l" in words} == flags
    assert all(len(words[words.index("-d") + 1]) > 3 for words in found if "-d" in words)
