"""Which model is better: the same prompts, seeded samples, a judge's votes, and how sure what they say is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.config.compare import CompareConfig, is_file
from prefopt.core.options import command
from prefopt.core.statistics import Interval, mean_interval
from prefopt.core.terminal import Reporter
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.evaluate.answers import Given, Rows, answers, check_same, identity, prompts_of
from prefopt.evaluate.judged import Versus, check_output, findings, write_judged
from prefopt.evaluate.judges import load_judge
from prefopt.evaluate.judges.judge import Judge, Question, ScoredVote, outcome, with_empty
from prefopt.evaluate.judges.recorded import recorded
from prefopt.evaluate.rates import FEWEST, Games, at_equal_length, groups, strengths, win_rate
from prefopt.evaluate.samples import Floats, Ints, Samples, distance, gathered, numbered, perplexity, seen
from prefopt.evaluate.tasks import Harness, TaskScore, changes, read_task_results
from prefopt.model.environment import hardware
from prefopt.model.load import base_and_adapter
from prefopt.model.precision import resolve_device, resolve_dtype
from prefopt.records import Comparison
from prefopt.runs.trends import Finding
from prefopt.studies.votes import Vote


@dataclass(frozen=True, slots=True)
class CompareResult:
    """``versus``: every two models. ``strengths``: Bradley-Terry, in log-odds, of three and more models whose prompts
    are enough and which comparisons link. ``models``: what the samples of each show; nothing where votes were counted.
    ``findings``: what is worth a look, in words. ``command`` does it again (empty where Python gave objects),
    ``identities`` are SHA-256 of what was compared, ``output_sha256`` is that of the file of judged pairs (empty where
    none was written), ``environment`` is what it ran on."""

    judge: str
    versus: list[Versus]
    strengths: dict[str, Interval]
    models: dict[str, Samples]
    output: Path | None = None
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    command: str = ""
    identities: dict[str, str] = field(default_factory=dict)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    output_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(replace(self, output=None)) | {"output": None if self.output is None else str(self.output)}


def run(config: CompareConfig, given: Given | None = None) -> CompareResult:
    """Compare what ``config`` names, or what is ``given`` in its place. Raises :class:`prefopt.errors.UserError`."""
    given = given or Given()
    if config.votes is not None:
        return _of_votes(config)
    judge = load_judge(config, given.judge)
    if config.judge == "gsm8k" and config.prompts is None:
        raise ConfigError("--prompts is missing: --judge gsm8k reads the answers there")
    check_output(config, [*(config.prompts or () if given.rows is None else ()), *(config.held_out or ())])
    if config.threads:
        torch.set_num_threads(config.threads)
    names, tasks = config.models, _tasks(config, given)
    reporter = Reporter("none" if config.json else config.progress)
    samples = {name: answers(config, name, given, reporter) for name in names}
    check_same(samples)
    asked, notes = prompts_of(config, given) if config.judge == "gsm8k" else ({}, [])
    prompt = numbered(row.prompt_key for row in samples[names[0]])
    versus, games, judged = [], [], []
    for i, k in combinations(range(len(names)), 2):
        questions = _questions(samples[names[i]], samples[names[k]], asked)
        votes, empty = with_empty(judge, questions)
        shape = (len(prompt), -1)
        outcomes = np.array([outcome(v) for v in votes]).reshape(shape)
        longer = np.array([float(len(a) - len(b)) for a, b in (q.responses for q in questions)]).reshape(shape)
        versus.append(_versus(config, (names[i], names[k]), samples[names[i]], prompt, outcomes, longer, empty))
        said = zip(prompt.tolist(), outcomes.tolist(), strict=True)
        games += [(i, k, p, x) for p, row in said for x in row if x == x]
        judged += [_judged(q, v, (names[i], names[k]), judge) for q, v in zip(questions, votes, strict=True)]
    output = None if config.output is None else Path(config.output)
    digest = "" if output is None else write_judged(output, judged)
    notes += [*_repeated(prompt), *judge.notes()]
    shown = {name: _seen(config, name, rows, notes, given) for name, rows in samples.items()}
    versus = _with_tasks(config, versus, tasks)
    return CompareResult(
        judge.name,
        versus,
        _strengths(config, names, games, versus, notes),
        shown,
        output,
        notes,
        [finding for v in versus for finding in findings(v, shown)],
        "" if given.models or given.rows is not None or given.judge else command("compare", config),
        {name: identity(config, name, given) for name in names},
        hardware(),
        digest,
    )


def _repeated(prompt: Ints) -> list[str]:
    """What is said of rows that ask the same."""
    rows, different = len(prompt), len(set(prompt.tolist()))
    if rows == different:
        return []
    prompts = "prompt" if different == 1 else "prompts"
    return [f"{rows} rows ask {different} different {prompts}: rows that ask the same count as samples of one prompt"]


def _questions(first: Rows, second: Rows, asked: dict[bytes, Comparison]) -> list[Question]:
    """Sample n of one model against sample n of the other, prompt by prompt."""
    found = []
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.responses, b.responses, strict=True):
            pair = replace(a, responses=(x, y), tiers=(), scores=None, labels=None, votes=None)
            found.append(Question(pair, asked.get(a.prompt_key)))
    return found


Scores = dict[str, list[TaskScore]]


def _tasks(config: CompareConfig, given: Given) -> Scores | Harness | None:
    """What is known of tasks, or what finds it out: before anything is drawn, so that a mistake costs nothing."""
    if config.task_results is not None:
        return {n: read_task_results(file) for n, file in zip(config.models, config.task_results, strict=True)}
    if config.tasks is None:
        return None
    if own := [name for name in config.models if name in given.models]:
        raise ConfigError(f"--tasks needs models named by their folders; {own[0]} is an object: save it first")
    return Harness(config.tasks, task_folder=config.task_folder, limit=config.task_limit)


def _with_tasks(config: CompareConfig, versus: Sequence[Versus], tasks: Scores | Harness | None) -> list[Versus]:
    if isinstance(tasks, Harness):
        device = resolve_device(config.device)
        dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
        tasks = {
            name: tasks.scores(name, *base_and_adapter(name), dtype=dtype, device=str(device)) for name in config.models
        }
    if tasks is None:
        return list(versus)
    return [replace(v, tasks=changes(tasks[v.first], tasks[v.second])) for v in versus]


def _seen(config: CompareConfig, name: str, rows: Rows, notes: list[str], given: Given) -> Samples:
    gap, held = None, None
    if config.reference is not None:
        reference = given.loaded(config.reference, config)
        if not is_file(name) and given.loaded(name, config).tokenizer.get_vocab() != reference.tokenizer.get_vocab():
            raise ModelError(f"--reference {config.reference}: it has other tokens than {name}; no KL is between them")
        gap = distance(rows, reference, seed=config.seed)
        reference.release()
    if config.held_out is not None and not is_file(name):
        model = given.loaded(name, config)
        how: dict[str, Any] = {"format": config.format, "columns": config.column_words, "on_bad_row": config.on_bad_row}
        held, cut, left = perplexity(model, config.held_out, **how)
        model.release()
        notes += [f"{name}: {left} rows of the held-out data were left out: they cannot be used"] if left else []
        notes += [f"{name}: {cut} rows of the held-out data were truncated"] if cut else []
    return seen(rows, gap, held)


# -- verdicts --------------------------------------------------------------------------------------------------


def _versus(
    config: CompareConfig,
    names: tuple[str, str],
    rows: Rows,
    prompt: Ints,
    outcomes: Floats,
    longer: Floats,
    empty: int,
) -> Versus:
    categories = {}
    if config.category is not None:
        said = np.array([_category(config.category, row) for row in rows])
        parts = {str(c): said == c for c in sorted(set(said.tolist()))}
        categories = {c: win_rate(gathered(outcomes[part], prompt[part])) for c, part in parts.items()}
    outcomes, longer = gathered(outcomes, prompt), gathered(longer, prompt)
    equal = at_equal_length(outcomes, longer)
    return Versus(*names, win_rate(outcomes), equal, categories, empty, _longer(longer, seed=config.seed))


def _longer(longer: Floats, *, seed: int) -> Interval | None:
    """The mean difference of lengths over prompts."""
    return mean_interval(np.nanmean(longer, axis=1), seed=seed) if len(longer) >= FEWEST else None


def _category(name: str, row: Comparison) -> str:
    if name not in row.extra:
        raise DataError(f"--category {name}: the prompt has no such column", row=row.row)
    return str(row.extra[name])


def _strengths(
    config: CompareConfig,
    names: Sequence[str],
    games: list[tuple[int, int, int, float]],
    versus: Sequence[Versus],
    notes: list[str],
) -> dict[str, Interval]:
    if len(names) < 3 or any(v.rate.rate is None for v in versus):
        return {}
    found = Games.of(games)
    if len(parts := groups(found, len(names))) > 1:
        told = "; ".join(", ".join(names[i] for i in part) for part in parts)
        notes.append(
            f"no strengths are told: between {told} nobody both won and lost, nor tied, or nobody met, so that no"
            " number of comparisons says how far apart they are"
        )
        return {}
    return dict(zip(names, strengths(found, len(names), seed=config.seed), strict=True))


def _judged(q: Question, vote: Vote, names: tuple[str, str], judge: Judge) -> dict[str, object]:
    extra = {name: q.pair.extra[name] for name in q.pair.extra if name not in _DRAWN}
    said: dict[str, object] = {"models": list(names), "judge": judge.name}
    said |= {name: value for name, value in vote.to_json().items() if name in ("rationale", "skipped")}
    if isinstance(vote, ScoredVote) and vote.scores is not None:
        said["judge_scores"] = list(vote.scores)
    return LAYOUTS["canonical"].write(replace(q.pair, tiers=vote.tiers, extra={**extra, **said}))


_DRAWN = {"logprobs", "sampling_logprobs", "tokens", "token_ids", "finish"}


# -- votes that are there --------------------------------------------------------------------------------------


def _of_votes(config: CompareConfig) -> CompareResult:
    found = recorded(config.votes or (), format=config.format, columns=config.column_words)
    names = sorted({name for one in found for name in one.models})
    prompts = {key: n for n, key in enumerate(dict.fromkeys(one.prompt for one in found))}
    versus, games = [], []
    for i, k in combinations(range(len(names)), 2):
        said = [
            (one.prompt, 1 - one.outcome, -one.longer)
            if one.models[0] != names[i]
            else (one.prompt, one.outcome, one.longer)
            for one in found
            if set(one.models) == {names[i], names[k]}
        ]
        if not said:
            continue
        prompt = numbered(key for key, _, _ in said)
        outcomes, longer = (gathered(np.array([[one[n]] for one in said], np.float64), prompt) for n in (1, 2))
        versus.append(Versus(names[i], names[k], win_rate(outcomes), at_equal_length(outcomes, longer)))
        games += [(i, k, prompts[key], x) for key, x, _ in said]
    notes: list[str] = []
    return CompareResult("people", versus, _strengths(config, names, games, versus, notes), {}, notes=notes)
