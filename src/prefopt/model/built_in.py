"""What a configuration may ask for of the code that computes it: what torch and transformers bring, nothing fetched."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

# transformers takes any OWNER/NAME for a kernel on the Hub, and fetches one in place of a flash attention that is not
# installed, or that a model does not take.
ATTENTION = {None, "eager", "sdpa", "flex_attention"}


def own_attention(config: PreTrainedConfig, name: str) -> None:
    """Let a configuration, and those inside it, use the default where it names attention that would be fetched."""
    waiting: list[Any] = [config]
    while waiting:
        inner = waiting.pop()
        asked = getattr(inner, "_attn_implementation_internal", None)
        if not (asked is None or (isinstance(asked, str) and asked in ATTENTION)):
            log.warning("%s: its configuration asks for attention %r, which is not built in: not used", name, asked)
            inner._attn_implementation_internal = None
        waiting += [value for value in vars(inner).values() if isinstance(value, PreTrainedConfig)]
