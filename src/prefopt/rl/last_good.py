"""What is left of a run that ran away: the last weights whose divergence was measured and small enough, as a model.

A checkpoint alone would not do: its run goes on to the same end, since every number of it is determined, and a new run
starts from a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefopt.config.ppo import PpoConfig
from prefopt.core.files import remove_folder
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import RunError
from prefopt.losses.rl import k1
from prefopt.model.architectures import causal_model
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.card import save_model
from prefopt.runs.folder import RunFolder
from prefopt.train import checkpoint
from prefopt.train.checkpoint import Checkpoint
from prefopt.train.policy import Policy

OTHERWISE = "a lower --learning-rate or a higher --beta"


def keep_last_good(
    config: PpoConfig, folder: RunFolder, policy: Policy, tokenizer: Tokenizer, ends: Sequence[int], *, named: bool
) -> str:
    """Write ``last-good`` into the folder of a run that diverged; says what there is, and how to go on from it.

    ``policy`` gets those weights too; ``ends`` are the tokens that ended its responses. ``named``: the model was named
    by a folder, and not given in Python.
    """
    found = next((kept for _, kept in checkpoint.whole(folder.checkpoints) if _is_good(kept, config.max_kl)), None)
    step = found.state["step"] if found is not None else 0
    if found is None or not step:
        return f"no good weights later than the first ones were kept: start anew elsewhere with {OTHERWISE}"
    path = folder.last_good
    try:
        policy.masters.load(checkpoint.part_of("actor", found.weights))
        repair_generation(causal_model(policy.scorer.model))
        remove_folder(path)
        save_model(path, policy.scorer, policy.masters, tokenizer)
        add_end_tokens(path, ends, tokenizer, policy.scorer.model)
    except RunError as error:
        return f"the weights after step {step} were good, but {error}"
    return (
        f"the last good weights that were kept, after step {step}, are a model: go on from them, into another --output,"
        f" with {_named(config, path, named=named)} and {OTHERWISE}"
    )


def _is_good(kept: Checkpoint, max_kl: float) -> bool:
    """Whether the very weights of a checkpoint wrote responses whose divergence was not too large: those of a run that
    was stopped within a step have moved since, or have written nothing yet."""
    if kept.rollouts is None or kept.state["progress"]["done"]:
        return False
    rollouts = Rollouts.from_tensors(kept.rollouts)
    divergence = float(k1(rollouts.logp_M - rollouts.ref_logp_M).sum()) / len(rollouts.score_N)
    return divergence <= max_kl


def _named(config: PpoConfig, path: Path, *, named: bool) -> str:
    """Options of a run that starts from the model in ``path`` and is held by the reference of this one."""
    start = f"--model {path}"
    if config.lora and named:
        start = f"--model {config.model} --adapter {path}"
    reference = config.reference or (config.model if named and config.adapter is None else None)
    return f"{start} --reference {reference}" if reference else start
