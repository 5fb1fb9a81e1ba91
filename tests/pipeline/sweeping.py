"""The tiny world that sweeps are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from methods import small_world as world
from prefopt.config.frontier import READ_BY, FrontierConfig
from prefopt.config.tools import ScoreConfig
from prefopt.evaluate.score import RowScorer
from prefopt.sweeps import data

PROMPTS = [a + b for a in "abcdef" for b in "abc"]
REWARD = "methods.small_world:reward"


def count_loads(patch: pytest.MonkeyPatch) -> list[str]:
    """Every reward that policies are measured by is added when it is loaded."""
    loaded, load = list[str](), data.load_row_scorer

    def counted(given: ScoreConfig) -> RowScorer:
        loaded.append(given.reward)
        return load(given)

    patch.setattr(data, "load_row_scorer", counted)
    return loaded


def write_place(folder: Path) -> Path:
    """A model and prompts."""
    world.write_world(folder / "m")
    # Without a BOS, which a reward model would pad with: a model that knows nothing may end a text with it.
    whole = PreTrainedTokenizerFast(tokenizer_object=world.tokenizer()._tokenizer, eos_token="</s>")
    whole.save_pretrained(folder / "m")
    (folder / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def frontier_config(place: Path, output: Path, **changes: Any) -> FrontierConfig:
    """A quick sweep of DPO, or of other ``methods``, with the options of ``values`` that they read."""
    given = values(place, output) | {"methods": ["dpo:beta=0.1"]} | changes
    methods = {text.partition(":")[0] for text in given["methods"]}
    unread = {name for name, readers in READ_BY.items() if methods.isdisjoint(readers)} - changes.keys()
    return FrontierConfig(**{name: value for name, value in given.items() if name not in unread})


def values(place: Path, output: Path) -> dict[str, Any]:
    """Options of a quick sweep."""
    return {
        **{"model": str(place / "m"), "prompts": [str(place / "p.txt")], "output": str(output), "reward": REWARD},
        **{"lines": "text", "held_out": 6, "num": 3, "max_new_tokens": 3, "responses": 32},
        **{"dpo": ["batch_size=4", "learning_rate=2e-3"], "ppo": ["batch_size=4", "num=2", "learning_rate=2e-3"]},
        **{"sft": ["batch_size=4"], "reward_model": ["batch_size=4"], "device": "cpu", "dtype": "float32"},
        "progress": "none",
    }
