"""Tokens to text: piece by piece the same as at once, characters whole, stops found however they are cut."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from data.small import small_tokenizer
from prefopt.generate.chat_model import BROKEN, TextStream
from prefopt.generate.model_io import continuation, decode, without_stop

TOKENIZER = small_tokenizer([("a", "b"), ("Ã", "©")])
WORDS = st.text(st.characters(codec="utf-8", exclude_characters=BROKEN), max_size=30)


def encoded(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(i) for i in ids), stream.finish()]


@given(WORDS, WORDS)
def test_pieces_add_up_and_no_character_is_shown_in_parts(prompt: str, text: str) -> None:
    stream = TextStream(TOKENIZER, encoded(prompt))
    given = pieces(stream, encoded(text))
    assert "".join(given) == text == stream.text and not any(BROKEN in piece for piece in given)
    assert continuation(TOKENIZER, encoded(prompt), encoded(text)) == text


@given(WORDS, st.integers(0, 8))
def test_text_ends_before_a_stop_wherever_tokens_cut_it(text: str, at: int) -> None:
    for stop in ("\nUser:", "é"):
        whole = text[:at] + stop + text[at:]
        stream = TextStream(TOKENIZER, [], stops=("\nUser:", "é"))
        shown = "".join(pieces(stream, encoded(whole)))
        first = min(i for s in ("\nUser:", "é") if (i := whole.find(s)) >= 0)
        assert shown == whole[:first] and stream.ended


def test_what_may_be_the_start_of_a_stop_is_held_back_and_given_at_the_end() -> None:
    stream = TextStream(TOKENIZER, [], stops=("\nUser:",))
    given = [stream.add(i) for i in encoded("yes\nUse")]
    assert "".join(given) == "yes" and stream.finish() == "\nUse" and not stream.ended


def test_bytes_that_are_no_character_are_shown_at_last() -> None:
    ids = encoded("é")[:1] if len(encoded("é")) > 1 else encoded("€")[:1]
    stream = TextStream(TOKENIZER, encoded("x"))
    assert stream.add(ids[0]) == "" and stream.finish() == BROKEN
    many = TextStream(TOKENIZER, encoded("x"))
    assert BROKEN in "".join(many.add(ids[0]) for _ in range(20))


def test_a_leading_space_belongs_to_the_answer_where_a_tokenizer_hides_it() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"▁yes": 0, "▁no": 1, ".": 2, "</s>": 3}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    assert decode(tokenizer, [1, 2]) == "no."
    assert continuation(tokenizer, [0], [1, 2]) == " no."
    assert "".join(pieces(TextStream(tokenizer, [0]), [1, 2])) == " no."
    assert continuation(tokenizer, [], [1, 2]) == "no."


@pytest.mark.parametrize(
    ("ids", "kept"), [([5, 6, 2], [5, 6]), ([5, 6], [5, 6]), ([2], []), ([], []), ([2, 5], [2, 5])]
)
def test_only_the_last_token_is_a_stop(ids: list[int], kept: list[int]) -> None:
    assert without_stop(ids, (2, 3)) == kept
