"""The models of PPO: actor, reference, reward and critic, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.config.tools import is_model_reward
from prefopt.config.training import LORA_ALPHA_PER_RANK, LORA_RANK
from prefopt.core.terminal import size
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.rewards import Judge, ModelJudge, load_judge
from prefopt.model.adapter import new_lora
from prefopt.model.load import load_model, local_folder, vocabulary_size
from prefopt.model.packed_model import causal_model, context_length
from prefopt.model.scorer import Scorer
from prefopt.reference.in_memory import HeldWeights, LiveReference
from prefopt.rl.critic import Critic, head_critic, network_critic
from prefopt.train.policy import Policy, ScalarPolicy


@dataclass(frozen=True, slots=True)
class PpoModels:
    """``actor`` is trainable already. The reference is the actor's own model with the weights it began with, where no
    other is named: of a LoRA run it is the same base, with the adapter as it was (a new one changes nothing)."""

    actor: Policy
    reference: LiveReference
    judge: Judge
    critic: Critic | None

    def memory(self) -> dict[str, int]:
        """Bytes of weights by model; what the reference shares with the actor counts as the actor's."""
        own = _bytes(self.actor.scorer.model)
        own += sum(_size(p) for p in self.actor.masters.masters.values() if not _is_of(p, self.actor.scorer.model))
        held = self.reference.held
        found = {"actor": own}
        if held is not None:
            found["reference"] = sum(_size(value) for value in held.saved().values())
        else:
            found["reference"] = _bytes(self.reference.scorer.model)
        found["reward"] = _bytes(self.judge.scorer.model) if isinstance(self.judge, ModelJudge) else 0
        found["critic"] = self.critic.weight_bytes if self.critic is not None else 0
        return found

    def words(self) -> list[str]:
        """Lines that a run prints."""
        memory = {name: size(of) for name, of in self.memory().items() if of}
        shared = self.reference.held is not None
        reference = "the actor's model as it was" if shared else "a model of its own"
        critic = self.critic.words if self.critic is not None else "none"
        return [
            f"actor: {memory['actor']}",
            f"reference: {reference}, {memory['reference']}{' more' if shared else ''}",
            f"reward: {', '.join(filter(None, [self.judge.words, memory.get('reward')]))}",
            f"critic: {', '.join(filter(None, [critic, memory.get('critic')]))}",
        ]


def build_models(
    config: PpoConfig,
    actor: Policy,
    source: str,
    tokenizer: Tokenizer,
    stop: tuple[int, ...],
    longest: int,
    judge: Judge | None,
) -> PpoModels:
    """Everything beside the actor, from folder ``source`` where it was named by one. ``longest``: tokens of prompt and
    response; ``judge`` stands in for ``config.reward``. Raises :class:`ModelError` where two models do not fit, and
    :class:`ConfigError` for a critic that cannot be made."""
    dtype, device = actor.dtype, actor.device
    if judge is None:
        judge = load_judge(
            config.reward, tokenizer, stop, dtype=dtype, device=device, attention=config.attention, longest=longest
        )
    return PpoModels(actor, _reference(config, actor, longest), judge, _critic(config, actor, source, tokenizer))


def _reference(config: PpoConfig, actor: Policy, longest: int) -> LiveReference:
    if config.reference is None:
        return LiveReference(actor.scorer, HeldWeights(actor.masters))
    model = load_model(local_folder(config.reference), dtype=actor.dtype, device=actor.device).requires_grad_(False)
    other = causal_model(model)
    context = context_length(other.config)
    if vocabulary_size(other) != vocabulary_size(causal_model(actor.scorer.model)):
        raise ModelError(
            f"--reference {config.reference}: its vocabulary is another than the model's; take its own kin"
        )
    if context is not None and longest > context:
        raise ModelError(
            f"--reference {config.reference}: its context is {context} tokens, but prompt and response may have"
            f" {longest}; lower --max-new-tokens"
        )
    return LiveReference(Scorer(model, attention=config.attention))


def _critic(config: PpoConfig, actor: Policy, source: str, tokenizer: Tokenizer) -> Critic | None:
    if config.algorithm == "rloo":
        return None
    kind = config.critic or "auto"
    if kind == "auto":
        kind = "reward" if is_model_reward(config.reward) else "actor" if source else "head"
    if kind == "reward" and not is_model_reward(config.reward):
        raise ModelError(f"--critic reward: --reward {config.reward} is no model to start from; take --critic actor")
    if kind == "actor" and not source:
        raise ConfigError(
            "critic actor: a model given in Python has no folder to load a second one from; name a folder as model, or"
            " take critic head"
        )
    if kind == "head":
        return head_critic(actor.scorer, seed=config.seed)
    return network_critic(
        kind,
        actor.scorer,
        config.reward if kind == "reward" else source,
        tokenizer,
        dtype=actor.dtype,
        seed=config.seed,
        checkpointing=config.gradient_checkpointing,
        adapter=local_folder(config.adapter) if kind == "actor" and config.adapter else None,
        adapt=_adapter(config) if config.lora else None,
    )


def _adapter(config: PpoConfig) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Puts an adapter on a critic, of the shape of the actor's new one."""
    rank = config.lora_rank or LORA_RANK
    alpha = config.lora_alpha or LORA_ALPHA_PER_RANK * rank
    return partial(new_lora, rank=rank, alpha=alpha, dropout=0.0, targets=config.lora_targets, task=ScalarPolicy.task)


def _bytes(model: torch.nn.Module) -> int:
    return sum(_size(p) for p in model.parameters())


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _is_of(parameter: torch.Tensor, model: torch.nn.Module) -> bool:
    return any(p is parameter for p in model.parameters())
