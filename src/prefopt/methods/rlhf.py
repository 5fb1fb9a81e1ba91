"""``prefopt rlhf``: supervised fine-tuning, then a reward model, then PPO against it.

Each stage has its own folder. ``stages.json`` beside them records digests of the inputs (options, contents of models,
data sets and templates) and of the result of each stage. A chain that is started again skips finished stages and
resumes a stopped one. If an input or a result has changed, it refuses and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.config.methods import METHODS, MethodConfig, RlhfConfig
from prefopt.config.rewards import reward_term
from prefopt.core.cache_folder import file_hashes
from prefopt.core.files import output_errors, read_json, write_json
from prefopt.core.model_folder import is_adapter
from prefopt.core.ranks import check_ranks, ranks_in
from prefopt.core.shown import ShownLines
from prefopt.core.terminal import Reporter
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts.columns import find_dataset_info
from prefopt.errors import ConfigError, DataError, Interrupted, RunError
from prefopt.generate.model_io import SampledModel
from prefopt.model.load import base_and_adapter
from prefopt.model.merge import merge_adapter
from prefopt.model.precision import resolve_device
from prefopt.rl.prompts import read_rollout_prompts, too_few
from prefopt.runs.folder import FREE_AT_RESUME
from prefopt.runs.history import RECORD, read_record
from prefopt.runs.table import CHAIN

OF_A_MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
OF_A_RUN = {RECORD, "reliability.json"}  # not of the model


def status_of(folder: Path) -> str:
    """``finished``, ``begun``, or empty if the folder holds no run."""
    if not (folder / RECORD).exists():
        return ""
    return "finished" if read_record(folder, f"remove {folder}").get("status") == "finished" else "begun"


def contents_of(folder: Path) -> str:
    """A digest of the files of a model: weights, configuration, tokenizer, template."""
    files = sorted({p for pattern in OF_A_MODEL for p in folder.glob(pattern) if p.name not in OF_A_RUN})
    if not files:
        raise RunError(f"{folder} holds no model")
    hashes = file_hashes(files, error=DataError)
    return _digest(json.dumps([[p.name, h] for p, h in zip(files, hashes, strict=True)]))


def contents_of_name(name: str) -> str:
    """:func:`contents_of` a model by name; for an adapter also of its base."""
    base, adapter = base_and_adapter(name)
    parts = [contents_of(Path(folder)) for folder in (base, adapter) if folder is not None]
    return parts[0] if len(parts) == 1 else _digest("".join(parts))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextmanager
def started_again() -> Iterator[None]:
    """Replace the --resume advice of a stopped stage: the same command continues a chain or sweep."""
    try:
        yield
    except Interrupted as stop:
        where = str(stop).partition(";")[0]
        raise Interrupted(
            f"{where}; what was computed is kept; run the same command again to continue", stop.signal
        ) from None


@dataclass(frozen=True, slots=True, repr=False)
class RlhfResult(ShownLines):
    """``output`` is the folder of the aligned model; ``done`` and ``skipped`` are the stages of this call."""

    output: Path
    done: tuple[str, ...]
    skipped: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """The aligned model and the stages."""
        yield f"aligned model: {self.output}"
        for word, names in (("done", self.done), ("skipped", self.skipped)):
            if names:
                yield f"{word}: {', '.join(names)}"


def run(config: RlhfConfig) -> RlhfResult:
    """Run all stages that are not finished.

    Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: the same call
    resumes the stage from its checkpoint.
    """
    check_ranks(config, None, ranks_in())  # its stages run in several processes, one by one
    with started_again():
        return _Chain(config).run()


class _Chain:
    def __init__(self, config: RlhfConfig) -> None:
        self.config, self.reporter = config, Reporter(config.progress)
        self.folder = Path(config.output)
        self.file = self.folder / CHAIN
        self.record: dict[str, dict[str, str]] = {}
        if self.file.exists():
            self.record = read_json(self.file, _stages, "name another --output")
        self.done: list[str] = []
        self.skipped: list[str] = []

    def run(self) -> RlhfResult:
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._check_prompts()
        self._stage("sft")
        if self.config.adapts:
            self._merge()
        self._stage("reward")
        self._stage("ppo")
        folder = self.config.folder("ppo")
        self.reporter.say(f"the aligned model: {folder}")
        return RlhfResult(folder, tuple(self.done), tuple(self.skipped))

    def _check_prompts(self) -> None:
        """Read the prompts of PPO before the first stage, with the tokenizer and context of its model."""
        first, last = self.config.stage("sft"), self.config.stage("ppo")
        if status_of(self.config.folder("ppo")):
            return
        start = SampledModel(first.model, device=last.device, dtype=last.dtype)
        last = replace(last, chat_template=last.chat_template or first.chat_template)
        prompts, _ = read_rollout_prompts(last, start, None, Reporter("none"))
        if few := too_few(last, len(prompts.ids)):
            self.reporter.say(f"ppo: {few}; in a chain: --ppo epochs=... batch_size=...")

    def _stage(self, name: str) -> None:
        config = self.config.stage(name)
        folder = self.config.folder(name)
        made_from = _made_from(config)
        status = status_of(folder)
        if status and self.record.get(name, {}).get("from") != made_from:
            raise RunError(
                f"{folder} is of a chain with other options, model or data; name another --output, or remove this"
                " folder and those of later stages"
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
            self.reporter.say(f"{name}: {'continues' if status else 'starts'}")
            METHODS[name].run(self.config.stage(name, resume=bool(status)))
            self.done.append(name)
        # Also for a finished stage: a chain may have been killed before this record.
        self._remember(name, {"from": made_from, "gave": contents_of(folder)})

    def _merge(self) -> None:
        """Merge the fine-tuned adapter: reward model and actor start from a whole model."""
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
        for line in report.lines():
            self.reporter.say(line)
        self._remember("tuned", {"from": made_from, "gave": contents_of(folder)})

    def _remember(self, name: str, what: dict[str, str]) -> None:
        self.record[name] = what
        write_json(self.file, self.record)


def _stages(found: Any) -> dict[str, dict[str, str]]:
    stages: dict[str, dict[str, str]] = found
    if not all(isinstance(text, str) for stage in stages.values() for text in stage.values()):
        raise ValueError("a stage has other than digests")
    return stages


MODELS, FILES, REWARDS = ("model", "reward", "reference"), ("chat_template", "judge_prompt"), ("true_reward",)
DATA = ("data", "prompts", "eval_data", "eval_prompts", "ptx_data")
"""Options that name models, data and files. Digests are of their contents, not their names."""


def _made_from(config: MethodConfig) -> str:
    """A digest of the options of a stage and the contents of what they name. For each source of data: the number of its
    option, the digest of its rows, its file ending, and its entry in a ``dataset_info.json``."""
    free = {*FREE_AT_RESUME, "device", "threads"}
    options = {name: value for name, value in config.to_dict().items() if name not in free}
    named = {name: value for name in (*MODELS, *DATA, *FILES) if (value := options.pop(name, None))}
    contents: dict[str, Any] = {}
    for name in REWARDS:  # with a name and a weight, which stay among the options
        if options.get(name) and (term := reward_term(options[name])).is_model:
            contents[name] = contents_of_name(term.source)
    for name, value in named.items():
        if name in MODELS:
            contents[name] = contents_of_name(value)
        elif name in FILES:
            contents[name] = file_hashes([Path(value)], error=ConfigError)
        else:  # --format takes precedence over a registry
            registry = options.get("format") is None or name == "ptx_data"
            contents[name] = [
                (
                    source.entry,
                    source.digest(),
                    source.suffix,
                    # The first version called the class Entry; its chains can still be resumed.
                    str(find_dataset_info(source.path) if registry else None).replace("DatasetInfo(", "Entry(", 1),
                )
                for source in find_sources(value)
            ]
    return _digest(json.dumps([options, contents], sort_keys=True, default=str))
