"""``prefopt env``: what a report of a bug needs, and nothing that names the user or opens a door."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

import prefopt
from prefopt.cli import main
from prefopt.core import plugins
from prefopt.model import environment as module
from prefopt.model.environment import anonymous, environment, in_words


def test_it_tells_versions_devices_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    found = environment()
    assert found["versions"]["prefopt"] == prefopt.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["folders"]["reference cache"].endswith("cache")
    assert f"{torch.get_num_threads()} threads" in found["devices"]["cpu"]
    assert ("cuda:0" in found["devices"]) == torch.cuda.is_available()
    lines = in_words(found)
    assert "versions:" in lines and f"  prefopt          {prefopt.__version__}" in lines


def test_extras_are_there_or_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        "torch>=2",
        'matplotlib>=3.9; extra == "plot"',
        "nosuch>=1 ; extra == 'wandb'",
        'pytest; extra == "dev"',
        'prefopt[plot]; extra == "all"',
    ]
    versions = {"matplotlib": "3.11"}

    monkeypatch.setattr(plugins.metadata, "requires", lambda name: known)
    monkeypatch.setattr(module, "installed_version", versions.get)
    found = environment()
    assert found["extras"] == {"plot": "matplotlib 3.11", "wandb": "not installed: pip install nosuch"}
    assert found["versions"]["peft"] == "not installed"


def test_every_extra_of_the_project_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [f'{name}; extra == "{extra}"' for extra, names in extras.items() for name in names]
    monkeypatch.setattr(plugins.metadata, "requires", lambda name: lines)
    assert set(environment()["extras"]) == set(extras) - {"dev"}


def test_no_secret_and_no_name_of_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PREFOPT_CACHE", str(home / "cache"))
    monkeypatch.setattr(module.sys, "executable", "/home/jane.doe/venv/bin/python")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_VARIABLE"):
        monkeypatch.setenv(name, "geheim")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in (["env"], ["env", "--json"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "jane" not in said and "geheim" not in said and "HF_TOKEN" not in said and "MY_VARIABLE" not in said
        assert "~/cache" in said and "/home/USER/venv" in said and "HF_HUB_OFFLINE" in said
    assert json.loads(said)["variables"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ada/x y", "/home/USER/x y"),
        ("/Users/ada", "/Users/USER"),
        ("C:\\Users\\ada\\x", "C:\\Users\\USER\\x"),
        ("/srv/home/ada", "/srv/home/ada"),
        ("{home}/.cache", "~/.cache"),
        ("{home}work/.cache", "{home}work/.cache"),
        ("no path", "no path"),
    ],
)
def test_paths_name_nobody(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ada"
    monkeypatch.setenv("HOME", str(home))
    assert anonymous(text.format(home=home)) == expected.format(home=home)


def test_of_several_processes_it_tells_which_this_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "processes" not in environment()
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = environment()["processes"]
    assert (found["rank"], found["local rank"]) == ("5 of 8", "1 of 4 on this machine")
    assert (found["backend"], found["device"], found["restarts"]) == ("gloo", "cpu", "0")
