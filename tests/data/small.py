"""A tokenizer made on the spot, for cases that no real one shows so plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def small_tokenizer(merges: list[tuple[str, str]] | None = None, marks: Sequence[str] = MARKS, **special: str) -> Any:
    """Byte-level BPE with every byte, the given merges and a few special tokens; a new one for each call."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges or []
    vocab = {token: i for i, token in enumerate([*marks, *alphabet, *(a + b for a, b in merges)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)
