"""Import the items of a study, from files of responses and from models."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.collect.pictures import without_metadata
from prefopt.config.collect import CollectNewConfig, ImportOptions
from prefopt.config.data import READING
from prefopt.config.sample import SampleConfig
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import Source, find_sources
from prefopt.data.layouts import LAYOUTS
from prefopt.data.pictures import BAD_PICTURE, BadPicture
from prefopt.data.validate import Problem, convert, describe, refuse, refused_rows
from prefopt.errors import DataError, RunError
from prefopt.records import Comparison, Response, Tiers
from prefopt.studies.items import MOST_RESPONSES, NewItem, ResponseOrigin

SAMPLING = ("adapter", "temperature", "top_p", "top_k", "max_new_tokens", "seed")

Answer = tuple[Response, ResponseOrigin]


@dataclass(slots=True)
class ImportedItems:
    """Imported items, rows that were refused, and counts of what was left out."""

    items: list[NewItem] = field(default_factory=list)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def report(self, on_bad_row: str) -> list[str]:
        """Counts of rows and items as text. Raises :class:`DataError` for bad rows unless skipped, and for no items."""
        if self.problems and on_bad_row == "refuse":
            raise refuse(self.problems, self.read)
        if not self.items:
            why = f": {describe(self.problems)}" if self.problems else ""
            raise DataError(f"none of {self.read} rows can be shown to annotators{why}")
        lines = [f"{self.read} rows read, {len(self.items)} items"]
        if self.problems:
            lines.append(f"{refused_rows(self.problems)} left out: {describe(self.problems)}")
        return lines + [f"{count} {what}" for what, count in self.counts.items()]

    def rows(self, source: Source, options: ImportOptions) -> Iterator[Comparison]:
        for c in open_comparisons(source, format=options.format, columns=options.column_words):
            self.read += 1
            if isinstance(c, Problem):
                self.problems.append(c)
            else:
                yield c

    def add(self, c: Comparison, answers: Sequence[Answer], gold: Tiers | None = None) -> None:
        """Add an item with the prompt of ``c``."""
        kept: list[Answer] = []
        for response, origin in answers:
            if gold is None and any(response == other for other, _ in kept):
                self.counts["duplicate responses of an item left out"] += 1
            else:
                kept.append((response, origin))
        responses = tuple(response for response, _ in kept)
        try:
            if len(kept) < 2:
                raise DataError("has fewer than two different responses to compare")
            if len(kept) > MOST_RESPONSES:
                raise DataError(f"has {len(kept)} responses; an item has at most {MOST_RESPONSES}")
            if not all(any(m.content.strip() or m.tool_calls for m in r.messages) for r in responses):
                raise DataError("has an empty response")
            bare = replace(c, responses=responses, tiers=(), scores=None, labels=None, votes=None, extra={})
            row = LAYOUTS["canonical"].write(without_metadata(bare) if bare.pictures else bare)
        except BadPicture as bad:
            self.problems.append(Problem(BAD_PICTURE, c.row, str(bad), c.file))
            return
        except DataError as error:
            self.problems.append(Problem("cannot be compared", c.row, error.what, c.file))
            return
        file, number = str(c.extra.get("source", c.file)), c.extra.get("source_row", c.row)
        row_number = number if isinstance(number, int) else c.row
        self.items.append(NewItem(row, c.prompt_key, [origin for _, origin in kept], gold, file, row_number))


def items_from_files(names: Sequence[str], options: ImportOptions) -> ImportedItems:
    """An item per row with several responses, and per prompt of rows with a single response.

    With several files, the first rows of each file with the same prompt are one item, so are the second, and so on.
    """
    found = ImportedItems()
    joined: dict[tuple[bytes, int], tuple[Comparison, list[Answer]]] = {}
    sources = find_sources(names)
    for source in sources:
        recorded, times = _recorded_origin(source), Counter[bytes]()
        for c in found.rows(source, options):
            key = c.prompt_key
            if not c.responses:
                found.problems.append(Problem("no response", c.row, "holds a prompt alone", c.file))
                continue
            # In a single file, a row of several responses is an item of its own.
            own = -1 if len(c.responses) == 1 else c.row
            _, answers = joined.setdefault((key, times[key] if len(sources) > 1 else own), (c, []))
            times[key] += 1
            answers += zip(c.responses, _origins(c, source, recorded, len(sources) > 1), strict=True)
    for c, answers in joined.values():
        found.add(c, answers)
    return found


def gold_items(names: Sequence[str], options: ImportOptions) -> ImportedItems:
    """Gold items: rows with a known order of responses."""
    found = ImportedItems()
    for source in find_sources(names):
        for c in found.rows(source, options):
            ranked = convert(c, "ranking")
            if isinstance(ranked, Problem):
                found.problems.append(ranked)
            else:
                answers = list(zip(c.responses, _origins(c, source, None, False), strict=True))
                found.add(c, answers, ranked.tiers)
    return found


def items_from_models(config: CollectNewConfig, folder: Path) -> ImportedItems:
    """Sample responses to the prompts from each model; samples of an interrupted run in ``folder`` are reused."""
    from prefopt.methods.sample import run

    assert config.model is not None
    paths = []
    for number, model in enumerate(config.model):
        path = folder / f"{number}.jsonl"
        same = (*READING, "on_bad_row", "max_new_tokens", "temperature", "top_p", "seed", "dtype", "device", "threads")
        values = {name: getattr(config, name) for name in ("prompts", *same)} | {
            "model": model,
            "num": config.num // len(config.model),
            "output": str(path),
            "resume": path.exists(),
        }
        try:
            run(SampleConfig.from_dict(values))
        except RunError as error:
            if not values["resume"]:
                raise
            remedy = "give the same options again, or remove this folder"
            raise RunError(f"{folder}: holds samples drawn with other options ({error}); {remedy}") from error
        paths.append(str(path))
    # Skipped are rows with too few different responses. Pictures were bounded when the prompts were read.
    return items_from_files(paths, ImportOptions(on_bad_row="skip", picture_folder="/"))


def _origins(c: Comparison, source: Source, recorded: ResponseOrigin | None, several: bool) -> list[ResponseOrigin]:
    """The models of a row; else the record beside the file; else, of several files, the name of the file."""
    models, model = c.extra.get("models"), c.extra.get("model")
    if isinstance(models, (list, tuple)) and len(models) == len(c.responses):
        return [ResponseOrigin(None if m is None else str(m)) for m in models]
    if isinstance(model, str):
        return [ResponseOrigin(model)] * len(c.responses)
    name = source.path.stem if several and source.path is not None else None
    return [recorded or ResponseOrigin(name)] * len(c.responses)


def _recorded_origin(source: Source) -> ResponseOrigin | None:
    """Model and settings from the record that ``prefopt sample`` writes beside its output."""
    if source.path is None:
        return None
    try:
        record = json.loads(source.path.with_name(source.path.name + ".run.json").read_text("utf-8"))
        options: Mapping[str, Any] = record["options"]
        settings = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        return ResponseOrigin(str(options["model"]), settings)
    except Exception:  # no record, or one in another format
        return None
