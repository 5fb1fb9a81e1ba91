"""The data of a run: groups to train on and groups held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.config.data import DataOptions
from prefopt.config.evaluation import HELD_OUT, LEAST_HELD_OUT, LEAST_PROMPTS, default_fraction
from prefopt.config.training import MethodOptions
from prefopt.core.options import flag
from prefopt.core.phases import phase
from prefopt.core.terminal import Reporter, StopRequest
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.load import GroupSet, load_groups
from prefopt.data.sampler import BatchSampler, Share
from prefopt.data.table import GroupTable, Selection, keep_responses
from prefopt.data.validate import DataKind
from prefopt.errors import ConfigError, DataError, Interrupted
from prefopt.reference.cache import ReferenceValues
from prefopt.train.batch import AT_ONCE, Batch, Column
from prefopt.train.columns import paired_of
from prefopt.train.run import ModelStart
from prefopt.train.source import BatchSource


@dataclass(frozen=True, slots=True)
class TrainingData:
    """``train`` and ``held_out`` index ``groups``. ``source`` is the data of ``--data`` alone.

    ``shares`` are the sources of a mixture, by their places in ``train``; empty without ``--data-weights``.
    """

    source: GroupSet
    groups: GroupTable
    train: Sequence[int]
    held_out: Sequence[int]
    shares: Sequence[Share] = ()
    kind: DataKind = "pairs"

    @property
    def noun(self) -> str:
        """What groups are called in messages."""
        if self.kind in ("pairs", "scored") and int(self.groups.responses_G.max(initial=2)) == 2:
            return "pairs"
        return "rankings" if self.kind == "ranking" else "rows"

    @property
    def unit(self) -> str:
        """What groups are called in the metric of speed: pairs also where a prompt has several, else rows."""
        return "pairs" if self.kind in ("pairs", "scored") else "rows"

    def in_words(self, files: Sequence[str]) -> str:
        """Size and files, for a model card."""
        noun = f"preference {self.noun}" if self.noun == "pairs" else self.noun
        held_out = f", {len(self.held_out)} held out" if self.held_out else ""
        names = ", ".join(f"`{Path(file).name}`" for file in files)
        return f"{len(self.train)} {noun}{held_out}, from {names}. {self.source.summary()[0]}."


class DataBatches(BatchSource):
    """Batches of a data set: training batches in the sampler's order, and the held-out groups sorted by length.

    ``columns`` makes the columns of some groups. ``reference`` holds values of all groups, followed by those of all
    ``mismatched``: the same prompts with responses to other prompts.
    """

    def __init__(
        self,
        data: TrainingData,
        sampler: BatchSampler,
        columns: Callable[[Sequence[Group]], dict[str, Column]] = lambda groups: {},
        *,
        reference: ReferenceValues | None = None,
        mismatched: GroupTable | None = None,
    ) -> None:
        self.data, self.sampler, self.columns = data, sampler, columns
        self.reference, self.mismatched = reference, mismatched
        self.steps_per_epoch = sampler.steps_per_epoch

    @property
    def groups(self) -> GroupTable:
        """All groups that :meth:`of` makes batches of: what memory must hold."""
        return self.data.groups

    def batch(self, step: int, update: int = 0) -> Batch:
        return self.of([self.data.train[i] for i in self.sampler.batch(step)])

    @property
    def held_out(self) -> Batch | None:
        indices = self.data.held_out
        if not indices:
            return None
        tokens = self.data.groups.tokens_G[np.asarray(indices)]
        return self.of([indices[i] for i in np.argsort(tokens, kind="stable").tolist()])

    def of(self, indices: Sequence[int]) -> Batch:
        """The batch of the groups at ``indices`` of the data."""
        batch = self._of(self.data.groups, indices, 0)
        columns = {**self.columns(batch.groups), **batch.columns}
        other = None
        if self.mismatched is not None:
            other = self._of(self.mismatched, indices, len(self.data.groups))
        return Batch(batch.groups, columns, other)

    def _of(self, groups: GroupTable, indices: Sequence[int], offset: int) -> Batch:
        some = [groups[i] for i in indices] if len(indices) <= AT_ONCE else Selection(groups, indices)
        known = self.reference.columns(np.asarray(indices) + offset) if self.reference is not None else {}
        return Batch(some, known)


@phase("data")
def load_data(
    config: MethodOptions,
    start: ModelStart,
    rows: Iterable[Mapping[str, object]] | None,
    reporter: Reporter,
    stop: StopRequest,
    *,
    kind: DataKind = "pairs",
    which: str = "all",
    **rendered: Any,
) -> TrainingData:
    """Read, render and split the data of ``config``, or ``rows`` in place of ``--data``.

    ``which``: see :data:`prefopt.train.columns.WHICH`; responses in no such pair are dropped. A chat template named in
    ``config`` is put on the tokenizer, so that the finished model has it. ``rendered`` are further fields of
    :class:`Rendering`. Raises :class:`DataError` as :func:`load_groups`, and where nothing is left to train on;
    :class:`prefopt.errors.Interrupted` after a stop.
    """

    def check() -> None:
        if stop.signal is not None:
            raise Interrupted("stopped while the data were read; nothing was trained", stop.signal)

    rendering = Rendering.from_options(config, start.limit, **rendered)
    how: dict[str, Any] = {"kind": kind, "on_bad_row": config.on_bad_row, "workers": config.threads}
    how |= {"reporter": reporter, "stop": check}
    layout: dict[str, Any] = {"format": config.format, "columns": config.column_words}
    if rows is not None:
        source = load_groups([parse_comparisons(rows, "data", **layout)], start.tokenizer, rendering, **how)
    else:
        source = load_groups(config.data, start.tokenizer, rendering, **how, **layout)
    source = _paired(source, which, "data", reporter)
    more = None
    if config.eval_data:
        more = load_groups(config.eval_data, start.tokenizer, rendering, **how, **layout)
        more = _paired(more, which, "evaluation data", reporter)
    groups, train, held_out = _held_out(config, source, more, reporter)
    if not train:
        raise DataError("no row is left to train on; lower --eval-fraction")
    shares = _shares(config, source.groups, train)
    data = TrainingData(source, groups, train, held_out, shares, kind)
    if held_out:
        default = _default_words(config, groups) if more is None and config.eval_fraction is None else ""
        reporter.say(f"data: {len(train)} {data.noun} to train on, {len(held_out)} held out{default}")
    if shares:
        parts = (f"{s.size} of {len(s.groups)} from {name}" for s, name in zip(shares, config.data, strict=True))
        reporter.say(f"data: an epoch takes {sum(s.size for s in shares)} rows: {', '.join(parts)}")
    reporter.say(_length_words(config.max_length, start, groups))
    if source.template:
        start.tokenizer.chat_template = source.template
    return data


def _length_words(given: int | None, start: ModelStart, groups: GroupTable) -> str:
    """The limit of a sequence, where it comes from, and the longest one."""
    context = f"the model's context is {start.positions:,}" if start.positions else "the model states no context"
    why = f"by --max-length; {context}" if given is not None else f"the default; {context}"
    return f"max length: {start.limit:,} tokens ({why}); the longest row has {int(groups.longest_G.max(initial=0)):,}"


def _paired(source: GroupSet, which: str, name: str, reporter: Reporter) -> GroupSet:
    """Report what was read, and drop responses that are in no pair, which need not be scored."""
    for line in source.summary():
        reporter.say(f"{name}: {line}")
    if which == "all":
        return source
    paired = paired_of(source.groups, which)
    if paired.all():
        return source
    left = f"{int((~paired).sum()):,} of {len(paired):,} responses are neither the best nor the worst of their row"
    reporter.say(f"{name}: {left}: not read")
    return replace(source, groups=keep_responses(source.groups, paired))


def _held_out(
    config: MethodOptions, source: GroupSet, more: GroupSet | None, reporter: Reporter
) -> tuple[GroupTable, Sequence[int], Sequence[int]]:
    """All groups, and the indices of training and held-out groups: a fraction of ``source``, or ``more``."""
    groups = source.groups
    if more is None and (fraction := _fraction(config, groups, reporter)):
        least = LEAST_HELD_OUT if config.eval_fraction is None else 1
        return groups, *source.split(fraction, config.seed, least=least)
    if more is None:
        return groups, range(len(groups)), ()
    if both := len(np.intersect1d(groups.prompt_key_G, more.groups.prompt_key_G)):
        reporter.say(f"evaluation data: {both} prompts are also in the training data")
    return groups + more.groups, range(len(groups)), range(len(groups), len(groups) + len(more.groups))


def _fraction(config: MethodOptions, groups: GroupTable, reporter: Reporter) -> float:
    """The fraction of the prompts to hold out. Raises :class:`ConfigError` where that is none by default, and an option
    needs some."""
    if config.eval_fraction is not None:
        return config.eval_fraction
    prompts = len(np.unique(groups.prompt_key_G))
    if fraction := default_fraction(prompts, read=_rows_read(config, groups)):
        return fraction
    few = f"{prompts} prompts are fewer than the {LEAST_PROMPTS} from which some are held out by default"
    for name in ("eval_every", "early_stopping", "eval_dtype", "samples", "find_learning_rate"):
        if hasattr(config, name) and config.is_given(name) and getattr(config, name):
            raise ConfigError(
                f"{flag(name)} needs held-out rows, and {few}: give --eval-fraction or --eval-data, or leave it out"
            )
    reporter.say(f"data: nothing is held out: {few}; --eval-fraction 0.1 holds out a tenth")
    return 0.0


def _rows_read(config: MethodOptions, groups: GroupTable) -> int:
    """The rows that a run reads, one as often as it is read."""
    return math.ceil(min(config.epochs * len(groups), (config.max_steps or math.inf) * config.batch_size))


def _default_words(config: MethodOptions, groups: GroupTable) -> str:
    """Where the number of prompts held out by default comes from."""
    read = _rows_read(config, groups)
    early = f", {HELD_OUT:.0%} of the {read:,} rows that are read, {LEAST_HELD_OUT} prompts at least"
    return f" (the default{early if read < len(groups) else ''}; --eval-fraction 0 trains on all)"


def _shares(config: DataOptions, groups: GroupTable, train: Sequence[int]) -> list[Share]:
    """The sources with their weights. Raises :class:`ConfigError` where an epoch would take no row of one."""
    if config.weights is None:
        return []
    source_T = groups.source_G[np.asarray(train)]
    shares = [Share(np.flatnonzero(source_T == s), weight) for s, weight in enumerate(config.weights)]
    for share, name in zip(shares, config.data, strict=True):
        if not len(share.groups):
            raise ConfigError(f"--data-weights: {name} has no row to train on; leave it and its weight out")
        if not share.size:
            least = 1 / len(share.groups)
            raise ConfigError(
                f"--data-weights {share.weight:g} selects none of the {len(share.groups)} rows of {name} in an epoch;"
                f" give at least {least:.2g}, or leave {name} out"
            )
    return shares
