"""A group as text, with what is trained between ⟦ and ⟧: what ``--dry-run`` and ``data check --show`` print."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.tokenizer import Tokenizer
from prefopt.records import Comparison

OPEN, CLOSE = "⟦", "⟧"


def show(group: Group, tokenizer: Tokenizer, *, most: int | None = None) -> str:
    """What all responses have in common once, then what each of them adds, special tokens and all.

    Each response is named by what was said of it: chosen or rejected, its rank, score or label. Of parts longer than
    ``most`` characters, the middle is left out.
    """
    if not group.continuations:
        return f"prompt ({_count(len(group.prefix))})\n{shortened(_decode(tokenizer, group.prefix), most)}"
    lines = [f"shared prefix ({_count(len(group.prefix))})"]
    if len(group.prefix):
        lines.append(shortened(_decode(tokenizer, group.prefix), most))
    for k, c in enumerate(group.continuations):
        lines.append(
            f"{_name(group, len(group.continuations), k)} ({_count(len(c.ids))}, {int(c.trained.sum())} trained)"
        )
        lines.append(shortened(_marked(tokenizer, group.prefix, c.ids, c.trained), most))
    return "\n".join(lines)


def show_words(c: Comparison, *, most: int | None = None) -> str:
    """A row as it was read, without a tokenizer: who says what, and what is said of the responses."""
    lines = []
    for m in c.prompt:
        lines += [f"{'prompt' if c.text else m.role}:", shortened(m.content, most)]
    for k, response in enumerate(c.responses):
        lines += [f"{_name(c, len(c.responses), k)}:", *(shortened(m.content, most) for m in response.messages)]
    return "\n".join(lines)


def shortened(text: str, most: int | None) -> str:
    """The text, or its beginning and end with the number of characters that are left out between them.

    >>> shortened("0123456789", 4)
    '01 [... 6 characters ...] 89'
    """
    if most is None or len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _name(group: Group | Comparison, of: int, k: int) -> str:
    """``chosen``; ``response 2, ranked 1 of 3, score 8.5``; ``response 1, desirable``; ``response``."""
    if of == 2 and group.pairs in (((0, 1),), ((1, 0),)) and group.scores is None:
        return "chosen" if group.pairs[0][0] == k else "rejected"
    parts = [f"response {k + 1}" if of > 1 else "response"]
    if len(group.tiers) > 1:
        place = next(i for i, tier in enumerate(group.tiers) if k in tier)
        tied = " (tied)" if len(group.tiers[place]) > 1 else ""
        parts.append(f"ranked {place + 1} of {len(group.tiers)}{tied}")
    elif group.pairs:
        better, worse = ([p[i] for p in group.pairs].count(k) for i in (0, 1))
        parts.append(f"preferred in {better} and dispreferred in {worse} of {len(group.pairs)} pairs")
    if group.scores is not None:
        parts.append(f"score {group.scores[k]:g}")
    if group.labels is not None:
        parts.append("desirable" if group.labels[k] else "undesirable")
    return ", ".join(parts)


def _count(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"


def _marked(tokenizer: Tokenizer, prefix: IntArray, ids: IntArray, trained: BoolArray) -> str:
    """The tokens behind the prefix, trained ones marked. Decoded from the prefix on: a space may depend on it."""
    cuts = [0, *(np.nonzero(np.diff(trained))[0] + 1).tolist(), len(ids)]
    before, text = prefix[-1:], ""
    for start, end in pairwise(cuts):
        whole, known = (_decode(tokenizer, np.concatenate([before, ids[start:stop]])) for stop in (end, start))
        run = whole[len(known) :] if whole.startswith(known) else _decode(tokenizer, ids[start:end])
        text += f"{OPEN}{run}{CLOSE}" if trained[start] else run
        before = ids[end - 1 : end]
    return text


def _decode(tokenizer: Tokenizer, ids: IntArray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
