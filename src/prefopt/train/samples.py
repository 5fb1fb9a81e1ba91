"""Samples on a few held-out prompts, before and after training: ``samples.jsonl`` in the folder of a run.

A sample depends on the seed, the prompt and its number, so that both models read the same random numbers: what differs
between two samples is due to training.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.core.files import replace_file
from prefopt.core.phases import phase
from prefopt.core.terminal import duration, visible
from prefopt.data.chat.ends import trained_ends
from prefopt.data.group import IntArray
from prefopt.data.layouts import LAYOUTS
from prefopt.errors import ModelError, RunError
from prefopt.generate.model_io import continuation, decode, without_stop
from prefopt.generate.sampler import Sample, SamplingParams
from prefopt.generate.transformers_sampler import TransformersSampler
from prefopt.model.architectures import causal_model, context_length
from prefopt.model.save import ids_of
from prefopt.records import Comparison, Message, Response
from prefopt.runs.samples import AFTER, BEFORE, SAMPLES, Row, read_samples
from prefopt.train.data import TrainingData
from prefopt.train.policy import Trained
from prefopt.train.run import ModelStart, Run

MAX_NEW_TOKENS = 128
LOOKED_AT = 8
"""Prompts that are looked at for each that is wanted, since some may be too long."""
EXCERPT = 100
"""Characters of each text on the screen."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A held-out prompt: the number of its row, and its token ids [P]."""

    row: int
    ids: IntArray


@dataclass(slots=True)
class HeldOutSamples:
    """The samples of a run on the first response's prompt of some held-out groups, spread over all of them.

    ``why_not``: the reason where none are drawn. Every rank of a run makes the same calls.
    """

    run: Run
    start: ModelStart
    policy: Trained[Any]
    data: TrainingData
    prompts: list[Prompt] = field(default_factory=list)
    why_not: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        wanted: int = getattr(self.run.config, "samples", 0)
        if not wanted or not self.data.held_out:
            return
        self.prompts = prompts_of(self.data, wanted, context_length(causal_model(self.policy.scorer.model).config))
        if not self.prompts:
            self.why_not = "no held-out row has a prompt that leaves room for an answer"

    @property
    def path(self) -> Path:
        return self.run.folder.path / SAMPLES

    def before(self) -> None:
        """Draw samples of the model as it is, before training, and write them; not where an earlier start of this run
        did."""
        if self.policy.sharded and self.prompts:
            self.why_not = "the weights are in shards; prefopt sample draws them from the saved model"
        if self.prompts and self.why_not is None and self.run.world.on_first(self._known) is None:
            self._add([])

    def after(self) -> list[str]:
        """Draw samples of the trained model and write both. Returns lines with one of them, or why there are none."""
        if self.prompts and self.why_not is None:
            known = self.run.world.on_first(self._known)
            if known is not None:
                self._add(known)
        if self.why_not is not None:
            return [f"samples: none: {self.why_not}"]
        rows = self.run.world.on_first(self._known) if self.prompts else None
        if not rows:
            return []
        self.run.folder.remember(samples={"file": SAMPLES, "prompts": len(rows), "seconds": round(self.seconds, 3)})
        title = f"samples: of {len(rows)} held-out prompts, before and after training ({duration(self.seconds)})"
        return [f"{title}: {self.path}; the first:", *excerpt(rows[0])]

    def _known(self) -> list[Row] | None:
        """The rows of the file; None where they are not of these prompts."""
        rows = read_samples(self.run.folder.path)
        return rows if [row["prompt"] for row in rows] == [self._text(p) for p in self.prompts] else None

    @phase("samples")
    def _add(self, known: Sequence[Row]) -> None:
        """Draw, and write the samples after those before training that ``known`` holds."""
        started = time.monotonic()
        try:
            self.run.world.on_first(lambda: self._write(known))
        except (ModelError, RunError) as error:  # training goes on, and the model is saved already
            self.why_not = str(error)
        self.seconds += time.monotonic() - started

    def _write(self, known: Sequence[Row]) -> None:
        samples = self._draw()
        rows = [self._row(*found, known[n] if known else None) for n, found in enumerate(samples)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(self.path, text.encode("utf-8", "replace"))

    def _draw(self) -> list[tuple[Prompt, Sample, tuple[int, ...]]]:
        tokenizer, stop = self.start.tokenizer, self.run.stop
        ends = {*trained_ends(self.data.groups, tokenizer), *ids_of(tokenizer.eos_token_id)}
        settings = SamplingParams(MAX_NEW_TOKENS, tuple(sorted(ends)), seed=self.run.config.seed)
        sampler = TransformersSampler(self.policy.scorer, rows=len(self.prompts))
        where = " while samples were drawn"
        found = sampler.sample([p.ids for p in self.prompts], 1, settings, progress=lambda *_: stop.check(where))
        return [(prompt, drawn[0], settings.stop) for prompt, drawn in zip(self.prompts, found, strict=True)]

    def _row(self, prompt: Prompt, sample: Sample, stop: Sequence[int], known: Row | None) -> Row:
        """A row of the canonical layout: the prompt as the model reads it, and one response or both."""
        tokenizer, before = self.start.tokenizer, known["responses"][0] if known else None
        texts = [] if before is None else [before]
        finish = known["finish"][:1] if known else []
        texts.append(continuation(tokenizer, prompt.ids, without_stop(sample.ids, stop)))
        responses = tuple(Response((Message("assistant", text),)) for text in texts)
        extra = {"models": [BEFORE, AFTER][: len(texts)], "source_row": prompt.row}
        turns = (Message("user", self._text(prompt)),)
        whole = Comparison(turns, responses, (), prompt.row, "", text=True, extra=extra)
        return LAYOUTS["canonical"].write(whole) | {"finish": [*finish, sample.finish]}

    def _text(self, prompt: Prompt) -> str:
        return decode(self.start.tokenizer, prompt.ids)


def prompts_of(data: TrainingData, count: int, context: int | None) -> list[Prompt]:
    """``count`` different prompts of held-out groups, spread evenly over those that leave room in the ``context`` for
    an answer of some words."""
    held_out = np.asarray(data.held_out, np.int64)
    first = np.sort(np.unique(data.groups.prompt_key_G[held_out], return_index=True)[1])
    longest = math.inf if context is None else context - MAX_NEW_TOKENS // 8
    some = [int(held_out[first[n]]) for n in _spread(len(first), LOOKED_AT * count)]
    fitting = [i for i in some if 0 < len(prompt_of(data, i)) <= longest]
    return [Prompt(data.groups[i].row, prompt_of(data, i)) for i in (fitting[n] for n in _spread(len(fitting), count))]


def _spread(size: int, count: int) -> list[int]:
    """``count`` of the numbers below ``size``, evenly spaced; all where they are fewer."""
    return [int(n) for n in np.unique(np.linspace(0, size - 1, min(count, size)).round())]


def prompt_of(data: TrainingData, index: int) -> IntArray:
    """The tokens of the first response's sequence before its first trained one."""
    ids, trained = data.groups[index].sequence(0)
    return ids[: int(trained.argmax())]


def excerpt(row: Row) -> list[str]:
    """A prompt with its samples, a line each."""
    before, after = row["responses"]
    texts = (("prompt", row["prompt"], True), ("before", before, False), ("after", after, False))
    return [f"  {name:<8}{_cut(text, from_end=from_end)}" for name, text, from_end in texts]


def _cut(text: str, *, from_end: bool) -> str:
    """One line; of a prompt the end, where the question is."""
    line = visible(text.replace("\n", "↵"))
    if len(line) <= EXCERPT:
        return line
    return f"…{line[1 - EXCERPT :]}" if from_end else f"{line[: EXCERPT - 1]}…"
