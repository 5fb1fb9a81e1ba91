"""How much longer a tokenizer can make a text before it looks for tokens, told from its ``tokenizer.json``.

A normaliser replaces, and replaces what was replaced: forty steps of a kilobyte make a terabyte of one letter. Real
ones make at most eighteen characters of one (NFKC of U+FDFA).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from prefopt.errors import ModelError

MOST = 1000
"""Characters that a tokenizer may make of one."""
UNICODE = 18
"""The longest that a normal form of Unicode makes of one character."""


def check_expansion(path: Path) -> None:
    """Raises :class:`ModelError` where the tokenizer in a file could make far more of a text than there is."""
    try:
        described = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # whoever loads it says what is wrong
    if not isinstance(described, dict):
        return
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        if (grows := growth(described.get(part))) > MOST:
            what = f"its {part} can make {'over a billion' if grows > 1e9 else f'{grows:,.0f}'} characters of one"
            raise ModelError(f"{path}: {what}, which no real tokenizer does; it is not loaded")


def growth(step: Any) -> float:
    """Characters that a step, or the steps inside it, can make of one."""
    if not isinstance(step, dict):
        return 1.0
    inner = [step[name] for name in ("normalizers", "pretokenizers", "decoders", "processors") if name in step]
    most = 1.0
    for one in inner[0] if inner and isinstance(inner[0], list) else []:
        most *= growth(one)
    match step.get("type"):
        case "Replace":
            most *= _replaced(step.get("pattern"), step.get("content"))
        case "Prepend" | "Metaspace" | "WordPiece" | "BPEDecoder":
            added = (step.get(name) for name in ("prepend", "replacement", "prefix", "suffix"))
            most *= 1 + sum(len(text) for text in added if isinstance(text, str))
        case "NFD" | "NFC" | "NFKD" | "NFKC":
            most *= UNICODE if most > 1 else 1
        case "Precompiled":
            most *= _mapped(step.get("precompiled_charsmap"))
        case "TemplateProcessing":
            shapes = [step.get(name) for name in ("single", "pair")]
            most *= max((len(shape) for shape in shapes if isinstance(shape, list)), default=1)
    return min(most, 1e300)


def _replaced(pattern: Any, content: Any) -> float:
    """Characters that one becomes where a pattern is replaced; an expression may match between any two."""
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    return 1.0 + len(re.sub(r"\\.", "", content))


def _mapped(encoded: Any) -> float:
    """The longest text of a map of SentencePiece: a trie's size, the trie, texts that end in a zero byte."""
    if not isinstance(encoded, str):
        return 1.0
    try:
        raw = base64.b64decode(encoded)
    except (ValueError, binascii.Error):
        return 1.0
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1.0, max((len(text.decode("utf-8", "replace")) for text in texts), default=1))
