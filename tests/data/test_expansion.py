"""Tokenizers that make far more of a text than there is are not loaded."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  (its import is not to be timed)
from tokenizers import normalizers

from data.small import small_tokenizer
from prefopt.data.tokenizer import expansion, load_tokenizer
from prefopt.errors import ModelError


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(*texts: str) -> str:
    """A map of SentencePiece with an empty trie."""
    return base64.b64encode((0).to_bytes(4, "little") + b"".join(t.encode() + b"\0" for t in texts)).decode()


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "one letter to a megabyte": ("normalizer", replace({"String": "a"}, "a" * 1_000_000)),
    "anything to a megabyte": ("normalizer", replace({"Regex": ""}, "a" * 1_000_000)),
    "doubled forty times": (
        "normalizer",
        {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40},
    ),
    "doubled in sequences of sequences": (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaa")] * 5}] * 5,
        },
    ),
    "by a map": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": charsmap("b", "a" * 5000)}),
    "on the way back": ("decoder", {"type": "Sequence", "decoders": [replace({"String": "a"}, "aa")] * 40}),
    "the text a thousand times": (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
            "pair": [],
            "special_tokens": {},
        },
    ),
}


@pytest.mark.parametrize(("part", "step"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_tokenizer_that_expands_is_not_loaded(part: str, step: dict[str, Any], tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text("utf-8"))
    described["added_tokens"].append(
        {
            "id": 9999,
            "content": "a" * 50,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": False,
        }
    )  # which is normalised on loading
    path.write_text(json.dumps(described | {part: step}))
    start = time.process_time()
    with pytest.raises(ModelError, match=f"its {part} can make .* characters of one") as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value) and time.process_time() - start < 5


def test_steps_of_real_tokenizers_are_within_bounds() -> None:
    unicode = {"type": "Precompiled", "precompiled_charsmap": charsmap("\ufdfa", "ffi", "x" * 18)}
    for steps in (
        [{"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")],
        [unicode, replace({"Regex": " {2,}"}, "\u2581")],
        [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
        [{"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, {"type": "NFKD"}, unicode],
    ):
        assert expansion({"type": "Sequence", "normalizers": steps}) < 100
    assert expansion(None) == expansion({"type": "ByteLevel"}) == 1


def test_what_is_said_bounds_what_is_made() -> None:
    """Against the library itself."""
    for content, times in (("xyz", 3), ("a\u2581b", 2)):
        steps = [normalizers.Replace("a", content)] * times
        described = {"type": "Sequence", "normalizers": [replace({"String": "a"}, content)] * times}
        made = normalizers.Sequence(steps).normalize_str("a")  # type: ignore[arg-type]
        assert len(made) <= expansion(described)


@pytest.mark.parametrize("text", ["[" * 200_000, "{" * 5, "[]", '{"normalizer": 5, "model": 7}', "\x00"])
def test_no_tokenizer_at_all_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
