"""The policy: the model that is trained, its scorer, and the float32 masters of what moves."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.config.dpo import DpoConfig
from prefopt.model.load import load_model, local_folder, new_lora, silence_dropout
from prefopt.model.precision import MasterWeights
from prefopt.model.scorer import Scorer, causal_model


class Policy:
    """First the model as it is before training, the usual reference; ``make_trainable`` then adds what trains."""

    def __init__(self, config: DpoConfig, source: str, dtype: torch.dtype, device: torch.device, given: Any) -> None:
        """Load the model in folder ``source``, or take the one ``given`` in Python, to compute in ``dtype``."""
        self.config, self.dtype, self._named = config, dtype, given is None
        model = given
        if model is None:
            # A full fine-tuning keeps float32 masters: they come from the file, not from rounded weights.
            load = dtype if config.lora else torch.promote_types(dtype, torch.float32)
            adapter = local_folder(config.adapter) if config.adapter else None
            model = load_model(source, dtype=load, device=device, adapter=adapter)
        else:
            silence_dropout(model)
        self._new_lora = config.lora and config.adapter is None
        for parameter in model.parameters() if self._new_lora else ():
            parameter.requires_grad_(False)
        self.masters = MasterWeights(model, dtype)
        self.scorer = Scorer(model, attention=config.attention)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.scorer.model.parameters()).device

    def make_trainable(self) -> str:
        """Put a new LoRA adapter on where one is asked for, and activation checkpointing; says what trains."""
        config = self.config
        torch.manual_seed(config.seed)
        if self._new_lora:
            self.scorer.detach_hook()
            assert config.lora_rank and config.lora_alpha and config.lora_dropout is not None
            model = new_lora(
                self.scorer.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
            )
            if self._named:  # not the folder on this machine that a name on the Hub was resolved to
                for adapter in getattr(model, "peft_config", {}).values():
                    adapter.base_model_name_or_path = config.model
            self.masters = MasterWeights(model, self.dtype)
            self.scorer = Scorer(model, attention=config.attention)
        if config.gradient_checkpointing:
            causal: Any = causal_model(self.scorer.model)
            # Older versions of transformers know only the second name, newer ones warn of it.
            enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trained = sum(p.numel() for p in self.masters.masters.values())
        total = sum(p.numel() for p in self.scorer.model.parameters())
        return f"training {trained:,} of {total:,} weights{' (LoRA)' if config.lora else ''}"

    def release(self) -> None:
        """Give the model its own attention and gradients back: one given in Python goes back to its owner."""
        self.scorer.detach_hook()
        self.masters.release()
