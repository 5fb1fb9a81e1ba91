"""Reward models: the loss against an oracle, planted rewards found again, and runs from end to end."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import prefopt
from data.small import small_tokenizer
from prefopt.cli import main
from prefopt.data.comparisons import parse_comparisons
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.data.table import GroupTable
from prefopt.errors import ConfigError, DataError, Interrupted, ModelError
from prefopt.model.scalar import ScalarScorer, load_scalar, response_rewards, scalar_from
from prefopt.train.columns import preference_batch
from prefopt.train.objectives import RewardObjective
from prefopt.train.reliability import reliability
from prefopt.train.step import Differentiator
from train.small import evaluations, pairs, quick, same_bits, tiny_llama, write_model, write_rows
from train.test_resume import stop_after

# peft asks an old name of transformers; here it is called directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CPU = torch.device("cpu")
ROWS = pairs(16)
RANKED = [
    {
        "prompt": f"{i}: ",
        "responses": ["aa", "bbb", "c" * (i + 1), "dede"][: 2 + i % 3],
        "scores": [3.0, 1.5, 1.0, -2.0][: 2 + i % 3],
    }
    for i in range(7)
]


def reward(model: Any, data: Any, output: Path, **options: Any) -> Any:
    result = prefopt.reward(model, data, output=output, **{**quick(model), **options})
    assert result is not None
    return result


def groups_of(rows: list[Any], kind: Any = "pairs") -> GroupTable:
    return load_groups([parse_comparisons(rows, "data")], small_tokenizer(), max_length=64, kind=kind).groups


def own_rewards(model: torch.nn.Module, group: Group) -> torch.Tensor:
    """The class's own scores [K], one response per call."""
    rows = [torch.tensor(group.sequence(k)[0], dtype=torch.long)[None] for k in range(len(group.continuations))]
    return torch.stack([model(input_ids=row, use_cache=False).logits[0, 0] for row in rows])


@pytest.mark.parametrize("margin", [None, 0.7])
@pytest.mark.parametrize("token_budget", [20, 10_000])
def test_k_wise_loss_and_gradient_are_those_on_a_blackboard(margin: float | None, token_budget: int) -> None:
    model = scalar_from(tiny_llama(), small_tokenizer(), seed=2).double()
    groups, centre = groups_of(RANKED), 0.03
    expected = torch.zeros((), dtype=torch.float64)
    for group in groups:
        r, terms = own_rewards(model, group), []
        assert group.scores is not None
        for better, worse in itertools.combinations(range(len(r)), 2):  # RANKED is in order
            m = margin * (group.scores[better] - group.scores[worse]) if margin else 0.0
            terms.append(-F.logsigmoid(r[better] - r[worse] - m) + centre * (r[better] + r[worse]) ** 2)
        assert len(terms) == math.comb(len(r), 2)
        expected = expected + sum(terms) / len(terms) / len(groups)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    scorer = ScalarScorer(model)
    objective = RewardObjective(device=CPU, margin=margin, centre=centre)
    batch = preference_batch(groups, "pairs", merge=True)
    found = Differentiator(scorer, objective).gradients(batch, token_budget).sums.means()
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-7)
    top = max(float(g.abs().max()) for g in gradients)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-6 * top)


def test_planted_rewards_are_found_again_from_votes(tmp_path: Path) -> None:
    planted = {"a": 1.0, "b": 0.2, "c": -0.4, "d": -1.3}
    letters, row = list(planted), {"prompt": "which? ", "responses": list(planted), "votes": []}
    for i, j in itertools.permutations(range(4), 2):  # as many votes either way as Bradley-Terry expects
        chance = 1 / (1 + math.exp(planted[letters[j]] - planted[letters[i]]))
        row["votes"].append([i, j, chance])
    options = {"batch_size": 1, "epochs": 300, "learning_rate": 3e-3, "dtype": "float64", "centre": 0.0}
    result = reward(write_model(tmp_path / "m"), [row], tmp_path / "o", **options)
    model = load_scalar(str(tmp_path / "o"), dtype=torch.float64, device=CPU, tokenizer=small_tokenizer())
    scorer = ScalarScorer(model)
    found = response_rewards(scorer, groups_of([row]), [0], 10_000)
    wanted = np.array(list(planted.values()))
    np.testing.assert_allclose(found - found.mean(), wanted - wanted.mean(), atol=0.02)
    best = found[[0, 1, 2]].mean()  # those that won a pair have a mean of 0
    assert abs(best) < 1e-5
    assert result.shift == pytest.approx(scorer.shift)


def test_a_run_saves_a_classifier_that_opens_plainly_and_tells_what_it_is_worth(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    result = reward(model, data, tmp_path / "o", epochs=8, learning_rate=3e-3, eval_fraction=0.25)
    found = result.reliability
    assert found.accuracy > 0.9  # vowels over x, y and z
    assert found.interval.low <= found.accuracy <= found.interval.high <= 1
    assert found.interval.low < 0.9, "of so few prompts all in order shows no more"
    told = json.loads((tmp_path / "o/reliability.json").read_text())
    assert told["accuracy"] == found.accuracy
    assert sum(b["share"] for b in told["reliability"]) == pytest.approx(1)
    assert sum(b["pairs"] for b in told["by_length"]) == found.pairs > 1
    assert (tmp_path / "o/reliability.svg").read_text().startswith("<svg")
    card = (tmp_path / "o/README.md").read_text()
    assert "Reward model of `m`" in card
    assert "| held-out accuracy | " in card
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    assert type(plain).__name__ == "LlamaForSequenceClassification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [row["prompt"] + row[side] + "</s>" for row in ROWS for side in ("chosen", "rejected")]
    with torch.no_grad():  # as anyone would: a padded batch
        own = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    scorer = ScalarScorer(load_scalar(str(tmp_path / "o"), dtype=torch.float32, device=CPU, tokenizer=tokenizer))
    packed = response_rewards(scorer, groups_of(ROWS), range(len(ROWS)), 100)
    np.testing.assert_allclose(own - result.shift, packed, atol=2e-5)
    assert evaluations(tmp_path / "o")[-1]["eval_rewards/accuracies"] == pytest.approx(found.accuracy)


def test_a_lora_run_saves_its_head_and_opens_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    result = reward(model, ROWS, tmp_path / "o", lora=True, learning_rate=1e-2, epochs=6, eval_fraction=0.25)
    assert result.reliability.accuracy > 0.9
    scorer = ScalarScorer(
        load_scalar(str(tmp_path / "o"), dtype=torch.float32, device=CPU, tokenizer=small_tokenizer())
    )
    assert scorer.shift == pytest.approx(result.shift)
    packed = response_rewards(scorer, groups_of(ROWS), range(len(ROWS)), 10_000)
    assert (packed[::2] > packed[1::2]).mean() > 0.9
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    with torch.no_grad():
        own = torch.cat([own_rewards(plain, group) for group in groups_of(ROWS)]).numpy()
    np.testing.assert_allclose(own - result.shift, packed, atol=2e-5)
    config = plain.config
    assert (config.num_labels, config.prefopt_reward_shift) == (1, pytest.approx(result.shift))


@pytest.mark.parametrize("options", [{"weight_decay": 0.1, "eval_fraction": 0.25}, {"lora": True, "lora_dropout": 0.2}])
def test_a_stopped_run_goes_on_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    options = options | {"epochs": 2}
    reward(model, ROWS, tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            reward(model, ROWS, tmp_path / "parts", **options)
    reward(model, ROWS, tmp_path / "parts", resume=True, **options)
    assert same_bits(tmp_path / "parts", tmp_path / "whole")
    shifts = [
        AutoConfig.from_pretrained(tmp_path / name).prefopt_reward_shift
        for name in ("whole", "parts")
        if not options.get("lora") or (tmp_path / name / "config.json").exists()
    ]
    assert shifts[0] == shifts[1]


def test_training_goes_on_from_a_reward_model(tmp_path: Path) -> None:
    first = reward(write_model(tmp_path / "m"), ROWS, tmp_path / "one", epochs=4, learning_rate=3e-3)
    again = reward(tmp_path / "one", ROWS, tmp_path / "two", learning_rate=1e-4, max_steps=1, zero="none")
    assert again.metrics["loss"] < 0.5 * math.log(2)
    assert again.shift == 0.0 != first.shift


def test_what_reliability_tells_is_counted_right() -> None:
    groups = groups_of([{"prompt": f"{i // 2}", "chosen": "ab" * (1 + i % 2), "rejected": "abc"} for i in range(8)])
    gaps = np.array([2.0, -1.0, 2.0, 2.0, 0.0, 3.0, -1.0, -1.0])
    rewards = np.stack([gaps, np.zeros(8)], 1).reshape(-1)
    found = reliability(rewards, groups, range(8))
    per_prompt = np.array([0.5, 1.0, 0.75, 0.0])
    assert found.accuracy == pytest.approx(per_prompt.mean())
    assert found.interval is not None
    assert found.interval.count == 4
    confidence, right = 1 / (1 + np.exp(-np.abs(gaps))), np.array([1, 0, 1, 1, 0.5, 1, 0, 0])
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    ece = sum((bins == b).mean() * abs(confidence[bins == b].mean() - right[bins == b].mean()) for b in set(bins))
    assert found.ece == pytest.approx(ece)
    assert found.longer == 0.5
    assert [(b.low, b.high, b.accuracy, b.pairs) for b in found.by_length] == [(-1, -1, 0.625, 4), (1, 1, 0.5, 4)]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    with pytest.raises(DataError, match="--margin needs a finite score of every response"):
        reward(model, ROWS, tmp_path / "o", margin=1.0)
    with pytest.raises(DataError, match=r"too few|no preference"):
        reward(model, [{"prompt": "p", "completion": "c"}], tmp_path / "o")
    with pytest.raises(DataError, match="a response ends with the pad token"):
        reward(model, [{"prompt": "p", "chosen": "a<s>", "rejected": "b"}], tmp_path / "o", max_length=3)
    with pytest.raises(ConfigError, match="merge the adapter"):
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        reward(wrapped, ROWS, tmp_path / "o", tokenizer=small_tokenizer())
    config = tiny_llama().config
    config.num_labels = 2
    several = AutoModelForSequenceClassification.from_config(config)
    several.save_pretrained(tmp_path / "two")
    small_tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="has 2 labels"):
        reward(tmp_path / "two", ROWS, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_command_shows_what_it_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "d.jsonl", ROWS)
    words = ["reward", "--model", write_model(tmp_path / "m"), "--data", data, "--output", str(tmp_path / "o")]
    assert main([*words, "--dry-run", "--device", "cpu", "--progress", "plain", "--margin", "0.5"]) == 2
    assert main([*words, "--dry-run", "--device", "cpu", "--progress", "plain"]) == 0
    said = "".join(capsys.readouterr())
    assert "--margin needs a finite score" in said
    assert "loss: Bradley-Terry (pairs all, centring 0.01), on a new head" in said


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"token_budget": 40}, {"attention": "loop"}, {"dtype": "bfloat16"}]
)
def test_how_it_is_computed_changes_only_rounding(options: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    plain = reward(model, ROWS, tmp_path / "plain", epochs=2, eval_fraction=0.25)
    other = reward(model, ROWS, tmp_path / "other", epochs=2, eval_fraction=0.25, **options)
    near = 0.05 if "dtype" in options else 1e-4
    assert other.held_out_loss == pytest.approx(plain.held_out_loss, rel=near)
    assert other.shift == pytest.approx(plain.shift, abs=10 * near)
