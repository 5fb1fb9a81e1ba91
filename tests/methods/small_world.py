"""A world that can be listed: a language of eight tokens, answers of three at most, and a reward for each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt import theory
from prefopt.data.group import Group
from prefopt.model.packing import pack
from prefopt.model.scorer import Scorer, response_sums

LETTERS = ["<s>", "</s>", *"abcdef"]
STOP, LONGEST = 1, 3
WORTH = {"a": 0.6, "b": 0.3, "c": 0.0, "d": -0.3, "e": 0.5, "f": -0.6}
PROMPT = "abc"
RESPONSES = theory.responses(len(LETTERS), LONGEST, STOP)


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


def group() -> Group:
    """The prompt with every response."""
    prompt = [LETTERS.index(letter) for letter in PROMPT]
    whole = [np.array([*prompt, *r], np.int32) for r in RESPONSES]
    return Group.from_sequences([(w, np.arange(len(w)) >= len(prompt)) for w in whole], row=0, pairs=())


def distribution(scorer: Scorer) -> torch.Tensor:
    """Log-probability [Y] of every response."""
    batch = pack([group()], scorer.layout)
    return response_sums(scorer(batch), batch)


def chances(ref: np.ndarray) -> np.ndarray:
    """Probability [Y, Y], above the diagonal, of each pair of different responses that the reference draws."""
    p = np.exp(ref) / np.exp(ref).sum()
    found = np.triu(np.outer(p, p), 1)
    return found / found.sum()


def labelled(ref: np.ndarray, labels: int | None, seed: int) -> dict[str, Any]:
    """A row of all responses, with ``labels`` comparisons of pairs that the reference draws, each by Bradley-Terry on
    the reward, counted as votes; None: every pair with its exact share of votes."""
    draw, share = np.random.Generator(np.random.PCG64(seed)), chances(ref)
    first, second = np.triu_indices(len(ref), 1)
    prefer = theory.bradley_terry(REWARD)[first, second]
    count = share[first, second] if labels is None else draw.multinomial(labels, share[first, second])
    wins = count * prefer if labels is None else draw.binomial(count, prefer)
    pairs = zip(first.tolist(), second.tolist(), wins.tolist(), (count - wins).tolist(), strict=True)
    votes = [vote for i, j, won, lost in pairs for vote in ([i, j, won], [j, i, lost]) if vote[2] > 0]
    return row_of(range(len(ref)), votes)


def row_of(responses: Sequence[int], votes: list[list[float]]) -> dict[str, Any]:
    """A row of the canonical layout. The end is written out, as a token like the others: a response that is nothing
    else is not taken for an empty one."""
    texts = ["".join(LETTERS[i] for i in RESPONSES[y]) for y in responses]
    return {"prompt": PROMPT, "responses": texts, "finish": ["length"] * len(texts), "votes": votes}


def pairs(ref: np.ndarray, labels: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one pair with one label each."""
    draw, share = np.random.Generator(np.random.PCG64(seed)), chances(ref)
    prefer = theory.bradley_terry(REWARD)
    found = draw.choice(share.size, labels, p=share.reshape(-1))
    sides = zip((found // len(ref)).tolist(), (found % len(ref)).tolist(), strict=True)
    return [row_of((i, j), [[0, 1, 1.0] if draw.random() < prefer[i, j] else [1, 0, 1.0]]) for i, j in sides]


def conditionals(logp: np.ndarray) -> np.ndarray:
    """Log-probability [M] of each token of every response, given what stands before it, from that of responses [Y]."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for response, p in zip(RESPONSES, np.exp(logp), strict=True):
        for t in range(len(response) + 1):
            mass[response[:t]] += p
    return np.log([mass[y[: t + 1]] / mass[y[:t]] for y in RESPONSES for t in range(len(y))])


def to_come(logp: np.ndarray, earned: np.ndarray) -> np.ndarray:
    """What is still to be earned, in expectation, before each token [M]: the value that a perfect critic has.

    ``earned`` [M] comes with each token.
    """
    after: dict[tuple[int, ...], float] = defaultdict(float)
    step = iter(zip(conditionals(logp), earned, strict=True))
    edges = {y[: t + 1]: next(step) for y in RESPONSES for t in range(len(y))}
    for at in sorted(edges, key=len, reverse=True):
        p, r = edges[at]
        after[at[:-1]] += np.exp(p) * (r + after[at])
    return np.array([after[y[:t]] for y in RESPONSES for t in range(len(y))])
