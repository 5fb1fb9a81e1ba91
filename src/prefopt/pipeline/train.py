"""A training of any kind into its folder, once: what sweeps are made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.config.option import flag
from prefopt.config.ppo import PpoConfig
from prefopt.config.score import is_model_reward
from prefopt.config.sft import SftConfig
from prefopt.config.sweep import AnyConfig, SweepOptions
from prefopt.disk.adapter_folder import is_adapter
from prefopt.disk.read import read_json
from prefopt.disk.write import output_errors, write_json
from prefopt.errors import RunError
from prefopt.methods import ppo, preference, reward, sft
from prefopt.pipeline.contents import contents_of_name, status_of
from prefopt.rewards import load_reward


def take_folder(config: SweepOptions, may_grow: Collection[str]) -> None:
    """The output's folder, with the options, the model and the reward that it was begun with; the options of
    ``may_grow`` may differ.

    Raises :class:`RunError` where it was begun with others, or holds something else.
    """
    folder = Path(config.output)
    file = folder / "sweep.json"
    options = {name: value for name, value in config.to_dict().items() if name not in may_grow}
    made_of = {"model": contents_of_name(config.model), "reward": _reward_of(config.reward)}
    now = {"command": type(config).__name__, "options": options, **made_of}
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output {folder} is a file; name a folder")
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"--output {folder} is not empty and holds no sweep; name another folder")
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
        return
    before = read_json(file, _begun, "name another --output")
    changed = [n for n in options if before["options"].get(n) != options[n]]
    same = {name: before[name] == now[name] for name in ("command", "model", "reward")}
    if not same["command"]:
        raise RunError(f"--output {folder} holds another kind of sweep; name another folder")
    if changed:
        told = ", ".join(f"{flag(n)} was {before['options'].get(n)!r} and is {options[n]!r}" for n in changed)
        raise RunError(f"--output {folder}: {told}; its points would not compare: put it back, or name another folder")
    if not same["model"]:
        raise RunError(f"--output {folder} was begun with another model in {config.model}; name another folder")
    if not same["reward"]:
        what = "model in" if is_model_reward(config.reward) else "code of"
        raise RunError(f"--output {folder} was begun with another {what} --reward {config.reward}; name another folder")


def _begun(found: dict[str, Any]) -> dict[str, Any]:
    return {"options": dict(found["options"]), **{name: found[name] for name in ("command", "model", "reward")}}


def _reward_of(name: str) -> str | None:
    """A digest of a reward model, or of a function's code; none for a rule of prefopt's."""
    return contents_of_name(name) if is_model_reward(name) else load_reward(name).digest()


def train_once(config: AnyConfig, callbacks: Sequence[Any] = ()) -> None:
    """Train, go on with a run that was stopped, or do nothing where it is finished."""
    status = status_of(Path(config.output))
    if status == "finished":
        return
    config = type(config).from_dict(config.to_dict() | {"resume": bool(status)})
    if isinstance(config, DpoConfig):
        preference.run(config, callbacks=callbacks)
    elif isinstance(config, SftConfig):
        sft.run(config, callbacks=callbacks)
    elif isinstance(config, PpoConfig):
        ppo.run(config, callbacks=callbacks)
    else:
        reward.run(config, callbacks=callbacks)


def model_of(config: AnyConfig) -> dict[str, Any]:
    """What a finished training gave: a model's name, and an adapter on it where one was trained."""
    folder = Path(config.output)
    adapter = is_adapter(folder) and not is_adapter(config.model)  # what a run on an adapter gave names its base itself
    return {"name": config.model if adapter else str(folder), "adapter": str(folder) if adapter else None}
