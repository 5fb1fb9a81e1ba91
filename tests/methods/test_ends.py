"""What trained answers end with also ends what plain transformers generates from the saved folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prefopt
from data.small import small_tokenizer
from prefopt.data.chat.ends import trained_ends
from prefopt.data.group import Group
from prefopt.data.table import GroupTable, TableBuilder
from prefopt.errors import Diverged
from prefopt.model.save import end_tokens, ids_of
from train.small import QUICK, tiny_llama

EOS, IM_END = 1, 3
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
CHATS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * i}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model as they are published: its EOS ends documents, its template ends turns with another token."""
    folder = tmp_path_factory.mktemp("base") / "m"
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    tokenizer = small_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return str(folder)


def ends_of(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft, lora": {"lora": True},
    "dpo": {},
    "dpo, lora": {"lora": True},
    "ppo": {"reward": "length", "max_new_tokens": 4, "num": 2},
    "ppo, lora": {"reward": "length", "max_new_tokens": 4, "num": 2, "lora": True},
    "online": {"reward": "length", "max_new_tokens": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_it(method: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, options = tmp_path / "out", {**QUICK, "progress": "plain", "max_steps": 1, **METHODS[method]}
    if method.startswith(("ppo", "online")):
        options.pop("max_length")
    getattr(prefopt, method.partition(",")[0])(base, CHATS, output=output, **options)
    assert ends_of(output) == [EOS, IM_END]
    said = "answers end with <|im_end|>: added to eos_token_id of generation_config.json"
    told = capsys.readouterr()
    assert (told.out + told.err).count(said) == 1
    assert GenerationConfig.from_pretrained(output).eos_token_id == [EOS, IM_END]
    if "lora" in method:
        from prefopt.model.merge import merge_adapter

        cpu = torch.device("cpu")
        report = merge_adapter(str(output), tmp_path / "merged", model=base, dtype=torch.float32, device=cpu)
        assert ends_of(tmp_path / "merged") == [EOS, IM_END]
        assert said in report.lines()
        (output / "generation_config.json").unlink()  # as adapters of others have none: the template says it
        merge_adapter(str(output), tmp_path / "again", model=base, dtype=torch.float32, device=cpu)
        assert ends_of(tmp_path / "again") == [EOS, IM_END]


@pytest.mark.parametrize("said", [{"a": 1}, "x", [None, 1.5]], ids=str)
def test_ends_that_are_no_numbers_are_left_out(said: Any, base: str, tmp_path: Path) -> None:
    """Not one line of it was read before the run was over, and then the trained model was lost."""
    folder = Path(shutil.copytree(base, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    prefopt.sft(str(folder), CHATS, output=tmp_path / "out", max_steps=1, **QUICK)
    assert ends_of(tmp_path / "out") == [IM_END]
    options: dict[str, Any] = {"max_new_tokens": 2, "device": "cpu", "dtype": "float32", "progress": "none"}
    assert len(prefopt.sample(str(folder), CHATS[:1], **options).rows) == 1


def test_what_is_there_already_stays_as_it_is(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefopt.sft(base, CHATS, output=tmp_path / "a", max_steps=1, **QUICK)
    options = {**QUICK, "progress": "plain", "max_steps": 1}
    prefopt.dpo(str(tmp_path / "a"), CHATS, output=tmp_path / "b", **options)
    assert ends_of(tmp_path / "b") == [EOS, IM_END]
    assert "answers end with" not in capsys.readouterr().out


@pytest.mark.parametrize("said", ["x", [[1]], {"a": 1}, True, -3])
def test_what_can_be_no_token_ends_no_run(said: object, base: str, tmp_path: Path) -> None:
    """Read from a stranger's generation_config.json when all training is done."""
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    assert end_tokens(tmp_path / "base") == []
    assert ids_of(said) == [] and ids_of([1, said]) == [1]
    if said != [[1]]:
        return
    prefopt.sft(str(tmp_path / "base"), CHATS, output=tmp_path / "out", max_steps=1, **QUICK)
    ids = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert ids and all(isinstance(i, int) for i in ids)
    assert prefopt.sample(str(tmp_path / "base"), [{"prompt": "k: "}], max_new_tokens=2, progress="none").samples == 1


def test_reward_models_and_raw_text_have_none(base: str, tmp_path: Path) -> None:
    prefopt.reward(base, CHATS, output=tmp_path / "reward", max_steps=1, **QUICK)
    assert not (tmp_path / "reward" / "generation_config.json").exists()
    texts = [{"text": "It is <|im_end|> or not, who knows"}] * 4
    prefopt.sft(base, texts, output=tmp_path / "text", max_steps=1, **QUICK)
    assert ends_of(tmp_path / "text") == EOS


def test_only_whole_answers_say_what_ends_them() -> None:
    """Not one that was cut, not a turn before the last, and no ordinary token."""
    tokenizer = small_tokenizer(bos_token="<s>", eos_token="</s>")
    turns = ([5, 6, 7, 2, 8, 9, IM_END], [0, 0, 1, 1, 0, 1, 1])
    cut, plain, untrained = ([5, 6, 7, EOS], [0, 0, 1, 1]), ([5, 6, 9], [0, 0, 1]), ([5, 6, 9, 0], [0, 0, 1, 0])

    def table(*sequences: Any, cuts: Any = None) -> GroupTable:
        builder = TableBuilder()
        group = Group.from_sequences([(np.array(i), np.array(t, bool)) for i, t in sequences], row=0, pairs=())
        builder.add(group, cuts=cuts)
        builder.add(Group.from_sequences([(np.array([4, 9]), np.array([0, 1], bool))], row=1, pairs=()))
        from prefopt.data.table import Part

        return GroupTable([Part(builder.columns())])

    assert trained_ends(table(turns, cut, plain, untrained, cuts=(0, 2, 0, 0)), tokenizer) == (IM_END,)
    assert trained_ends(table(turns, cut), tokenizer) == (EOS, IM_END)
    assert trained_ends(table(plain), tokenizer) == ()
    by_chance, inside = ([5, 6, 9, 2], [0, 0, 1, 1]), ([5, 6, 2, 9, IM_END], [0, 0, 1, 1, 1])
    assert trained_ends(table(by_chance, inside), tokenizer) == (IM_END,)


@pytest.fixture(scope="module")
def taught(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, taught to answer and to end."""
    output = tmp_path_factory.mktemp("taught") / "out"
    options = {**QUICK, "learning_rate": 1e-2, "max_length": 128, "batch_size": 8}
    prefopt.sft(base, CHATS, output=output, epochs=40, **options)
    return output


def written_by(method: str, base: str, taught: Path, folder: Path) -> Path:
    """A folder of the taught model after a step of a method that hardly moves it."""
    still: dict[str, Any] = {**QUICK, "learning_rate": 1e-9, "max_steps": 1}
    if method == "sft":
        return taught
    if method == "dpo":
        prefopt.dpo(str(taught), CHATS, output=folder / "out", **still)
    elif method == "ppo":
        del still["max_length"]
        prefopt.ppo(str(taught), CHATS, output=folder / "out", reward="length", max_new_tokens=8, num=2, **still)
    else:
        from prefopt.model.merge import merge_adapter

        prefopt.dpo(str(taught), CHATS, output=folder / "adapter", lora=True, **still)
        merge_adapter(str(folder / "adapter"), folder / "out", dtype=torch.float32, device=torch.device("cpu"))
    return folder / "out"


@pytest.mark.parametrize("method", ["sft", "dpo", "ppo", "merge"])
def test_plain_transformers_generates_the_same_text_to_the_end_mark(
    method: str, base: str, taught: Path, tmp_path: Path
) -> None:
    """What the answer was trained to be, to its end mark and no token further, as prefopt samples it."""
    output = written_by(method, base, taught, tmp_path)
    model, tokenizer = (kind.from_pretrained(output) for kind in (AutoModelForCausalLM, AutoTokenizer))
    how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 60, "dtype": "float32", "device": "cpu"}
    rows = prefopt.sample(str(output), [{"prompt": c["prompt"]} for c in CHATS], progress="none", **how).rows
    for chat, row in zip(CHATS, rows, strict=True):
        ids = tokenizer.apply_chat_template(chat["prompt"], add_generation_prompt=True, return_tensors="pt")
        found = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(found)
        assert text.startswith("It is ") and text.endswith("<|im_end|>") and text.count("<|im_end|>") == 1
        assert text == tokenizer.decode(row["token_ids"][0])


def test_what_is_left_of_a_run_that_ran_away_has_it_too(base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "reward": "length", "max_new_tokens": 4, "num": 8, "beta": 0.0, "epochs": 20}
    options |= {"max_kl": 0.5, "learning_rate": 1e-3, "save_every": 1}
    options.pop("max_length")
    with pytest.raises(Diverged, match="are a model"):
        prefopt.ppo(base, CHATS, output=tmp_path / "out", **options)
    assert ends_of(tmp_path / "out" / "last-good") == [EOS, IM_END]
