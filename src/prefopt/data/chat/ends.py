"""The tokens that end responses: in tokenised data, and by the chat template."""

from __future__ import annotations

import numpy as np

from prefopt.data.chat.render import Renderer
from prefopt.data.table import GroupTable
from prefopt.data.tokenizer import Tokenizer, end_marks
from prefopt.errors import DataError, ModelError
from prefopt.records import Comparison, Message


def trained_ends(table: GroupTable, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end responses, in ascending order.

    Each is the last trained token of a response that was not truncated, and no trained token ever follows it. A token
    that is followed occurs inside answers too, and ended one that was cut off there by chance when it was sampled.
    """
    marks = list(map(int, tokenizer.convert_tokens_to_ids(list(end_marks(tokenizer)))))
    ending: set[int] = set()
    inside: set[int] = set()
    for part in table.parts:
        c = part.columns
        ids_T, trained_T = c["ids_T"], c["trained_T"]
        last_N = np.repeat(np.cumsum(c["prefix_G"], dtype=np.int64), c["responses_G"])
        last_N += np.cumsum(c["length_N"], dtype=np.int64) - 1
        whole_N = (c["cut_N"] == 0) & trained_T[last_N]
        ending.update(ids_T[last_N[whole_N]].tolist())
        others = np.setdiff1d(np.flatnonzero(np.isin(ids_T, marks)), last_N)
        inside.update(ids_T[others[trained_T[others] & trained_T[others + 1]]].tolist())
    return tuple(sorted(ending.intersection(marks) - inside))


def end_of_turn(renderer: Renderer) -> int | None:
    """The token that the chat template ends an answer with, found on a probe; None where there is none."""
    probe = Comparison.pair([Message("user", "?")], chosen="!", rejected="?", row=0)
    try:
        group = renderer.render(probe).group
    except (DataError, ModelError):  # it wants a conversation of another kind
        return None
    last = int(group.continuations[0].ids[-1])
    return last if renderer.tokenizer.convert_ids_to_tokens(last) in end_marks(renderer.tokenizer) else None
