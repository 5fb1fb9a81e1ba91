"""A world that can be listed: a language of eight tokens, answers of three at most, and a reward for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt import theory
from prefopt.data.group import Group
from prefopt.data.packer import pack
from prefopt.model.scorer import Scorer, response_sums

LETTERS = ["<s>", "</s>", *"abcdef"]
STOP, LONGEST = 1, 3
WORTH = {"a": 0.6, "b": 0.3, "c": 0.0, "d": -0.3, "e": 0.5, "f": -0.6}
PROMPT = "abc"
RESPONSES = theory.responses(len(LETTERS), LONGEST, STOP)
SHORT = theory.responses(len(LETTERS), 2, STOP)  # a part of the world, sooner learnt


def tokenizer() -> Any:
    """A token for every letter, and two marks."""
    raw = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=STOP,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def write_world(folder: Path, seed: int = 0) -> str:
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def text_of(response: Sequence[int]) -> str:
    """What a reward sees: everything before the mark that ends a response."""
    return "".join(LETTERS[i] for i in response if i != STOP)


def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What each letter is worth, the more the earlier it comes, and something for a text that ends as it begins."""
    found = []
    for text in responses:
        letters = re.findall("<s>|.", text)
        value = sum(WORTH.get(x, -0.4) / (t + 1) for t, x in enumerate(letters))
        found.append(value + (0.4 if len(letters) > 1 and letters[0] == letters[-1] else 0.0))
    return found


REWARD = np.array(reward([], [text_of(r) for r in RESPONSES]))


def group(responses: Sequence[Sequence[int]] = RESPONSES) -> Group:
    """The prompt with every response."""
    prompt = [LETTERS.index(letter) for letter in PROMPT]
    whole = [np.array([*prompt, *r], np.int32) for r in responses]
    return Group.from_sequences([(w, np.arange(len(w)) >= len(prompt)) for w in whole], row=0, pairs=())


def distribution(scorer: Scorer, responses: Sequence[Sequence[int]] = RESPONSES) -> torch.Tensor:
    """Log-probability [Y] of every response."""
    batch = pack([group(responses)], scorer.layout)
    return response_sums(scorer(batch), batch)


def dense(model: Any, responses: Sequence[Sequence[int]] = RESPONSES) -> torch.Tensor:
    """The same by the model class's own forward on a padded batch: far faster for so many short responses."""
    longest = max(map(len, responses))
    prompt = [LETTERS.index(letter) for letter in PROMPT]
    ids = torch.tensor([[*prompt, *r, *[STOP] * (longest - len(r))] for r in responses])
    logp = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    target = ids[:, len(prompt) :]
    there = torch.arange(longest) < torch.tensor([len(r) for r in responses])[:, None]
    return (logp.gather(-1, target[..., None])[..., 0] * there).sum(-1)
