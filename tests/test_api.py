"""``prefopt.dpo``: with names and with objects, the same run; what happens to the objects."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt.cli import main
from prefopt.errors import ConfigError, DataError, RunError
from train.small import dpo, metrics, pairs, quick, weights, words, write_model, write_rows

ROWS = pairs(9)
PROBE = torch.tensor([[0, 20, 30, 40]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder that nobody changes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: Any = model.eval()(input_ids=PROBE)
    result: torch.Tensor = found.logits
    return result


@pytest.mark.parametrize("options", [{}, {"lora": True, "learning_rate": 1e-2}])
def test_names_objects_and_the_command_give_the_same_bits(options: dict[str, Any], model: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    assert main(words(model, data, tmp_path / "command", **options)) == 0
    dpo(Path(model), Path(data), tmp_path / "names", **options)
    result = dpo(
        AutoModelForCausalLM.from_pretrained(model),
        (row for row in ROWS),
        tmp_path / "objects",
        tokenizer=AutoTokenizer.from_pretrained(model),
        **options,
    )
    for name in ("names", "objects"):
        a, b = weights(tmp_path / "command"), weights(tmp_path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert metrics(tmp_path / "command") == metrics(tmp_path / name)
    assert (result.output, result.steps, result.held_out_loss) == (tmp_path / "objects", 3, None)
    lines = metrics(tmp_path / "objects")  # batches of so many rows
    assert result.metrics["loss"] == pytest.approx(
        sum(n * x["loss"] for n, x in zip((4, 4, 1), lines, strict=True)) / 9
    )
    assert result.metrics["epoch"] == 1.0 and result.metrics["learning_rate"] == lines[-1]["learning_rate"]
    assert {p.name for p in (tmp_path / "objects").iterdir()} == {p.name for p in (tmp_path / "command").iterdir()}


def test_a_model_given_is_trained_in_place_and_given_back_whole(model: str, tmp_path: Path) -> None:
    given, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before, attention = logits(given), given.config._attn_implementation
    dpo(given, ROWS, tmp_path / "out", tokenizer=tokenizer)
    assert given.config._attn_implementation == attention
    assert not torch.equal(logits(given), before)
    torch.testing.assert_close(logits(given), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    generated = given.generate(PROBE, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert generated.shape == (1, 7)


def test_a_model_given_is_given_back_after_a_dry_run_and_after_an_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before, attention = logits(given), given.config._attn_implementation
    options = {**quick(given), "output": tmp_path / "out", "tokenizer": tokenizer}
    for more in ({}, {"lora": True}):
        assert prefopt.dpo(given, ROWS, dry_run=True, **options, **more) is None
        assert given.config._attn_implementation == attention and not (tmp_path / "out").exists()
        torch.testing.assert_close(logits(given), before)

    def fail(*_: Any) -> None:
        raise RunError("no")

    given = AutoModelForCausalLM.from_pretrained(model)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="no"):
        patch.setattr("prefopt.train.trainer.Trainer.fit", fail)
        prefopt.dpo(given, ROWS, **options)
    assert given.config._attn_implementation == attention
    assert torch.equal(logits(given), before)


def test_a_second_run_goes_on_from_the_first_ones_weights(model: str, tmp_path: Path) -> None:
    given, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    dpo(given, ROWS, tmp_path / "one", tokenizer=tokenizer)
    trained = copy.deepcopy(given)
    dpo(given, ROWS, tmp_path / "two", tokenizer=tokenizer)
    # Its reference is the model as it came in, not the one of the first run: the same as from the folder.
    dpo(tmp_path / "one", ROWS, tmp_path / "folder")
    for name, value in weights(tmp_path / "folder").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-7)
    assert not torch.equal(logits(trained), logits(given))


def test_errors_come_as_exceptions_in_one_line(model: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data, row 10: 1 of 10 rows cannot be used: missing field"):
        dpo(model, [*ROWS, {"prompt": "p", "chosen": "c"}], tmp_path / "out")
    with pytest.raises(ConfigError, match="over the model's context"):
        dpo(model, ROWS, tmp_path / "out", max_length=500)
    with pytest.raises(DataError, match=r"no\.json: no such file"):
        dpo(model, tmp_path / "no.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_are_compared_by_name_and_by_object(model: str, tmp_path: Path) -> None:
    """A model, and the same after training in place: one name, told apart; judged by a function."""
    quiet: dict[str, Any] = {"progress": "none", "max_new_tokens": 8}
    rows = [{"prompt": f"{row['prompt']}"} for row in ROWS]
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    given = copy.deepcopy(base)
    dpo(given, ROWS, tmp_path / "out", tokenizer=tokenizer, learning_rate=1e-2)
    attention = given.config._attn_implementation

    def vowels(prompts: Any, responses: Any) -> list[float]:
        return [float(sum(letter in "aeiou" for letter in r)) for r in responses]

    found = prefopt.compare(given, base, rows, judge=vowels, reference=base, tokenizer=tokenizer, **quiet)
    (v,) = found.versus
    assert (v.first, v.second) == (f"{model} (a)", f"{model} (b)") and found.judge.endswith("vowels")
    assert given.config._attn_implementation == base.config._attn_implementation == attention
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    named: dict[str, Any] = {**quiet, "dtype": "float32", "device": "cpu"}
    same = prefopt.compare(tmp_path / "out", Path(model), prompts, judge=vowels, reference=model, **named)
    assert [same.versus[0].rate, *(m.distance for m in same.models.values())] == [
        v.rate,
        *(m.distance for m in found.models.values()),
    ]
    assert found.command == "" and len(set(found.identities.values())) == 2
    plain = prefopt.compare(tmp_path / "out", model, prompts, judge="length", **named)
    assert f" --a {tmp_path / 'out'} --b {model}" in plain.command and "--judge length" in plain.command
    for options, said in (
        ({"tokenizer": None}, "a model object needs its tokenizer"),
        ({"b": base, "dtype": "float32"}, "dtype is for a model named by its folder"),
        ({"tasks": ["t"]}, "save it first"),
    ):
        with pytest.raises(ConfigError, match=said):
            prefopt.compare(given, **{"b": base, "tokenizer": tokenizer, "prompts": rows, "judge": vowels, **options})
    with pytest.raises(ConfigError, match="tokenizer goes with a model object"):
        prefopt.compare(model, tmp_path / "out", rows, judge=vowels, tokenizer=tokenizer)


def test_answers_of_gsm8k_may_stand_in_rows(model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"k{i}: ", "response": "so\n#### 7"} for i in range(3)]
    other = write_model(tmp_path / "other", seed=1)
    named: dict[str, Any] = {"dtype": "float32", "device": "cpu", "progress": "none", "max_new_tokens": 4}
    found = prefopt.compare(model, other, rows, judge="gsm8k", **named)
    assert found.versus[0].rate.ties + found.versus[0].rate.wins + found.versus[0].rate.losses == 3
