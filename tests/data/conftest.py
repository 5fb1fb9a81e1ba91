"""Tokenizers for the tests of the data room: real ones, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def minimind(shared: Path) -> Any:
    """6,400 tokens of English and Chinese, with a chat template in the manner of Qwen3."""
    return load_tokenizer(shared / "data/minimind_tokenizer")


@pytest.fixture(scope="session")
def imdb(shared: Path) -> Any:
    """Byte-level BPE without BOS and without a chat template."""
    return load_tokenizer(shared / "models/tiny-imdb")


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> Any:
    """A folder with vocab.json and merges.txt only."""
    return load_tokenizer(shared / "data/gpt2_tokenizer")


@pytest.fixture(scope="session")
def stories(shared: Path) -> Any:
    """A SentencePiece-like tokenizer that puts BOS before plain text."""
    return load_tokenizer(shared / "models/stories260k")
