"""The benchmark's model: a 40M-parameter Llama with random weights and a 32,000-token tokenizer trained from the data.

Random weights are enough: the time and the memory of a step depend on shapes alone. Llama, 8 layers, width 512,
8 heads of 64, MLP 1,280, tied embeddings: 24.1M parameters in the body, 16.4M in the head.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA_SETS = {
    "dpo_en_demo": "llamafactory_demo/dpo_en_demo.json",
    "ultrafeedback_sample": "ultrafeedback_sample/train_clean.jsonl",
}
EOS, PAD, START = "<|im_end|>", "<|pad|>", "<|im_start|>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SEED = 0
CONFIG: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1_280,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4_096,
    "tie_word_embeddings": True,
}
# ChatML with the line break between turns instead of after them: nothing follows the end of the last one, so that
# a trainer that scores all that the template adds after the prompt and one that stops at EOS score the same tokens.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def read_pairs(data_root: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a data set in the explicit conversational layout: prompt, chosen and rejected are lists of messages."""
    path = data_root / DATA_SETS[name]
    text = path.read_text(encoding="utf-8")
    raw = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [_explicit(row) for row in raw]


def _explicit(row: dict[str, Any]) -> dict[str, Any]:
    if "conversations" in row:  # LLaMA-Factory's ranking layout
        prompt = [{"role": ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]]
        sides = {side: row[side]["value"] for side in ("chosen", "rejected")}
    else:
        prompt = [{"role": "user", "content": row["prompt"]}]
        sides = {side: row[side] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()}}


def _texts(data_root: Path) -> Iterator[str]:
    for name in DATA_SETS:
        for row in read_pairs(data_root, name):
            for part in ("prompt", "chosen", "rejected"):
                for message in row[part]:
                    yield message["content"]


def build_model(data_root: Path, cache: Path) -> Path:
    """A Hugging Face folder with model and tokenizer; made once per description and kept under ``cache``."""
    description = json.dumps([CONFIG, CHAT_TEMPLATE, SEED, DATA_SETS], sort_keys=True)
    folder = cache / f"llama-40m-{hashlib.sha256(description.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[PAD, START, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(data_root), trainer)
    if tokenizer.get_vocab_size() != CONFIG["vocab_size"]:
        raise SystemExit(f"the data yields only {tokenizer.get_vocab_size()} tokens; is {data_root} complete?")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE

    torch.manual_seed(SEED)
    ids = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **ids))
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    fast.save_pretrained(partial)
    partial.rename(folder)
    return folder
