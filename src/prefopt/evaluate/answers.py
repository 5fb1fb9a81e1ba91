"""The samples that are compared: drawn once and kept on disk, or read from files of samples.

What is drawn goes to an entry of the cache row by row, named by everything that it depends on. A judge that fails, or a
kill, loses none of it: the same command goes on from what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prefopt
from prefopt.config.compare import CompareConfig, is_file
from prefopt.config.data import READING
from prefopt.config.sample import SampleConfig
from prefopt.core.cache_folder import SAMPLES, acquired, cache_errors, file_hashes, samples_folder, space_lock, used
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import open_comparisons, parse_comparisons, read_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.validate import Problem, refuse, refused_rows
from prefopt.errors import CacheError, DataError
from prefopt.generate.output import wrong_with
from prefopt.generate.sampled_model import SampledModel
from prefopt.records import Comparison
from prefopt.rewards import Reward

Rows = list[Comparison]


@dataclass(frozen=True, slots=True)
class Given:
    """What stands in for names: ``models`` by the names that the config has for them, ``rows`` of prompts, a judge."""

    models: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    rows: Sequence[Mapping[str, object]] | None = None
    judge: Reward | None = None

    def loaded(self, name: str, config: CompareConfig) -> SampledModel:
        """A model that the config names, whichever way it was given."""
        own = self.models.get(name)
        if own is not None:
            return SampledModel(name, given=own, tokenizer=self.tokenizer)
        return SampledModel(name, device=config.device, dtype=config.dtype)


def answers(config: CompareConfig, name: str, given: Given, reporter: Reporter) -> Rows:
    """The samples of a model, a row for each prompt: drawn now or before, or read from the file that ``name`` is."""
    return _read(Path(name)) if is_file(name) else _drawn(config, name, given, reporter)


def identity(config: CompareConfig, name: str, given: Given) -> str:
    """The SHA-256 of what decides a model's answers, or of a file of samples."""
    if is_file(name):
        return file_hashes([Path(name)], error=DataError)[0]
    return given.loaded(name, config).answering()


def _drawn(config: CompareConfig, name: str, given: Given, reporter: Reporter) -> Rows:
    from prefopt.methods.sample import run as sample

    model = given.loaded(name, config)
    options = {n: getattr(config, n) for n in ("num", "max_new_tokens", "temperature", "seed")}
    options |= {n: getattr(config, n) for n in (*READING, "on_bad_row")}
    if name not in given.models:
        options |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    options |= {"model": name, "prompts": config.prompts or []}
    folder = samples_folder() / _key(options, model.answering(), given.rows)
    lock = space_lock(folder)
    if not acquired(lock):
        raise CacheError(f"{folder}: another process draws the same samples; wait for it")
    try:
        path = folder / SAMPLES
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and (wrong := wrong_with(path)):
            raise CacheError(f"{path} {wrong}; prefopt cache verify --repair takes such samples out of use")
        progress = "none" if config.json else config.progress
        drawn = SampleConfig(
            output=str(path), resume=path.exists(), threads=config.threads, progress=progress, **options
        )
        own = given.models.get(name)
        sample(drawn, model=own, tokenizer=given.tokenizer if own is not None else None, rows=given.rows)
        used(folder)
    finally:
        lock.release()
    reporter.say(f"samples of {name}: {path}")
    return _read(path)


def _key(options: Mapping[str, Any], model: str, rows: Sequence[Mapping[str, object]] | None) -> str:
    """Name of the entry: a hash of everything that the samples depend on."""
    if rows is None:
        prompts = [(source.name, source.digest()) for source in find_sources(options["prompts"])]
        text = json.dumps(prompts)
    else:
        text = json.dumps(list(map(dict, rows)), default=repr, sort_keys=True)
    versions = [prefopt.__version__, *map(version, ("torch", "transformers", "tokenizers"))]
    whole = json.dumps([options, model, text, versions], sort_keys=True)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _read(path: Path) -> Rows:
    found = read_comparisons(str(path))
    problems = [row for row in found if isinstance(row, Problem)]
    if problems:
        raise DataError(f"{problems[0].kind}: {problems[0].what}", file=str(path), row=problems[0].row)
    rows = [row for row in found if isinstance(row, Comparison)]
    if bad := next((row for row in rows if not row.responses), None):
        raise DataError("has no response; prefopt sample draws some", file=str(path), row=bad.row)
    return rows


def check_same(samples: Mapping[str, Rows]) -> None:
    """Every model answered the same prompts, equally often. Raises :class:`DataError` at the first difference."""
    (first, rows), *others = samples.items()
    for name, found in others:
        if len(found) != len(rows):
            raise DataError(
                f"{first} has {len(rows)} prompts and {name} {len(found)}: compare samples of the same ones"
            )
        for a, b in zip(rows, found, strict=True):
            if a.prompt_key != b.prompt_key:
                raise DataError(
                    f"the prompt is another one than in {first}: compare samples of the same ones", file=name, row=b.row
                )
            if len(a.responses) != len(b.responses):
                what = f"has {len(b.responses)} samples, and {first} {len(a.responses)}: draw equally many"
                raise DataError(what, file=name, row=b.row)


def prompts_of(config: CompareConfig, given: Given) -> tuple[dict[bytes, Comparison], list[str]]:
    """The prompts' rows as their files have them, by prompt: with the answers that gsm8k compares with; and what is
    said of rows that were left out. Raises :class:`DataError` for rows that cannot be used, unless they may be."""
    how: dict[str, Any] = {"format": config.format, "columns": config.column_words}
    found, left = {}, 0
    if given.rows is not None:
        readings = [parse_comparisons(given.rows, "prompts", **how)]
    else:
        readings = [open_comparisons(source, **how) for source in find_sources(config.prompts or [])]
    for reading in readings:
        problems: list[Problem] = []
        for row in reading:
            if isinstance(row, Comparison):
                found[row.prompt_key] = row
            else:
                problems.append(row)
        if problems and config.on_bad_row == "refuse":
            raise refuse(problems, reading.count)
        left += refused_rows(problems)
    return found, [f"{left} rows of the prompts were left out: they cannot be used"] if left else []
