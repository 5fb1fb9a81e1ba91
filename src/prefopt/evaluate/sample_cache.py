"""The samples of a comparison: drawn once and kept in the cache, or read from a file of samples.

Drawn samples are written row by row to a cache entry whose name hashes everything they depend on, so that the same
command goes on after a failed judge or a kill.
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
from prefopt.data.validate import refuse, refused_rows
from prefopt.errors import CacheError, DataError
from prefopt.generate.model_io import SampledModel
from prefopt.generate.sample_file import sample_file_error
from prefopt.methods.sample import run as sample
from prefopt.records import Comparison
from prefopt.rewards import Reward

Rows = list[Comparison]


@dataclass(frozen=True, slots=True)
class CompareInputs:
    """Python objects in place of names in the config: ``models`` by their names there, ``rows`` of prompts, a judge."""

    models: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    rows: Sequence[Mapping[str, object]] | None = None
    judge: Reward | None = None

    def load(self, name: str, config: CompareConfig) -> SampledModel:
        """The model of this name."""
        model = self.models.get(name)
        if model is not None:
            return SampledModel(name, given=model, tokenizer=self.tokenizer)
        return SampledModel(name, device=config.device, dtype=config.dtype)

    def digest(self, name: str, config: CompareConfig) -> str:
        """SHA-256 of what decides a model's samples, or of a file of samples."""
        if is_file(name):
            return file_hashes([Path(name)], error=DataError)[0]
        return self.load(name, config).generation_digest()


def load_samples(config: CompareConfig, name: str, inputs: CompareInputs, reporter: Reporter) -> Rows:
    """The samples of a model, a row for each prompt: drawn, cached, or read from the file ``name``."""
    if is_file(name):
        return _read(Path(name))
    model, own = inputs.load(name, config), inputs.models.get(name)
    options = {n: getattr(config, n) for n in ("num", "max_new_tokens", "temperature", "seed", *READING, "on_bad_row")}
    if own is None:
        options |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    options |= {"model": name, "prompts": config.prompts or []}
    folder = samples_folder() / _key(options, model.generation_digest(), inputs.rows)
    path = folder / SAMPLES
    lock = space_lock(folder)
    if not acquired(lock):
        raise CacheError(f"{folder}: another process draws the same samples; wait for it")
    try:
        with cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and (wrong := sample_file_error(path)):
            raise CacheError(f"{path} {wrong}; remove such samples with prefopt cache verify --repair")
        options |= {"threads": config.threads, "progress": "none" if config.json else config.progress}
        drawn = SampleConfig(output=str(path), resume=path.exists(), **options)
        sample(drawn, model=own, tokenizer=None if own is None else inputs.tokenizer, rows=inputs.rows)
        used(folder)
    finally:
        lock.release()
    reporter.say(f"samples of {name}: {path}")
    return _read(path)


def _key(options: Mapping[str, Any], model: str, rows: Sequence[Mapping[str, object]] | None) -> str:
    if rows is None:
        text = json.dumps([(source.name, source.digest()) for source in find_sources(options["prompts"])])
    else:
        text = json.dumps(list(map(dict, rows)), default=repr, sort_keys=True)
    versions = [prefopt.__version__, *map(version, ("torch", "transformers", "tokenizers"))]
    whole = json.dumps([options, model, text, versions], sort_keys=True)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _read(path: Path) -> Rows:
    found = read_comparisons(str(path))
    if found.problems:
        problem = found.problems[0]
        raise DataError(f"{problem.kind}: {problem.what}", file=str(path), row=problem.row)
    rows = found.comparisons
    if bad := next((row for row in rows if not row.responses), None):
        raise DataError("has no response; prefopt sample draws some", file=str(path), row=bad.row)
    return rows


def check_same_prompts(samples: Mapping[str, Rows]) -> None:
    """Raises :class:`DataError` at the first prompt that models do not have in common, or sampled a different number
    of times."""
    (first, rows), *others = samples.items()
    for name, found in others:
        if len(found) != len(rows):
            raise DataError(
                f"{first} has {len(rows)} prompts, {name} {len(found)}: compare samples of the same prompts"
            )
        for a, b in zip(rows, found, strict=True):
            if a.prompt_key != b.prompt_key:
                what = f"its prompt differs from that of {first}: compare samples of the same prompts"
                raise DataError(what, file=name, row=b.row)
            if len(a.responses) != len(b.responses):
                what = f"has {len(b.responses)} samples, and {first} {len(a.responses)}: draw equally many"
                raise DataError(what, file=name, row=b.row)


def prompt_rows(config: CompareConfig, inputs: CompareInputs) -> tuple[dict[bytes, Comparison], list[str]]:
    """The rows of ``--prompts`` by prompt key, with the answers that the judge gsm8k reads; and notes on rows left out.

    Raises :class:`DataError` for rows that cannot be used, unless they are skipped.
    """
    how: dict[str, Any] = {"format": config.format, "columns": config.column_words}
    if inputs.rows is not None:
        readings = [parse_comparisons(inputs.rows, "prompts", **how)]
    else:
        readings = [open_comparisons(source, **how) for source in find_sources(config.prompts or [])]
    found: dict[bytes, Comparison] = {}
    left_out = 0
    for reading in readings:
        if reading.problems and config.on_bad_row == "refuse":
            raise refuse(reading.problems, reading.count)
        found |= {row.prompt_key: row for row in reading.comparisons}
        left_out += refused_rows(reading.problems)
    return found, [f"{left_out} rows of the prompts were left out: they cannot be used"] if left_out else []
