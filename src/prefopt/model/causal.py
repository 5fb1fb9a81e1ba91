"""Whether a configuration is that of a causal language model; what it is instead, in one line."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from prefopt.errors import ModelError
from prefopt.model.quantised import refuse_training


def refuse_untrainable(name: str, config: Any) -> None:
    """Raise :class:`ModelError` for what cannot be trained, before data are read or a weight: see
    :func:`refuse_other_kinds` (a sequence classifier may be of any kind) and :func:`refuse_training`."""
    if not any(a.endswith("ForSequenceClassification") for a in architectures_of(config)):
        refuse_other_kinds(name, config)
    refuse_training(name, config)


def refuse_other_kinds(name: str, config: Any) -> None:
    """Raise :class:`ModelError` for encoders, encoder-decoders, and models that transformers loads otherwise."""
    what = _name_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: {what} is an encoder-decoder; prefopt trains causal language models")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name}: {what} is an encoder; prefopt trains causal language models")
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return
    text = config.get_text_config()
    if text is config:
        raise ModelError(
            f"{name}: {what} is no causal language model of transformers (AutoModelForCausalLM does not know it);"
            " prefopt trains causal language models"
        )
    remedy = "give a language model of text alone"
    if type(text) in mapping:
        remedy = f"give its language model by itself, saved as {mapping[type(text)].__name__}"
    raise ModelError(
        f"{name}: its class is {what}, made for more than text, and AutoModelForCausalLM does not load it; {remedy}"
    )


def architectures_of(config: Any) -> list[str]:
    """The classes that a configuration names, whatever stands in their place in a file of somebody else's."""
    named = getattr(config, "architectures", None)
    return [str(name) for name in named] if isinstance(named, list | tuple) else []


def _name_of(config: Any) -> str:
    named = architectures_of(config)
    return named[0] if named else f"a model of type {config.model_type}"
