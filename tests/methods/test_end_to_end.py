"""The command on real data, and what it leaves behind: a folder that transformers loads by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prefopt.cli import main
from prefopt.data.load import load_groups
from prefopt.data.tokenizer import load_tokenizer
from prefopt.train import policy
from train.flat import response_logprobs
from train.small import CLOCKS, evaluations, steps, tiny_llama, weights, words

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = {
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "log_ratios_per_token/chosen",
    "log_ratios_per_token/rejected",
    "tokens",
}
PROBE = torch.tensor([[1, 20, 30, 40, 50]])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Logits of the model in memory when it was saved, by its own attention."""
    found: list[torch.Tensor] = []
    save = policy.save_model

    def noted(folder: Path, scorer: Any, *more: Any, **named: Any) -> None:
        save(folder, scorer, *more, **named)
        scorer.detach_hook()
        with torch.no_grad():
            found.append(scorer.model.eval()(input_ids=PROBE).logits)

    monkeypatch.setattr(policy, "save_model", noted)
    yield found


def slice_of(shared: Path, rows: slice, folder: Path) -> str:
    """Some rows of LLaMA-Factory's dpo_en_demo."""
    whole = json.loads((shared / "data/llamafactory_demo/dpo_en_demo.json").read_text("utf-8"))
    path = folder / "dpo_en_demo.json"
    path.write_text(json.dumps(whole[rows]), "utf-8")
    return str(path)


def held_out_loss(policy: Any, reference: Any, tokenizer: str, data: str, max_length: int, beta: float) -> float:
    groups = load_groups([data], load_tokenizer(tokenizer), max_length=max_length).groups
    with torch.no_grad():
        ratios = torch.stack([response_logprobs(policy, g) - response_logprobs(reference, g) for g in groups])
    return float(-torch.nn.functional.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean())


@pytest.fixture(scope="module")
def conversations(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Llama that speaks with the tokenizer and the chat template of a real model."""
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    tokenizer = load_tokenizer(shared / "data/minimind_tokenizer")
    model = tiny_llama(
        vocab_size=6400,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_dpo_en_demo_end_to_end(
    shared: Path,
    conversations: str,
    tmp_path: Path,
    trained: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output = slice_of(shared, slice(24), tmp_path), tmp_path / "aligned"
    options = {"max_length": 128, "epochs": 2, "batch_size": 6, "learning_rate": 3e-3, "progress": "plain"}
    (tmp_path / "eval").mkdir()
    held_out = slice_of(shared, slice(24, 30), tmp_path / "eval")
    assert main(words(conversations, data, output, **options, eval_data=held_out)) == 0
    printed, complaints = capsys.readouterr()
    assert "24 rows read, 24 kept, 0 refused" in printed and "rows truncated" in printed
    assert not [line for line in complaints.splitlines() if "prefopt" in line]

    # metrics.jsonl
    lines = steps(output)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(set(line) == NAMES for line in lines)
    raw = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    clocks = CLOCKS - {"rows_per_second"}  # that is of runs on rows
    assert set(raw) == NAMES | clocks and all(raw[name] > 0 for name in clocks)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < 0.65 < lines[0]["loss"]
    assert [line["epoch"] for line in lines] == pytest.approx([n / 4 for n in range(1, 9)])
    rates = [line["learning_rate"] for line in lines]
    assert all(a > b for a, b in pairwise(rates[1:])) and max(rates) <= 3e-3
    for line in lines:
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-9)
        assert 1 <= line["lengths/chosen"] <= 128 and line["grad_norm"] > 0

    # the folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    torch.testing.assert_close(model(input_ids=PROBE).logits, trained[0], rtol=0, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {t.dtype for t in weights(output).values()}
    original = AutoTokenizer.from_pretrained(conversations)
    assert tokenizer.chat_template == original.chat_template and tokenizer.get_vocab() == original.get_vocab()
    generation = GenerationConfig.from_pretrained(output)
    assert (generation.temperature, generation.do_sample) == (0.7, True)
    config = json.loads((output / "config.json").read_text())
    assert "prefix" not in json.dumps(config) and config["dtype"] == "float32"
    reference = AutoModelForCausalLM.from_pretrained(conversations)
    told = min(line["eval_loss"] for line in evaluations(output))
    assert told == pytest.approx(held_out_loss(model, reference, conversations, held_out, 128, 0.1), rel=1e-4)

    # its card
    card = (output / "README.md").read_text("utf-8")
    assert "24 preference pairs, 6 held out, from `dpo_en_demo.json`. 24 rows read, 24 kept, 0 refused." in card
    assert "| learning_rate | 0.003 |" in card and "| max_length | 128 |" in card and "| beta | 0.1 |" in card
    # Of the second epoch, four batches of six rows.
    assert "| training metrics | averages over the 24 rows of steps 5 to 8 |" in card
    assert f"| training: loss | {sum(line['loss'] for line in lines[4:]) / 4:.6g} |" in card
    assert f"| held-out loss | {told:.6g} |" in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "Direct Preference Optimization" in card

    # used again, from the file of options it left
    again = ["dpo", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again"), "--progress", "none"]
    assert main(again) == 0
    for name, value in weights(output).items():
        assert torch.equal(value, weights(tmp_path / "again")[name]), name


def test_a_dry_run_shows_everything_and_writes_nothing(
    shared: Path,
    conversations: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    data = slice_of(shared, slice(24), tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    before = sorted(p for p in tmp_path.rglob("*"))
    options = {"max_length": 128, "progress": "plain", "dry_run": True}
    for more in ({}, {"lora": True}):
        assert main(words(conversations, data, tmp_path / "out", **options | more)) == 0
        out = capsys.readouterr().out
        rendered = [line for line in out.splitlines() if "⟦" in line and not line.startswith("row")]
        assert out.count("\nchosen (") == out.count("\nrejected (") == 1 and len(rendered) >= 2
        assert "row 1, trained tokens" in out and len(out.splitlines()) <= 25
        assert "24 rows read, 24 kept, 0 refused" in out and "options set: " in out and "beta=0.1" in out
        assert "max length: 128 tokens (by --max-length; the model's context is " in out
        assert "reference: 48 responses are still to be scored" in out
        assert "6 steps of 4 pairs" in out and "memory: " in out and "about " in out
    new = [p for p in sorted(tmp_path.rglob("*")) if p not in before]
    # Hashes of the model's files may be kept; no values, no folder of a run.
    assert not (tmp_path / "out").exists() and not (tmp_path / "home/out").exists()
    assert not [p for p in new if "reference" in p.parts]


SMALL = {"max_length": 64, "max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}


def test_tiny_imdb_is_trained_whole(shared: Path, tmp_path: Path, trained: list[torch.Tensor]) -> None:
    base, output = str(shared / "models/tiny-imdb"), tmp_path / "out"
    data = slice_of(shared, slice(8), tmp_path)
    assert main(words(base, data, output, **SMALL)) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(model(input_ids=PROBE).logits, trained[0], rtol=0, atol=1e-4)
    start = AutoModelForCausalLM.from_pretrained(base)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    assert len(moved) == len(list(model.parameters()))
    # It had no chat template; it carries the one it was trained with.
    assert not AutoTokenizer.from_pretrained(base).chat_template
    turns = [{"role": "user", "content": "Hello"}]
    shown = AutoTokenizer.from_pretrained(output).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == "User: Hello\n\nAssistant:"
    assert (output / "generation_config.json").exists()


def test_tiny_imdb_with_an_adapter(shared: Path, tmp_path: Path, trained: list[torch.Tensor]) -> None:
    base, output = str(shared / "models/tiny-imdb"), tmp_path / "out"
    data = slice_of(shared, slice(8), tmp_path)
    assert main(words(base, data, output, **SMALL | {"lora": True, "lora_rank": 4, "learning_rate": 1e-2})) == 0
    start = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = start(input_ids=PROBE).logits
        adapted = PeftModel.from_pretrained(start, output)
        torch.testing.assert_close(adapted(input_ids=PROBE).logits, trained[0], rtol=0, atol=1e-4)
        assert (adapted(input_ids=PROBE).logits - before).abs().max() > 1e-3
        by_name = AutoModelForCausalLM.from_pretrained(output)  # finds the base by its name
        torch.testing.assert_close(by_name(input_ids=PROBE).logits, trained[0], rtol=0, atol=1e-4)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, base)
    assert not list(output.glob("model*.safetensors")) and (output / "tokenizer.json").exists()
    assert all(t.dtype == torch.float32 for t in weights(output).values())
    card = (output / "README.md").read_text()
    assert "library_name: peft" in card and "| lora_rank | 4 |" in card
    assert "| adapters | 100 % of attention, mlp |" in card
