"""Supervised fine-tuning: the loss of plain transformers, whatever the packing, and runs from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.errors import ConfigError, DataError, Interrupted, ModelError
from prefopt.model.scorer import Scorer
from prefopt.train.batch import Batch
from prefopt.train.objectives import LikelihoodObjective
from prefopt.train.step import Differentiator
from train.small import QUICK, evaluations, metrics, pairs, quick, steps, tiny_llama, weights, write_model, write_rows
from train.test_resume import stop_after

CPU = torch.device("cpu")
CHOSEN = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(13)]
TEXTS = [
    {"text": f"{row['prompt']}{row['chosen']} {row['rejected']} " * (i % 4 + 1)} for i, row in enumerate(pairs(12))
]


def sft(model: Any, data: Any, output: Path, **options: Any) -> Any:
    result = prefopt.sft(model, data, output=output, **{**quick(model), **options})
    assert result is not None
    return result


def told(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "rows_per_second"} for line in metrics(output)]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[n], b[n]) for n in a) and told(one) == told(other)


def groups_of(rows: list[Any], **rendered: Any) -> list[Group]:
    readings = [parse_comparisons(rows, "data")]
    return list(load_groups(readings, small_tokenizer(), Rendering(64, **rendered), kind="demonstrations").groups)


def plain_loss(model: torch.nn.Module, groups: list[Group], average: str) -> torch.Tensor:
    """What transformers computes itself from ``labels`` on one padded batch, or on each row for a mean over rows."""
    rows = [g.sequence(k) for g in groups for k in range(len(g.continuations))]
    width = max(len(ids) for ids, _ in rows)
    ids, labels = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -100)
    mask = np.zeros_like(ids)
    for i, (tokens, trained) in enumerate(rows):
        n = len(tokens)
        ids[i, :n], mask[i, :n], labels[i, :n] = tokens, 1, np.where(trained, tokens, -100)
    batch = {n: torch.from_numpy(x) for n, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}
    if average == "tokens":
        return model(**batch).loss  # type: ignore[no-any-return]
    return torch.stack([model(**{n: x[i : i + 1] for n, x in batch.items()}).loss for i in range(len(rows))]).mean()


@pytest.mark.parametrize("average", ["tokens", "rows"])
@pytest.mark.parametrize("train_on", ["responses", "all"])
@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_loss_and_gradient_are_those_of_plain_transformers(average: Any, train_on: str, token_budget: int) -> None:
    model = tiny_llama().double()
    groups = groups_of(CHOSEN, train_on=train_on)
    weights = list(model.parameters())
    expected = plain_loss(model, groups, average)
    gradients = torch.autograd.grad(expected, weights)
    scorer = Scorer(model)
    objective = LikelihoodObjective(average, device=CPU)
    found = Differentiator(scorer, objective).gradients(Batch(groups), token_budget)
    record = found.sums.means()
    assert record["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    top = max(float(g.abs().max()) for g in gradients)
    for weight, gradient in zip(weights, gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-5 * top)
    scorer.detach_hook()
    nll = float(plain_loss(model, groups, "tokens").detach())
    assert objective.derived(record)["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)


def test_a_finished_folder_has_the_perplexity_it_tells(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    held_out = write_rows(tmp_path / "held.jsonl", CHOSEN[8:])
    result = sft(model, write_rows(tmp_path / "d.jsonl", CHOSEN[:8]), tmp_path / "o", eval_data=held_out, epochs=20)
    lines = evaluations(tmp_path / "o")
    assert lines[-1]["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    best = min(lines, key=lambda line: line["eval_loss"])
    assert (result.best_step, result.held_out_loss) == (best["step"], best["eval_loss"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    with torch.no_grad():
        own = float(plain_loss(saved, groups_of(CHOSEN[8:]), "tokens"))
    assert math.exp(own) == pytest.approx(best["eval_perplexity"], rel=1e-4)
    card = (tmp_path / "o/README.md").read_text()
    assert "Supervised fine-tuning of `m`" in card
    assert "8 rows, 5 held out, from `d.jsonl`" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "o").eos_token == "</s>"


def test_the_chosen_side_of_preferences_is_what_is_learned(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    sft(model, CHOSEN, tmp_path / "demonstrations")
    sft(model, pairs(13), tmp_path / "preferences")
    assert same(tmp_path / "demonstrations", tmp_path / "preferences")


@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "eval_fraction": 0.25}, {"lora": True, "lora_dropout": 0.2}])
def test_a_stopped_run_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    options = options | {"epochs": 2}
    sft(model, CHOSEN, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            sft(model, CHOSEN, tmp_path / "parts", **options)
    sft(model, CHOSEN, tmp_path / "parts", resume=True, **options)
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_texts_longer_than_the_limit_are_cut_into_windows_and_none_is_lost() -> None:
    text = "".join(chr(97 + i % 26) for i in range(150))
    groups = groups_of([{"text": text}, {"text": "short"}], windows=True)
    ids = [g.sequence(0)[0] for g in groups]
    assert [len(x) for x in ids] == [50, 50, 51, 6]  # EOS is one more
    whole = small_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert np.concatenate(ids[:3])[:-1].tolist() == whole
    assert all(g.sequence(0)[1].tolist() == [False] + [True] * (len(x) - 1) for g, x in zip(groups, ids, strict=True))


def test_a_model_and_its_tokenizer_are_made_from_text_alone(tmp_path: Path) -> None:
    described = tmp_path / "described"
    tiny_llama().config.save_pretrained(described)
    (described / "generation_config.json").unlink(missing_ok=True)
    data = write_rows(tmp_path / "texts.jsonl", TEXTS)
    words = ["sft", f"--model={described}", f"--data={data}", f"--output={tmp_path / 'o'}", "--from-scratch"]
    words += ["--train-tokenizer=300", "--eval-fraction=0.2", "--epochs=30", "--learning-rate=0.01", "--seed=3"]
    words += [
        f"--{n.replace('_', '-')}={QUICK[n]}" for n in ("device", "dtype", "progress", "max_length", "batch_size")
    ]
    assert main(words) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.eos_token_id == model.config.eos_token_id != model.config.pad_token_id
    assert tokenizer.decode(tokenizer("klm 1: aeiou")["input_ids"]) == "klm 1: aeiou"
    assert evaluations(tmp_path / "o")[-1]["eval_perplexity"] > 1
    lines = steps(tmp_path / "o")
    assert lines[-1]["perplexity"] < 0.5 * lines[0]["perplexity"]
    assert "Training from scratch" in (tmp_path / "o/README.md").read_text()
    again = json.loads((tmp_path / "o/run.json").read_text())["options"]
    assert again["from_scratch"] is True


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with pytest.raises(ConfigError, match="--train-tokenizer does nothing without --from-scratch"):
        sft(model, CHOSEN, tmp_path / "o", train_tokenizer=300)
    with pytest.raises(ConfigError, match="--lora: --from-scratch trains all weights"):
        sft(model, CHOSEN, tmp_path / "o", from_scratch=True, lora=True)
    with pytest.raises(ConfigError, match="from_scratch"):
        sft(tiny_llama(), CHOSEN, tmp_path / "o", from_scratch=True, tokenizer=small_tokenizer())
    with pytest.raises(ModelError, match="--train-tokenizer 5000: the text makes only"):
        sft(model, TEXTS, tmp_path / "o", from_scratch=True, train_tokenizer=5000)
    with pytest.raises(DataError, match="a prompt alone"):
        sft(model, [{"prompt": "only this"}], tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_dry_run_shows_what_would_be_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "m")
    assert prefopt.sft(model, CHOSEN, output=tmp_path / "o", dry_run=True, **QUICK | {"progress": "plain"}) is None
    said = "".join(capsys.readouterr())
    assert "⟦" in said
    assert "mean over every token" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_recipe_of_the_shipped_model_makes_one_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Path(__file__).resolve().parents[2] / "src/prefopt/recipes/tiny_imdb.yaml"
    monkeypatch.chdir(recipe.parents[1])  # it names the shipped model's folder
    words = ["aeiou", "film", "of", "the", "klm", "a", "plot", "good", "bad", "and", "long"]
    texts = [{"text": " ".join(words[(i * j + i) % 11] for j in range(1, 60))} for i in range(24)]
    data = write_rows(tmp_path / "texts.jsonl", texts)
    given = ["--data", data, "--output", str(tmp_path / "o"), "--train-tokenizer", "280", "--batch-size", "4"]
    assert main(["sft", "--config", str(recipe), *given, "--max-steps", "4", "--eval-fraction", "0.1"]) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "o").config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 256, 280)
