"""Every layout of rows that is read, by name. Their order is their precedence.

Where a row has the fields of two, the one that stands first is meant: those with more fields come before those with
fewer, and of two with the same fields the one whose shape says more. A row that lacks a field of its file's layout
may still have all fields of a lesser one; :func:`prefopt.data.recognise.recognise` says what becomes of it.
"""

from __future__ import annotations

from prefopt.data.layouts import alpaca, hh, kwise, openai, public, qa, several, sharegpt, trl, two, ultrafeedback, v1
from prefopt.data.layouts.layout import Layout

_ORDER = (
    kwise.BY_INDEX_LAYOUT,
    several.RANKS,
    kwise.CANONICAL,
    openai.PREFERENCE,
    v1.PAIR,
    *public.PUBLIC,
    several.SIDES,
    sharegpt.RANKING,
    alpaca.RANKING,
    ultrafeedback.PAIR,
    trl.PREFERENCE_CHAT,
    trl.PREFERENCE_TEXT,
    sharegpt.MESSAGES_RANKING,
    hh.TRANSCRIPTS,
    trl.IMPLICIT_CHAT,
    trl.IMPLICIT_TEXT,
    two.TWO_CHAT,
    two.TWO_TEXT,
    trl.UNPAIRED_CHAT,
    trl.UNPAIRED_TEXT,
    sharegpt.KTO,
    alpaca.KTO,
    several.RATING,
    several.GENERATIONS,
    several.OUTPUTS,
    ultrafeedback.COMPLETIONS,
    qa.PAIR_LABELS,
    qa.SOLUTIONS,
    trl.COMPLETION_CHAT,
    trl.COMPLETION_TEXT,
    sharegpt.CONVERSATION,
    alpaca.DEMONSTRATION,
    v1.MESSAGES,
    openai.MESSAGES,
    qa.ANSWER,
    qa.RAW_TEXT,
    trl.PROMPT_CHAT,
    trl.PROMPT_TEXT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ORDER}
