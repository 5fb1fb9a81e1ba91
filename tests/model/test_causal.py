"""What is no causal language model is told what it is, in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.errors import ModelError
from prefopt.model.check import _sees_ahead
from prefopt.model.kernels.attention import NotCausalError
from prefopt.model.scorer import Scorer
from prefopt.model.supported import refuse_other_kinds, refuse_untrainable

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 97}


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("bert", "BertForMaskedLM", "is an encoder; prefopt trains causal"),
        ("roberta", "RobertaForMaskedLM", "is an encoder; prefopt trains causal"),
        ("modernbert", "ModernBertForMaskedLM", "is an encoder; prefopt trains causal"),
        ("bart", "BartForConditionalGeneration", "is an encoder-decoder; prefopt trains causal"),
        ("t5", "T5ForConditionalGeneration", "is an encoder-decoder; prefopt trains causal"),
        ("voxtral", "VoxtralForConditionalGeneration", "saved as LlamaForCausalLM"),
        ("llava_next", "LlavaNextForConditionalGeneration", "saved as LlamaForCausalLM"),
        ("aya_vision", "AyaVisionForConditionalGeneration", "saved as Cohere2ForCausalLM"),
        ("glm4v", "Glm4vForConditionalGeneration", "made for more than text"),
        ("vit", "ViTForImageClassification", "is no causal language model of transformers"),
    ],
)
def test_one_true_line(kind: str, name: str, words: str) -> None:
    config = AutoConfig.for_model(kind)
    config.architectures = [name]
    with pytest.raises(ModelError) as refused:
        refuse_other_kinds("MODEL", config)
    line = str(refused.value)
    assert line.startswith("MODEL: ")
    assert name in line
    assert words in line
    assert "\n" not in line


VISION = ["qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "internvl"]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma4", "qwen3_5", "mamba", "opt", *VISION])
def test_causal_language_models_pass(kind: str) -> None:
    refuse_untrainable("MODEL", AutoConfig.for_model(kind))


def test_a_bert_that_was_made_a_decoder_passes() -> None:
    refuse_other_kinds("MODEL", AutoConfig.for_model("bert", is_decoder=True))


def test_a_classifier_may_be_of_any_kind() -> None:
    """A reward model can be an encoder's."""
    refuse_untrainable("MODEL", AutoConfig.for_model("bert", architectures=["BertForSequenceClassification"]))


def built(**changes: Any) -> Any:
    config = AutoConfig.for_model("bert", **SMALL, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()


def test_a_model_that_sees_ahead_is_found_out() -> None:
    assert _sees_ahead(built()) > 1e-3
    assert _sees_ahead(built(is_decoder=True)) == 0
    with pytest.raises(NotCausalError, match="tokens see what comes after them"):
        Scorer(built())
