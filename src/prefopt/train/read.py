"""The groups that a run reads where ``--max-steps`` ends it before its first epoch does: no others need a reference.

>>> from prefopt.data.sampler import Sampler
>>> sampler = Sampler(6, 2, seed=0)
>>> groups_read(sampler, 1, train=[10, 11, 12, 13, 14, 15], held_out=[20]).tolist()
[12, 13, 20]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefopt.data.sampler import IndexArray, Sampler
from prefopt.data.table import GroupTable, Selection
from prefopt.model.reference import ReferenceValues


def groups_read(sampler: Sampler, steps: int, train: Sequence[int], held_out: Sequence[int]) -> IndexArray:
    """The groups of the batches of so many steps, which the sampler draws from ``train``, and all held out; sorted."""
    batches = [sampler.batch(step) for step in range(steps)]
    drawn = np.asarray(train, np.int64)[np.concatenate([*batches, np.empty(0, np.int64)])]
    return np.unique(np.concatenate([drawn, np.asarray(held_out, np.int64)]))


def at(groups: GroupTable, at_G: IndexArray) -> GroupTable:
    """Some of the groups, in this order."""
    return GroupTable.of(Selection(groups, at_G.tolist()))


def spread(values: ReferenceValues, at_G: IndexArray, table: GroupTable) -> ReferenceValues:
    """``values`` of the groups ``at_G`` as values of all of ``table``. Those of the others are NaN: a loss that read
    one would tell at once."""
    found = without_values(table)
    first, stop = found.starts[at_G], found.starts[at_G + 1]
    at_N = _ranges(first, stop)
    found.sums_N[at_N] = values.sums_N
    if values.token_values_M is not None:
        assert found.token_values_M is not None
        found.token_values_M[_ranges(found.token_starts[at_N], found.token_starts[at_N + 1])] = values.token_values_M
    return found


def without_values(table: GroupTable, value: float = np.nan) -> ReferenceValues:
    """``value`` where the reference's values of a table will stand."""
    tokens = np.concatenate([[0], np.cumsum(table.trained_N, dtype=np.int64)])
    sums, each = np.full(len(table.trained_N), value), np.full(int(tokens[-1]), value, np.float32)
    return ReferenceValues(sums, table.trained_N, table.response_starts, tokens, each)


def _ranges(first: IndexArray, stop: IndexArray) -> IndexArray:
    """first[0], ..., stop[0] - 1, first[1], ...: end to end."""
    count = stop - first
    found: IndexArray = np.repeat(stop - np.cumsum(count), count) + np.arange(int(count.sum()))
    return found
