"""What this installation runs on, for a person and for reports of bugs: no secrets, and no name of the user."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import prefopt
from prefopt.core.cache_folder import cache_root
from prefopt.core.terminal import size

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "rich",
)
# Whose values say how things run and name nobody. Of any other variable not even the name is told.
VARIABLES = (
    "PREFOPT_CACHE",
    "PREFOPT_DTYPE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "CUBLAS_WORKSPACE_CONFIG",
    "WANDB_MODE",
)

Section = dict[str, str]


def environment() -> dict[str, Section]:
    """Sections of names and values: versions, the machine, devices, folders, extras and variables."""
    found = hardware()
    found["machine"]["memory"] += f", {size(psutil.virtual_memory().available)} free"
    found |= {
        "folders": _folders(),
        "extras": _extras(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    return _anonymous(found)


def hardware() -> dict[str, Section]:
    """What a run's results may depend on, quick to find out: versions, the machine and its devices."""
    versions = {"prefopt": prefopt.__version__, "python": platform.python_version(), **_libraries()}
    return _anonymous({"versions": versions, "machine": _machine(), "devices": _devices()})


def in_words(found: Mapping[str, Section]) -> list[str]:
    """Lines for a person; sections without a value are left out."""
    lines: list[str] = []
    for title, rows in found.items():
        if rows:
            width = max(map(len, rows))
            lines += [*([""] if lines else []), f"{title}:", *(f"  {name:{width}}  {rows[name]}" for name in rows)]
    return lines


def _anonymous(found: Mapping[str, Section]) -> dict[str, Section]:
    return {title: {name: anonymous(value) for name, value in rows.items()} for title, rows in found.items()}


def anonymous(text: str) -> str:
    """The text with the home folder as ``~``, and without the name of the user where it is part of a path."""
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(r"(?<![\w.~-])(/home|/Users|[A-Z]:\\Users)([/\\])[^/\\\s]+", r"\1\2USER", text)


def _libraries() -> Section:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> Section:
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "processor": _processor(),
        "cores": f"{psutil.cpu_count(logical=False) or '?'} of {psutil.cpu_count()} logical ones; this process may use"
        f" {_usable_cores()}",
        "memory": size(psutil.virtual_memory().total),
    }


def _processor() -> str:
    """Its name; platform.processor() is empty on many systems."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> Section:
    import torch

    from prefopt.model.load import native_bfloat16

    cpu = torch.device("cpu")
    found = {
        "cpu": f"{torch.get_num_threads()} threads, bfloat16 {'native' if native_bfloat16(cpu) else 'emulated (slow)'}"
    }
    for i in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        about: Any = torch.cuda.get_device_properties(i)
        kind = f"capability {about.major}.{about.minor}, CUDA {torch.version.cuda}"
        found[f"cuda:{i}"] = f"{about.name}, {size(about.total_memory)}, {kind}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        found["cuda"] = f"none found, by a torch built for CUDA {built}" if built else "none: this torch has no CUDA"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _folders() -> Section:
    from huggingface_hub import constants

    cache, hub = cache_root(), Path(constants.HF_HUB_CACHE)
    return {
        "reference cache": f"{cache} ({size(_bytes(cache))})",
        "hub cache": f"{hub} ({size(_bytes(hub))})",
        "free there": size(shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free),
        "python": sys.executable,
    }


def _bytes(folder: Path) -> int:
    """What lies below a folder; links are not followed, and what goes away meanwhile does not count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total


def _extras() -> Section:
    """Each extra with the versions of its packages, or how to install it."""
    found: Section = {}
    for extra, names in _requirements().items():
        versions = {name: _version(name) for name in names}
        lacking = [name for name, version in versions.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        found[extra] = f'not installed: pip install "prefopt[{extra}]"' if lacking else there
    return found


def _requirements() -> dict[str, list[str]]:
    """The packages of each extra of prefopt, but for those of developers."""
    # The project file first: what an editable installation noted of it may be old.
    requirements = _declared(Path(prefopt.__file__).parents[2] / "pyproject.toml") or _installed()
    found: dict[str, list[str]] = {}
    for extra, name in _parsed(requirements):
        if extra != "dev" and name != "prefopt":
            found.setdefault(extra, []).append(name)
    return found


def _installed() -> list[str]:
    try:
        return metadata.requires("prefopt") or []
    except metadata.PackageNotFoundError:
        return []


def _declared(project: Path) -> list[str]:
    """The same lines as in an installation, of the project file beside the sources, where there is one."""
    found = tomllib.loads(project.read_text("utf-8")).get("project", {}) if project.is_file() else {}
    extras = found["optional-dependencies"] if found.get("name") == "prefopt" else {}
    return [f"{name}; extra == '{extra}'" for extra, names in extras.items() for name in names]


def _parsed(requirements: list[str]) -> Iterator[tuple[str, str]]:
    for text in requirements:
        condition = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", text)
        name = re.match(r"[\w.-]+", text)
        if condition and name:
            yield condition[1], name[0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
