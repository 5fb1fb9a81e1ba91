"""Which model is better: the same prompts, seeded samples, a judge's votes, and how sure what they say is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.command import command
from prefopt.config.compare import CompareConfig, is_file
from prefopt.data.layouts import LAYOUTS
from prefopt.disk.write import output_errors, replace_file
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.evaluate.answers import Given, Rows, answers, check_same, identity, prompts_of
from prefopt.evaluate.judged import findings
from prefopt.evaluate.judges import load_judge
from prefopt.evaluate.judges.judge import Judge, Question, ScoredVote, outcome, with_empty
from prefopt.evaluate.judges.recorded import recorded
from prefopt.evaluate.rates import FEWEST, Floats, at_equal_length, win_rate
from prefopt.evaluate.samples import Samples, distance, perplexity, seen
from prefopt.evaluate.strengths import Games, strengths
from prefopt.evaluate.tasks import Harness, TaskScore, changes, read_task_results
from prefopt.evaluate.versus import Versus
from prefopt.interval import Interval, mean_interval
from prefopt.model.environment import hardware
from prefopt.model.load import local_folder, resolve_device, resolve_dtype
from prefopt.progress import Reporter
from prefopt.records import Comparison
from prefopt.studies.votes import Vote
from prefopt.train.finding import Finding


@dataclass(frozen=True, slots=True)
class CompareResult:
    """``versus``: every two models. ``strengths``: Bradley-Terry, in log-odds, of three and more models whose prompts
    are enough. ``models``: what the samples of each show; nothing where votes were counted. ``findings``: what is worth
    a look, in words. ``command`` does it again (empty where Python gave objects), ``identities`` are SHA-256 of what
    was compared, ``environment`` is what it ran on."""

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
    names, tasks = config.models, _tasks(config, given)
    reporter = Reporter("none" if config.json else config.progress)
    samples = {name: answers(config, name, given, reporter) for name in names}
    check_same(samples)
    asked = prompts_of(config, given) if config.judge == "gsm8k" else {}
    versus, games, judged = [], [], []
    for i, k in combinations(range(len(names)), 2):
        questions = _questions(samples[names[i]], samples[names[k]], asked)
        votes, empty = with_empty(judge, questions)
        shape = (len(samples[names[i]]), -1)
        outcomes = np.array([outcome(v) for v in votes]).reshape(shape)
        longer = np.array([float(len(a) - len(b)) for a, b in (q.responses for q in questions)]).reshape(shape)
        versus.append(_versus(config, (names[i], names[k]), samples[names[i]], outcomes, longer, empty))
        games += [(i, k, p, x) for p, row in enumerate(outcomes.tolist()) for x in row if x == x]
        judged += [_judged(q, v, (names[i], names[k]), judge) for q, v in zip(questions, votes, strict=True)]
    output = _write(config, judged)
    notes = judge.notes()
    shown = {name: _seen(config, name, rows, notes, given) for name, rows in samples.items()}
    versus = _with_tasks(config, versus, tasks)
    return CompareResult(
        judge.name,
        versus,
        _strengths(config, names, games, versus),
        shown,
        output,
        notes,
        [finding for v in versus for finding in findings(v, shown)],
        "" if given.models or given.rows is not None or given.judge else command("compare", config),
        {name: identity(config, name, given) for name in names},
        hardware(),
    )


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
            name: tasks.scores(name, local_folder(name), dtype=dtype, device=str(device)) for name in config.models
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
        how: dict[str, Any] = {"format": config.format, "columns": config.columns, "on_bad_row": config.on_bad_row}
        held, cut, left = perplexity(model, config.held_out, **how)
        model.release()
        notes += [f"{name}: {left} rows of the held-out data were left out: they cannot be used"] if left else []
        notes += [f"{name}: {cut} rows of the held-out data were truncated"] if cut else []
    return seen(rows, gap, held)


# -- verdicts --------------------------------------------------------------------------------------------------


def _versus(
    config: CompareConfig, names: tuple[str, str], rows: Rows, outcomes: Floats, longer: Floats, empty: int
) -> Versus:
    categories = {}
    if config.category is not None:
        said = np.array([_category(config.category, row) for row in rows])
        categories = {str(c): win_rate(outcomes[said == c]) for c in sorted(set(said.tolist()))}
    rate = win_rate(outcomes)
    return Versus(*names, rate, at_equal_length(outcomes, longer), categories, empty, _longer(longer, seed=config.seed))


def _longer(longer: Floats, *, seed: int) -> Interval | None:
    """The mean difference of lengths over prompts."""
    return mean_interval(longer.mean(1), seed=seed) if len(longer) >= FEWEST else None


def _category(name: str, row: Comparison) -> str:
    if name not in row.extra:
        raise DataError(f"--category {name}: the prompt has no such column", row=row.row)
    return str(row.extra[name])


def _strengths(
    config: CompareConfig, names: Sequence[str], games: list[tuple[int, int, int, float]], versus: Sequence[Versus]
) -> dict[str, Interval]:
    if len(names) < 3 or any(v.rate.rate is None for v in versus):
        return {}
    return dict(zip(names, strengths(Games.of(games), len(names), seed=config.seed), strict=True))


def _judged(q: Question, vote: Vote, names: tuple[str, str], judge: Judge) -> dict[str, object]:
    extra = {name: q.pair.extra[name] for name in q.pair.extra if name not in _DRAWN}
    said: dict[str, object] = {"models": list(names), "judge": judge.name}
    said |= {name: value for name, value in vote.to_json().items() if name in ("rationale", "skipped")}
    if isinstance(vote, ScoredVote) and vote.scores is not None:
        said["judge_scores"] = list(vote.scores)
    return LAYOUTS["canonical"].write(replace(q.pair, tiers=vote.tiers, extra={**extra, **said}))


def _write(config: CompareConfig, rows: Sequence[dict[str, object]]) -> Path | None:
    if config.output is None:
        return None
    path = Path(config.output)
    with output_errors(path):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(path, text.encode("utf-8", "surrogatepass"))
    return path


_DRAWN = {"logprobs", "sampling_logprobs", "tokens", "token_ids", "finish"}


# -- votes that are there --------------------------------------------------------------------------------------


def _of_votes(config: CompareConfig) -> CompareResult:
    found = recorded(config.votes or (), format=config.format, columns=config.columns)
    names = sorted({name for one in found for name in one.models})
    prompts = {key: n for n, key in enumerate(dict.fromkeys(one.prompt for one in found))}
    versus, games = [], []
    for i, k in combinations(range(len(names)), 2):
        by_prompt: dict[int, list[tuple[float, float]]] = {}
        for one in found:
            if set(one.models) == {names[i], names[k]}:
                turned = one.models[0] != names[i]
                said = (1 - one.outcome, -one.longer) if turned else (one.outcome, one.longer)
                by_prompt.setdefault(prompts[one.prompt], []).append(said)
        if not by_prompt:
            continue
        outcomes, longer = _table(list(by_prompt.values()))
        rate = win_rate(outcomes)
        versus.append(Versus(names[i], names[k], rate, at_equal_length(outcomes, longer)))
        games += [(i, k, p, x) for p, many in by_prompt.items() for x, _ in many]
    return CompareResult("people", versus, _strengths(config, names, games, versus), {})


def _table(rows: Sequence[Sequence[tuple[float, float]]]) -> tuple[Floats, Floats]:
    """Outcomes and differences of length [prompts, votes], NaN where a prompt has fewer votes than another."""
    table = np.full((2, len(rows), max(map(len, rows))), np.nan)
    for p, many in enumerate(rows):
        table[:, p, : len(many)] = np.array(many).T
    return table[0], np.nan_to_num(table[1])
