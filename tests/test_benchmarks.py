"""Benchmarks are run by hand: that what they take from the package is there is seen here."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def test_what_benchmarks_import_is_there() -> None:
    assert SCRIPTS
    for node in (node for script in SCRIPTS for node in ast.walk(ast.parse(script.read_text("utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prefopt":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
