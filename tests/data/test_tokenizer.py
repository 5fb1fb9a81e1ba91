"""Tokenizers that cannot be loaded are one line."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.small import small_tokenizer
from prefopt.data.tokenizer import eos_id, load_tokenizer
from prefopt.errors import ModelError


def test_saved_tokenizer_loads(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert eos_id(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")


def test_incomplete_folders(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text('{"version": "1.0"')
    only = tmp_path / "only-config"
    only.mkdir()
    (only / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for folder, message in (
        (tmp_path / "absent", "no such folder"),
        (only, "has no tokenizer"),
        (damaged, "cannot be loaded"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As where these packages are not installed."""
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return None if name.partition(".")[0] in modules or name in modules else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.parametrize(
    ("first", "modules", "said"),
    [
        (
            b"\n\x0e\n\x05<unk>\x15\x00\x00",
            ("sentencepiece",),
            "SentencePiece's, .*: pip install sentencepiece protobuf",
        ),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00", ("google",), "SentencePiece's, .*: pip install sentencepiece protobuf"),
        (b"IQ== 0\nIg== 1\n", ("tiktoken",), "tiktoken's, .*: pip install tiktoken, or convert"),
    ],
)
def test_packages_that_a_vocabulary_needs_are_named(
    first: bytes, modules: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(first * 40)
    without(monkeypatch, *modules)
    with pytest.raises(ModelError, match=f"tokenizer.model is {said}"):
        load_tokenizer(tmp_path)


def test_sentencepiece_alone_is_read(shared: Path, tmp_path: Path) -> None:
    """Llama 2's way: the same ids as its converted tokenizer has."""
    pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install sentencepiece")
    shutil.copy(shared / "data/stories260k/tok512.model", tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"tokenizer.model: .* since no tokenizer_config.json names its class"):
        load_tokenizer(tmp_path)  # as which transformers would not even put the space before the first word
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    import sentencepiece

    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = load_tokenizer(tmp_path)
    text = "Once upon a time, there was"
    assert found(text, add_special_tokens=False)["input_ids"] == raw.encode(text)
