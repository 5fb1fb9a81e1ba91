"""A group as text, with what is trained between ⟦ and ⟧: what ``--dry-run`` prints."""

from __future__ import annotations

from itertools import groupby

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"


def show(group: Group, tokenizer: Tokenizer) -> str:
    """The shared prefix once, then what each response adds, special tokens and all."""
    lines = [f"shared prefix ({len(group.prefix)} tokens)", _decode(tokenizer, group.prefix)]
    names = ("chosen", "rejected") if group.pairs == ((0, 1),) and len(group.continuations) == 2 else ()
    for k, c in enumerate(group.continuations):
        name = names[k] if names else f"response {k + 1}"
        lines += [f"{name} ({len(c.ids)} tokens, {int(c.trained.sum())} trained)", _marked(tokenizer, c.ids, c.trained)]
    return "\n".join(lines)


def _marked(tokenizer: Tokenizer, ids: IntArray, trained: BoolArray) -> str:
    parts = []
    for on, run in groupby(range(len(ids)), key=lambda i: bool(trained[i])):
        text = _decode(tokenizer, ids[list(run)])
        parts.append(f"{OPEN}{text}{CLOSE}" if on else text)
    return "".join(parts)


def _decode(tokenizer: Tokenizer, ids: IntArray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
