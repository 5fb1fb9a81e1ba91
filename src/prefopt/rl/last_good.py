"""The last good weights of a run that went too far, written as a model, and how to go on from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prefopt.config.dpo import DpoConfig
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.files import remove_folder
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError
from prefopt.model.architectures import causal_model
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.parallel.world import World
from prefopt.train.policy import Policy

Going = PpoConfig | DpoConfig | OnlineConfig
"""Options of runs whose last good weights are kept."""


def write_last_good(policy: Policy, path: Path, tokenizer: Tokenizer, ends: Sequence[int], world: World) -> None:
    """Write the policy as the model in ``path``, in the place of what is there; ``ends`` are the tokens that end its
    responses. All ranks of ``world`` call this. Raises :class:`prefopt.errors.RunError` where it cannot be written."""
    aside = path.with_name(f".{path.name}")
    repair_generation(causal_model(policy.scorer.model))
    world.on_first(lambda: remove_folder(aside))
    policy.save(aside, tokenizer, writes=world.first)
    if world.first:
        add_end_tokens(aside, ends, tokenizer, policy.scorer.model)
        before = path.with_name(f".{path.name}-before")  # at every moment one of the two is whole
        if path.exists():
            remove_folder(before)
            path.rename(before)
        aside.rename(path)
        remove_folder(before)


def otherwise(config: Going) -> str:
    """Options that keep the next run from the same end."""
    imitates = isinstance(config, OnlineConfig) and config.imitates  # there is no beta then
    return "a lower --learning-rate" if imitates else "a lower --learning-rate or a higher --beta"


def going_on(config: Going, path: Path, *, named: bool) -> str:
    """How a run goes on from the model in ``path``, held by the reference of this one, unless that moves. ``named``:
    the model was not given in Python."""
    start = f"--model {path}"
    if config.lora and named:
        start = f"--model {config.model} --adapter {path}"
    moves = getattr(config, "ref_model_sync_steps", None) is not None
    reference = config.reference or (_start(config) if named and not moves else None)
    start = f"{start} --reference {reference}" if reference else start
    other = getattr(config, "reference_adapter", None)
    start = f"{start} --reference-adapter {other}" if other else start
    return f"go on from them, into another --output, with {start} and {otherwise(config)}"


def _start(config: Going) -> str | None:
    """What ``--reference`` calls the model before training; None for an adapter that was put on a model of another name
    than its own, which no name stands for."""
    if config.adapter is None:
        return config.model
    with suppress(ModelError):  # its own model cannot be found
        if base_and_adapter(config.adapter)[0] == local_folder(config.model):
            return config.adapter
    return None
