"""The demonstration: a small model of film reviews is aligned to write positive ones, and measured before and after."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.table import Table

from prefopt.config.dpo import DpoConfig
from prefopt.config.sample import SampleConfig
from prefopt.config.tools import ScoreConfig
from prefopt.core.files import output_errors, write_json
from prefopt.core.options import command, program
from prefopt.core.statistics import Interval, mean_interval
from prefopt.core.terminal import Screen, duration
from prefopt.data.comparisons import read_comparisons
from prefopt.errors import RunError
from prefopt.evaluate import score
from prefopt.evaluate.samples import kl_to_reference
from prefopt.generate.model_io import SampledModel
from prefopt.generate.rewards import best_of_n_kl
from prefopt.methods import dpo, sample
from prefopt.records import Comparison
from prefopt.rewards import load_reward
from prefopt.runs.history import read_history
from prefopt.runs.plot import plot_runs, require_matplotlib
from prefopt.runs.table import chart

MARK = "demo.json"
HELD_OUT = 32
"""Openings to measure on, of about 130."""
TIMES = 4
"""Repetitions of each other opening: each draws new samples."""
SAMPLES = 4
"""Continuations of an opening, compared with one another."""
MEASURED = 8
"""Continuations of a held-out opening."""
TOKENS = 48
JUDGE = "vader"

MADE = {
    "model": "model",
    "prompts": "prompts.txt",
    "held_out": "held_out.txt",
    "samples": "samples.jsonl",
    "scored": "scored.jsonl",
    "aligned": "aligned",
    "before": "before.jsonl",
    "before_scored": "before-scored.jsonl",
    "after": "after.jsonl",
    "after_scored": "after-scored.jsonl",
    "picture": "curves.png",
}
"""What the demonstration writes: the next one replaces this, and nothing else."""


@dataclass(frozen=True, slots=True)
class Example:
    """An opening with the first continuation of each model, and its score."""

    opening: str
    before: tuple[str, float]
    after: tuple[str, float]


@dataclass(frozen=True, slots=True)
class Risen:
    """A word, and how often it occurs in 1,000 words before and after."""

    word: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.word} {self.before:.1f} to {self.after:.1f}"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Averages over samples, with intervals over openings. ``change`` is that of the score, paired by opening.

    ``kl``: KL(aligned || model) of whole continuations in nats, estimated on samples of the aligned model (k1).
    ``tokens``: average length before and after. ``perplexity``: per token, of both models' continuations under the
    model before. ``variety``: distinct word trigrams as a fraction of all, before and after; a model that repeats
    itself has little. ``risen``: the words that rose most, see :func:`risen_words`.
    """

    before: Interval
    after: Interval
    change: Interval
    kl: Interval
    tokens: tuple[float, float]
    perplexity: tuple[float, float]
    variety: tuple[float, float]
    risen: tuple[Risen, ...]
    examples: tuple[Example, ...]


def _files(folder: Path) -> SimpleNamespace:
    """``folder``, and the files of the demonstration by their names in :data:`MADE`."""
    return SimpleNamespace(folder=folder, **{name: folder / file for name, file in MADE.items()})


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    times[stage] = time.monotonic() - started


def run_demo(output: str, seed: int = 0) -> DemoResult:
    """Sample, score, align, measure and print; replaces an earlier demonstration in ``output``. Raises
    :class:`RunError` where the folder holds anything else, :class:`ConfigError` where a package is missing."""
    load_reward(JUDGE)
    require_matplotlib()
    console, files = Screen(), _files(Path(output))
    times: dict[str, float] = {}
    _make_room(files.folder)
    _write_start(files, seed)
    tell(
        console,
        "1. A model and something to write about",
        f"{files.model}: tiny-imdb, 6.5 million parameters, writes film reviews, good and bad",
        f"{files.prompts}: openings of reviews to learn on, each {TIMES} times",
        f"{files.held_out}: {HELD_OUT} others to measure on",
    )
    draw = _sampling(files.model, files.prompts, files.samples, SAMPLES, seed)
    tell(console, f"2. It writes {SAMPLES} continuations of each line", command("sample", draw))
    with _timed(times, "sampling"):
        sample.run(draw)
    judge = ScoreConfig(files=[str(files.samples)], reward=JUDGE, output=str(files.scored))
    tell(console, "3. A judge likes some more than others: the sentiment of their words", command("score", judge))
    with _timed(times, "judging"):
        console.print("\n".join(score.run(judge).lines()))
    train = _training(files, seed)
    tell(console, "4. Direct preference optimization: the best of each line against the worst", command("dpo", train))
    with _timed(times, "reference and training"):
        dpo.run(train)
    with _timed(times, "measuring"):
        result = _measure(console, files, seed)
        plot_runs([read_history(files.aligned)], files.picture)
    tell_result(console, result, files.aligned)
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in times.items())
    console.print(f"\ntime: {parts}; {duration(sum(times.values()))} in all")
    # The same options but for the loss: the rows that are left out, the pairs and the precision name what is cached.
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    free = next(path for n in numbers if not (path := files.folder / f"aligned-again{n}").exists())
    again = replace(train, loss="ipo", output=str(free))
    tell_next(console, files.model, again, files.aligned, files.picture)
    return result


def _measure(console: Screen, files: SimpleNamespace, seed: int) -> DemoResult:
    """Both models continue the held-out openings with the same seed, and are scored."""
    both = (files.model, files.before, files.before_scored), (files.aligned, files.after, files.after_scored)
    draws = [_sampling(model, files.held_out, drawn, MEASURED, seed) for model, drawn, _ in both]
    judges = [ScoreConfig(files=[str(drawn)], reward=JUDGE, output=str(scored)) for _, drawn, scored in both]
    commands = [*(command("sample", d) for d in draws), *(command("score", j) for j in judges)]
    tell(console, "5. Did it get better? Both write on openings that neither was trained on", *commands)
    for d in draws:
        sample.run(d)
    for j in judges:
        score.run(j)
    return compare(files.before_scored, files.after_scored, reference=files.model, seed=seed)


def _sampling(model: Path, prompts: Path, output: Path, num: int, seed: int) -> SampleConfig:
    return SampleConfig(
        model=str(model),
        prompts=[str(prompts)],
        output=str(output),
        num=num,
        max_new_tokens=TOKENS,
        seed=seed,
        device="cpu",
        dtype="float32",
    )


def _training(files: SimpleNamespace, seed: int) -> DpoConfig:
    # A model this small takes a rate that would wreck a large one: a hundred times the default. Twice as much gains a
    # quarter more by this judge, at three times the KL.
    return DpoConfig(
        model=str(files.model),
        data=[str(files.scored)],
        output=str(files.aligned),
        pairs="best-worst",
        on_bad_row="skip",  # a continuation may be empty
        batch_size=16,
        learning_rate=1e-4,
        seed=seed,
        device="cpu",
        dtype="float32",
    )


def _make_room(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise RunError(f"--output {folder} is not empty and holds no demonstration; name another folder")
    for name in (*MADE.values(), *(f"{name}.run.json" for name in MADE.values())):
        path = folder / name
        with output_errors(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_json(folder / MARK, {"made_by": "prefopt demo", "replaced_by_the_next_one": list(MADE.values())})


def _write_start(files: SimpleNamespace, seed: int) -> None:
    """Copy the model of the package, and split its openings by the seed."""
    with output_errors(files.folder):
        with resources.as_file(resources.files("prefopt.demo").joinpath("tiny_imdb")) as folder:
            shutil.copytree(folder, files.model)
        openings = resources.files("prefopt.demo").joinpath("openings.txt").read_text("utf-8").splitlines()
        random.Random(seed).shuffle(openings)
        files.held_out.write_text("\n".join(openings[:HELD_OUT]) + "\n", "utf-8")
        files.prompts.write_text("\n".join(openings[HELD_OUT:] * TIMES) + "\n", "utf-8")


# -- measurement and its presentation --------------------------------------------------------------------------------


def compare(before: Path, after: Path, *, reference: Path, seed: int) -> DemoResult:
    """Compare two files of scored samples of the same prompts in the same order."""
    one, two = _rows(before), _rows(after)
    assert [r["prompt"] for r in one] == [r["prompt"] for r in two]
    scores = [np.array([np.mean(r["scores"]) for r in rows]) for rows in (one, two)]
    lengths = [float(np.mean([r["tokens"] for r in rows])) for rows in (one, two)]
    sampled = [row for row in read_comparisons(after) if isinstance(row, Comparison)]
    gap = kl_to_reference(sampled, SampledModel(str(reference), device="cpu", dtype="float32"))
    assert gap is not None, "there are several openings"
    chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(one), 3, replace=False)
    return DemoResult(
        mean_interval(scores[0]),
        mean_interval(scores[1]),
        mean_interval(scores[1] - scores[0]),
        gap.k1,
        (lengths[0], lengths[1]),
        (_perplexity(one), _perplexity(two, gap.k1.mean)),
        (_variety(one), _variety(two)),
        risen_words(one, two),
        tuple(
            Example(one[i]["prompt"], *((r[i]["responses"][0], r[i]["scores"][0]) for r in (one, two))) for i in chosen
        ),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): texts may hold characters that it takes for ends of lines.
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def _perplexity(rows: list[dict[str, Any]], gap: float = 0.0) -> float:
    """Per token of the rows' samples, under a model that gives each of them ``gap`` nats less than its own did, on
    average."""
    logps = [logp for row in rows for logp in row["logprobs"]]
    tokens = sum(len(ids) for row in rows for ids in row["token_ids"])
    return math.exp((len(logps) * gap - sum(logps)) / tokens)


def risen_words(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int = 6) -> tuple[Risen, ...]:
    """The ``count`` words that rose most, by the difference of their rates in units of its standard error (Poisson).

    >>> one, two = [{"responses": ["a bad film, so bad"]}], [{"responses": ["a great film", "a great Great end"]}]
    >>> [str(word) for word in risen_words(one, two, 1)]
    ['great 0.0 to 428.6']
    """
    counts = [Counter(w for row in rows for text in row["responses"] for w in _words(text)) for rows in (before, after)]
    sizes = [max(1, c.total()) for c in counts]

    def rise(word: str) -> float:
        rates = [c[word] / n for c, n in zip(counts, sizes, strict=True)]
        return (rates[1] - rates[0]) / math.sqrt(sum(r / n for r, n in zip(rates, sizes, strict=True)))

    most = sorted(counts[1], key=lambda word: (-rise(word), word))[:count]
    return tuple(Risen(w, *(1000 * c[w] / n for c, n in zip(counts, sizes, strict=True))) for w in most if rise(w) > 0)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def _variety(rows: list[dict[str, Any]]) -> float:
    words = [text.split() for row in rows for text in row["responses"]]
    triples = [triple for w in words for triple in zip(w, w[1:], w[2:], strict=False)]
    return len(set(triples)) / max(1, len(triples))


def tell(console: Screen, title: str, *lines: str) -> None:
    """Print the title of a stage, and lines about it."""
    console.print(f"\n{title}", style="bold")
    for line in lines:
        console.print(line)


def tell_result(console: Screen, result: DemoResult, run: Path) -> None:
    """Print the measurement, three openings side by side, and the loss."""
    change = "a change that chance does not explain" if result.change.excludes(0) else "which chance could explain"
    tell(
        console,
        "6. What changed",
        f"sentiment of {result.before.count} openings' continuations, -1 to 1, with 95 % intervals over openings:",
        f"  before {result.before}",
        f"  after  {result.after}",
        f"  change {result.change}: {change}",
        *_kl_lines(result),
        f"length: {result.tokens[0]:.1f} tokens before, {result.tokens[1]:.1f} after",
        f"variety: {result.variety[0]:.1%} of all sequences of three words are distinct before,"
        f" {result.variety[1]:.1%} after",
        f"words that rose most, in 1,000: {', '.join(map(str, result.risen))}",
        "The judge adds up the words of a list, and is easy to please: a review that praises is not a better review.",
    )
    table = Table(show_header=True, show_lines=True, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("before", "after"):
        table.add_column(name, ratio=1)
    for e in result.examples:
        table.add_row(*(_sample(e.opening, text, score) for text, score in (e.before, e.after)))
    console.print()
    console.print(table, soft_wrap=False)
    history = read_history(run)
    tell(console, "The loss, step by step (ln 2 = 0.693 is where it starts)", *chart(history.curve("loss")))


def _kl_lines(result: DemoResult) -> Iterator[str]:
    """The KL, a scale for it, and what the model before makes of the continuations."""
    kl, (before, after) = result.kl, result.perplexity
    each = kl.mean / result.tokens[1]
    yield f"KL to the model before, on samples: {kl.mean:.1f} nats [{kl.low:.1f}, {kl.high:.1f}], {each:.3f} per token"
    scale = ", ".join(f"{best_of_n_kl(n):.1f} of {n}" for n in (4, 16, 64))
    yield f"  for scale: the best of several samples is at most so many nats away: {scale}"
    yield f"perplexity under the model before: {before:.1f} of its own continuations, {after:.1f} of the new ones"


def _sample(opening: str, text: str, score: float) -> str:
    return f"[{score:+.2f}] {opening}{text}".replace("\n", " ") + "\n"


def tell_next(console: Screen, model: Path, again: DpoConfig, aligned: Path, picture: Path) -> None:
    """Print three commands to continue with. ``again``: the demonstration's training with another loss."""
    start = program()
    tell(
        console,
        "7. What to try next",
        f"talk to it: {start} chat --model {shlex.quote(str(aligned))} --against {shlex.quote(str(model))}",
        f"another loss, the same reference from the cache: {command('dpo', again)}",
        f"your model and your pairs: {start} dpo --model MODEL --data PAIRS.jsonl --output OUTPUT",
        f"{aligned} is an ordinary Hugging Face folder, with its card in README.md; {picture} shows the curves",
    )
