"""Writes the stubs of prefopt, prefopt.data and prefopt.collect: python docs/make_stubs.py.

From them editors and type checkers know every keyword argument.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

import prefopt
from prefopt import api
from prefopt.api.functions import in_stub

SOURCE = Path(prefopt.__file__).parent
HEAD = '# Written by docs/make_stubs.py; tests/test_stubs.py keeps it current.\n"""{}"""\n\n{}\n'
RESULTS = {
    "TrainingResult": "prefopt.train.result",
    "RewardResult": "prefopt.train.result",
    "PpoResult": "prefopt.methods.ppo",
    "OnlineResult": "prefopt.methods.online",
    "RlhfResult": "prefopt.methods.rlhf",
    "SampleResult": "prefopt.methods.sample",
    "CompareResult": "prefopt.evaluate.result",
    "ScoreResult": "prefopt.evaluate.score",
    "MergeReport": "prefopt.model.merge",
    "ExportedModel": "prefopt.export.serving",
    "RewardBenchReport": "prefopt.evaluate.reward_bench",
    "RunList": "prefopt.api.runs",
    "Frontier": "prefopt.sweeps.points",
    "MethodsTable": "prefopt.sweeps.methods",
    "DataReport": "prefopt.data.audit",
    "StudySummary": "prefopt.studies.summary",
    "Data": "prefopt.api.types",
    "Model": "prefopt.api.types",
    "Name": "prefopt.api.types",
    "Names": "prefopt.api.types",
    "Scores": "prefopt.api.types",
    "Tokenizer": "prefopt.api.types",
    "Path": "pathlib",
    "Sequence": "collections.abc",
    "Any": "typing",
    "Literal": "typing",
    "overload": "typing",
}
"""Where the names of annotations come from."""


def stubs() -> dict[Path, str]:
    """The files and what they should hold."""
    found = {SOURCE / "__init__.pyi": _stub(prefopt, api.FUNCTIONS, TOP)}
    for name in ("data", "collect"):
        package, module = (importlib.import_module(f"prefopt.{part}{name}") for part in ("", "api."))
        found[SOURCE / name / "__init__.pyi"] = _stub(package, {n: getattr(module, n) for n in package.FUNCTIONS})
    return found


TOP = "from prefopt import collect as collect, data as data, errors as errors\n"
TOP += "from prefopt.runs.callbacks import Callback as Callback\n\n__version__: str\n"


def _stub(package: Any, functions: Mapping[str, Callable[..., Any]], more: str = "") -> str:
    body = "\n".join(text for name in sorted(functions) for text in _function(name, functions[name], package.__name__))
    used = [name for name in RESULTS if re.search(rf"\b{name}\b", body)]
    lines: dict[str, list[str]] = {}
    for name in used:
        lines.setdefault(RESULTS[name], []).append(name)
    imports = "\n".join(f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(lines.items()))
    return HEAD.format(package.__doc__.rstrip(), imports) + more + "\n" + body


def _function(name: str, function: Any, package: str) -> list[str]:
    """The stub of a function; two where a dry run returns None."""
    signature = inspect.signature(function)
    returns = str(signature.return_annotation)
    doc = str(function.__doc__).partition("\n")[0] + f" ``help({package}.{name})`` lists all options."
    whole = returns.removesuffix(" | None")
    if "dry_run" not in signature.parameters:
        return [_definition(name, signature.parameters, returns, doc)]
    trains = {
        n: p.replace(annotation="Literal[False]") if n == "dry_run" else p for n, p in signature.parameters.items()
    }
    short = f"@overload\ndef {name}(model: Model, data: Data | None = None, *, dry_run: bool, **options: Any)"
    return ["@overload\n" + _definition(name, trains, whole, doc), f"{short} -> {returns}: ...\n"]


def _definition(name: str, parameters: Mapping[str, Parameter], returns: str, doc: str) -> str:
    lines, named = [], False
    for p in parameters.values():
        if p.kind is Parameter.KEYWORD_ONLY and not named:
            named = True
            lines.append("*")
        default = "" if p.default is Parameter.empty else f" = {p.default!r}"
        lines.append(f"{p.name}: {in_stub(p.annotation)}{default}")
    inside = "".join(f"    {line},\n" for line in lines)
    return f'def {name}(\n{inside}) -> {returns}:\n    """{doc}"""\n    ...\n'


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")
