"""Tokenizers that cannot be loaded are one line."""

from __future__ import annotations

from pathlib import Path

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
