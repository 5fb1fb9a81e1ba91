"""The data of a run: groups to train on and groups held out, and every line a person should read about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.config.dpo import DpoConfig
from prefopt.data.formats import parse_comparisons
from prefopt.data.load import GroupSet, build_groups, load_groups
from prefopt.data.table import GroupTable
from prefopt.errors import DataError
from prefopt.progress import Reporter


@dataclass(frozen=True, slots=True)
class TrainingData:
    """``groups`` are all of them; ``train`` and ``held_out`` index them. ``source`` is what ``--data`` gave."""

    source: GroupSet
    groups: GroupTable
    train: Sequence[int]
    held_out: Sequence[int]

    @property
    def responses(self) -> int:
        """Responses of all groups."""
        return len(self.groups.key_N)


def load_data(
    config: DpoConfig,
    tokenizer: Any,
    max_length: int,
    rows: Iterable[Mapping[str, object]] | None,
    reporter: Reporter,
) -> TrainingData:
    """Read, render and split what ``config`` names, or ``rows`` in place of ``--data``.

    A tokenizer without a chat template is given the plain one, so that the finished model is used as it was trained.
    Raises :class:`DataError` as :func:`load_groups`, and where nothing is left to train on.
    """
    options: dict[str, Any] = {"max_length": max_length, "on_bad_row": config.on_bad_row}
    if rows is not None:
        source = build_groups([parse_comparisons(rows, "data")], tokenizer, **options)
    else:
        source = load_groups(config.data, tokenizer, **options)
    for line in source.summary():
        reporter.say(f"data: {line}")
    groups = source.groups
    train: Sequence[int] = range(len(groups))
    held_out: Sequence[int] = ()
    if config.eval_fraction:
        train, held_out = source.split(config.eval_fraction, config.seed)
    elif config.eval_data:
        more = load_groups(config.eval_data, tokenizer, **options)
        for line in more.summary():
            reporter.say(f"evaluation data: {line}")
        if both := len(np.intersect1d(groups.prompt_key_G, more.groups.prompt_key_G)):
            reporter.say(f"evaluation data: {both} prompts stand in the training data too")
        held_out = range(len(groups), len(groups) + len(more.groups))
        groups += more.groups
    if not train:
        raise DataError("no pair is left to train on; lower --eval-fraction")
    if held_out:
        reporter.say(f"data: {len(train)} pairs to train on, {len(held_out)} held out")
    if source.template:
        tokenizer.chat_template = source.template
    return TrainingData(source, groups, train, held_out)
