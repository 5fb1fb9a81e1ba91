"""What is done with a finished model: ``prefopt merge`` and ``prefopt push``; and ``prefopt env``."""

from __future__ import annotations

from prefopt.config.env import EnvConfig
from prefopt.config.merge import MergeConfig
from prefopt.config.push import PushConfig
from prefopt.model.environment import environment, in_words
from prefopt.model.load import DTYPES, resolve_device
from prefopt.model.merge import merge_adapter
from prefopt.model.push import confirmed, plan, push
from prefopt.screen import tell, tell_json, tell_lines


def merge_model(config: MergeConfig) -> int:
    done = merge_adapter(
        config.adapter,
        config.output,
        model=config.model,
        dtype=DTYPES[config.dtype],
        device=resolve_device(config.device),
    )
    tell_lines(done.in_words())
    return 0


def push_model(config: PushConfig) -> int:
    planned = plan(config.folder, run=config.with_run, checkpoints=config.with_checkpoints)
    tell_lines(planned.in_words(config.repo, config.private))  # input() flushes it
    if not confirmed(config.yes):
        tell("nothing was sent")
        return 0
    tell(f"sent: {push(planned, config.repo, private=config.private)}")
    return 0


def show_environment(config: EnvConfig) -> int:
    found = environment()
    if config.json:
        tell_json(found)
    else:
        tell_lines(in_words(found))
    return 0
