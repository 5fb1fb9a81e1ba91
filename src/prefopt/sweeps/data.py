"""Data shared by all trainings of a sweep (prompt split, preferences) and the measurement of every policy. Files are
written below ``data`` of the sweep's output, and reused when the sweep is continued."""

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
from prefopt.config.scoring import is_model_reward
from prefopt.config.sweeps import SweepOptions
from prefopt.config.tools import ScoreConfig
from prefopt.core.files import output_errors, replace_file
from prefopt.core.statistics import mean_interval
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import open_comparisons, parse_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem, refuse
from prefopt.errors import DataError, RunError
from prefopt.evaluate import score
from prefopt.evaluate.choices import ChoiceTask
from prefopt.evaluate.samples import log_ratios, of_prompts, perplexity
from prefopt.evaluate.score import RowScorer, load_row_scorer
from prefopt.generate.model_io import SampledModel, read_prompt_set, renderer_for
from prefopt.methods import sample
from prefopt.model.precision import scoring_dtype
from prefopt.records import Comparison, Message, tiers_of


@dataclass(frozen=True, slots=True)
class SweepData:
    """``train``, ``held_out`` and ``tune`` are files of prompts. ``preferences`` has ``each`` responses per row on
    average; ``made`` describes how it was made."""

    train: Path
    held_out: Path
    preferences: Path
    each: float
    made: str
    tune: Path | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A policy on the held-out prompts: mean true reward with its 95 % interval, KL to the reference in nats per
    response with its standard error over prompts (None where not measured), and tokens per response. ``rewards`` and
    ``kls`` are those of each prompt; ``perplexity`` is that of a text, where one is measured; ``judged`` are the scores
    of a second reward, of each prompt; ``task`` says of each question of a task whether it was answered right."""

    reward: float
    interval: tuple[float, float]
    kl: float | None
    kl_se: float | None
    length: float
    rewards: tuple[float, ...] = ()
    kls: tuple[float, ...] = ()
    perplexity: float | None = None
    judged: tuple[float, ...] = ()
    task: tuple[float, ...] = ()

    def means(self) -> dict[str, Any]:
        """The averages alone, by name."""
        return {name: getattr(self, name) for name in ("reward", "interval", "kl", "kl_se", "length")}


def prepare_data(config: SweepOptions, reference: SampledModel, reporter: Reporter, *, tune: int = 0) -> SweepData:
    """Split the prompts, ``tune`` of them for choosing rates, and make or copy the preferences, unless that is done.
    Raises :class:`DataError` for too few
    prompts, and :class:`RunError` where the folder holds other ones."""
    folder, prompts = Path(config.output) / "data", _prompts(config, reference, reporter)
    if len(prompts) <= config.held_out + tune:
        asked = f"--held-out {config.held_out}" + (f" and --tune {tune}" if tune else "")
        left = f"{asked} leave{'' if tune else 's'} none to train on: give more, or lower {'them' if tune else 'it'}"
        raise DataError(f"--prompts has {len(prompts)} different prompts, of which {left}")
    random.Random(config.seed).shuffle(prompts)
    held_out, rest = prompts[: config.held_out], prompts[config.held_out :]
    tuned, train = rest[:tune], rest[tune:]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(files, (train, held_out), strict=True):
        _write_once(path, rows, "the prompts")
    if tuned:
        _write_once(folder / "tune.jsonl", tuned, "the prompts")
    choose = f", {len(tuned)} to choose rates on" if tuned else ""
    reporter.say(f"prompts: {len(train)} to train on, {len(held_out)} to measure on{choose}")
    if config.data is not None:
        apart = {row.prompt_key for row in (*held_out, *tuned)}
        preferences = _given(config, folder, apart, reporter)
    else:
        preferences = _sampled(config, folder, train)
    counts = [len(row.responses) for row in _read([str(preferences)])]
    each = float(np.mean(counts))
    return SweepData(*files, preferences, each, made_from(config), folder / "tune.jsonl" if tuned else None)


def made_from(config: SweepOptions) -> str:
    """How the preferences of a sweep are made, in words."""
    if config.data is not None:
        return "given"
    if config.labels == "order":
        return f"{config.samples} samples of a prompt in the order of {config.reward}"
    return f"pairs of samples, drawn by Bradley-Terry on {config.reward}"


def true_reward(config: SweepOptions, name: str | None = None) -> RowScorer:
    """The scorer of ``--reward``, or of ``name``. A reward model is loaded here: a sweep has one for all that it
    measures. Raises :class:`prefopt.errors.ConfigError` for an unknown reward."""
    return load_row_scorer(_scoring(config, Path(config.output), Path(config.output), name))


class Measure:
    """Draws samples of a policy for some prompts, always with the same seed, and scores them by ``reward``
    (:func:`true_reward`). ``text``: data to measure its perplexity on, too; ``judge``: a second reward; ``task``:
    questions that it answers."""

    def __init__(
        self,
        config: SweepOptions,
        prompts: Path,
        reference: SampledModel,
        reward: RowScorer,
        text: Sequence[str] | None = None,
        judge: RowScorer | None = None,
        task: ChoiceTask | None = None,
    ) -> None:
        self._config, self._prompts, self._reference, self._text = config, prompts, reference, text
        self._scores, self._judge, self.task = reward, judge, task

    def __call__(
        self,
        name: str,
        file: Path,
        *,
        adapter: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        best_of: int | None = None,
    ) -> Measurement:
        """Measure the model in folder ``name``, or ``model``; its samples are written to ``file``.

        With ``best_of`` the true reward picks each sample of so many, and the KL is not measured.
        """
        config = self._config
        drawn = sample.run(
            SampleConfig(
                model=name,
                adapter=adapter,
                prompts=[str(self._prompts)],
                num=config.num,
                max_new_tokens=config.max_new_tokens,
                seed=config.seed,
                best_of=best_of,
                reward=None if best_of is None else config.reward,
                progress="none",
                **_comparing(config),
            ),
            model=model,
            tokenizer=tokenizer,
        )
        rows = [row for row in parse_comparisons(drawn.rows, name) if isinstance(row, Comparison)]
        scores = self._scores(rows)
        scored = _lines(replace(r, scores=s, tiers=tiers_of(s)) for r, s in zip(rows, scores, strict=True))
        with output_errors(file):
            replace_file(file, scored)
        lengths: list[Any] = [row.extra["tokens"] for row in rows]
        rewards = [float(np.mean(s)) for s in scores]
        judged = tuple(float(np.mean(s)) for s in self._judge(rows)) if self._judge is not None else ()
        reward = mean_interval(rewards, seed=config.seed)
        length = float(np.mean([n for many in lengths for n in many]))
        found = Measurement(reward.mean, (reward.low, reward.high), None, None, length, tuple(rewards), judged=judged)
        if best_of is None:
            policy = self._policy(name, adapter, given=model, tokenizer=tokenizer)
            kls = of_prompts(rows, log_ratios(rows, self._reference, policy))
            error = float(kls.std(ddof=1) / len(kls) ** 0.5)
            found = replace(found, kl=float(kls.mean()), kl_se=error, kls=tuple(kls.tolist()))
            if self._text is not None:
                found = replace(found, perplexity=perplexity(policy, self._text)[0])
            if self.task is not None:
                found = replace(found, task=self.task(policy))
            policy.release()
        return found

    def answers(self, name: str, adapter: str | None) -> tuple[float, ...]:
        """What the model in folder ``name`` answers to the task, as in :class:`Measurement`."""
        assert self.task is not None
        policy = self._policy(name, adapter)
        found = self.task(policy)
        policy.release()
        return found

    def _policy(self, name: str, adapter: str | None, **given: Any) -> SampledModel:
        device, dtype = self._config.device, scoring_dtype(self._config.dtype)
        return SampledModel(name, adapter=adapter, device=device, dtype=dtype, **given)


def _prompts(config: SweepOptions, reference: SampledModel, reporter: Reporter) -> list[Comparison]:
    """The distinct prompts, truncated with ``prefix_min``."""
    renderer = renderer_for(reference.tokenizer)
    # Prompts that are truncated may be longer than the model's context.
    context, room = None if config.prefix_max else reference.context, config.max_new_tokens
    found = read_prompt_set(config.prompts, renderer, context=context, room=room, lines=config.lines)
    for line in found.notes:
        reporter.say(f"prompts: {line}")
    rows = found.rows
    if config.prefix_min is not None and config.prefix_max is not None:
        chance = random.Random(config.seed)
        sizes = [chance.randint(config.prefix_min, config.prefix_max) for _ in rows]
        rows = [_cut(row, size, reference.tokenizer) for row, size in zip(rows, sizes, strict=True)]
    return list({row.prompt_key: replace(row, extra={}) for row in rows}.values())


def _cut(row: Comparison, size: int, tokenizer: Any) -> Comparison:
    """A prompt of its first ``size`` tokens."""
    if not row.text:
        raise DataError("is a conversation, and --prefix-min cuts text to continue", file=row.file, row=row.row)
    ids = tokenizer(row.prompt[0].content, add_special_tokens=False)["input_ids"][:size]
    return replace(row, prompt=(Message("user", tokenizer.decode(ids)),))


def _sampled(config: SweepOptions, folder: Path, train: Sequence[Comparison]) -> Path:
    """Preferences of the true reward between samples of the model."""
    asked, drawn, scored = (folder / f"{name}.jsonl" for name in ("asked", "samples", "scored"))
    _write_once(asked, [*train] * config.rounds, "the prompts")
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
        return scored
    pairs = folder / "pairs.jsonl"
    _write_once(pairs, bradley_terry(_read([str(scored)]), config.seed), "the preferences")
    return pairs


def bradley_terry(rows: Iterable[Comparison], seed: int) -> list[Comparison]:
    """Pairs of consecutive samples: the first is preferred with probability sigmoid(difference of scores).

    No sample is in two pairs, so labels are independent. Raises :class:`DataError` for a row without scores.
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
    """The given data without rows whose prompts are held out."""
    path, rows = folder / "preferences.jsonl", list(_read(config.data or []))
    kept = [replace(row, row=n, file="", extra={}) for n, row in enumerate(rows, 1) if row.prompt_key not in held_out]
    if not kept:
        raise DataError(f"all {len(rows)} rows of --data have prompts that are held out: give other --prompts")
    if len(kept) < len(rows):
        reporter.say(f"data: {len(rows) - len(kept)} of {len(rows)} rows are skipped: their prompts are held out")
    _write_once(path, kept, "the data")
    return path


def _read(names: Sequence[str]) -> list[Comparison]:
    """All rows. Raises :class:`DataError` for an unreadable one."""
    found: list[Comparison] = []
    for source in find_sources(names):
        reading = open_comparisons(source)
        rows = list(reading)
        if problems := [row for row in rows if isinstance(row, Problem)]:
            raise refuse(problems, reading.count)
        found += [row for row in rows if not isinstance(row, Problem)]
    return found


def _machine(config: SweepOptions) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("dtype", "device", "threads")}


def _comparing(config: SweepOptions) -> dict[str, Any]:
    """Policies are measured in one precision, and by one true reward, whether they come from a folder or from a step of
    a training."""
    return _machine(config) | {"dtype": scoring_dtype(config.dtype)}


def _scoring(config: SweepOptions, file: Path, output: Path, name: str | None = None) -> ScoreConfig:
    reward = name or config.reward
    machine = _comparing(config) if is_model_reward(reward) else {}
    return ScoreConfig(files=[str(file)], reward=reward, output=str(output), **machine)


def _lines(rows: Iterable[Comparison]) -> bytes:
    written = (LAYOUTS["canonical"].write(row) for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written).encode("utf-8", "surrogatepass")


def _write_once(path: Path, rows: Iterable[Comparison], what: str) -> None:
    """Write a file, or raise :class:`RunError` where it exists with other content."""
    data = _lines(rows)
    if not path.exists():
        with output_errors(path):
            replace_file(path, data)
    elif path.read_bytes() != data:
        raise RunError(f"{what} are not those that {path} was made from: restore them, or name another --output")
