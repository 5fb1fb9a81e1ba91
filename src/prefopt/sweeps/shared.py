"""What all roads of a sweep stand on: prompts that are dealt once, preferences that are made once, and one measure.

Everything is written below ``data`` of the sweep's output, and found there when the sweep is started again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.sample import SampleConfig
from prefopt.config.sweeps import SweepOptions
from prefopt.config.tools import ScoreConfig
from prefopt.core.files import output_errors, replace_file
from prefopt.core.statistics import Interval, mean_interval
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem, refuse
from prefopt.errors import DataError, RunError
from prefopt.evaluate import score
from prefopt.evaluate.sample_stats import kl_to_reference
from prefopt.evaluate.score import load_row_scorer
from prefopt.generate.model_io import PromptReader, SampledModel, renderer_for
from prefopt.methods import sample
from prefopt.records import Comparison, Message, tiers_of


@dataclass(frozen=True, slots=True)
class Ground:
    """``train`` and ``held_out`` are files of prompts, ``data`` one of preferences; ``each``: responses of its rows on
    average; ``made``: how it came to be, in words."""

    train: Path
    held_out: Path
    data: Path
    each: float
    made: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A policy on the held-out prompts: its mean true reward, its divergence from the reference in nats per response
    with a standard error over prompts (none where it cannot be measured), and tokens of a response."""

    reward: Interval
    kl: float | None
    kl_error: float | None
    length: float


def lay(config: SweepOptions, reference: SampledModel, reporter: Reporter) -> Ground:
    """Deal the prompts, and make or copy the preferences, where that is not done yet.

    Raises :class:`DataError` for too few prompts, and :class:`RunError` where the folder holds other ones.
    """
    folder = Path(config.output) / "data"
    train, held_out = _dealt(config, _prompts(config, reference, reporter))
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(files, (train, held_out), strict=True):
        _same(path, _lines(rows), "the prompts")
    reporter.say(f"prompts: {len(train)} to train on, {len(held_out)} to measure on")
    if config.data is not None:
        data, made = _given(config, folder, {row.prompt_key for row in held_out}, reporter), "given"
    else:
        data, made = _made(config, folder, train)
    counts = [len(row.responses) for row in _read([str(data)])]
    return Ground(*files, data, float(np.mean(counts)), made)


class Measure:
    """Draws samples of a policy on the held-out prompts, always with the same seed, and looks at them."""

    def __init__(self, config: SweepOptions, ground: Ground, reference: SampledModel) -> None:
        """Raises :class:`prefopt.errors.ConfigError` where there is no such reward."""
        self._config, self._ground, self._reference = config, ground, reference
        self._scores = load_row_scorer(_scoring(config, ground.held_out, ground.held_out))

    def __call__(
        self,
        name: str,
        file: Path,
        *,
        adapter: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        best_of: int | None = None,
    ) -> Measured:
        """Measure the model in folder ``name``, or the one given; its samples are kept in ``file``.

        With ``best_of`` the true reward picks each sample of so many: whose divergence is not measured.
        """
        config = self._config
        drawn = sample.run(
            SampleConfig(
                model=name,
                adapter=adapter,
                prompts=[str(self._ground.held_out)],
                num=config.num,
                max_new_tokens=config.max_new_tokens,
                seed=config.seed,
                best_of=best_of,
                reward=None if best_of is None else config.reward,
                progress="none",
                **_machine(config),
            ),
            model=model,
            tokenizer=tokenizer,
        )
        rows = [row for row in parse_comparisons(drawn.rows, name) if isinstance(row, Comparison)]
        scores = self._scores(rows)
        _write(file, (replace(r, scores=s, tiers=tiers_of(s)) for r, s in zip(rows, scores, strict=True)))
        lengths: list[Any] = [row.extra["tokens"] for row in rows]
        told = mean_interval([float(np.mean(s)) for s in scores], seed=config.seed)
        length = float(np.mean([n for many in lengths for n in many]))
        if best_of is not None:
            return Measured(told, None, None, length)
        gap = kl_to_reference(rows, self._reference, seed=config.seed)
        assert gap is not None, "there are at least two held-out prompts"
        return Measured(told, gap.k1.mean, gap.error, length)


# -- prompts ---------------------------------------------------------------------------------------------------


def _prompts(config: SweepOptions, reference: SampledModel, reporter: Reporter) -> list[Comparison]:
    """Every different prompt, cut where that is asked for."""
    renderer = renderer_for(reference.tokenizer)
    chats = reference.tokenizer.chat_template is not None
    lines = config.lines if config.lines != "auto" else "user" if chats else "text"
    # Prompts that are cut to their beginning may be longer than the model can read.
    context, room = None if config.prefix_max else reference.context, config.max_new_tokens
    reader = PromptReader(renderer, context=context, lines=lines, on_bad_row="refuse", room=room)
    found = reader.read(find_sources(config.prompts))
    for line in found.notes:
        reporter.say(f"prompts: {line}")
    rows = found.rows
    if config.prefix_min is not None and config.prefix_max is not None:
        chance = random.Random(config.seed)
        sizes = [chance.randint(config.prefix_min, config.prefix_max) for _ in rows]
        rows = [_cut(row, size, reference.tokenizer) for row, size in zip(rows, sizes, strict=True)]
    return list({row.prompt_key: replace(row, extra={}) for row in rows}.values())


def _cut(row: Comparison, size: int, tokenizer: Any) -> Comparison:
    """The prompt's first ``size`` tokens as text."""
    if not row.text:
        raise DataError("is a conversation, and --prefix-min cuts text to continue", file=row.file, row=row.row)
    ids = tokenizer(row.prompt[0].content, add_special_tokens=False)["input_ids"][:size]
    return replace(row, prompt=(Message("user", tokenizer.decode(ids)),))


def _dealt(config: SweepOptions, rows: list[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Those to train on, and those to measure on."""
    if len(rows) <= config.held_out:
        raise DataError(
            f"--prompts has {len(rows)} different prompts, of which --held-out {config.held_out} leaves none to train"
            " on: give more, or lower it"
        )
    random.Random(config.seed).shuffle(rows)
    return rows[config.held_out :], rows[: config.held_out]


# -- preferences -----------------------------------------------------------------------------------------------


def _made(config: SweepOptions, folder: Path, train: Sequence[Comparison]) -> tuple[Path, str]:
    """Samples of the model, and the true reward's word on them."""
    asked, drawn, scored = (folder / f"{name}.jsonl" for name in ("asked", "samples", "scored"))
    _same(asked, _lines([*train] * config.rounds), "the prompts")
    if not scored.exists():
        sample.run(
            SampleConfig(
                model=config.model,
                prompts=[str(asked)],
                output=str(drawn),
                num=config.samples,
                max_new_tokens=config.max_new_tokens,
                seed=config.seed,
                resume=drawn.exists(),
                progress=config.progress,
                **_machine(config),
            )
        )
        score.run(_scoring(config, drawn, scored))
    if config.labels == "order":
        return scored, f"{config.samples} samples of a prompt in the order of {config.reward}"
    pairs = folder / "pairs.jsonl"
    _same(pairs, _lines(bradley_terry(_read([str(scored)]), config.seed)), "the preferences")
    return pairs, f"pairs of samples, drawn by Bradley-Terry on {config.reward}"


def bradley_terry(rows: Iterable[Comparison], seed: int) -> list[Comparison]:
    """Samples two by two, in their order: the first is preferred with the probability sigmoid(its score - the other's).

    An odd one is left over; no sample stands in two pairs, so that labels are independent. Raises :class:`DataError`
    for a row without scores.
    """
    chance, found = random.Random(seed), []
    for row in rows:
        if row.scores is None:
            raise DataError("has no scores", file=row.file, row=row.row)
        for i in range(0, len(row.responses) - 1, 2):
            first = chance.random() < 1 / (1 + math.exp(row.scores[i + 1] - row.scores[i]))
            order = ((0,), (1,)) if first else ((1,), (0,))
            found.append(replace(row, responses=row.responses[i : i + 2], tiers=order, scores=None, extra={}))
    return found


def _given(config: SweepOptions, folder: Path, held_out: set[bytes], reporter: Reporter) -> Path:
    """The data less the rows whose prompts are held out."""
    path, rows = folder / "preferences.jsonl", list(_read(config.data or []))
    kept = [replace(row, row=n, file="", extra={}) for n, row in enumerate(rows, 1) if row.prompt_key not in held_out]
    if not kept:
        raise DataError(f"all {len(rows)} rows of --data have prompts that are held out: give other --prompts")
    if len(kept) < len(rows):
        reporter.say(f"data: {len(rows) - len(kept)} of {len(rows)} rows are left out, as their prompts are held out")
    _same(path, _lines(kept), "the data")
    return path


def _read(names: Sequence[str]) -> list[Comparison]:
    """All rows. Raises :class:`DataError` for one that cannot be read."""
    found: list[Comparison] = []
    for source in find_sources(names):
        reading = open_comparisons(source)
        problems: list[Problem] = []
        for row in reading:
            problems.append(row) if isinstance(row, Problem) else found.append(row)
        if problems:
            raise refuse(problems, reading.count)
    return found


# -- files -----------------------------------------------------------------------------------------------------


def _machine(config: SweepOptions) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("dtype", "device", "threads")}


def _scoring(config: SweepOptions, file: Path, output: Path) -> ScoreConfig:
    by_model = ScoreConfig(files=[str(file)], reward=config.reward, output=str(output)).by_model
    machine = _machine(config) if by_model else {}
    return ScoreConfig(files=[str(file)], reward=config.reward, output=str(output), **machine)


def _lines(rows: Iterable[Comparison]) -> bytes:
    written = (LAYOUTS["canonical"].write(row) for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode("utf-8", "surrogatepass")


def _write(path: Path, rows: Iterable[Comparison]) -> None:
    with output_errors(path):
        replace_file(path, _lines(rows))


def _same(path: Path, data: bytes, what: str) -> None:
    """Write a file, or find it as it would be written. Raises :class:`RunError` where it is another."""
    if not path.exists():
        with output_errors(path):
            replace_file(path, data)
    elif path.read_bytes() != data:
        raise RunError(f"{what} are not those that {path} was made from: put them back, or name another --output")
