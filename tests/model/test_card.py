"""The model card: what the Hub reads of it, that its examples run, and that it names no folder of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefopt.config.reward import RewardConfig
from prefopt.core.hub import cached
from prefopt.methods.reward import run as train_reward
from prefopt.model.card import REPOSITORY, data_sets, front_matter, how_to_use, portable, read_card, write_card
from train.small import dpo, pairs, write_model, write_rows


def front(folder: Path) -> dict[str, Any]:
    return read_card(folder / "README.md")[0]


def run_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the example in Python of a card as a reader would, with the folder's name in its place."""
    capsys.readouterr()
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.S)
    assert code is not None
    exec(compile(code[1].replace(REPOSITORY, str(folder)), "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True])
def test_a_card_says_what_a_reader_needs(lora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "far" / "base")
    text = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model: owner/base\n---\n# base\n"
    (tmp_path / "far" / "base" / "README.md").write_text(text)
    data = write_rows(tmp_path / "far" / "rows.jsonl", pairs(8))
    dpo(base, data, tmp_path / "out", lora=lora, eval_fraction=0.25, max_steps=2)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    found = front(tmp_path / "out")
    # An adapter fits the local model alone, not the one of the Hub that this was made from.
    relation = (None, None) if lora else ("owner/base", "finetune")
    assert (found.get("base_model"), found.get("base_model_relation")) == relation
    assert (found["license"], found["language"], found["pipeline_tag"]) == ("apache-2.0", ["en"], "text-generation")
    assert found["library_name"] == ("peft" if lora else "transformers") and "dpo" in found["tags"]
    assert "# base: Direct Preference Optimization" in card
    assert str(tmp_path) not in card and "/far/" not in card, "it names no folder of this machine"
    held_out = card[card.index("### Held-out rows") : card.index("### Training batches")]
    assert re.search(r"\| held-out accuracy \| \d+% \(95% interval \d+% to \d+%, \d rows?, step \d\) \|", held_out)
    assert "| held-out: rewards/margins | " in held_out and "| held-out loss | " in held_out
    serve = "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules aligned=" if lora else "vllm serve "
    assert f"{serve}{REPOSITORY}" in card and ("`BASE` is the model" in card) == lora
    assert run_example(tmp_path / "out", capsys).startswith("Once upon a time")


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_reward_model_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", pairs(6))
    base = write_model(tmp_path / "base")
    config = RewardConfig(
        model=base,
        data=[data],
        output=str(tmp_path / "out"),
        max_steps=1,
        device="cpu",
        dtype="float32",
        progress="none",
    )
    train_reward(config)
    found = front(tmp_path / "out")
    assert found["pipeline_tag"] == "text-classification" and found["license"] == "other" and "base_model" not in found
    assert (
        "No row was held out, so how it does on unseen rows is not known." in (tmp_path / "out/README.md").read_text()
    )
    float(run_example(tmp_path / "out", capsys))


def test_a_model_with_a_template_is_asked_in_turns(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert any('"role": "user"' in line for line in how_to_use(tmp_path, None, reward=False))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert any('"role": "user"' in line for line in how_to_use(tmp_path, None, reward=False))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not any('"role"' in line for line in how_to_use(tmp_path, None, reward=False))


def test_data_sets_of_the_hub_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local").mkdir()
    Path("local/set").mkdir()
    names = ["owner/set", "owner/set,split=train", "a/b.jsonl", "local/set", "rows.jsonl", "/x/y", "a/*.jsonl"]
    assert data_sets(names) == ["owner/set"]
    found = front_matter(tmp_path, model="owner/base", tag="sft", files=names)
    assert (found["base_model"], found["datasets"]) == ("owner/base", ["owner/set"])
    assert yaml.safe_load(yaml.safe_dump(found)) == found


def test_an_adapter_on_a_model_of_the_hub_names_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "owner/base"}')
    about: dict[str, Any] = {"title": "DPO", "tag": "dpo", "data": "rows", "files": (), "license": "as the base"}
    write_card(tmp_path, model="owner/base", settings={}, results={"steps": 1}, **about)
    found = front(tmp_path)
    assert (found["base_model"], found["base_model_relation"]) == ("owner/base", "adapter")
    serve = f"vllm serve owner/base --enable-lora --max-lora-rank 8 --lora-modules aligned={REPOSITORY}"
    assert serve in (tmp_path / "README.md").read_text()


def test_the_card_of_the_base_is_found_as_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    for model, stated in (("~/base", "mit"), ("prefopt:demo/tiny_imdb", "apache-2.0")):
        assert front_matter(tmp_path, model=model, tag="dpo", files=())["license"] == stated


def test_a_base_of_the_hub_is_read_from_its_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("prefopt.model.card.cached", lambda name, file: card if name == "owner/base" else None)
    assert front_matter(tmp_path, model="owner/base", tag="dpo", files=())["license"] == "mit"
    assert front_matter(tmp_path, model="owner/other", tag="dpo", files=())["license"] == "other"
    assert cached("owner/no-such-model-at-all", "README.md") is None


@pytest.mark.parametrize("text", ["no front matter", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: mit"])
def test_a_card_that_cannot_be_read_states_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path, model=str(tmp_path), tag="dpo", files=())["license"] == "other"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/base", "base"),
        ("../base", "base"),
        ("~/models/base/", "base"),
        ("owner/base", "owner/base"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        (["/data/a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (3, 3),
        (None, None),
        ("my_rewards:score", "my_rewards:score"),
    ],
)
def test_values_lose_their_folders(value: Any, expected: Any) -> None:
    assert portable(value) == expected


def test_settings_lose_their_folders_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    about: dict[str, Any] = {"title": "DPO", "tag": "dpo", "data": "rows", "files": (), "license": "as the base"}
    settings = {"reference": "/home/someone/ref", "lora": True, "eval_data": ["/home/someone/e.jsonl"]}
    write_card(tmp_path, model="/home/someone/base", settings=settings, results={"steps": 1}, **about)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "someone" not in card and "| reference | ref |" in card and "| eval_data | e.jsonl |" in card
