"""``prefopt compare``: which model is better on the same prompts, by a judge of seeded samples or by recorded votes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.compare import CompareConfig, is_file
from prefopt.core.options import command
from prefopt.core.statistics import MIN_PROMPTS, Interval, mean_interval
from prefopt.core.terminal import Reporter
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.evaluate.judges import Judge, Question, ScoredVote, load_judge, vote_with_empty
from prefopt.evaluate.length_control import length_controlled
from prefopt.evaluate.result import CompareResult, PairResult, check_output, correct_pairs, findings, write_pairs
from prefopt.evaluate.samples import (
    CompareInputs,
    Rows,
    SampleStats,
    by_prompt,
    check_same_prompts,
    kl_to_reference,
    lines_of,
    load_samples,
    perplexity,
    prompt_numbers,
    prompt_rows,
    sample_stats,
    sampling_model,
)
from prefopt.evaluate.score import read_rows
from prefopt.evaluate.strengths import bradley_terry, connected_groups, win_counts
from prefopt.evaluate.tasks import Harness, TaskScore, changes, read_task_results
from prefopt.evaluate.win_rate import Floats, Ints, tier_outcome, win_rate
from prefopt.model.environment import hardware
from prefopt.model.load import base_and_adapter
from prefopt.model.precision import resolve_device, resolve_dtype, scoring_dtype
from prefopt.records import Comparison
from prefopt.studies.export import ExportOptions, export_rows
from prefopt.studies.study import Study, is_study
from prefopt.studies.votes import Vote

SAMPLING_COLUMNS = {"logprobs", "sampling_logprobs", "tokens", "token_ids", "finish"}
"""Columns of ``prefopt sample`` that hold a value per response; judged pairs leave them out."""


def run(config: CompareConfig, inputs: CompareInputs | None = None) -> CompareResult:
    """Compare the models of ``config``, or the ``inputs`` in their place. Raises :class:`prefopt.errors.UserError`."""
    inputs = inputs or CompareInputs()
    if config.votes is not None:
        return _compare_votes(config)
    judge = load_judge(config, inputs.judge)
    if config.judge == "gsm8k" and config.prompts is None:
        raise ConfigError("--prompts is missing: --judge gsm8k reads the answers there")
    check_output(config, [*(config.prompts or () if inputs.rows is None else ()), *(config.held_out or ())])
    if config.threads:
        torch.set_num_threads(config.threads)
    names, task_scorer = config.models, _task_scorer(config, inputs)
    reporter = Reporter("none" if config.json else config.progress)
    lines = lines_of(config, inputs)
    samples = {name: load_samples(config, name, inputs, reporter, lines) for name in names}
    check_same_prompts(samples)
    answers, notes = prompt_rows(config, inputs) if config.judge == "gsm8k" else ({}, [])
    prompts = prompt_numbers(row.prompt_key for row in samples[names[0]])
    versus, games, judged = [], [], []
    for i, k in combinations(range(len(names)), 2):
        pair = (names[i], names[k])
        questions = _questions(samples[pair[0]], samples[pair[1]], answers)
        votes, empty = vote_with_empty(judge, questions)
        outcomes = np.array([tier_outcome(v.tiers) for v in votes]).reshape(len(prompts), -1)
        longer = np.array([float(len(a) - len(b)) for a, b in (q.responses for q in questions)]).reshape(outcomes.shape)
        versus.append(_pair_result(config, pair, samples[pair[0]], prompts, outcomes, longer, empty))
        by_row = zip(prompts.tolist(), outcomes.tolist(), strict=True)
        games += [(i, k, prompt, x) for prompt, row in by_row for x in row if not math.isnan(x)]
        judged += [_judged_row(q, v, pair, judge) for q, v in zip(questions, votes, strict=True)]
    output = None if config.output is None else Path(config.output)
    digest = "" if output is None else write_pairs(output, judged)
    if lines == "user":
        notes.append("lines of --prompts are the user's turns for all models, since some have a chat template")
    if (different := len(set(prompts.tolist()))) < len(prompts):
        asked = f"{len(prompts)} rows ask {different} different prompt{'s' * (different > 1)}"
        notes.append(f"{asked}: rows that ask the same count as samples of one prompt")
    notes += judge.notes()
    notes += _precision_note(config)
    stats = {name: _sample_stats(config, name, rows, notes, inputs) for name, rows in samples.items()}
    if task_scorer is not None:
        scores = {name: task_scorer(name) for name in names}
        versus = [replace(pair, tasks=changes(scores[pair.first], scores[pair.second])) for pair in versus]
    versus = correct_pairs(versus)
    return CompareResult(
        judge.name,
        versus,
        _strengths(names, games, versus, notes),
        stats,
        output,
        notes,
        [finding for pair in versus for finding in findings(pair, stats)],
        "" if inputs.models or inputs.rows is not None or inputs.judge else command("compare", config),
        {name: inputs.digest(name, config) for name in names},
        hardware(),
        digest,
    )


def _precision_note(config: CompareConfig) -> list[str]:
    """A note where models are sampled in one dtype and their log-probabilities compared in another."""
    if not (config.reference or config.held_out or (config.judge or "").startswith("implicit:")):
        return []
    device = resolve_device(config.device)
    drawn, scored = (resolve_dtype(name, device) for name in (config.dtype, scoring_dtype(config.dtype)))
    if drawn == scored or all(map(is_file, config.models)):
        return []
    names = [str(dtype).removeprefix("torch.") for dtype in (drawn, scored)]
    return [f"samples are drawn in {names[0]}, and log-probabilities of models compared in {names[1]}"]


def _questions(first: Rows, second: Rows, answers: dict[bytes, Comparison]) -> list[Question]:
    """Sample n of one model against sample n of the other, prompt by prompt."""
    found = []
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.responses, b.responses, strict=True):
            pair = replace(a, responses=(x, y), tiers=(), scores=None, labels=None, votes=None)
            found.append(Question(pair, answers.get(a.prompt_key)))
    return found


def _pair_result(
    config: CompareConfig,
    names: tuple[str, str],
    rows: Rows,
    prompts: Ints,
    outcomes: Floats,
    longer: Floats,
    empty: int,
) -> PairResult:
    categories = {}
    if config.category is not None:
        for row in rows:
            if config.category not in row.extra:
                raise DataError(f"--category {config.category}: the prompt has no such column", row=row.row)
        of_row = np.array([str(row.extra[config.category]) for row in rows])
        for name in sorted(set(of_row.tolist())):
            chosen = of_row == name
            categories[str(name)] = win_rate(by_prompt(outcomes[chosen], prompts[chosen]))
    outcomes, longer = by_prompt(outcomes, prompts), by_prompt(longer, prompts)
    difference = mean_interval(np.nanmean(longer, axis=1), seed=config.seed) if len(longer) >= MIN_PROMPTS else None
    return PairResult(*names, win_rate(outcomes), length_controlled(outcomes, longer), categories, empty, difference)


def _judged_row(q: Question, vote: Vote, names: tuple[str, str], judge: Judge) -> dict[str, object]:
    extra = {name: value for name, value in q.pair.extra.items() if name not in SAMPLING_COLUMNS}
    extra |= {"models": list(names), "judge": judge.name}
    extra |= {name: value for name, value in vote.to_json().items() if name in ("rationale", "skipped")}
    if isinstance(vote, ScoredVote) and vote.scores is not None:
        extra["judge_scores"] = list(vote.scores)
    return LAYOUTS["canonical"].write(replace(q.pair, tiers=vote.tiers, extra=extra))


def _sample_stats(config: CompareConfig, name: str, rows: Rows, notes: list[str], inputs: CompareInputs) -> SampleStats:
    kl, held_out = None, None
    if config.reference is not None:
        reference = inputs.load(config.reference, config, scores=True)
        policy = sampling_model(Path(name), config) if is_file(name) else inputs.load(name, config, scores=True)
        if policy is None:
            what = "its KL is by the log-probabilities in the file, which sampling rounds differently from scoring"
            notes.append(f"{name}: the model that drew it was not found: {what}")
        elif policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            raise ModelError(f"--reference {config.reference}: its tokenizer is not that of {name}: no KL is defined")
        kl = kl_to_reference(rows, reference, policy, seed=config.seed)
        for model in (reference, policy):
            if model is not None:
                model.release()
    if config.held_out is not None and not is_file(name):
        model = inputs.load(name, config, scores=True)
        layout: dict[str, Any] = {"format": config.format, "columns": config.column_words}
        held_out, cut, left_out = perplexity(model, config.held_out, on_bad_row=config.on_bad_row, **layout)
        model.release()
        if left_out:
            notes.append(f"{name}: {left_out} rows of the held-out data were left out: they cannot be used")
        if cut:
            notes.append(f"{name}: {cut} rows of the held-out data were truncated")
    return sample_stats(rows, kl, held_out)


def _strengths(
    names: Sequence[str],
    games: list[tuple[int, int, int, float]],
    versus: Sequence[PairResult],
    notes: list[str],
) -> dict[str, Interval]:
    if len(names) < 3 or any(pair.rate.rate is None for pair in versus):
        return {}
    wins = win_counts(games, len(names))
    if len(groups := connected_groups(wins)) > 1:
        listed = "; ".join(", ".join(names[i] for i in group) for group in groups)
        notes.append(
            f"no strengths: between the groups {listed} no model both won and lost, or they were never compared,"
            " so their distance cannot be estimated"
        )
        return {}
    return dict(zip(names, bradley_terry(wins), strict=True))


def _task_scorer(config: CompareConfig, inputs: CompareInputs) -> Callable[[str], list[TaskScore]] | None:
    """Task scores of a model by its name. Made before sampling, so that mistakes show early."""
    if config.task_results is not None:
        scores = {n: read_task_results(file) for n, file in zip(config.models, config.task_results, strict=True)}
        return scores.__getitem__
    if config.tasks is None:
        return None
    if objects := [name for name in config.models if name in inputs.models]:
        raise ConfigError(f"--tasks needs models named by their folders; {objects[0]} is an object: save it first")
    harness = Harness(config.tasks, task_folder=config.task_folder, limit=config.task_limit)
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    return lambda name: harness.scores(name, *base_and_adapter(name), dtype=dtype, device=str(device))


def _compare_votes(config: CompareConfig) -> CompareResult:
    votes = recorded_votes(config.votes or (), format=config.format, columns=config.column_words)
    names = sorted({name for vote in votes for name in vote.models})
    keys = {key: n for n, key in enumerate(dict.fromkeys(vote.prompt for vote in votes))}
    versus, games = [], []
    for i, k in combinations(range(len(names)), 2):
        pair = (names[i], names[k])
        if not (of_pair := [vote for vote in votes if vote.models == pair]):
            continue
        prompts = prompt_numbers(vote.prompt for vote in of_pair)
        outcomes = by_prompt(np.array([[vote.outcome] for vote in of_pair], np.float64), prompts)
        longer = by_prompt(np.array([[vote.longer] for vote in of_pair], np.float64), prompts)
        versus.append(PairResult(*pair, win_rate(outcomes), length_controlled(outcomes, longer)))
        games += [(i, k, keys[vote.prompt], vote.outcome) for vote in of_pair]
    notes: list[str] = []
    versus = correct_pairs(versus)
    return CompareResult("people", versus, _strengths(names, games, versus, notes), {}, notes=notes)


@dataclass(frozen=True, slots=True)
class RecordedVote:
    """One comparison of two ``models``, in alphabetical order, on the prompt with this key. ``outcome`` is 1 where the
    first won, 1/2 for a tie; ``longer``: characters of the first response minus those of the second."""

    models: tuple[str, str]
    prompt: bytes
    outcome: float
    longer: int


def recorded_votes(
    names: Sequence[str], *, format: str | None = None, columns: Sequence[str] | None = None
) -> list[RecordedVote]:
    """A vote for every pair of responses of different models that a row judges.

    Raises :class:`DataError` for rows that do not name their models, and where no row compares two models.
    """
    votes = [vote for row in _rows(names, format, columns) for vote in _votes(row)]
    if not votes:
        raise DataError(f"{', '.join(names)}: no row compares responses of two models")
    return votes


def _rows(names: Sequence[str], format: str | None, columns: Sequence[str] | None) -> Iterator[Comparison]:
    studies = [name for name in names if is_study(Path(name))]
    for name in studies:
        with Study(Path(name), read_only=True) as study:
            exported = export_rows(study, ExportOptions(provenance=True))
        yield from parse_comparisons(exported.rows, name).comparisons
    if files := [name for name in names if name not in studies]:
        yield from read_rows(files, format=format, columns=columns)


def _votes(row: Comparison) -> Iterator[RecordedVote]:
    models: Any = row.extra.get("models")
    named = isinstance(models, list) and all(isinstance(model, str) and model for model in models)
    if not named or len(models) != len(row.responses):
        raise DataError(
            "does not name the model of each response in a column models, as votes of prefopt chat and of studies do",
            file=row.file or None,
            row=row.row,
        )
    for i, k in combinations(range(len(models)), 2):
        longer = len(row.responses[i].text) - len(row.responses[k].text)
        for outcome in _outcomes(row, i, k):
            if models[i] < models[k] and not math.isnan(outcome):
                yield RecordedVote((models[i], models[k]), row.prompt_key, outcome, longer)
            elif models[i] > models[k] and not math.isnan(outcome):
                yield RecordedVote((models[k], models[i]), row.prompt_key, 1 - outcome, -longer)


def _outcomes(row: Comparison, i: int, k: int) -> list[float]:
    """An outcome per annotator for a row of a study; else the one of the row's weighted votes or tiers."""
    annotations: Any = row.extra.get("annotations")
    numbers: Any = row.extra.get("numbers")
    if isinstance(annotations, list) and isinstance(numbers, list):
        return [tier_outcome(vote.get("tiers") or (), numbers[i], numbers[k]) for vote in annotations]
    if row.votes is None:
        return [tier_outcome(row.tiers, i, k)]
    won = sum(weight for a, b, weight in row.votes if (a, b) == (i, k))
    lost = sum(weight for a, b, weight in row.votes if (a, b) == (k, i))
    return [won / (won + lost) if won + lost else math.nan]
