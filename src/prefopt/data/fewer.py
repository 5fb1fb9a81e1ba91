"""Groups without the responses that a run does not read: they would be encoded at every step for nothing.

>>> import numpy as np
>>> from dataclasses import replace
>>> from prefopt.data.group import Group
>>> rows = [([1, 2, n], [False, False, True]) for n in (3, 4, 5)]
>>> group = Group.from_sequences(rows, row=1, pairs=((0, 1), (0, 2), (1, 2)))
>>> table = GroupTable.of([replace(group, tiers=((0,), (1,), (2,)))])
>>> fewer = keep_responses(table, np.array([True, False, True]))[0]
>>> [c.ids.tolist() for c in fewer.continuations], fewer.pairs, fewer.tiers
([[3], [5]], ((0, 1),), ((0,), (1,)))
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from prefopt.data.table import Array, GroupTable, IndexArray, Part

BoolArray = npt.NDArray[np.bool_]


def keep_responses(groups: GroupTable, keep_N: BoolArray) -> GroupTable:
    """The same groups with the responses [N] that are kept, and the pairs of which both are.

    The shared prefix of a group stays what it was, and so does everything that is said of the responses that are kept.
    Parts that lie on disk stay there; what is kept of them is held in memory.
    """
    ends = np.cumsum([0, *(len(part.columns["length_N"]) for part in groups.parts)]).tolist()
    parts = zip(groups.parts, ends[:-1], ends[1:], strict=True)
    return GroupTable([_fewer(part, keep_N[start:end]) for part, start, end in parts])


def _fewer(part: Part, keep_N: BoolArray) -> Part:
    c = part.columns
    group_N = _owners(c["responses_G"])
    columns: dict[str, Array] = {n: x[keep_N] if n.endswith("_N") else x for n, x in c.items()}
    columns["responses_G"] = _counts(group_N[keep_N], len(part), c["responses_G"])
    # A group's tokens are its prefix and its responses: runs that stay or go as a whole.
    starts = part.response_starts[:-1]
    stays = np.insert(keep_N, starts, True)
    lengths = np.insert(c["length_N"], starts, c["prefix_G"])
    group_run = np.insert(group_N, starts, np.arange(len(part)))
    keep_T = np.repeat(stays, lengths)
    columns["ids_T"], columns["trained_T"] = c["ids_T"][keep_T], c["trained_T"][keep_T]
    tokens = np.bincount(group_run[stays], lengths[stays], len(part))
    columns["tokens_G"] = tokens.astype(c["tokens_G"].dtype)
    # Pairs count responses from 0 within their group.
    group_P = _owners(c["pairs_G"])
    before_N: IndexArray = np.cumsum(keep_N) - keep_N
    at_P2 = c["pair_P"] + starts[group_P][:, None]
    keep_P = keep_N[at_P2].all(1)
    first_P = np.append(before_N, 0)[starts[group_P]]
    columns["pair_P"] = (before_N[at_P2] - first_P[:, None])[keep_P].astype(c["pair_P"].dtype)
    columns["weight_P"] = c["weight_P"][keep_P]
    columns["pairs_G"] = _counts(group_P[keep_P], len(part), c["pairs_G"])
    return Part(columns, max_id=part.max_id, source=part.source)


def _owners(count_G: Array) -> IndexArray:
    return np.repeat(np.arange(len(count_G)), count_G)


def _counts(owner: IndexArray, groups: int, like: Array) -> Array:
    return np.bincount(owner, minlength=groups).astype(like.dtype)
