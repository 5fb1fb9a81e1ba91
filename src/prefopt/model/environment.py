"""The installation and its machine, for bug reports and run records: no secrets, and no name of the user."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import prefopt
from prefopt.core.cache_folder import cache_root
from prefopt.core.plugins import extras, how_to_install, installed_version
from prefopt.core.ranks import backend_of, ranks_in
from prefopt.core.terminal import size
from prefopt.errors import ConfigError

LIBRARIES = "torch transformers tokenizers peft safetensors huggingface_hub numpy rich".split()
OPTIONAL = ("bitsandbytes",)
"""Libraries on which numbers depend where they are installed."""
# Variables that affect runs and hold no secrets; no other variable is shown, not even its name.
VARIABLES = """
    PREFOPT_CACHE PREFOPT_DTYPE PREFOPT_TIMEOUT_MINUTES HF_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF OMP_NUM_THREADS MKL_NUM_THREADS TOKENIZERS_PARALLELISM
    CUBLAS_WORKSPACE_CONFIG WANDB_MODE
""".split()

Section = dict[str, str]


def environment() -> dict[str, Section]:
    """Names and values by section: versions, machine, devices, folders, extras and variables."""
    found = hardware()
    found["machine"]["memory"] += f", {size(psutil.virtual_memory().available)} free"
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return found | _anonymous({"folders": _folders(), "extras": _extras(), "variables": variables})


def hardware() -> dict[str, Section]:
    """Versions, machine and devices, for run records; of several processes also which this one is."""
    versions = {"prefopt": prefopt.__version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) or "not installed" for name in LIBRARIES}
    versions |= {name: version for name in OPTIONAL if (version := installed_version(name))}
    found = {"versions": versions, "machine": _machine(), "devices": _devices(), "processes": _processes()}
    return _anonymous({title: rows for title, rows in found.items() if rows})


def in_words(found: Mapping[str, Section]) -> list[str]:
    """The sections in lines; empty ones are left out."""
    lines: list[str] = []
    for title, rows in found.items():
        if rows:
            width = max(map(len, rows))
            lines += ["", f"{title}:", *(f"  {name:{width}}  {value}" for name, value in rows.items())]
    return lines[1:]


def _anonymous(found: Mapping[str, Section]) -> dict[str, Section]:
    return {title: {name: anonymous(value) for name, value in rows.items()} for title, rows in found.items()}


def anonymous(text: str) -> str:
    """The text with the home folder as ``~``, and without the user's name in other paths."""
    home = str(Path.home())
    if home != "/":
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(r"(?<![\w.~-])(/home|/Users|[A-Z]:\\Users)([/\\])[^/\\\s]+", r"\1\2USER", text)


def _machine() -> Section:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on many systems
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = f"{psutil.cpu_count(logical=False) or '?'} of {psutil.cpu_count()} logical ones"
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "processor": named[1] if named else platform.processor() or "unknown",
        "cores": f"{cores}; this process may use {usable}",
        "memory": size(psutil.virtual_memory().total),
    }


def _devices() -> Section:
    import torch

    from prefopt.model.precision import native_bfloat16

    bfloat16 = "native" if native_bfloat16(torch.device("cpu")) else "emulated (slow)"
    found = {"cpu": f"{torch.get_num_threads()} threads, bfloat16 {bfloat16}"}
    built = torch.version.cuda
    if not torch.cuda.is_available():
        found["cuda"] = f"none found, by a torch built for CUDA {built}" if built else "none: this torch has no CUDA"
    for i in range(torch.cuda.device_count()):
        about: Any = torch.cuda.get_device_properties(i)
        kind = f"capability {about.major}.{about.minor}, CUDA {built}"
        found[f"cuda:{i}"] = f"{about.name}, {size(about.total_memory)}, {kind}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _processes() -> Section:
    """What this process is among several; nothing where it is alone. The others are not asked."""
    try:
        ranks = ranks_in()
    except ConfigError as error:
        return {"mistake": str(error)}
    if ranks.alone:
        return {}
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "rank": f"{ranks.rank} of {ranks.size}",
        "local rank": f"{ranks.local_rank} of {ranks.local_size} on this machine",
        "backend": backend_of(gpus),
        "device": f"cuda:{ranks.local_rank % gpus}" if gpus else "cpu",
        "restarts": str(ranks.restarts),
    }


def _folders() -> Section:
    from huggingface_hub import constants

    cache = cache_root()
    return {
        "reference cache": str(cache),
        "hub cache": constants.HF_HUB_CACHE,
        "free there": size(shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free),
        "python": sys.executable,
    }


def _extras() -> Section:
    """Each extra of prefopt but ``dev``, with the versions of its packages or how to install it."""
    found: Section = {}
    for extra, names in extras().items():
        versions = {name: installed_version(name) for name in names}
        installed = ", ".join(f"{name} {version}" for name, version in versions.items())
        found[extra] = installed if all(versions.values()) else f"not installed: {how_to_install(extra)}"
    return found
