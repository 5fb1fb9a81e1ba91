"""Step-wise preferences: every judged turn of a trajectory as a comparison of its own.

>>> from prefopt.records import Message
>>> four, so = Message("assistant", "4", rejected=(Message("assistant", "22"),)), Message("assistant", "so", label=True)
>>> turns = (four, Message("user", "why?"), so)
>>> row = Comparison((Message("user", "2 + 2?"),), (Response(turns),), (), row=1)
>>> [(len(c.prompt), [r.text for r in c.responses], c.tiers, c.labels) for c in judged_steps(row)]
[(1, ['4', '22'], ((0,), (1,)), None), (3, ['so'], (), (True,))]
"""

from __future__ import annotations

from dataclasses import replace

from prefopt.data.validate import Problem
from prefopt.records import Comparison, Message, Response

STEPWISE = "judged turns are comparisons of their own (--compare steps)"
NOT_STEPWISE = "turns of a response that are judged by themselves are read with --compare steps alone"


def judged(c: Comparison) -> bool:
    """Whether some turn of a response has a label or a rejected alternative."""
    return any(m.label is not None or m.rejected for r in c.responses for m in r.messages)


def judged_steps(c: Comparison) -> list[Comparison] | Problem:
    """Each assistant turn with a label or a rejected alternative, behind the turns before it.

    With an alternative it is a pair, otherwise a labelled response. A turn that several responses of the row have in
    common, with the same turns before it, counts once. Returns a :class:`Problem` for a row without any.
    """
    found: list[Comparison] = []
    for response in c.responses:
        before: list[Message] = list(c.prompt)
        for m in response.messages:
            plain = replace(m, label=None, rejected=(), trained=True)
            if m.role == "assistant" and (m.label is not None or m.rejected):
                if m.rejected and m.label is False:
                    what = "a turn is labelled undesirable and has a rejected alternative; leave one of them out"
                    return Problem("contradicting judgements", c.row, what, c.file)
                found.append(_step(c, tuple(before), plain, m))
            before.append(plain)
    if not found:
        what = "no assistant turn has a label or a rejected alternative; leave out --compare steps, or give them"
        return Problem("no judged turn", c.row, what, c.file)
    return [step for i, step in enumerate(found) if step not in found[:i]]


def _step(c: Comparison, before: tuple[Message, ...], taken: Message, judged: Message) -> Comparison:
    bare = replace(c, prompt=before, tiers=(), scores=None, labels=None, votes=None)
    if judged.rejected:
        return replace(bare, responses=(Response((taken,)), Response(judged.rejected)), tiers=((0,), (1,)))
    return replace(bare, responses=(Response((taken,)),), labels=(bool(judged.label),))
