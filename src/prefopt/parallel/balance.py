"""Which groups of a global batch each rank computes: a function of their costs alone, the same on every rank.

>>> [part.tolist() for part in balanced(np.array([5, 9, 4, 1]), 2)]
[[1, 3], [0, 2]]
>>> [part.tolist() for part in balanced(np.array([5]), 3)]
[[0], [], []]
"""

from __future__ import annotations

import heapq

import numpy as np

from prefopt.data.table import IndexArray


def balanced(costs: IndexArray, ranks: int) -> list[IndexArray]:
    """For each rank the positions, ascending, of its groups in a batch whose groups cost ``costs`` tokens.

    The longest group first, each to the rank with the fewest tokens; of equal ones the first (longest processing time,
    Graham 1969: at most 4/3 of the best largest share).
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for i in np.argsort(-np.asarray(costs, np.int64), kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        parts[rank].append(i)
        heapq.heappush(loads, (load + int(costs[i]), rank))
    return [np.array(sorted(part), np.int64) for part in parts]
