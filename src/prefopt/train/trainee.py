"""What reinforcement learning trains: the actor and, where it is a network of its own, the critic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.errors import Diverged
from prefopt.train.critic import Critic
from prefopt.train.optim import Schedule, adamw, clip_, grad_norm
from prefopt.train.policy import Policy


@dataclass(slots=True)
class Trainee:
    """A network, its optimiser and its learning rate. ``publish`` brings the network after its masters."""

    masters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    publish: Callable[[], None]
    zero_grad: Callable[[], None]
    load: Callable[[dict[str, torch.Tensor]], None]

    def update(self, step: int, limit: float) -> float:
        """An optimiser step; returns the gradient's norm. Raises :class:`Diverged` where that is not finite."""
        norm = float(grad_norm(self.masters.values()))
        if not math.isfinite(norm):
            raise Diverged(f"step {step + 1}: the gradient's norm is {norm}", "try --dtype float32")
        clip_(self.masters.values(), norm, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step)
        self.optimizer.step()
        self.publish()
        self.zero_grad()
        return norm


def trainees(config: PpoConfig, policy: Policy, critic: Critic | None, steps: int) -> dict[str, Trainee]:
    """The actor, with an optimiser and a schedule over so many steps, and a critic with its own."""
    assert config.learning_rate is not None

    def optimizer(masters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
        betas = (config.adam_beta1, config.adam_beta2)
        return adamw(masters, betas=betas, epsilon=config.adam_epsilon, weight_decay=config.weight_decay)

    def schedule(peak: float) -> Schedule:
        return Schedule(config.schedule, peak, steps, round(config.warmup * steps))

    own = policy.masters
    actor = Trainee(
        own.masters, optimizer(own.masters), schedule(config.learning_rate), own.publish, own.zero_grad, own.load
    )
    if critic is None:
        return {"actor": actor}
    peak = config.critic_learning_rate or config.learning_rate
    other = Trainee(
        critic.masters, optimizer(critic.masters), schedule(peak), critic.publish, critic.zero_grad, critic.load
    )
    return {"actor": actor, "critic": other}
