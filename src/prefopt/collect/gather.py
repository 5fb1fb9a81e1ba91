"""Items for a study, from files of responses and from models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.config.collect import CollectNewConfig, ImportOptions
from prefopt.config.data import READING
from prefopt.config.sample import SampleConfig
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.layouts import LAYOUTS
from prefopt.data.validate import Problem, convert, describe, refuse, refused_rows
from prefopt.errors import DataError, RunError
from prefopt.records import Comparison, Response
from prefopt.studies.items import MOST_RESPONSES, NewItem, Origin

SAMPLING = ("adapter", "temperature", "top_p", "top_k", "max_new_tokens", "seed")


@dataclass(slots=True)
class Gathered:
    """Items, and what became of every row."""

    items: list[NewItem] = field(default_factory=list)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def settle(self, on_bad_row: str) -> list[str]:
        """What happened, in words. Raises :class:`DataError` for bad rows unless they are skipped, and for no item."""
        if self.problems and on_bad_row == "refuse":
            raise refuse(self.problems, self.read)
        if not self.items:
            why = f": {describe(self.problems)}" if self.problems else ""
            raise DataError(f"none of {self.read} rows can be shown to people{why}")
        lines = [f"{self.read} rows read, {len(self.items)} items"]
        if self.problems:
            lines.append(f"{refused_rows(self.problems)} left out: {describe(self.problems)}")
        return lines + [f"{count} {what}" for what, count in self.counts.items()]


@dataclass(slots=True)
class _Joined:
    """Responses to one prompt, with the row that the prompt was first read from."""

    first: Comparison
    responses: list[tuple[Response, Origin]] = field(default_factory=list)


def from_files(names: Sequence[str], options: ImportOptions) -> Gathered:
    """An item of every row that has several responses; of single ones, of the responses to one prompt.

    With several files, what the first row of each file, the second, and so on, answers to one prompt is one item.
    """
    found = Gathered()
    joined: dict[tuple[bytes, int], _Joined] = {}
    sources = find_sources(names)
    for source in sources:
        origin, times = _recorded(source), Counter[bytes]()
        for c in _rows(source, options, found):
            key = c.prompt_key
            if not c.responses:
                found.problems.append(Problem("no response", c.row, "holds a prompt alone", c.file))
                continue
            # Of one file, a row of several responses stands alone.
            alone = -1 if len(c.responses) == 1 else c.row
            place = (key, times[key] if len(sources) > 1 else alone)
            times[key] += 1
            held = joined.setdefault(place, _Joined(c))
            held.responses += zip(c.responses, _origins(c, source, origin, len(sources) > 1), strict=True)
    for held in joined.values():
        _add(held, found)
    return found


def golden(names: Sequence[str], options: ImportOptions) -> Gathered:
    """Gold items: rows whose preference is known."""
    found = Gathered()
    for source in find_sources(names):
        for c in _rows(source, options, found):
            ranked = convert(c, "ranking")
            if isinstance(ranked, Problem):
                found.problems.append(ranked)
                continue
            pairs = list(zip(c.responses, _origins(c, source, None, False), strict=True))
            _add(_Joined(c, pairs), found, ranked.tiers)
    return found


def sampled(config: CollectNewConfig, folder: Path) -> Gathered:
    """Responses of one model or several to the prompts; what an interrupted run has drawn in ``folder`` is kept."""
    from prefopt.methods.sample import run

    assert config.model is not None
    paths = []
    for number, model in enumerate(config.model):
        path = folder / f"{number}.jsonl"
        values = {
            "model": model,
            "prompts": config.prompts,
            "num": config.num // len(config.model),
            "output": str(path),
            "resume": path.exists(),
            **{name: getattr(config, name) for name in READING},
            "on_bad_row": config.on_bad_row,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            "dtype": config.dtype,
            "device": config.device,
            "threads": config.threads,
        }
        try:
            run(SampleConfig.from_dict(values))
        except RunError as error:
            if not values["resume"]:
                raise
            what = f"holds samples that were drawn otherwise ({error})"
            raise RunError(f"{folder}: {what}; give the same options again, or remove this folder") from error
        paths.append(str(path))
    plain = ImportOptions(on_bad_row="skip")  # rows of which too few different responses are left
    return from_files(paths, plain)


def _rows(source: Source, options: ImportOptions, found: Gathered) -> Iterator[Comparison]:
    reading = open_comparisons(source, format=options.format, columns=options.column_words)
    for c in reading:
        found.read += 1
        if isinstance(c, Problem):
            found.problems.append(c)
        else:
            yield c


def _add(held: _Joined, found: Gathered, gold: tuple[tuple[int, ...], ...] | None = None) -> None:
    c = held.first
    kept: list[tuple[Response, Origin]] = []
    for response, origin in held.responses:
        if gold is None and any(response == other for other, _ in kept):
            found.counts["responses that equal another of their item left out"] += 1
        else:
            kept.append((response, origin))
    what = ""
    if len(kept) < 2:
        what = "has fewer than two different responses to compare"
    elif len(kept) > MOST_RESPONSES:
        what = f"has {len(kept)} responses; people compare {MOST_RESPONSES} at most"
    elif not all(any(m.content.strip() or m.tool_calls for m in r.messages) for r, _ in kept):
        what = "has an empty response"
    if what:
        found.problems.append(Problem("cannot be compared", c.row, what, c.file))
        return
    bare = replace(c, responses=tuple(r for r, _ in kept), tiers=(), scores=None, labels=None, votes=None, extra={})
    try:
        row = LAYOUTS["canonical"].write(bare)
    except DataError as error:
        found.problems.append(Problem("cannot be compared", c.row, error.what, c.file))
        return
    file, number = str(c.extra.get("source", c.file)), c.extra.get("source_row", c.row)
    row_number = number if isinstance(number, int) else c.row
    found.items.append(NewItem(row, c.prompt_key, [o for _, o in kept], gold, file, row_number))


def _origins(c: Comparison, source: Source, recorded: Origin | None, several: bool) -> list[Origin]:
    """Who answered: what the row says, else the record beside the file, else, of several files, the file's name."""
    many, one = c.extra.get("models"), c.extra.get("model")
    if isinstance(many, (list, tuple)) and len(many) == len(c.responses):
        return [Origin(str(m) if m is not None else None) for m in many]
    if isinstance(one, str):
        return [Origin(one)] * len(c.responses)
    name = source.path.stem if several and source.path is not None else None
    return [recorded or Origin(name)] * len(c.responses)


def _recorded(source: Source) -> Origin | None:
    """Model and settings from what ``prefopt sample`` left beside its output."""
    if source.path is None:
        return None
    try:
        record = json.loads(source.path.with_name(source.path.name + ".run.json").read_text("utf-8"))
        options: Mapping[str, Any] = record["options"]
        settings = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        return Origin(str(options["model"]), settings)
    except Exception:  # none, or of another make: nothing is known
        return None
