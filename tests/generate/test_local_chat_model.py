"""A model on this machine as a talker: what it is asked, where its answers end, what no longer fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.small import small_tokenizer
from prefopt.errors import RunError
from prefopt.generate.chat_model import ChatRequest, LocalChatModel
from prefopt.generate.model_io import SampledModel, end_of_turn, renderer_for
from prefopt.generate.sampler import SamplingParams
from prefopt.records import Message
from train.small import tiny_llama, write_model

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def says(folder: Path, text: str, *, template: str | None = None, end: str | None = None) -> str:
    """A model that says ``text`` after anything, over and over: each token is told by the one before it alone."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    ids = tokenizer(text + (end or ""), add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids), "each token must have one successor"
    size, width = len(tokenizer), 264
    model = tiny_llama(max_position_embeddings=96, hidden_size=width)
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    # Layers add nothing; embeddings are one-hot, and the head turns each into the next.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(size, width))
        head = torch.zeros(size, width)
        for token in range(size):
            head[following.get(token, ids[0]), token] = 1.0
        model.get_output_embeddings().weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def talker(folder: str, **settings: object) -> LocalChatModel:
    model = SampledModel(folder, device="cpu", dtype="float32")
    renderer = renderer_for(model.tokenizer)
    given = {"max_new_tokens": 40, "temperature": 0.0, **settings}
    return LocalChatModel(model, renderer, SamplingParams(stop=model.stop_ids(renderer), **given))  # type: ignore[arg-type]


def asked(*words: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], w) for i, w in enumerate(words))


def test_an_answer_ends_at_the_end_of_the_turn_and_has_no_white_space_before_it(tmp_path: Path) -> None:
    one = talker(says(tmp_path / "m", " grün", template=CHATML, end="<|im_end|>"))
    assert "".join(one.answer(one.fit(asked("hi")), 0)) == "grün"
    assert one.params.stop == (1, 3)


def test_without_a_template_the_other_side_is_not_played(tmp_path: Path) -> None:
    one = talker(says(tmp_path / "m", " ok\nUser:"))
    assert "".join(one.answer(one.fit(asked("hi")), 0)) == "ok"
    assert "".join(one.complete("go", 0)).startswith("k\nUser: ok")  # text is only continued


def test_turns_that_do_not_fit_are_left_out_and_a_message_that_never_fits_is_refused(tmp_path: Path) -> None:
    one = talker(write_model(tmp_path / "m", max_position_embeddings=96), max_new_tokens=500)
    assert one.fit(asked("short")) == ChatRequest(asked("short"))
    long = asked("a" * 20, "b" * 20, "c" * 20, "d" * 10, "e")
    fitted = one.fit(long)
    assert fitted.dropped in (2, 4) and fitted.messages == long[fitted.dropped :]
    list(one.answer(fitted, 0))
    with pytest.raises(RunError, match=r"this message alone has \d+ tokens, and the model's context is 96"):
        one.fit(asked("x" * 90))
    assert list(one.complete("y" * 300, 0))  # the end of a text that is too long


def test_a_seed_gives_the_same_answers_and_another_attempt_another(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    one, two = (talker(folder, temperature=1.0, seed=4) for _ in range(2))
    first = "".join(one.answer(one.fit(asked("hi")), 0))
    assert first == "".join(two.answer(two.fit(asked("hi")), 0))
    assert first != "".join(one.answer(one.fit(asked("hi")), 1))
    other = talker(folder, temperature=1.0, seed=5)
    assert first != "".join(other.answer(other.fit(asked("hi")), 0))


def test_the_end_of_a_turn_is_read_off_the_template() -> None:
    tokenizer = small_tokenizer()
    assert end_of_turn(renderer_for(tokenizer)) == 1  # the plain layout ends answers with EOS
    tokenizer.chat_template = CHATML
    assert end_of_turn(renderer_for(tokenizer)) == 3
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert end_of_turn(renderer_for(tokenizer)) is None
    bare = small_tokenizer(bos_token="<s>")
    assert end_of_turn(renderer_for(bare)) is None


def test_what_the_generation_config_says_ends_answers_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(folder)
    found = SampledModel(folder, device="cpu")
    assert found.stop_ids(renderer_for(found.tokenizer)) == (1, 7)
    given = SampledModel("given", given=model, tokenizer=small_tokenizer())
    assert given.stop_ids(renderer_for(given.tokenizer)) == (1, 7)
