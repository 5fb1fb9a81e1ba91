"""The models of PPO: actor, reference, reward model and critic, and their memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.core.terminal import size
from prefopt.data.chat.pictures import same_processor
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.rewards import RewardScorer
from prefopt.model.architectures import body_of, causal_model, context_length, vocabulary_size
from prefopt.model.checkpoint import WeightFiles
from prefopt.model.load import base_and_adapter, load_model, local_folder
from prefopt.model.scorer import PackedModel, Scorer
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.rl.critic import Critic, build_critic, bytes_of, kind_of_critic, shared_base, weights_of
from prefopt.rl.rewards import Rewards
from prefopt.train.policy import Policy


@dataclass(frozen=True, slots=True)
class PpoModels:
    """``actor`` is trainable. Unless ``--reference`` names another, the reference is the actor's model with its initial
    weights; in a LoRA run these are the same base with the initial adapter."""

    actor: Policy
    reference: InMemoryReference
    judge: RewardScorer
    critic: Critic | None
    is_start: bool
    """Whether the reference is the actor's model with its initial weights."""
    true_judge: RewardScorer | None = None
    """What measures ``--true-reward``."""

    def memory(self) -> dict[str, int]:
        """Bytes of weights by model on this process. What models share counts as that of the first of them: with LoRA
        one base serves actor, reference and critic."""
        counted: dict[int, torch.Tensor] = {}

        def more(weights: Iterable[torch.Tensor]) -> int:
            fresh = {id(x): x for x in weights if id(x) not in counted}
            counted.update(fresh)
            return bytes_of(fresh.values())

        held, true = self.reference.weights, self.true_judge.models if self.true_judge is not None else []
        found = {"actor": more([*weights_of(self.actor.apart), *self.actor.masters.masters.values()])}
        found["reference"] = more(held.saved().values() if held is not None else weights_of(self.reference.scorer))
        found["reward"] = more(weight for model in self.judge.models for weight in weights_of(model))
        if true:
            found["true reward"] = more(weight for model in true for weight in weights_of(model))
        return found | {"critic": more(self.critic.held) if self.critic is not None else 0}

    def beside_training(self) -> dict[str, int]:
        """Bytes by model of weights that neither actor nor critic has."""
        critic = self.critic.held if self.critic is not None else []
        trained = {id(weight) for weight in critic}
        found = self.memory()
        for name, judge in (("reward", self.judge), ("true reward", self.true_judge)):
            if judge is not None and name in found:
                shared = [x for model in judge.models for x in weights_of(model) if id(x) in trained]
                found[name] -= bytes_of(shared)
        return {name: count for name, count in found.items() if name not in ("actor", "critic") and count}

    def words(self) -> list[str]:
        """Lines of the log."""
        memory = {name: size(of) for name, of in self.memory().items() if of}
        shared = self.is_start
        reference = "the actor's model before training" if shared else "a separate model"
        critic = self.critic.words if self.critic is not None else "none"
        return [
            f"actor: {memory['actor']}",
            f"reference: {reference}, {memory['reference']}{' more' if shared else ''}",
            f"reward: {', '.join(filter(None, [self.judge.words, memory.get('reward')]))}",
            *([f"true reward: {self.true_judge.words}"] if self.true_judge is not None else []),
            f"critic: {', '.join(filter(None, [critic, memory.get('critic')]))}",
        ]


def build_models(
    config: PpoConfig,
    actor: Policy,
    source: str,
    tokenizer: Tokenizer,
    stop: tuple[int, ...],
    longest: int,
    rewards: Rewards,
    world: World = ALONE,
) -> PpoModels:
    """Build the other models. ``source`` is the actor's folder, empty for one given in Python; ``longest``: tokens of
    prompt and response. All are cut into shards if the actor is. Raises :class:`ModelError` where models do not fit
    together, and :class:`ConfigError` for a critic that cannot be made."""
    dtype, device = actor.dtype, actor.device
    how: dict[str, Any] = {"dtype": dtype, "device": device, "attention": config.attention, "pictures": actor.pictures}
    judge, true_judge = rewards.scorers(tokenizer, stop, longest=longest, **how)
    critic_base = shared_base(config, actor, source, rewards, judge)
    for model in {id(m): m for m in [*judge.models, *(true_judge.models if true_judge else [])]}.values():
        cut_frozen(model, actor, world)
    reference = reference_of(config, actor, longest, world)
    critic = build_critic(config, actor, source, tokenizer, rewards, critic_base, world)
    return PpoModels(actor, reference, judge, critic, config.reference is None, true_judge)


def cut_frozen(scorer: PackedModel, actor: Policy, world: World) -> None:
    """Cut a frozen model into shards if the actor is in shards."""
    if actor.sharded:
        from prefopt.parallel.gathered import cut

        cut(scorer, actor.masters, world)


def reference_of(
    config: PpoConfig | OnlineConfig, actor: Policy, longest: int, world: World, *, moves: bool = False
) -> InMemoryReference:
    """The reference of a run: ``config.reference``, else the actor as it is. ``longest`` and ``world``: see
    :func:`build_models`. ``moves``: its values will follow the actor's. Raises :class:`ModelError` where the two do not
    fit together, and :class:`ConfigError` for one in shards that moves."""
    if actor.pictures and actor.sharded:
        raise ConfigError("--prompts has pictures, and models in shards do not sample for them: give --shard none")
    if config.reference is None and actor.sharded and moves:
        raise ConfigError("--ref-model-sync-steps does not work with weights in shards: give --shard none")
    if config.reference is None and actor.sharded:
        from prefopt.parallel.gathered import copy_as_it_is

        return InMemoryReference(copy_as_it_is(actor.apart, world))
    if config.reference is None:
        return InMemoryReference(actor.scorer, SwappedWeights(actor.masters, moves=moves))
    source = local_folder(config.reference)
    if actor.pictures:
        same_processor(source, str(causal_model(actor.scorer.model).name_or_path), f"--reference {config.reference}")
    more: dict[str, Any] = {"quantise": config.quantise, "pictures": actor.pictures}
    model = load_model(source, dtype=actor.dtype, device=actor.device, **more).requires_grad_(False)
    other = causal_model(model)
    context = context_length(other.config)
    if vocabulary_size(other) != vocabulary_size(causal_model(actor.scorer.model)):
        raise ModelError(
            f"--reference {config.reference}: its vocabulary is not the model's; take a model of the same family"
        )
    if context is not None and longest > context:
        raise ModelError(
            f"--reference {config.reference}: its context is {context} tokens, but prompt and response may have"
            f" {longest}; lower --max-new-tokens"
        )
    scorer = Scorer(model, attention=config.attention, pictures=actor.pictures)
    cut_frozen(scorer, actor, world)
    return InMemoryReference(scorer)


def bytes_of_others(config: PpoConfig, actor: Policy, source: str, rewards: Rewards) -> int:
    """About the bytes that the models of :func:`build_models` take if none is in shards, with what training the critic
    needs. ``actor`` trains already."""
    each = actor.dtype.itemsize
    trained = sum(p.numel() for p in actor.masters.masters.values())
    judges = {name: weights_in_files(name) for name in rewards.models()}
    found = sum(judges.values()) * each
    found += each * (trained if config.reference is None else weights_in_files(config.reference))
    kind = kind_of_critic(config, source, rewards)
    if kind in ("reward", "actor"):
        layers = body_of(causal_model(actor.scorer.model)).parameters()
        own = judges.get(rewards.first_model or "", 0) if kind == "reward" else sum(p.numel() for p in layers)
        shares = not (kind == "reward" and config.quantises)
        trains, frozen = (trained, 0 if shares else own) if config.lora else (own, 0)
        wide = torch.promote_types(actor.dtype, torch.float32).itemsize
        # A master, a gradient and two moments for each weight that trains, and a rounded copy if it is narrower.
        found += 4 * wide * trains + each * (frozen + (trains if each < wide else 0))
    return found


def weights_in_files(name: str) -> int:
    """The number of weights of a model, by the headers of its files."""
    base, _ = base_and_adapter(name)
    return sum(math.prod(tensor.shape) for tensor in WeightFiles.read(base).tensors.values())
