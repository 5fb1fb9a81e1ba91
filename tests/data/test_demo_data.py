"""Real data with real tokenizers: what is trained is the answer, the whole answer and nothing but the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.comparisons import read_comparisons
from prefopt.data.group import show
from prefopt.data.load import load_groups
from prefopt.data.tokenizer import load_tokenizer
from prefopt.errors import DataError

DEMO = "data/llamafactory_demo/dpo_{}_demo.json"


def decode(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def rendered(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))


def sample(file: Path, folder: Path, every: int) -> tuple[Path, list[dict[str, Any]]]:
    """Every n-th row of a file, as a file of its own."""
    text = file.read_text("utf-8")
    rows = (json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line])[
        ::every
    ]
    path = folder / f"{file.stem}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path, rows


def turns_of(row: dict[str, Any]) -> list[dict[str, str]]:
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": names[m["from"]], "content": m["value"]} for m in row["conversations"]]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_answer_is_trained_to_its_end_of_turn(shared: Path, minimind: Any, language: str) -> None:
    file = shared / DEMO.format(language)
    data = load_groups([file], minimind)
    assert (data.read, data.kept, data.refused, data.truncated) == (300, 300, 0, 0)
    for row, group in zip(json.loads(file.read_text("utf-8")), data.groups, strict=True):
        prompt = turns_of(row)
        for k, side in enumerate((row["chosen"], row["rejected"])):
            ids, trained = group.sequence(k)
            answer = {"role": "assistant", "content": side["value"]}
            assert decode(minimind, ids[trained]) == side["value"].lstrip("\n") + "<|im_end|>"
            assert decode(minimind, ids[~trained]) == rendered(minimind, prompt, add_generation_prompt=True)
            whole = rendered(minimind, [*prompt, answer]).removesuffix("\n")
            assert ids.tolist() == minimind(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-4B-Instruct"])
def test_other_templates(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared / "data/minimind_tokenizer")
    config = json.loads((shared / f"data/chat_templates/{name}.tokenizer_config.json").read_text("utf-8"))
    tokenizer.chat_template = config["chat_template"]
    file, rows = sample(shared / DEMO.format("en"), tmp_path, 5)
    for row, group in zip(rows, load_groups([file], tokenizer).groups, strict=True):
        for k, side in enumerate((row["chosen"], row["rejected"])):
            ids, trained = group.sequence(k)
            assert decode(tokenizer, ids[trained]) == side["value"] + "<|im_end|>"
            assert decode(tokenizer, ids[~trained]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("fixture", ["imdb", "gpt2", "stories"])
def test_plain_layout(shared: Path, tmp_path: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(fixture)
    file, rows = sample(shared / DEMO.format("zh" if fixture == "stories" else "en"), tmp_path, 5)
    data = load_groups([file], tokenizer)
    assert data.kept == len(rows) == 60
    assert sum("no chat template" in note for note in data.notes) == 1
    bos = ["<s>"] if fixture == "stories" else []
    assert data.template is not None
    for row, group in zip(rows, data.groups, strict=True):
        for k, side in enumerate((row["chosen"], row["rejected"])):
            ids, trained = group.sequence(k)
            eos = tokenizer.eos_token
            assert decode(tokenizer, ids[trained]).lstrip(" ") == side["value"].lstrip(" ") + eos
            text = decode(tokenizer, ids[~trained])
            lead = "System: " if row["conversations"][0]["from"] == "system" else "User: "
            assert text.removeprefix("".join(bos)).lstrip(" ").startswith(lead) and text.endswith("\n\nAssistant:")
            assert tokenizer.convert_ids_to_tokens(ids[:2].tolist()).count("<s>") == len(bos)
            turns = [*turns_of(row), {"role": "assistant", "content": side["value"]}]
            whole = rendered(tokenizer, turns, chat_template=data.template)
            assert ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_text_rows_are_joined_as_they_stand(shared: Path, tmp_path: Path, gpt2: Any, stories: Any) -> None:
    file, rows = sample(shared / "data/ultrafeedback_sample/eval_clean.jsonl", tmp_path, 3)
    for tokenizer, lead in ((gpt2, []), (stories, [1])):
        data = load_groups([file], tokenizer, on_bad_row="skip")
        apart = 0
        assert data.read == len(rows) == data.kept + data.refused
        for group in data.groups:
            row = rows[group.row - 1]
            for k, side in enumerate(("chosen", "rejected")):
                ids, trained = group.sequence(k)
                assert decode(tokenizer, ids[trained]) == row[side] + tokenizer.eos_token
                prompt = [*lead, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
                assert ids[~trained].tolist() == prompt
                plain = tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"]
                apart += ids.tolist() != [*lead, *plain, tokenizer.eos_token_id]
        assert 0 < apart < data.kept and sum("tokenized apart" in note for note in data.notes) == 1


def test_bad_rows_are_refused_by_name_or_skipped_with_a_count(shared: Path, tmp_path: Path, imdb: Any) -> None:
    file, rows = sample(shared / "data/ultrafeedback_sample/train_clean.jsonl", tmp_path, 1)
    ties = [r for r in rows if r["chosen"] == r["rejected"]]
    rows = [*rows[:150], *ties, *(r for r in rows if not (r["chosen"].strip() and r["rejected"].strip()))]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    tied = [i for i, r in enumerate(rows, 1) if r["chosen"] == r["rejected"]]
    empty = [i for i, r in enumerate(rows, 1) if not (r["chosen"].strip() and r["rejected"].strip())]
    # Identical responses are refused; of those with equal scores nobody said that one is better.
    same_scores = [i for i, r in enumerate(rows, 1) if len(set(r["metadata"].values())) == 1]
    assert len(tied) == 4 and empty
    tied = [i for i in tied if i not in same_scores]
    with pytest.raises(DataError) as caught:
        load_groups([file], imdb)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message and f"{len(tied) + len(empty)} of {len(rows)} rows" in message
    assert (
        f"identical responses: {len(tied)} (rows {', '.join(map(str, tied))}; the preferred" in message
        and "--on-bad-row skip" in message
    )
    data = load_groups([file], imdb, on_bad_row="skip", max_length=512)
    assert data.read == len(rows) == data.kept + data.refused
    assert {p.row for p in data.problems} >= {*tied, *empty}
    lines = "\n".join(data.summary())
    assert f"{len(rows)} rows read, {data.kept} kept, {data.refused} refused" in lines
    assert f"{data.truncated} of {data.kept} rows truncated" in lines and "source_index" in lines


def test_show_marks_what_is_trained(shared: Path, tmp_path: Path, minimind: Any) -> None:
    file = sample(shared / DEMO.format("en"), tmp_path, 100)[0]
    data = load_groups([file], minimind)
    row = read_comparisons(file).comparisons[0]
    text = show(data.groups[0], minimind)
    assert text.count("⟦") == text.count("⟧") == 2
    assert f"⟦{row.responses[0].text}<|im_end|>⟧" in text and f"⟦{row.responses[1].text}<|im_end|>⟧" in text
    assert text.count(row.prompt[0].content) == 1


def test_split_keeps_prompts_apart(shared: Path, minimind: Any) -> None:
    data = load_groups([shared / DEMO.format("en")], minimind, max_length=1024)
    train, held = data.split(0.2, seed=3)
    assert sorted(train + held) == list(range(300)) and 35 <= len(held) <= 85
    prompts = [c.prompt for c in read_comparisons(shared / DEMO.format("en")).comparisons]
    assert len(set(prompts)) == 295
    assert not {prompts[i] for i in train} & {prompts[i] for i in held}
    assert data.split(0.2, seed=3) == (train, held) != data.split(0.2, seed=4)
