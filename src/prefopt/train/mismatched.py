"""Responses to other prompts, by which KTO estimates how far the policy went from its reference.

They are fixed by the order of the data: a row's prompt with as many responses as it has itself, taken from the rows
behind it whose prompt is another one (from the first row again after the last). So they are the same whatever the seed,
and their reference values are kept like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.table import GroupTable, Part, TableBuilder
from prefopt.errors import DataError


def mismatched(groups: Sequence[Group], max_length: int) -> tuple[GroupTable, int]:
    """For each of ``groups`` its prompt with other rows' responses, and how many of those lost their end: a sequence
    is cut at ``max_length`` tokens.

    Raises :class:`DataError` where all rows have the same prompt.
    """
    columns, cut = TableBuilder(), 0
    for index, group in enumerate(groups):
        prompt, _, _ = _parted(group, 0)
        sequences = []
        for ids, trained in islice(_others(groups, index, prompt), len(group.continuations)):
            mask = np.concatenate([np.zeros(len(prompt), np.bool_), trained])
            sequences.append((np.concatenate([prompt, ids])[:max_length], mask[:max_length]))
            cut += len(mask) > max_length
        try:
            columns.add(Group.from_sequences(sequences, group.row))
        except ValueError as error:
            raise DataError(f"with another row's response to its prompt, {error}", row=group.row) from None
    return GroupTable([Part(columns.columns())]), cut


def _others(groups: Sequence[Group], index: int, prompt: IntArray) -> Iterator[tuple[IntArray, BoolArray]]:
    """Responses of the rows behind ``index`` whose prompt is not ``prompt``, round and round."""
    found = False
    while True:
        for step in range(1, len(groups)):
            other = groups[(index + step) % len(groups)]
            if np.array_equal(_parted(other, 0)[0], prompt):
                continue
            found = True
            for k in range(len(other.continuations)):
                _, ids, trained = _parted(other, k)
                yield ids, trained
        if not found:
            raise DataError("every row has the same prompt, and the loss compares with responses to other prompts")


def _parted(group: Group, k: int) -> tuple[IntArray, IntArray, BoolArray]:
    """Response k in two: the ids before its first trained token, and ids and mask from there on."""
    ids, trained = group.sequence(k)
    first = int(np.argmax(trained))
    return ids[:first], ids[first:], trained[first:]
