"""Every layout of rows that is read, by name. Their order is their precedence.

Where a row has the fields of two, the one that stands first is meant: those with more fields come before those with
fewer, and of two with the same fields the one whose shape says more. A row that lacks a field of its file's layout
may still have all fields of a lesser one; :func:`prefopt.data.layouts.recognise.recognise` says what becomes of it.
"""

from __future__ import annotations

from prefopt.data.layouts import canonical, llama_factory, providers, public, questions, responses, trl, two_responses
from prefopt.data.layouts.layout import Layout

_ORDER = (
    canonical.BY_INDEX_LAYOUT,
    responses.RANKS,
    canonical.CANONICAL,
    providers.PREFERENCE,
    llama_factory.V1_PAIR,
    *public.PUBLIC,
    responses.SIDES,
    llama_factory.SHAREGPT_RANKING,
    llama_factory.ALPACA_RANKING,
    responses.PAIR,
    trl.PREFERENCE_CHAT,
    trl.PREFERENCE_TEXT,
    llama_factory.MESSAGES_RANKING,
    providers.TRANSCRIPTS,
    trl.IMPLICIT_CHAT,
    trl.IMPLICIT_TEXT,
    two_responses.TWO_CHAT,
    two_responses.TWO_TEXT,
    trl.UNPAIRED_CHAT,
    trl.UNPAIRED_TEXT,
    llama_factory.SHAREGPT_KTO,
    llama_factory.ALPACA_KTO,
    responses.RATING,
    responses.GENERATIONS,
    responses.OUTPUTS,
    responses.COMPLETIONS,
    questions.PAIR_LABELS,
    questions.SOLUTIONS,
    trl.COMPLETION_CHAT,
    trl.COMPLETION_TEXT,
    llama_factory.CONVERSATION,
    llama_factory.DEMONSTRATION,
    llama_factory.V1_MESSAGES,
    providers.MESSAGES,
    questions.ANSWER,
    questions.RAW_TEXT,
    trl.PROMPT_CHAT,
    trl.PROMPT_TEXT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ORDER}
