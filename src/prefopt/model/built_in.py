"""What a configuration may ask for of the code that computes it: what torch and transformers bring, nothing fetched."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from prefopt.disk.vetted import read_object

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
        if not _is_built_in(asked):
            log.warning("%s: its configuration asks for attention %r, which is not built in: not used", name, asked)
            inner._attn_implementation_internal = None
        waiting += [value for value in vars(inner).values() if isinstance(value, PreTrainedConfig)]


def attention_for(folder: str) -> dict[str, str]:
    """What to give a library that opens a folder by itself, where ``config.json`` there names attention to be fetched:
    every model has eager attention."""
    waiting: list[Any] = [read_object(Path(folder) / "config.json")]
    while waiting:
        match waiting.pop():
            case dict() as inner:
                if not all(_is_built_in(value) for key, value in inner.items() if "attn_implementation" in key):
                    return {"attn_implementation": "eager"}
                waiting += inner.values()
            case list() as inner:
                waiting += inner
    return {}


def _is_built_in(asked: object) -> bool:
    return asked is None or (isinstance(asked, str) and asked in ATTENTION)
