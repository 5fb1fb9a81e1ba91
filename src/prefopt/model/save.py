"""What saving a model takes, whoever saves it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig


def repair_generation(model: Any) -> str | None:
    """Make a generation config such as transformers agrees to save; says what was changed, if anything.

    Some published models set a temperature without sampling, which loads but cannot be saved.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    try:
        config.validate(strict=True)
        return None
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
        return "its generation config sets sampling options without sampling: do_sample is switched on"
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
        return "its generation config is not valid: a plain one is saved"


def share_weights(folder: Path) -> None:
    """Weights readable as other new files are: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)
