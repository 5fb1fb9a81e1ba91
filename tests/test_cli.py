"""The command line, as far as it needs no model: bad input, files of options, what reaches the method."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import prefopt
from prefopt import cli
from prefopt.config.dpo import DpoConfig
from prefopt.config.methods import METHODS, method_of, read_options
from prefopt.core.options import Option, options
from prefopt.core.plugins import imported
from prefopt.core.yaml_file import read_document, write_document
from prefopt.errors import ConfigError, Interrupted, RunError

NEEDED = ["--model", "m", "--data", "d.jsonl", "--output", "o"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a recorder in the method's place; what it was called with."""
    calls: list[dict[str, Any]] = []
    module = types.ModuleType("prefopt.methods.dpo")
    module.run = lambda config, **objects: calls.append({"config": config, **objects})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefopt.methods.dpo", module)
    monkeypatch.setattr("prefopt.methods.early_checks.check_before_torch", lambda config: None)
    return calls


BAD = {
    "unknown option": (["--betta", "1"], "unknown option '--betta'; did you mean --beta?"),
    "unknown option with equals": (["--lerning-rate=1"], "did you mean --learning-rate?"),
    "underscore": (["--max_lenght", "5"], "did you mean --max-length?"),
    "abbreviated": (["--be", "1"], "unknown option '--be'"),
    "no option": (["pairs.json"], "'pairs.json' has no option before it"),
    "no value": (["--beta"], "--beta has no value; it must be a number above 0"),
    "no file": (["--config"], "--config has no value"),
    "not a number": (["--beta", "high"], "--beta is 'high'; it must be a number above 0"),
    "no whole number": (["--max-length", "1.5"], "--max-length is '1.5'; it must be a whole number of at least 2"),
    "not true or false": (["--lora", "maybe"], "--lora is 'maybe'; it must be true or false"),
    "no choice": (["--schedule", "cosin"], "one of linear, cosine, constant; did you mean cosine?"),
    "not finite": (["--beta", "nan"], "--beta is 'nan'"),
    "out of range": (["--beta", "0"], "--beta is 0.0; it must be a number above 0"),
    "at the limit": (["--label-smoothing", "0.5"], "it must be a number of at least 0 and below 0.5"),
    "below": (["--seed", "-1"], "--seed is -1;"),
    "empty": (["--reference", ""], "--reference is ''; it must be text"),
    "twice": (["--beta", "1", "--beta", "2"], "--beta is given twice"),
    "device": (["--device", "gpu"], "--device is 'gpu'; it must be cpu, cuda, cuda:N or mps"),
    "precision": (["--device", "mps", "--dtype", "float64"], "--device mps has no float64"),
    "two sources": (["--eval-data", "e", "--eval-fraction", "0.1"], "--eval-data and --eval-fraction"),
    "nothing to evaluate": (["--eval-every", "5", "--eval-fraction", "0"], "--eval-every needs evaluation data"),
    "nothing to stop on": (["--early-stopping", "2", "--eval-fraction", "0"], "--early-stopping needs evaluation data"),
    "no adapter": (["--lora-rank", "8"], "--lora-rank does nothing without --lora"),
    "no adapter, even at its default": (["--lora-dropout", "0"], "--lora-dropout does nothing without --lora"),
    "adapter of its own": (["--lora", "--adapter", "a", "--lora-alpha", "8"], "--lora-alpha shapes a new adapter"),
    "adapter of nothing": (["--reference-adapter", "a"], "--reference-adapter under full fine-tuning needs"),
    "nothing to resume": (["--dry-run", "--resume"], "--dry-run trains nothing"),
    "no such file": (["--config", "no.yaml"], "--config no.yaml: No such file or directory"),
}


def test_bad_input_is_one_line_and_status_2(ran: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    for mistake, (words, said) in BAD.items():
        assert cli.main(["dpo", *NEEDED, *words]) == 2, mistake
        out, err = capsys.readouterr()
        assert err.startswith("prefopt: error: ") and err.count("\n") == 1 and said in err, (mistake, err)
        assert not out and not ran


BAD_FILES = {
    "unknown name": (
        "beta: 1\nlerning_rate: 1e-6\n",
        "o.yaml: unknown option 'lerning_rate'; did you mean learning_rate?",
    ),
    "wrong type": ("beta: high\n", "o.yaml: beta is 'high'; it must be a number above 0"),
    "number for text": ("reference: 5\n", "o.yaml: reference is 5; it must be text"),
    "text for truth": ("lora: 'yes'\n", "o.yaml: lora is 'yes'; it must be true or false"),
    "null": ("epochs:\n", "o.yaml: epochs has no value; it must be a number above 0"),
    "out of range": ("batch-size: 0\n", "o.yaml: batch_size is 0; it must be a whole number of at least 1"),
    "twice": ("beta: 1\nseed: 1\nbeta: 2\n", "o.yaml, line 3: beta is a duplicate"),
    "twice, spelt in two ways": ("max_length: 9\nmax-length: 8\n", "o.yaml, line 2: max_length is a duplicate"),
    "not YAML": ("beta: 1\n seed: [\n", "o.yaml, line 2: not YAML"),
    "no mapping": ("- beta\n", "o.yaml: no options in it"),
    "nothing": ("", "o.yaml: no options in it"),
    "code": ("beta: !!python/object/apply:os.getcwd []\n", "o.yaml, line 1: not YAML"),
}


def test_a_bad_file_of_options_is_one_line_and_status_2(
    ran: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for mistake, (text, said) in BAD_FILES.items():
        (tmp_path / "o.yaml").write_text(text, "utf-8")
        assert cli.main(["dpo", *NEEDED, "--config", "o.yaml"]) == 2, mistake
        err = capsys.readouterr().err
        assert err.startswith("prefopt: error: ") and err.count("\n") == 1 and said in err, (mistake, err)
        assert not ran


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dpo", "--model", "m", "--data", "d"], "--output is missing"),
        (["dop"], "unknown command 'dop'; did you mean dpo?"),
        (["--versoin"], "unknown option '--versoin'; did you mean --version?"),
        (["cache"], "prefopt cache needs one of list, verify, clear"),
        (["cache", "lst"], "did you mean list?"),
        (["cache", "verify", "--repare"], "did you mean --repair?"),
        (["cache", "clear", "--older-than", "-1"], "--older-than is -1.0"),
        (["demo", "--beta", "1"], "unknown option '--beta'"),
    ],
)
def test_a_bad_command_is_one_line_and_status_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def values_of(o: Option) -> st.SearchStrategy[Any]:
    """Values that the option takes, the ends of its range among them."""
    looks = [
        "1e5",
        "-1e-5",
        "null",
        "~",
        "yes",
        "0x1f",
        "1:30",
        "2026-01-01",
        "1_0",
        "# x",
        ": ",
        "- a",
        "!!x",
        "'",
        "=",
    ]
    # Short enough for a file's name, and of no user's home.
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda name: name[0] != "~")
    text = st.sampled_from(looks) | names
    limits = dict(o.limits)
    low = limits.get("of at least", limits.get("above", -1e9))
    high = limits.get("of at most", limits.get("below", 1e9))
    if o.choices:
        kind: st.SearchStrategy[Any] = st.sampled_from(o.choices)
    elif o.name == "device":
        kind = st.sampled_from(["cpu", "cuda", "cuda:1"])
    elif bool in o.kinds:
        kind = st.booleans()
    elif int in o.kinds:
        kind = st.integers(int(low), int(high))
    elif float in o.kinds:
        kind = st.floats(low, high, exclude_min="above" in limits, exclude_max="below" in limits)
    else:
        kind = st.lists(text, min_size=1, max_size=3) if list[str] in o.kinds else text
    return kind | st.none() if o.optional else kind


@given(st.fixed_dictionaries({o.name: values_of(o) for o in options(DpoConfig)}))
def test_print_config_says_what_config_reads(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    try:
        expected = DpoConfig(**values)
    except ConfigError:  # the values contradict each other: the file still holds each as it was
        expected = None
    file = tmp_path_factory.mktemp("options") / "o.yaml"
    file.write_text(write_document(DpoConfig, values), "utf-8")
    read = read_document(str(file))
    assert read == values
    if expected is not None:
        assert DpoConfig.from_dict(read) == expected
        assert DpoConfig.from_dict(expected.to_dict()) == expected


def test_print_config_round_trips_through_config(
    ran: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "1e5", "--data", "a b", "ü.json", "--output=null?", "--lora", "--learning-rate", "3e-6"]
    assert cli.main(["dpo", *words, "--lora-targets", "q", "v", "--shuffle", "false", "--print-config"]) == 0
    file = tmp_path / "o.yaml"
    file.write_text(capsys.readouterr().out, "utf-8")
    assert not ran
    assert cli.main(["dpo", "--config", str(file)]) == 0
    assert cli.main(["dpo", *words, "--lora-targets", "q", "v", "--shuffle", "false"]) == 0
    assert ran[0] == ran[1]
    config = ran[0]["config"]
    assert (config.model, config.data, config.output) == ("1e5", ["a b", "ü.json"], "null?")
    assert (config.lora, config.lora_targets, config.learning_rate, config.shuffle) == (True, ["q", "v"], 3e-6, False)


def test_print_config_without_what_is_required_is_a_file_to_fill_in(
    ran: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["dpo", "--print-config"]) == 0
    file = tmp_path / "o.yaml"
    file.write_text(capsys.readouterr().out, "utf-8")
    assert cli.main(["dpo", "--config", str(file)]) == 2
    # A default that depends on another option is not frozen by printing it.
    assert cli.main(["dpo", *NEEDED, "--config", str(file), "--lora"]) == 0
    assert ran[0]["config"] == DpoConfig(model="m", data=["d.jsonl"], output="o", lora=True)


def test_the_command_line_overrides_the_file(ran: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "o.yaml"
    file.write_text("model: x\ndata: one.json\noutput: o\nbeta: 1e-1\nmax-length: 64\nlora: true\n", "utf-8")
    words = ["dpo", "--config", str(file), "--data", "two.json", "--data", "three.json", "--max-length", "32"]
    assert cli.main([*words, "--lora", "false"]) == 0
    config = ran[0]["config"]
    assert (config.model, config.data) == ("x", ["two.json", "three.json"])
    assert (config.beta, config.max_length, config.lora) == (0.1, 32, False)


def test_every_option_of_the_command_line_reaches_the_config(ran: list[dict[str, Any]]) -> None:
    """One option at a time, set to something else than its default."""
    other: dict[str, str] = {
        "device": "cpu",
        "lora_targets": "q",
        "eval_data": "e",
        "track": "wandb",
        "data_weights": "2",
        "offload": "optimizer",
        "loss": "ipo",
        "learning_rate": "1e-5",
        "find_learning_rate": "stop",
        "vision": "full",
    }
    company = {
        "lora": ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "quantise", "reference_adapter"],
        "eval-fraction=0.5": ["eval_every", "early_stopping", "eval_dtype", "find_learning_rate"],
        "track=wandb": ["track_project"],
        "ref-model-sync-steps=5": ["ref_model_mixup_alpha"],
        "max-kl=9": ["kl_every", "kl_samples", "max_new_tokens"],
    }
    plain = DpoConfig(model="m", data=["d.jsonl"], output="o").to_dict()
    for o in options(DpoConfig):
        if o.required or o.name == "shard":  # which one process refuses: tests/parallel
            continue
        value: Any = other.get(o.name) or (next((c for c in o.choices if c != o.default), None))
        if value is None:
            value = {bool: str(not o.default).lower(), int: "3", float: "0.25", str: "name"}.get(o.kinds[0], "name=1")
        with_it = [f"--{flag}" for flag, names in company.items() if o.name in names]
        ran.clear()
        assert cli.main(["dpo", *NEEDED, *with_it, o.flag, value]) == 0, o.flag
        assert getattr(ran[0]["config"], o.name) != plain[o.name], o.flag


def test_defaults_follow_what_is_trained() -> None:
    def config(**values: Any) -> DpoConfig:
        return DpoConfig(model="m", data=["d"], output="o", **values)

    assert (config().learning_rate, config().published_rate, config().lora_rank) == ("auto", 1e-6, None)
    lora = config(lora=True, lora_rank=4)
    assert (lora.published_rate, lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (2e-5, 4, 8, 0.0)
    assert config(adapter="a").lora and config(adapter="a").lora_rank is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        lora.beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RunError("out: belongs to another\nrun"), 2, "prefopt: error: out: belongs to another run\n"),
        (Interrupted("stopped at step 3; --resume goes on", signal.SIGTERM), 143, "prefopt: stopped at step 3;"),
        (KeyboardInterrupt(), 130, "prefopt: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            2,
            "prefopt: error: out/x: No space left on device;",
        ),
    ],
)
def test_how_a_run_ends_is_told_by_its_status(
    error: BaseException,
    status: int,
    said: str,
    ran: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(config: DpoConfig) -> None:
        raise error

    monkeypatch.setattr(sys.modules["prefopt.methods.dpo"], "run", run)
    assert cli.main(["dpo", *NEEDED]) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_a_bug_keeps_its_traceback(ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: DpoConfig) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys.modules["prefopt.methods.dpo"], "run", run)
    with pytest.raises(OSError, match="Bad file"):
        cli.main(["dpo", *NEEDED])


@pytest.mark.parametrize("name", ["~nosuch", "~nosuch/x", "x" * 300])
def test_a_name_that_is_no_path_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    for words in (
        ["dpo", "--model", name, "--data", "rows.jsonl", "--output", "o"],
        ["dpo", "--model", ".", "--data", name, "--output", "o"],
        ["data", "check", name],
        ["data", "check", "rows.jsonl", "--model", name],
        ["score", "rows.jsonl", "--reward", name, "--output", "s.jsonl"],
        ["sample", "--model", name, "--prompts", "rows.jsonl", "--output", "s.jsonl"],
        ["merge", "--adapter", name, "--output", "o"],
        ["runs", name],
    ):
        assert cli.main(words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("prefopt: error: ") and said.count("\n") == 1, said
        assert name[:60] in said, words


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m prefopt dpo --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("usage: prefopt dpo") and not result.stderr
    assert result.returncode in (0, 141)


def test_no_help_shows_code() -> None:
    """A text that was meant to be filled in."""
    shown = [(name, o.name, o.help, o.default_text) for name, verb in cli.VERBS.items() for o in options(verb.config)]
    assert len(shown) > 300
    assert not [entry for entry in shown if re.search(r"\{[^}]*[(.'\[]|\{[A-Z_]+\}", f"{entry[2]} {entry[3]}")]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"prefopt {prefopt.__version__}\n"
    for words in (["--help"], ["cache", "--help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        listed = [name for name in cli.VERBS if re.search(rf"^  {name} +{re.escape(cli.VERBS[name].help)}$", out, re.M)]
        assert listed == [name for name in cli.VERBS if len(words) == 1 or name.startswith("cache ")]
    for name, verb in cli.VERBS.items():
        assert cli.main([*name.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert all(o.flag in out for o in options(verb.config)), name
        assert not re.search(r"--[a-z-]*-\n", out), "a name is broken over lines"
    assert cli.main([]) == 2


def test_cache_commands_on_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "list"]) == 0
    assert "0 spaces, 0 bytes" in capsys.readouterr().out
    assert cli.main(["cache", "verify"]) == 0
    assert cli.main(["cache", "clear", "--older-than", "30"]) == 0
    assert "0 bytes freed" in capsys.readouterr().out
    assert cli.main(["cache", "clear", "--space", "abc"]) == 2
    assert "no space abc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prefopt.dpo("m", "d", output="o", betta=1), "unknown option 'betta'; did you mean beta?"),
        (lambda: prefopt.dpo("m", "d", output="o", beta="high"), "--beta is 'high'"),
        (lambda: prefopt.dpo("m", "d", output="o", seed=True), "--seed is True; it must be a whole number"),
        (lambda: prefopt.dpo("m", [], output="o"), r"--data is \[\]"),
        (lambda: prefopt.dpo("m", 5, output="o"), "data must be names of files, or a list of rows"),  # type: ignore[arg-type]
        (lambda: prefopt.dpo("m", {"prompt": "p"}, output="o"), "data must be names of files, or a list of rows"),
        (lambda: prefopt.dpo("m", [{}, "d"], output="o"), "mixes rows and names"),
        (lambda: prefopt.dpo(object(), "d", output="o"), "needs its tokenizer"),  # type: ignore[arg-type]
        (lambda: prefopt.dpo("m", "d", output="o", tokenizer=object()), "tokenizer goes with"),  # type: ignore[arg-type]
    ],
)
def test_python_refuses_what_the_command_line_refuses(
    call: Callable[[], Any], said: str, ran: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match=said):
        call()
    assert not ran


def test_python_passes_names_or_objects(ran: list[dict[str, Any]], tmp_path: Path) -> None:
    prefopt.dpo(tmp_path, "d.jsonl", output=tmp_path / "o", beta=1)
    assert ran[0] == {
        "config": DpoConfig(model=str(tmp_path), data=["d.jsonl"], output=str(tmp_path / "o"), beta=1.0),
        "model": None,
        "tokenizer": None,
        "rows": None,
        "callbacks": (),
    }
    prefopt.dpo("m", (name for name in ("a", "b")), output="o")  # type: ignore[arg-type]
    assert ran.pop()["config"].data == ["a", "b"]
    model, tokenizer, rows = types.SimpleNamespace(name_or_path="base"), object(), [{"prompt": "p"}]
    prefopt.dpo(model, iter(rows), output="o", tokenizer=tokenizer)  # type: ignore[arg-type]
    assert ran[1]["config"].model == "base"
    assert (ran[1]["model"], ran[1]["tokenizer"], ran[1]["rows"]) == (model, tokenizer, rows)


def test_every_command_finds_what_it_runs() -> None:
    assert all(callable(imported(verb.path)) for verb in cli.VERBS.values())


def test_every_row_of_the_table_of_methods_is_a_command_and_a_function() -> None:
    """What is true of each row is all that a method needs beside its config and its module."""
    for name, method in METHODS.items():
        verb, function = cli.VERBS[name], getattr(prefopt, name)
        assert (verb.config, verb.help, verb.yaml) == (method.config, method.help, True) and name in dir(prefopt)
        assert function.__name__ == name and method.config.__name__ in function.__doc__
        arguments = inspect.signature(imported(verb.path)).parameters
        assert {"config", "model", "tokenizer", "rows", "callbacks"} <= set(arguments)
        values = {o.name: "x" for o in options(method.config) if o.required}
        assert method_of(method.config.from_dict(values)) == name
    assert set(prefopt.__all__) >= {*METHODS, "Callback", "compare", "report", "rlhf", "sample"}
    with pytest.raises(AttributeError):
        _ = prefopt.no_such_method


def test_values_may_begin_with_a_dash() -> None:
    words = ["--seed", "-1", "--beta", "-.5", "--reference", "- a b", "--lora", "--data", "-", "x", "--eval-data=-y"]
    given = cli.parse("dpo", words)
    assert (given["seed"], given["beta"], given["reference"], given["lora"]) == (-1, -0.5, "- a b", True)
    assert (given["data"], given["eval_data"]) == (["-", "x"], ["-y"])


def test_renamed_options_are_refused_with_the_new_name_and_old_records_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"reference_every": 5, "reference_mix": 0.5}
    for name, new in zip(old, ("ref_model_sync_steps", "ref_model_mixup_alpha"), strict=True):
        flag = name.replace("_", "-")
        assert cli.main(["dpo", *NEEDED, f"--{flag}", "1"]) == 2
        assert f"now called --{new.replace('_', '-')}" in capsys.readouterr().err
        (tmp_path / "o.yaml").write_text(f"{name}: 1\n", "utf-8")
        assert cli.main(["dpo", *NEEDED, "--config", str(tmp_path / "o.yaml")]) == 2
        assert f"now called {new}" in capsys.readouterr().err
    given = DpoConfig(model="m", data=["d.jsonl"], output="o").to_dict()
    # A file that --print-config wrote lists all options, those without a value as null.
    assert DpoConfig.from_dict(given | dict.fromkeys(old)).to_dict() == given
    read = read_options("dpo", {"model": "m", "data": ["d.jsonl"], "output": "o", **old})
    assert (read.ref_model_sync_steps, read.ref_model_mixup_alpha) == (5, 0.5)
