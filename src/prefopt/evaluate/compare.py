"""Which model is better: the same prompts, seeded samples, a judge's votes, and how sure what they say is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.compare import CompareConfig, is_file
from prefopt.config.sample import SampleConfig
from prefopt.data.formats import open_comparisons, parse_comparisons, read_comparisons
from prefopt.data.layouts import LAYOUTS
from prefopt.data.problem import Problem
from prefopt.data.sources import find_sources
from prefopt.data.tokenizer import load_tokenizer
from prefopt.disk.write import output_errors, replace_file
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.evaluate.judges import load_judge
from prefopt.evaluate.judges.judge import Judge, Question, outcome, with_empty
from prefopt.evaluate.judges.recorded import recorded
from prefopt.evaluate.rates import AtEqualLength, Floats, WinRate, at_equal_length, win_rate
from prefopt.evaluate.samples import Samples, distance, perplexity, seen
from prefopt.evaluate.strengths import Games, strengths
from prefopt.generate.loaded import SampledModel
from prefopt.interval import Interval
from prefopt.model.load import local_folder
from prefopt.records import Comparison
from prefopt.studies.votes import Vote

Rows = list[Comparison]


@dataclass(frozen=True, slots=True)
class Versus:
    """Two models: how often the first won, at any length and read at equal length; by category, where one is named.

    ``empty``: comparisons decided by one response having no words, without the judge.
    """

    first: str
    second: str
    rate: WinRate
    equal_length: AtEqualLength | None
    categories: dict[str, WinRate] = field(default_factory=dict)
    empty: int = 0


@dataclass(frozen=True, slots=True)
class CompareResult:
    """``versus``: every two models. ``strengths``: Bradley-Terry, in log-odds, of three and more models whose prompts
    are enough. ``models``: what the samples of each show; nothing where votes were counted."""

    judge: str
    versus: list[Versus]
    strengths: dict[str, Interval]
    models: dict[str, Samples]
    output: Path | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(replace(self, output=None)) | {"output": None if self.output is None else str(self.output)}


def run(config: CompareConfig) -> CompareResult:
    """Compare what ``config`` names. Raises :class:`prefopt.errors.UserError`."""
    if config.votes is not None:
        return _of_votes(config)
    judge = load_judge(config)
    names = config.models
    samples = {name: _samples(config, name) for name in names}
    _check_same(samples)
    asked = _asked(config) if config.judge == "gsm8k" else {}
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
    shown = {name: _seen(config, name, rows, notes) for name, rows in samples.items()}
    scale = _strengths(config, names, games, versus)
    return CompareResult(judge.name, versus, scale, shown, output, notes)


# -- samples ---------------------------------------------------------------------------------------------------


def _samples(config: CompareConfig, name: str) -> Rows:
    """The samples of a model, a row for each prompt: drawn now, or read from the file that ``name`` is."""
    if is_file(name):
        found = read_comparisons(name)
        problems = [row for row in found if isinstance(row, Problem)]
        if problems:
            raise DataError(f"{problems[0].kind}: {problems[0].what}", file=name, row=problems[0].row)
        rows = [row for row in found if isinstance(row, Comparison)]
        if bad := next((row for row in rows if not row.responses), None):
            raise DataError("has no response; prefopt sample draws some", file=name, row=bad.row)
        return rows
    from prefopt.methods.sample import run as sample

    options = {n: getattr(config, n) for n in ("num", "max_new_tokens", "temperature", "seed")}
    options |= {n: getattr(config, n) for n in ("dtype", "device", "threads", "format", "columns")}
    progress = "none" if config.json else config.progress
    drawn = sample(SampleConfig(model=name, prompts=config.prompts or [], progress=progress, **options))
    return [row for row in parse_comparisons(drawn.rows, name) if isinstance(row, Comparison)]


def _check_same(samples: dict[str, Rows]) -> None:
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


def _asked(config: CompareConfig) -> dict[bytes, Comparison]:
    """The prompts' rows as their files have them, by prompt."""
    if config.prompts is None:
        raise ConfigError("--prompts is missing: --judge gsm8k reads the answers there")
    found = {}
    for source in find_sources(config.prompts):
        for row in open_comparisons(source, format=config.format, columns=config.columns):
            if isinstance(row, Comparison):
                found[row.prompt_key] = row
    return found


def _questions(first: Rows, second: Rows, asked: dict[bytes, Comparison]) -> list[Question]:
    """Sample n of one model against sample n of the other, prompt by prompt."""
    found = []
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a.responses, b.responses, strict=True):
            pair = replace(a, responses=(x, y), tiers=(), scores=None, labels=None, votes=None)
            found.append(Question(pair, asked.get(a.prompt_key)))
    return found


def _seen(config: CompareConfig, name: str, rows: Rows, notes: list[str]) -> Samples:
    gap, held = None, None
    if config.reference is not None:
        reference = SampledModel(config.reference, device=config.device, dtype=config.dtype)
        if not is_file(name) and load_tokenizer(local_folder(name)).get_vocab() != reference.tokenizer.get_vocab():
            raise ModelError(f"--reference {config.reference}: it has other tokens than {name}; no KL is between them")
        gap = distance(rows, reference, seed=config.seed)
        reference.release()
    if config.held_out is not None and not is_file(name):
        model = SampledModel(name, device=config.device, dtype=config.dtype)
        held, cut = perplexity(model, config.held_out, format=config.format, columns=config.columns)
        model.release()
        notes += [f"{name}: {cut} rows of the held-out data were truncated"] if cut else []
    return seen(rows, gap, held)


# -- verdicts --------------------------------------------------------------------------------------------------


def _versus(
    config: CompareConfig, names: tuple[str, str], rows: Rows, outcomes: Floats, longer: Floats, empty: int
) -> Versus:
    categories = {}
    if config.category is not None:
        said = np.array([_category(config.category, row) for row in rows])
        categories = {str(c): win_rate(outcomes[said == c], seed=config.seed) for c in sorted(set(said.tolist()))}
    rate = win_rate(outcomes, seed=config.seed)
    return Versus(*names, rate, at_equal_length(outcomes, longer), categories, empty)


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
    said = {"models": list(names), "judge": judge.name}
    said |= {name: value for name, value in vote.to_json().items() if name in ("rationale", "skipped")}
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
        rate = win_rate(outcomes, seed=config.seed)
        versus.append(Versus(names[i], names[k], rate, at_equal_length(outcomes, longer)))
        games += [(i, k, p, x) for p, many in by_prompt.items() for x, _ in many]
    return CompareResult("people", versus, _strengths(config, names, games, versus), {})


def _table(rows: Sequence[Sequence[tuple[float, float]]]) -> tuple[Floats, Floats]:
    """Outcomes and differences of length [prompts, votes], NaN where a prompt has fewer votes than another."""
    table = np.full((2, len(rows), max(map(len, rows))), np.nan)
    for p, many in enumerate(rows):
        table[:, p, : len(many)] = np.array(many).T
    return table[0], np.nan_to_num(table[1])


def lines(result: CompareResult) -> Iterator[str]:
    """What a person is told."""
    yield f"judge: {result.judge}"
    yield from result.notes
    for v in result.versus:
        yield ""
        yield from _versus_lines(v)
    if result.strengths:
        yield "\nstrength (Bradley-Terry, log-odds, 95 % interval over prompts):"
        for name, s in sorted(result.strengths.items(), key=lambda item: -item[1].mean):
            yield f"  {s.mean:+.2f} [{s.low:+.2f}, {s.high:+.2f}]  {name}"
    for name, shown in result.models.items():
        yield f"\n{name}: {', '.join(_sample_words(shown))}"
    if result.output is not None:
        yield f"\nwritten: {result.output}"


def _versus_lines(v: Versus) -> Iterator[str]:
    r = v.rate
    undecided = f", undecided {r.undecided}" if r.undecided else ""
    yield f"{v.first} against {v.second}, {r.prompts} prompts: won {r.wins}, tied {r.ties}, lost {r.losses}{undecided}"
    if v.empty:
        yield f"  {v.empty} decided without the judge, for a response had no words"
    if r.rate is None:
        yield f"  {_too_few(r.prompts)}"
    else:
        assert r.p is not None
        yield f"  win rate {_percent(r.rate)}, a tie counting half; sign test p = {r.p:.2g}"
        if v.equal_length is not None:
            yield f"  at equal length {_percent(v.equal_length.rate)}"
        if r.rate.excludes(0.5):
            yield f"  {v.first} is {'better' if r.rate.mean > 0.5 else 'worse'} here by this judge"
        else:
            more = f"; if it is as large as it looks, about {r.needed:,} prompts would show it" if r.needed else ""
            yield f"  no difference is shown{more}"
    for name, part in v.categories.items():
        told = f"{part.prompts} prompts, too few for a rate" if part.rate is None else _percent(part.rate)
        yield f"  {name}: {told}"


def _too_few(prompts: int) -> str:
    return f"{prompts} prompts are too few to tell a rate; give at least 10, better 100"


def _percent(i: Interval) -> str:
    return f"{i.mean:.1%} [{i.low:.1%}, {i.high:.1%}]"


def _sample_words(s: Samples) -> Iterator[str]:
    yield f"{s.samples} samples of {s.characters:.0f} characters"
    if s.tokens is not None:
        yield f"{s.tokens:.1f} tokens"
    if s.entropy is not None:
        yield f"entropy {s.entropy:.2f} nats per token"
    yield f"repetition {s.repetition:.1%}"
    if s.empty:
        yield f"{s.empty} empty"
    if s.distance is not None:
        d = s.distance
        yield f"KL to the reference {d.k1.mean:.2f} ± {d.error:.2f} nats per response (k1), {d.k3:.2f} (k3)"
    if s.perplexity is not None:
        yield f"perplexity of the held-out data {s.perplexity:.2f}"
