"""A tokenizer as GGUF metadata: byte-level BPE, and SentencePiece's BPE, as llama.cpp reads them.

llama.cpp has the splitting of text into words built in, under names; a tokenizer is written only where its own
pre-tokenizer is one of them. SentencePiece's merges are pairs with ranks in ``tokenizer.json`` and scores of pieces in
llama.cpp; ranks become scores where both choose the same merge in every text, which is checked.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.chat.ends import end_of_turn
from prefopt.data.chat.render import Renderer
from prefopt.data.tokenizer import Tokenizer, leading_ids
from prefopt.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp counts them."""
SPACE = "\u2581"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_WORDS = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_GPT2: "gpt-2", _WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
"""llama.cpp's names of ways to split a text into words, by their regular expressions."""


@dataclass(frozen=True)
class GgufVocabulary:
    """``model``: gpt2 or llama. ``tokens``, ``kinds`` (and ``scores`` of SentencePiece): one a row of the embedding.
    ``values``: further metadata behind ``tokenizer.ggml.``. ``notes``: lines on what llama.cpp does otherwise."""

    model: str
    tokens: list[str]
    kinds: list[int]
    values: dict[str, str | int | bool]
    scores: list[float] | None = None
    merges: list[str] | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: Tokenizer, rows: int) -> GgufVocabulary:
    """The vocabulary of a tokenizer for an embedding of ``rows``. Raises :class:`ModelError` for a kind of tokenizer
    that llama.cpp would read otherwise."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, not BPE")
    ids: dict[str, int] = tokenizer.get_vocab()
    if len(ids) > rows or max(ids.values()) >= rows:
        raise _refused(f"it has {max(ids.values()) + 1} tokens, and the embedding {rows} rows")
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in ids.items():
        tokens[i], kinds[i] = token, NORMAL
    for added in described["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    values: dict[str, str | int | bool] = {**_special(tokenizer), "add_bos_token": bool(leading_ids(tokenizer))}
    template = _chat_template(tokenizer)
    if model.get("byte_fallback"):
        values["add_space_prefix"] = _space_prefix(described)
        values["add_eos_token"] = False
        kinds = _piece_kinds(tokens, kinds, model.get("unk_token"))
        scores = _scores(tokens, kinds, merges)
        tokens = [t.replace(SPACE, " ") if k == USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)]
        return GgufVocabulary("llama", tokens, kinds, values | {"pre": "default"}, scores, None, template)
    notes: list[str] = []
    values["pre"] = _split(described, bool(model.get("ignore_merges")), notes)
    return GgufVocabulary("gpt2", tokens, kinds, values, None, [" ".join(m) for m in merges], template, notes)


def _refused(why: str) -> ModelError:
    return ModelError(f"the tokenizer cannot be written into a GGUF file: {why}")


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {f"{theirs}_token_id": getattr(tokenizer, f"{ours}_token_id") for ours, theirs in names.items()}
    turn = end_of_turn(Renderer(tokenizer)) if tokenizer.chat_template and tokenizer.eos_token_id is not None else None
    if turn is not None and turn != tokenizer.eos_token_id:
        found["eot_token_id"] = turn
    return {name: int(i) for name, i in found.items() if i is not None}


def _chat_template(tokenizer: Tokenizer) -> str | None:
    """The template for conversations without tools."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else None


# -- byte-level BPE --------------------------------------------------------------------------------------------


def _split(described: Mapping[str, Any], ignore_merges: bool, notes: list[str]) -> str:
    """llama.cpp's name of the way a text is split into words."""
    normalizer = described["normalizer"]
    if normalizer is not None and normalizer["type"] == "NFC":
        notes.append("the tokenizer composes characters first (NFC), llama.cpp takes text as it is")
    elif normalizer is not None:
        raise _refused(f"its normalizer is {normalizer['type']}")
    pre = described["pre_tokenizer"]
    steps = pre["pretokenizers"] if pre is not None and pre["type"] == "Sequence" else [pre]
    name = None
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, **rest}]:
            name = "smollm" if rest.get("use_regex") else None
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            name = SPLITS.get(pattern)
    if name is None:
        raise _refused("llama.cpp has no name that prefopt knows for the way it splits words")
    if ignore_merges and name != "llama-bpe":
        raise _refused("it looks whole words up before it merges, which llama.cpp does for Llama 3's alone")
    return name


# -- SentencePiece ---------------------------------------------------------------------------------------------


def _space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text. Raises :class:`ModelError` for other changes to it."""
    normalizer, pre = described["normalizer"], described["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix = False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case _:
                raise _refused(f"it changes text by {step['type']}")
    match pre:
        case None | {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
            return prefix
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return prefix or scheme != "never"
    raise _refused(f"it splits text by {pre['type']}")


def _piece_kinds(tokens: Sequence[str], kinds: Sequence[int], unknown: str | None) -> list[int]:
    found = list(kinds)
    for i, token in enumerate(tokens):
        if token == unknown:
            found[i] = UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[i] = BYTE
    return found


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A score for each piece: minus the rank of its first merge. Raises :class:`ModelError` where ranks of pairs say
    more than scores of pieces can."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, pair in enumerate(merges):
        ranks["".join(pair)].append(rank)
    merged = (NORMAL, USER_DEFINED)
    pieces = {t for t, kind in zip(tokens, kinds, strict=True) if kind in merged}
    for piece, found in ranks.items():
        splits = sum(piece[:i] in pieces and piece[i:] in pieces for i in range(1, len(piece)))
        if found[-1] - found[0] != len(found) - 1 or splits != len(found):
            raise _refused(f"its merges of {piece!r} are not those of a SentencePiece model")
    return [-float(ranks[t][0]) if t in ranks else 0.0 for t in tokens]
