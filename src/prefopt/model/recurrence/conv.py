"""Causal depthwise convolutions of a packed row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prefopt.model.recurrence.row import Segments, repeat_tails, tails_of


def packed_conv(conv: Callable[[Tensor], Tensor], x: Tensor, width: int, segments: Segments) -> Tensor:
    """The causal convolution ``conv`` of ``width`` taps, [1, D, T] to [1, D, T], of a packed row x.

    Each response sees the last ``width - 1`` tokens of its prompt, and each sequence starts with zeros. ``conv`` is the
    class's own, in torch or by causal-conv1d: it sees a longer row and need not know of sequences.
    """
    tails = tails_of(segments, width, x.device)
    if tails is None:
        return conv(x)
    longer = repeat_tails(x[0].transpose(0, 1), tails)
    out = conv(longer.transpose(0, 1)[None])
    return out[0].transpose(0, 1).index_select(0, tails.keep_T).transpose(0, 1)[None]
