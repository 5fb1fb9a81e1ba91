"""Models that begin at random, and tokenizers made from the text they will read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError
from prefopt.model.load import check_fits, load_config
from prefopt.model.precision import silence_dropout
from prefopt.model.supported import model_errors

END, PAD = "<|endoftext|>", "<|pad|>"
TURNS = ("<|im_start|>", "<|im_end|>")
"""Kept for a ChatML template that fine-tuning may add."""


def new_model(folder: str, tokenizer: Tokenizer, *, seed: int, fitted: bool) -> torch.nn.Module:
    """The causal language model that ``config.json`` of a folder describes, its weights drawn from ``seed``, float32.

    ``fitted``: its vocabulary and special tokens are those of ``tokenizer``, whatever the file says. Raises
    :class:`ModelError` where it describes none.
    """
    config: Any = load_config(folder)
    silence_dropout(config)
    if fitted:
        config.vocab_size = len(tokenizer)
        for kind in ("bos", "eos", "pad"):
            setattr(config, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    check_fits(AutoModelForCausalLM, folder, config)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with model_errors(folder):
            made: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.random.set_rng_state(state)
    return made.eval()


def new_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE (as GPT-2's) of ``size`` tokens, from ``texts``; the same texts give the same tokenizer.

    It ends texts with ``<|endoftext|>`` and pads with a token of its own. Raises :class:`ModelError` where the text is
    too short for so many tokens.
    """
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False, special=True) for text in (END, PAD, *TURNS)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    if raw.get_vocab_size() < size:
        raise ModelError(
            f"--train-tokenizer {size}: the text makes only {raw.get_vocab_size()} tokens; give no more, or more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=PAD)
