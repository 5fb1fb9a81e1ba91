"""Imports run one way, and what needs no torch imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"

# From the bottom up: a module imports from its own room and from those before it.
ROOMS = (
    "errors records core config transfer theory losses rewards studies data model parallel reference runs generate"
    " export train rl methods evaluate chat reports sweeps web collect ui demo api cli"
).split()
TORCH_FREE = {"errors", "records", "core", "config", "studies", "data", "web", "collect", "ui"}
FRONT = {"prefopt", "prefopt.__main__"}  # they only open the door to what is above everything


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((SRC / "prefopt").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str) -> list[str]:
    """Every module of the package that a source names, wherever in it; relative imports are given as they stand."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            names += [f"prefopt.{a.name}" for a in node.names] if prefix == "prefopt" else [prefix]
    return [n for n in names if n.split(".")[0] in ("prefopt", "")]


def problems(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    if module in FRONT:
        return []
    room = module.split(".")[1]
    if room not in ROOMS:
        return [f"{module} is in no known room: add {room!r} to ROOMS at its place"]
    wrong = []
    for target in imports(source):
        if target.startswith("."):
            wrong.append(f"{module} imports {target}: spell it from prefopt on")
            continue
        to = target.split(".")[1] if "." in target else ""
        if to in ("", "__version__"):
            continue
        if to not in ROOMS:
            wrong.append(f"{module} imports {target}, which is in no known room")
        elif ROOMS.index(to) > ROOMS.index(room):
            wrong.append(f"{module} imports {target}: {to} comes after {room}")
        elif room == to == "methods" and target not in (module, "prefopt.methods"):
            wrong.append(f"{module} imports {target}: methods do not import one another")
    return wrong


def test_imports_run_one_way() -> None:
    found = [line for module, path in modules().items() for line in problems(module, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prefopt.data.group", "from prefopt.model.scorer import Scorer"),
        ("prefopt.data.group", "def f():\n    from prefopt.train import trainer"),
        ("prefopt.config.dpo", "import prefopt.cli"),
        ("prefopt.config.dpo", "from prefopt import api"),
        ("prefopt.methods.sft", "from prefopt.methods.dpo import run"),
        ("prefopt.data.group", "from .read import x"),
        ("prefopt.misc.tools", ""),
        ("prefopt.data.group", "from prefopt.misc import tools"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert problems(module, source)


def test_what_is_torch_free_imports_no_torch() -> None:
    names = ["prefopt"] + [m for m in modules() if m not in FRONT and m.split(".")[1] in TORCH_FREE]
    names += ["prefopt.api", "prefopt.cli"]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' imports torch')\n"
    )
    script += "import prefopt; prefopt.Callback\nif 'torch' in sys.modules: sys.exit('prefopt.Callback imports torch')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["dpo", "--help"], ["dpo", "--print-config"], ["cache", "list"], ["runs", "src"]]
)
def test_what_only_tells_imports_no_torch(words: list[str]) -> None:
    script = (
        "import sys\nfrom prefopt.cli import main\n"
        f"status = main({words!r})\n"
        "heavy = [m for m in ('torch', 'transformers') if m in sys.modules]\n"
        "sys.exit(status or (f'imports {heavy}' if heavy else 0))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
