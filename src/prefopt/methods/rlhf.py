"""Chains of methods: supervised fine-tuning, then a reward model, then PPO against it.

Each stage has a folder of its own. ``stages.json`` beside them keeps what a finished stage was made from (its options,
the contents of every model, data set and template that they name) and what came of it, so that a chain that is started
again does only what is still to be done, or goes on where it was stopped; where anything has changed since, it says so
and touches nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.config.ppo import PpoConfig
from prefopt.config.rlhf import RewardConfig, RlhfConfig, StageConfig, StageName
from prefopt.config.sft import SftConfig
from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import output_errors, read_json, write_json
from prefopt.core.model_folder import is_adapter
from prefopt.core.terminal import Reporter
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts.columns import find_dataset_info
from prefopt.errors import ConfigError, DataError, Interrupted, RunError
from prefopt.generate.model_io import SampledModel
from prefopt.methods import ppo, reward, sft
from prefopt.model.load import base_and_adapter
from prefopt.model.merge import merge_adapter
from prefopt.model.precision import resolve_device
from prefopt.rl.prompts import read_prompts, too_few
from prefopt.runs.folder import FREE
from prefopt.runs.history import RECORD, read_record
from prefopt.runs.table import CHAIN

OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
OF_A_RUN = {RECORD, "reliability.json"}  # what changes, or says nothing of the model


def status_of(folder: Path) -> str:
    """``finished``, ``begun``, or nothing where there is no run in the folder."""
    if not (folder / RECORD).exists():
        return ""
    record = read_record(folder, f"remove {folder}")
    return "finished" if record.get("status") == "finished" else "begun"


def contents_of(folder: Path) -> str:
    """A digest of the files of a model: weights, configuration, tokenizer, template."""
    files = sorted({p for pattern in OF_A_MODEL for p in folder.glob(pattern) if p.name not in OF_A_RUN})
    if not files:
        raise RunError(f"{folder} holds no model")
    hashes = file_hashes(files, error=DataError)
    text = json.dumps([[p.name, h] for p, h in zip(files, hashes, strict=True)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def contents_of_name(name: str) -> str:
    """The same of a model by its name; an adapter's folder is taken together with that of its model."""
    base, adapter = base_and_adapter(name)
    parts = [contents_of(Path(folder)) for folder in (base, adapter) if folder is not None]
    return parts[0] if len(parts) == 1 else hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def started_again() -> Iterator[None]:
    """A stage that is stopped speaks of --resume; what it is a part of goes on where it is started again."""
    try:
        yield
    except Interrupted as stop:
        where = str(stop).partition(";")[0]
        said = f"{where}; what was computed is kept: the same command goes on"
        raise Interrupted(said, stop.signal) from None


@dataclass(frozen=True, slots=True)
class RlhfResult:
    """``output`` is the folder of the aligned model; ``done`` and ``skipped`` are stages of this call."""

    output: Path
    done: tuple[str, ...]
    skipped: tuple[str, ...]


def run(config: RlhfConfig) -> RlhfResult:
    """Run the chain, or what is left of it.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: started again, the
    stage goes on from its checkpoint.
    """
    with started_again():
        return _Chain(config).run()


class _Chain:
    def __init__(self, config: RlhfConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)
        self.file = self.folder / CHAIN
        self.record: dict[str, dict[str, str]] = self._read()
        self.done: list[str] = []
        self.skipped: list[str] = []

    def run(self) -> RlhfResult:
        """Every stage in turn."""
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._check_prompts()
        self._stage("sft", lambda c: sft.run(_as(SftConfig, c)))
        if self.config.adapts:
            self._merge()
        self._stage("reward", lambda c: reward.run(_as(RewardConfig, c)))
        self._stage("ppo", lambda c: ppo.run(_as(PpoConfig, c)))
        folder = self.config.folder("ppo")
        self.reporter.say(f"the aligned model: {folder}")
        return RlhfResult(folder, tuple(self.done), tuple(self.skipped))

    def _check_prompts(self) -> None:
        """Read what the last stage will answer before the first one begins: what it would refuse is told now.

        The tokenizer and the context are those of the model that the chain starts from.
        """
        first, last = self.config.stage("sft"), self.config.stage("ppo")
        assert isinstance(first, SftConfig) and isinstance(last, PpoConfig)
        if status_of(self.config.folder("ppo")):
            return
        start = SampledModel(first.model, device=last.device, dtype=last.dtype)
        last = replace(last, chat_template=last.chat_template or first.chat_template)
        prompts, _ = read_prompts(last, start, None, Reporter("none"))
        if few := too_few(last, len(prompts.ids)):
            self.reporter.say(f"ppo: {few}; in a chain: --ppo epochs=... batch_size=...")

    def _stage(self, name: StageName, method: Callable[[StageConfig], object]) -> None:
        config = self.config.stage(name)
        folder = self.config.folder(name)
        made_from = _made_from(config)
        status = status_of(folder)
        if status and self.record.get(name, {}).get("from") != made_from:
            raise RunError(
                f"{folder} is of a chain with other options, model or data; name another --output, or remove this"
                " folder and those of the stages after it"
            )
        if status == "finished":
            if self.record[name].get("gave") == contents_of(folder):
                self.reporter.say(f"{name}: done already")
                self.skipped.append(name)
                return
            if "gave" in self.record[name]:
                raise RunError(f"{folder} was changed since it was finished; remove it, or name another --output")
        else:
            self._remember(name, {"from": made_from})
            self.reporter.say(f"{name}: {'goes on' if status else 'begins'}")
            method(self.config.stage(name, resume=bool(status)))
            self.done.append(name)
        # (A stage that finished in the moment before the chain was killed comes here with nothing to do.)
        self._remember(name, {"from": made_from, "gave": contents_of(folder)})

    def _merge(self) -> None:
        """The fine-tuned adapter folded in: one whole model that reward model and actor start from."""
        source, folder = self.config.folder("sft"), self.config.folder("tuned")
        made_from = contents_of(source)
        known = self.record.get("tuned", {})
        if folder.exists() and known == {"from": made_from, "gave": contents_of(folder)}:
            return
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} was not made from {source} as it is now; remove it")
        import torch

        model = None if is_adapter(self.config.model) else self.config.model
        device = resolve_device(self.config.device)
        report = merge_adapter(str(source), folder, model=model, dtype=torch.float32, device=device)
        for line in report.in_words():
            self.reporter.say(line)
        self._remember("tuned", {"from": made_from, "gave": contents_of(folder)})

    def _remember(self, name: str, what: dict[str, str]) -> None:
        self.record[name] = what
        write_json(self.file, self.record)

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.file.exists():
            return {}
        return read_json(self.file, _stages, "name another --output")


def _stages(found: Any) -> dict[str, dict[str, str]]:
    stages: dict[str, dict[str, str]] = found
    if not all(isinstance(text, str) for stage in stages.values() for text in stage.values()):
        raise ValueError("a stage has other than digests")
    return stages


def _as(kind: type[Any], config: StageConfig) -> Any:
    assert isinstance(config, kind)
    return config


MODELS, DATA, FILES = ("model", "reward", "reference"), ("data", "prompts", "eval_data", "ptx_data"), ("chat_template",)
"""Options of a stage that name folders of models, rows, and files: what they hold decides on it, not their names."""


def _made_from(config: StageConfig) -> str:
    """A digest of everything that decides on a stage: its options, and the contents of what they name."""
    free = {*FREE, "device", "threads"}
    options = {name: value for name, value in config.to_dict().items() if name not in free}
    named = {name: value for name in (*MODELS, *DATA, *FILES) if (value := options.pop(name, None))}
    contents: dict[str, Any] = {}
    for name, value in named.items():
        if name in MODELS:
            contents[name] = contents_of_name(value)
        elif name in FILES:
            contents[name] = file_hashes([Path(value)], error=ConfigError)
        else:  # (--format goes before what a registry says)
            contents[name] = _digests(value, registry=options.get("format") is None or name == "ptx_data")
    text = json.dumps([options, contents], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digests(names: Sequence[str], *, registry: bool) -> list[tuple[int, str, str, str]]:
    """Of each source the name it is of, by number (a weight may belong to it), its rows, what its ending says of their
    layout, and, with ``registry``, what a ``dataset_info.json`` beside it does."""
    return [
        (
            source.entry,
            source.digest(),
            source.suffix,
            str(find_dataset_info(source.path) if registry else None),
        )
        for source in find_sources(names)
    ]
