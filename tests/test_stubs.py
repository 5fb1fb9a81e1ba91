"""Stubs, signatures and help of the Python functions say what the options are."""

from __future__ import annotations

import inspect
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prefopt
import prefopt.data
from prefopt import collect
from prefopt.api import FUNCTIONS
from prefopt.cli import VERBS
from prefopt.core.options import options
from prefopt.core.python_words import in_python

ROOT = Path(__file__).resolve().parents[1]
EVERY: dict[str, Any] = {
    **FUNCTIONS,
    **{f"data.{name}": getattr(prefopt.data, name) for name in prefopt.data.FUNCTIONS},
    **{f"collect.{name}": getattr(collect, name) for name in collect.FUNCTIONS},
}
OTHER_NAMES = {
    "runs": "list_runs",
    "export": "export_model",
    "reward-bench": "reward_bench",
    "losses": "list_losses",
    "methods": "compare_methods",
    "collect import": "collect.import_",
}
"""Commands whose name is that of a package, or a word of Python."""
COMMANDS_ALONE = {
    "launch": "starts processes",
    "chat": "is for a terminal",
    "demo": "is for a terminal",
    "completion": "is for a shell",
    "collect serve": "does not end",
    "ui": "does not end",
    "data layouts": "is a page of the documentation",
    **dict.fromkeys(("cache list", "cache verify", "cache clear"), "keeps house"),
}


def test_the_stubs_are_current() -> None:
    written = runpy.run_path(str(ROOT / "docs/make_stubs.py"))["stubs"]()
    assert len(written) == 3
    for path, text in written.items():
        assert path.read_text("utf-8") == text, "run: python docs/make_stubs.py"


def test_every_command_is_a_function() -> None:
    names = {verb: OTHER_NAMES.get(verb, verb.replace(" ", ".")) for verb in VERBS if verb not in COMMANDS_ALONE}
    assert set(names.values()) == EVERY.keys()


@pytest.mark.parametrize("name", [name for name in EVERY if hasattr(EVERY[name], "config")])
def test_signature_and_help_name_every_option(name: str) -> None:
    function = EVERY[name]
    parameters, words = inspect.signature(function).parameters, str(function.__doc__)
    for o in options(function.config):
        assert (o.name in parameters) == (o.name not in function.hidden), o.name
        if o.name in parameters and not o.positional:
            assert f"{o.name}: " in words, o.name
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert in_python(words) == words, "the words of the command line"


def test_what_dir_shows_is_what_users_need() -> None:
    shown = [name for name in dir(prefopt) if not name.startswith("__")]
    assert set(shown) == {"Callback", "collect", "data", "errors", *FUNCTIONS}
    assert all(getattr(prefopt, name) is not None for name in shown)
    assert {name for name in dir(prefopt.data) if not name.startswith("__")} == set(prefopt.data.FUNCTIONS)
    for package, name in ((prefopt, "TYPE_CHECKING"), (prefopt.data, "chek")):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(package, name)


USE = """
import prefopt
from typing import assert_type
from prefopt.train.result import TrainingResult

found = prefopt.dpo("m", [{"prompt": "p"}], output="o", beta=0.1, loss_options={"gamma": 1.0}, eval_fraction=0.0)
assert_type(found, TrainingResult)
assert_type(prefopt.dpo("m", "d", output="o", dry_run=True), TrainingResult | None)
assert_type(prefopt.data.check("d").ok, bool)
prefopt.ppo("m", prompts="p", output="o", reward=lambda prompts, responses: [0.0])
prefopt.online("m", prompts="p", output="o", reward=["brief=length*-0.1", "vader"])
prefopt.dpo("m", "d", output="o", betaa=0.1)
prefopt.dpo("m", "d", output="o", schedule="steep")
prefopt.score("s.jsonl", reward="length")
"""
WRONG = (12, 13, 14)
"""Lines of it with a misspelt option, a value that is none, and without what is required."""


@pytest.mark.slow
def test_a_type_checker_sees_mistakes_alone(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(USE, "utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--follow-imports=silent", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    lines = [int(line.split(":")[1]) for line in said.splitlines() if ": error: " in line and "use.py" in line]
    assert sorted(set(lines)) == list(WRONG), said
