"""Checks of a config without torch or a model, so that common mistakes are reported within a second."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt.config.export import ExportConfig
from prefopt.config.judges import LLM
from prefopt.config.methods import method_of
from prefopt.config.reward_bench import RewardBenchConfig
from prefopt.config.rewards import ComponentOptions
from prefopt.config.sample import SampleConfig
from prefopt.config.scoring import IMPLICIT, RULES, ScorerOptions, is_model_reward
from prefopt.config.tools import ScoreConfig
from prefopt.core.endpoint import Endpoint, is_url
from prefopt.core.files import OVERWRITE, RESUME, expanded, is_path, one_below, refuse_existing
from prefopt.core.hub import no_telemetry, why_not_read
from prefopt.core.ranks import ranks_in, restarted
from prefopt.data.files.content import look
from prefopt.data.files.sources import FileOrigin, Source, find_sources
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.export.checks import check_export
from prefopt.rewards import load_reward
from prefopt.runs.folder import check_output

MODELS = ("model", "adapter", "reference", "reference_adapter", "teacher", "teacher_adapter", "a", "b")
DATA = ("data", "eval_data", "prompts", "eval_prompts", "ptx_data", "files")
TEXT = ".txt"
CONFIGS = ("config.json", "adapter_config.json")
GPU_DRIVERS = ("libcuda.so.1", "libamdhip64.so", "nvcuda.dll", "amdhip64.dll")


def check_before_torch(config: Any) -> None:
    """Raise :class:`prefopt.errors.UserError` for a missing device, model, data file or reward, for an empty data file,
    for an output folder that is taken, and for a rollout server that does not answer.

    Configs without a ``device`` pass: they need no torch.
    """
    if not hasattr(config, "device"):
        return
    _check_device(config.device)
    if method_of(config) and not config.dry_run and ranks_in().alone:  # several look at it together, later
        again = restarted()
        check_output(Path(config.output), resume=config.resume or again, overwrite=config.overwrite and not again)
    if isinstance(config, SampleConfig | ScoreConfig) and config.output and not Path(config.output).is_dir():
        if isinstance(config, ScoreConfig):
            refuse_existing(Path(config.output), OVERWRITE, unless=config.overwrite)
        else:
            refuse_existing(Path(config.output), RESUME, unless=config.resume)
    if isinstance(config, ExportConfig):
        check_export(config)
    if isinstance(config, RewardBenchConfig):
        for file in filter(None, (config.output, config.html)):
            refuse_existing(Path(file), OVERWRITE, unless=config.overwrite)
    for option in DATA:
        for source in find_sources(getattr(config, option, None) or []):
            _check_file(source)
    if getattr(config, "url", None) is None:  # a server knows its own models
        for option in MODELS:
            names = getattr(config, option, None)
            for name in names if isinstance(names, list) else [names]:
                if not (option == "teacher" and name is not None and is_url(name)):
                    _check_model(name)
    _check_servers(config)
    known = [*RULES, *([IMPLICIT] if isinstance(config, ScorerOptions) else [])]
    for reward in _rewards_of(config):
        _check_reward(reward, known)


def _rewards_of(config: Any) -> list[str]:
    if isinstance(config, ComponentOptions):
        terms = [*config.reward_terms, *([config.true_term] if config.true_term is not None else [])]
        return [term.source for term in terms if term.source != LLM]
    reward = getattr(config, "reward", None)
    return [reward] if isinstance(reward, str) else []


def _check_reward(reward: str, known: Sequence[str]) -> None:
    if is_model_reward(reward):
        _check_model(reward)
    elif reward not in known:
        load_reward(reward)  # refuses the name, or an absent module


def _check_servers(config: Any) -> None:
    """Refuse servers that do not answer; not of a resumed run, whose checkpoint may hold what they would be asked."""
    if getattr(config, "resume", False):
        return
    teacher = getattr(config, "teacher", None)
    named = {"rollout": getattr(config, "rollout_server", None) or [], "teacher": [teacher] if teacher else []}
    for what, names in named.items():
        flag = "--rollout-server" if what == "rollout" else "--teacher"
        for url in filter(is_url, names):
            key = getattr(config, f"{what}_key")
            Endpoint(url, key_variable=key, flag=flag, key_flag=f"--{what}-key").models(f"--{what}-model")


def _check_device(name: str | None) -> None:
    """Refuse a GPU without a driver library, or Apple's GPU on another system. Torch checks the number of GPUs."""
    if name is None or not name.startswith(("cuda", "mps")):
        return
    there = platform.system() == "Darwin" if name.startswith("mps") else any(map(_loads, GPU_DRIVERS))
    if not there:
        raise ConfigError(f"--device {name}: this machine has no such device; leave --device out to use what it has")


def _loads(library: str) -> bool:
    with suppress(OSError):
        return bool(ctypes.CDLL(library))
    return False


def _check_file(source: Source) -> None:
    """Refuse absent and empty files; a text file of prompts may be empty."""
    path = source.origin.path if isinstance(source.origin, FileOrigin) else Path(source.name)
    if path.suffix.lower() == TEXT:
        if not path.exists():
            raise DataError("no such file; check the path", file=source.name)
    elif isinstance(source.origin, FileOrigin):
        look(path)


def _check_model(name: str | None) -> None:
    """Refuse what is neither a model's folder, nor the name of a model in the Hub's cache or on the Hub, nor a file of
    samples."""
    if name is None:
        return
    path = expanded(name)
    if path.is_dir() and not any((path / file).exists() for file in CONFIGS):
        raise ModelError(f"{name} holds no {' and no '.join(CONFIGS)}: it is not a model{one_below(path)}")
    if path.exists():
        return
    if name.endswith(".jsonl"):
        raise DataError("no such file; check the path", file=name)
    if is_path(name):
        raise ModelError(f"{name}: no such folder; check the path")
    no_telemetry()
    from huggingface_hub import HfApi, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in CONFIGS):
        return
    try:
        HfApi().model_info(name)
    except Exception as error:  # of several libraries
        if why := why_not_read(error, name):
            raise ModelError(f"{name}: {why}") from error
