"""The last good weights of a run that went too far, written as a model, and how to go on from them.

Resuming such a run from a checkpoint would diverge again, since every number of it is determined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from prefopt.config.dpo import DpoConfig
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.files import remove_folder
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ModelError, RunError
from prefopt.losses.rl import k1
from prefopt.model.architectures import causal_model
from prefopt.model.load import base_and_adapter, local_folder
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.parallel.world import World
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.folder import RunFolder
from prefopt.train import checkpoint
from prefopt.train.checkpoint import Checkpoint
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


def keep_last_good(
    config: PpoConfig | OnlineConfig,
    folder: RunFolder,
    policy: Policy,
    tokenizer: Tokenizer,
    ends: Sequence[int],
    world: World,
    *,
    named: bool,
) -> str:
    """Write ``last-good`` into the folder of a run that diverged. Returns how to continue from it, in words.

    ``policy`` gets those weights too; ``ends`` are the tokens that ended its responses. ``named``: the model was not
    given in Python. All ranks of ``world`` call this.
    """
    newest = checkpoint.newest(folder.checkpoints, world, lambda kept: _is_good(kept, config.max_kl))
    found = newest[1] if newest is not None else None
    step = found.state["step"] if found is not None else 0
    if found is None or not step:
        return (
            f"no good weights later than the first ones were kept: start a new run elsewhere with {otherwise(config)}"
        )
    path = folder.last_good
    failed = None
    try:
        policy.masters.load(checkpoint.part_of("actor", found.weights))
        write_last_good(policy, path, tokenizer, ends, world)
    except RunError as error:
        failed = str(error)
    if (failed := world.from_first(failed)) is not None:
        return f"the weights after step {step} were good, but {failed}"
    how = going_on(config, path, named=named)
    return f"the last good weights that were kept, after step {step}, are a model: {how}"


def _is_good(kept: Checkpoint, max_kl: float | None) -> bool:
    """Whether the weights of a checkpoint themselves drew responses of small enough divergence: within a step they have
    moved since."""
    if kept.rollouts is None or kept.state["progress"]["done"]:
        return False
    rollouts = Rollouts.from_tensors(kept.rollouts)
    divergence = float(k1(rollouts.logp_M - rollouts.ref_logp_M).sum()) / len(rollouts.score_N)
    return divergence <= max_kl if max_kl is not None else math.isfinite(divergence)


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
