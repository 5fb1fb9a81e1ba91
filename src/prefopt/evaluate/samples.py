"""The samples of a comparison, drawn once and cached or read from a file, and their statistics.

Drawn samples are written row by row to a cache entry whose name hashes everything they depend on, so that the same
command goes on after a failed judge or a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

import prefopt
from prefopt.config.compare import CompareConfig, is_file
from prefopt.config.data import READING
from prefopt.config.sample import SampleConfig
from prefopt.core.cache_folder import SAMPLES, acquired, cache_errors, file_hashes, samples_folder, space_lock, used
from prefopt.core.files import expanded
from prefopt.core.model_folder import base_of, is_adapter
from prefopt.core.statistics import Interval, mean_interval
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import open_comparisons, parse_comparisons, read_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.group import Group, pictures_in
from prefopt.data.load import load_groups
from prefopt.data.pictures import ANYWHERE, PictureFolder
from prefopt.data.validate import Problem, refuse, refused_rows
from prefopt.errors import CacheError, DataError, ModelError, UserError
from prefopt.evaluate.score import response_logprobs
from prefopt.evaluate.win_rate import Floats, Ints
from prefopt.generate.model_io import SampledModel, renderer_for
from prefopt.generate.sample_file import read_record, sample_file_error
from prefopt.methods.sample import run as sample
from prefopt.model.precision import scoring_dtype
from prefopt.records import Comparison
from prefopt.rewards import Reward

Rows = list[Comparison]
TOKEN_BUDGET = 4096
"""Tokens of a forward pass."""
MAX_LENGTH = 4096
"""Tokens of a held-out row where the model has no context limit."""


@dataclass(frozen=True, slots=True)
class CompareInputs:
    """Python objects in place of names in the config: ``models`` by their names there, ``rows`` of prompts, a judge."""

    models: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    rows: Sequence[Mapping[str, object]] | None = None
    judge: Reward | None = None

    def load(self, name: str, config: CompareConfig, *, scores: bool = False) -> SampledModel:
        """The model of this name, to draw samples, or where it ``scores`` in the precision for that."""
        model = self.models.get(name)
        if model is not None:
            return SampledModel(name, given=model, tokenizer=self.tokenizer)
        return SampledModel(name, device=config.device, dtype=scoring_dtype(config.dtype) if scores else config.dtype)

    def digest(self, name: str, config: CompareConfig) -> str:
        """SHA-256 of what decides a model's samples, or of a file of samples."""
        if is_file(name):
            return file_hashes([Path(name)], error=DataError)[0]
        return self.load(name, config).generation_digest()


def lines_of(config: CompareConfig, inputs: CompareInputs) -> Literal["auto", "user"]:
    """What the lines of .txt prompts are for all models: each model's own default where these agree, else user turns,
    since samples of different prompts cannot be compared."""
    sampled = [name for name in config.models if not is_file(name)]
    if inputs.rows is not None or len(sampled) < 2:
        return "auto"
    if not any(source.suffix == ".txt" for source in find_sources(config.prompts or [])):
        return "auto"
    chats = {inputs.load(name, config).tokenizer.chat_template is not None for name in sampled}
    return "auto" if len(chats) == 1 else "user"


def load_samples(
    config: CompareConfig,
    name: str,
    inputs: CompareInputs,
    reporter: Reporter,
    lines: Literal["auto", "user"] = "auto",
) -> Rows:
    """The samples of a model, a row for each prompt: drawn, cached, or read from the file ``name``. ``lines``: those of
    .txt prompts, see :func:`lines_of`."""
    if is_file(name):
        return _read(Path(name), PictureFolder.of(config.picture_folder) if config.picture_folder else None)
    model, own = inputs.load(name, config), inputs.models.get(name)
    options = {n: getattr(config, n) for n in ("num", "max_new_tokens", "temperature", "seed", *READING, "on_bad_row")}
    if own is None:
        options |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    options |= {"model": name, "prompts": config.prompts or []} | ({} if lines == "auto" else {"lines": lines})
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
    return _read(path, ANYWHERE)


def _key(options: Mapping[str, Any], model: str, rows: Sequence[Mapping[str, object]] | None) -> str:
    if rows is None:
        text = json.dumps([(source.name, source.digest()) for source in find_sources(options["prompts"])])
    else:
        text = json.dumps(list(map(dict, rows)), default=repr, sort_keys=True)
    versions = [prefopt.__version__, *map(version, ("torch", "transformers", "tokenizers"))]
    whole = json.dumps([options, model, text, versions], sort_keys=True)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def _read(path: Path, pictures: PictureFolder | None) -> Rows:
    found = read_comparisons(str(path), pictures=pictures)
    if found.problems:
        problem = found.problems[0]
        raise DataError(f"{problem.kind}: {problem.what}", file=str(path), row=problem.row)
    rows = found.comparisons
    if bad := next((row for row in rows if not row.responses), None):
        raise DataError("has no response; prefopt sample draws some", file=str(path), row=bad.row)
    return rows


def sampling_model(path: Path, config: CompareConfig) -> SampledModel | None:
    """The model that ``prefopt sample`` drew a file with, where its record names folders of this machine and they still
    hold that model."""
    try:
        record = read_record(path)
        options = record["options"]
        name, adapter, quantise = options["model"], options.get("adapter"), options.get("quantise")
        folders = [name, *([adapter] if adapter else []), *([base_of(name)] if is_adapter(name) else [])]
        if not all(expanded(folder).is_dir() for folder in folders):
            return None
        model = SampledModel(
            name, adapter=adapter, quantise=quantise, device=config.device, dtype=scoring_dtype(config.dtype)
        )
        return model if model.identity().digest == record["model"] else None
    except (UserError, OSError, KeyError, TypeError):  # no record, or none of a file of samples
        return None


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
                what = f"has {len(b.responses)} samples, and {first} {len(a.responses)}: draw the same number"
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


@dataclass(frozen=True, slots=True)
class KlEstimate:
    """KL(policy || reference) of whole responses in nats, estimated on the policy's own samples (Schulman 2020).

    With r = reference / policy of a response, ``k1`` is the mean of -log r, unbiased, and ``error`` its standard error
    over prompts; ``k3`` is the mean of r - 1 - log r, never negative with the same expectation, but dominated by rare
    responses where the two models are far apart.
    """

    k1: Interval
    error: float
    k3: float


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Means over samples. ``entropy``: nats per token from the log-probabilities of the sampled tokens, None where they
    were not sampled from the model's own distribution. ``repetition``: see :func:`repetition`."""

    prompts: int
    samples: int
    tokens: float | None
    characters: float
    entropy: float | None
    repetition: float
    empty: int
    distance: KlEstimate | None = None
    perplexity: float | None = None


def sample_stats(
    rows: Sequence[Comparison], kl: KlEstimate | None = None, perplexity: float | None = None
) -> SampleStats:
    """Statistics of rows of ``prefopt sample``; rows of another origin have neither tokens nor entropy."""
    texts = [r.text for row in rows for r in row.responses]
    tokens, logps, sampling = (_column(rows, name) for name in ("tokens", "logprobs", "sampling_logprobs"))
    entropy = None
    if tokens is not None and logps is not None and sampling is not None and np.allclose(logps, sampling, atol=1e-4):
        entropy = float(-np.sum(logps) / np.sum(tokens))
    return SampleStats(
        len({row.prompt_key for row in rows}),
        len(texts),
        None if tokens is None else float(np.mean(tokens)),
        float(np.mean([len(t) for t in texts])),
        entropy,
        float(np.mean([repetition(t) for t in texts])),
        sum(not t.strip() for t in texts),
        kl,
        perplexity,
    )


def repetition(text: str, n: int = 4) -> float:
    """The fraction of word n-grams that occurred before in the text; of characters where it has no spaces.

    >>> round(repetition("a b c d a b c d"), 3), repetition("all of these are different words")
    (0.2, 0.0)
    """
    words = text.split() if " " in text.strip() else list(text.strip())
    ngrams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return 1 - len(ngrams) / ngrams.total() if ngrams else 0.0


def kl_to_reference(
    rows: Sequence[Comparison], reference: SampledModel, policy: SampledModel | None = None, *, seed: int = 0
) -> KlEstimate | None:
    """The KL of the model that drew these samples to ``reference``; None for one prompt. Arguments and errors are those
    of :func:`log_ratios`."""
    log_ratio = log_ratios(rows, reference, policy)
    k3 = np.expm1(-log_ratio) + log_ratio
    means = of_prompts(rows, log_ratio)
    if len(means) < 2:
        return None
    error = float(means.std(ddof=1) / len(means) ** 0.5)
    return KlEstimate(mean_interval(means, seed=seed), error, float(k3.mean()))


def of_prompts(rows: Sequence[Comparison], values_N: Floats) -> Floats:
    """The mean of each prompt, by first occurrence, of values of the rows' responses [N]."""
    prompts = np.repeat(prompt_numbers(row.prompt_key for row in rows), [len(row.responses) for row in rows])
    found: Floats = np.bincount(prompts, values_N) / np.bincount(prompts)
    return found


def log_ratios(rows: Sequence[Comparison], reference: SampledModel, policy: SampledModel | None = None) -> Floats:
    """Log-ratios [N] of the rows' responses, of the model that drew them to ``reference``, which must have the same
    tokens.

    ``policy`` is the model that drew them: the same code then scores both models, so that their rounding is alike, and
    the KL of a model to itself is 0 in any precision. Without it the samples' own log-probabilities are used: in
    bfloat16, sampling and scoring round differently by tenths of a nat per response. Raises :class:`DataError` where
    samples lack token ids or log-probabilities, or were not drawn from the model's own distribution, and
    :class:`ModelError` where a token is none of the reference's.
    """
    pictured = any(row.pictures for row in rows)
    for model in (reference, policy) if pictured else ():
        if model is not None:
            model.pictures = True
    for row in rows:
        if not all(name in row.extra for name in ("token_ids", "logprobs", "sampling_logprobs")):
            raise DataError("has no token ids and log-probabilities, which prefopt sample writes", row=row.row)
        if not np.allclose(_numbers(row, "logprobs"), _numbers(row, "sampling_logprobs"), atol=1e-4):
            what = "a temperature, top-k or top-p"
            if pictured:
                what += ", or without the token of pictures, which its model expects in answers"
            raise DataError(f"was sampled with {what}: --reference cannot use it", row=row.row)
    bare = [replace(row, responses=(), tiers=(), scores=None, labels=None, votes=None) for row in rows]
    groups = []
    for row, prompt in zip(rows, renderer_for(reference.tokenizer).prompts(bare), strict=True):
        if isinstance(prompt, Problem):
            raise DataError(f"{prompt.kind}: {prompt.what}", row=row.row)
        ids: Any = row.extra["token_ids"]
        wholes = [np.concatenate([np.asarray(prompt), np.asarray(x, np.int32)]) for x in ids]
        sequences = [(whole, np.arange(len(whole)) >= len(prompt)) for whole in wholes]
        pictures = [pictures_in(prompt)] * len(wholes) if pictures_in(prompt) else ()
        groups.append(Group.from_sequences(sequences, row=row.row, pairs=(), pictures=pictures))
    if max(int(c.ids.max()) for g in groups for c in g.continuations) >= len(reference.tokenizer):
        raise ModelError(f"--reference {reference.name}: its vocabulary lacks tokens of the samples")
    if policy is None:
        logps = np.concatenate([_numbers(row, "logprobs") for row in rows])
    else:
        logps = response_logprobs(policy.scorer, groups, TOKEN_BUDGET)
        policy.release()  # one model in memory at a time
    found: Floats = logps - response_logprobs(reference.scorer, groups, TOKEN_BUDGET)
    return found


def perplexity(model: SampledModel, names: Sequence[str], **layout: Any) -> tuple[float, int, int]:
    """The perplexity per token of the best responses of some data, and how many rows were truncated to the model's
    context and how many left out. Perplexities of models with different tokenizers do not compare."""
    found = load_groups(names, model.tokenizer, max_length=model.context or MAX_LENGTH, kind="demonstrations", **layout)
    logps = response_logprobs(model.scorer, list(found.groups), TOKEN_BUDGET)
    mean = logps.sum() / found.groups.trained_N.sum()
    return float(np.exp(-mean)), found.truncated, found.refused


def prompt_numbers(keys: Iterable[Hashable]) -> Ints:
    """The number [rows] of each row's prompt, by first occurrence."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def by_prompt(values: Floats, prompt: Ints) -> Floats:
    """``values`` [rows, samples] of rows with these prompt numbers as [prompts, samples], padded with NaN.

    >>> by_prompt(np.array([[1.0], [0.5], [0.0]]), np.array([0, 1, 0]))
    array([[1. , 0. ],
           [0.5, nan]])
    """
    found: dict[int, list[float]] = {}
    for number, row in zip(prompt.tolist(), values.tolist(), strict=True):
        found.setdefault(number, []).extend(row)
    longest = max(map(len, found.values()), default=0)
    return np.array([found[n] + [np.nan] * (longest - len(found[n])) for n in sorted(found)])


def _column(rows: Sequence[Comparison], name: str) -> Floats | None:
    if not all(name in row.extra for row in rows):
        return None
    return np.concatenate([_numbers(row, name) for row in rows])


def _numbers(row: Comparison, name: str) -> Floats:
    values: Any = row.extra[name]
    return np.asarray(values, np.float64)
