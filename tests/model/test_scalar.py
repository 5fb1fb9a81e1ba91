"""Scalar heads on packed batches, against transformers' own sequence classifiers on padded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from data.small import small_tokenizer
from model.architectures import Float64Throughout, build, with_exact_rotary
from model.oracle import assert_same, assert_same_gradients, gradients, groups_of_every_kind
from prefopt.data.group import Group
from prefopt.errors import ModelError
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model
from prefopt.model.check import check_scalars
from prefopt.model.packing import pack
from prefopt.model.scalar import PAD, ScalarScorer, load_scalar, scalar_from, set_shift
from prefopt.model.scorer import Scorer
from train.small import tiny_llama, write_model

HERE: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
# Llama and Qwen, absolute positions, windows, experts, layers behind other names, and one that cannot share.
NAMES = ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "mistral", "mixtral", "phi3", "opt", "gpt_neox", "bloom"]
NAMES += ["qwen3.5", "jamba"]  # recurrent ones


def padding_tokenizer() -> Any:
    """Pads with 0, begins with 1, ends with 2: as the small architectures' configurations have it."""
    return small_tokenizer(marks=["<pad>", "<s>", "</s>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rewarded(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = scalar_from(with_exact_rotary(build(name, dtype)), padding_tokenizer(), seed=3)
    set_shift(model, 0.25)
    return model


def endings(groups: list[Group]) -> list[np.ndarray]:
    """Every response, of several steps the last one, from the first token of its prompt to its last trained one."""
    found = []
    for group in groups:
        for k in range(len(group.continuations)):
            ids, trained = group.sequences(k)[-1]
            found.append(ids[: np.nonzero(trained)[0][-1] + 1])
    return found


def alone(model: Any, groups: list[Group]) -> torch.Tensor:
    """The class's own scores [N], one response per call, without padding."""
    rows = [torch.tensor(ids, dtype=torch.long)[None] for ids in endings(groups)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[:, 0] for row in rows])


def padded(model: Any, groups: list[Group], side: str) -> torch.Tensor:
    """The same in one padded batch, as anyone would call transformers."""
    rows = endings(groups)
    width = max(map(len, rows)) + 3
    ids = np.full((len(rows), width), model.config.pad_token_id)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask)}
    if side == "left" and model.config.model_type != "opt":
        given["position_ids"] = torch.from_numpy(positions)
    return model(**given, use_cache=False).logits[:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_rewards_and_gradients_are_those_of_the_class_itself(name: str) -> None:
    with Float64Throughout():
        model, groups = rewarded(name), groups_of_every_kind()
        expected = alone(model, groups) - 0.25
        expected_gradients = gradients(expected, model)
        scorer = ScalarScorer(model)
        assert scorer.path == ("separate" if name == "bloom" else "shared")
        found = scorer(pack(groups, scorer.layout))
        assert_same(found, expected, 1e-9)
        assert_same_gradients(gradients(found, model), expected_gradients, 1e-9)
        scorer.detach_hook()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_padding_on_either_side_gives_the_same_rewards(name: str, side: str) -> None:
    model = rewarded(name, torch.float32)
    groups = [g for g in groups_of_every_kind() if len(g.prefix)]
    scorer = ScalarScorer(model)
    with torch.no_grad():
        found = scorer(pack(groups, scorer.layout))
        scorer.detach_hook()
        assert_same(found, padded(model, groups, side) - 0.25, 2e-5)


def test_values_of_tokens_are_read_before_them() -> None:
    with Float64Throughout():
        model, groups = rewarded("llama"), groups_of_every_kind()
        scorer = ScalarScorer(model)
        batch = pack(groups, scorer.layout)
        values = scorer(batch, tokens=True)
        scorer.detach_hook()
        expected = []
        for group in groups:
            for ids, trained in (one for k in range(len(group.continuations)) for one in group.sequences(k)):
                hidden = model.model(input_ids=torch.tensor(ids, dtype=torch.long)[None]).last_hidden_state[0]
                expected.append(model.score(hidden)[np.nonzero(trained)[0] - 1, 0] - 0.25)
        assert_same(values, torch.cat(expected), 1e-9)
        assert_same_gradients(gradients(values, model), gradients(torch.cat(expected), model), 1e-9)


def test_an_adapter_trains_the_head_too_and_scores_as_it_does_by_itself() -> None:
    with Float64Throughout():
        policy = new_lora(rewarded("llama"), rank=4, alpha=8, dropout=0.0, targets=None, task="SEQ_CLS").double()
        trained = {n for n, p in policy.named_parameters() if p.requires_grad}
        assert any("score" in n for n in trained)
        assert all("lora_" in n or "score.modules_to_save" in n for n in trained)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        groups = groups_of_every_kind()
        expected = alone(policy, groups) - 0.25
        scorer = ScalarScorer(policy)
        found = scorer(pack(groups, scorer.layout))
        assert_same(found, expected, 1e-9)
        assert_same_gradients(gradients(found, policy), gradients(expected, policy), 1e-9)


def test_a_saved_folder_opens_plainly_and_again(tmp_path: Path) -> None:
    folder, tokenizer = write_model(tmp_path / "sft"), small_tokenizer()
    model = causal_model(load_scalar(folder, **HERE, tokenizer=tokenizer, seed=1))
    set_shift(model, -0.5)
    groups = [g for g in groups_of_every_kind() if len(g.prefix)]
    scorer = ScalarScorer(model)
    with torch.no_grad():
        found = scorer(pack(groups, scorer.layout))
    scorer.detach_hook()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert type(plain).__name__ == "LlamaForSequenceClassification"
    assert plain.config.pad_token_id == 0 != plain.config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(padded(plain, groups, "right") + 0.5, found, rtol=0, atol=2e-5)
    again = ScalarScorer(load_scalar(str(tmp_path / "reward"), **HERE, tokenizer=tokenizer))
    with torch.no_grad():
        assert torch.equal(again(pack(groups, again.layout)), found)


def test_the_head_is_drawn_from_its_seed_and_leaves_the_layers_alone() -> None:
    causal, tokenizer = tiny_llama(), small_tokenizer()
    before = {n: p.clone() for n, p in causal.model.named_parameters()}
    one, same, other = (scalar_from(causal, tokenizer, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert one.model is causal.model
    assert all(torch.equal(before[n], p) for n, p in one.model.named_parameters())
    wide = scalar_from(tiny_llama(hidden_size=1024), tokenizer).score.weight
    assert float(wide.detach().std()) == pytest.approx(1025**-0.5, rel=0.1)


def test_a_tokenizer_that_could_only_pad_with_eos_is_given_a_token() -> None:
    tokenizer = small_tokenizer(marks=["</s>"], eos_token="</s>", pad_token="</s>")
    causal = tiny_llama(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=None)
    model = scalar_from(causal, tokenizer)
    assert tokenizer.pad_token == PAD
    assert model.config.pad_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(tokenizer)
    check_scalars(ScalarScorer(model), [g for g in groups_of_every_kind() if len(g.prefix)])


def test_the_load_check_sees_a_head_that_is_read_elsewhere() -> None:
    groups = [g for g in groups_of_every_kind() if len(g.prefix)]
    report = check_scalars(ScalarScorer(rewarded("llama", torch.float32)), groups)
    assert report.clone_error is not None
    assert report.clone_error < 1e-5
    assert report.sharing_error < 1e-5
    wrong = rewarded("llama", torch.float32)
    wrong.config.pad_token_id = int(groups[0].sequence(0)[0][-1])  # the class now takes a response's end for padding
    with pytest.raises(ModelError, match=r"rewards differ by .* pad token"):
        check_scalars(ScalarScorer(wrong), groups[:1])


def saved(folder: Path, name: str = "llama", **config: Any) -> str:
    model = scalar_from(build(name, torch.float32), padding_tokenizer())
    for field, value in config.items():
        setattr(model.config, field, value)
    model.save_pretrained(folder)
    return str(folder)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    tokenizer = padding_tokenizer()
    several = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **_TINY, num_labels=3))
    several.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="three has 3 labels; a reward model has one"):
        load_scalar(str(tmp_path / "three"), **HERE, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="pad_token_id 2 is EOS"):
        load_scalar(saved(tmp_path / "padded", pad_token_id=2), **HERE, tokenizer=tokenizer)
    build("granite", torch.float32).save_pretrained(tmp_path / "granite")
    with pytest.raises(ModelError, match=r"no sequence classifier .* for granite models"):
        load_scalar(str(tmp_path / "granite"), **HERE, tokenizer=tokenizer)
    bert = AutoConfig.for_model("bert", **_TINY, num_labels=1)
    AutoModelForSequenceClassification.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="no linear head named score"):
        load_scalar(str(tmp_path / "bert"), **HERE, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="no linear head named score"):
        ScalarScorer(build("llama"))
    with pytest.raises(ModelError, match="no language-model head"):
        Scorer(rewarded("llama"))


_TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
