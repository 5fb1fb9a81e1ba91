"""Every layout of rows that is read, by name. Their order is their precedence.

Where a row has the fields of two, the one that stands first is meant: those with more fields come before those with
fewer, and of two with the same fields the one whose shape says more.
"""

from __future__ import annotations

from prefopt.data.layouts import sharegpt, trl
from prefopt.data.layouts.layout import Layout

_ORDER = (
    sharegpt.RANKING,
    trl.PREFERENCE_CHAT,
    trl.PREFERENCE_TEXT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ORDER}
