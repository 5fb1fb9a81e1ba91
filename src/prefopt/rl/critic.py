"""The critic of PPO: a network of its own, an adapter on a base that is in memory already, or a head on the actor."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt.config.ppo import PpoConfig
from prefopt.config.training import LORA_ALPHA_PER_RANK, LORA_RANK
from prefopt.core.model_folder import is_adapter
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.rewards import RewardScorer
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations, towers_of, vocabulary_size
from prefopt.model.kernels.head import TokenScores, wide_dtype
from prefopt.model.load import local_folder
from prefopt.model.memory import Blueprint
from prefopt.model.merge import load_merged
from prefopt.model.offload import HostActivations
from prefopt.model.packing import PackedBatch, PackLayout, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer, end_ids, load_scalar, scalar_from
from prefopt.model.scorer import PackedModel, Scorer, ScoreRequest
from prefopt.parallel.tensors import local_of
from prefopt.parallel.world import World
from prefopt.rl.rewards import Rewards
from prefopt.train.memory import blueprint_of
from prefopt.train.policy import Policy, ScalarPolicy, compiles, loaded_on, masters_of


@dataclass(frozen=True, slots=True)
class Critic:
    """Either a separate network (``scorer``), or a head ``weight`` [H] on the actor's hidden states.

    A separate network is usual in papers (Huang et al. 2024, arXiv 2403.17031): its features need not serve next-token
    prediction as well. A head saves a forward pass and most of the memory; its gradient reaches the actor's layers.
    """

    words: str
    weights: MasterWeights
    scorer: ScalarScorer | None = None
    apart: ScalarScorer | None = None
    """The scorer for passes that other ranks do not make, where the weights are in shards."""
    blueprint: Blueprint | None = None
    """Of a network in shards: how it was before, to count the memory of a pass."""

    @property
    def is_head(self) -> bool:
        """Whether it is a head on the actor."""
        return self.scorer is None

    @property
    def of_rollouts(self) -> Critic:
        """The critic of passes that other ranks do not make."""
        return self if self.apart is None else replace(self, scorer=self.apart)

    def values(self, batch: PackedBatch, layout: PackLayout, hidden_M: torch.Tensor | None) -> torch.Tensor:
        """Values [M], float32 or wider. ``batch`` is in the actor's ``layout``; ``hidden_M`` [M, H] are its hidden
        states, for a head."""
        if self.scorer is not None:
            if layout != self.scorer.layout:  # of another architecture
                batch = pack(batch.groups, self.scorer.layout).to(batch.target.device)
            values: torch.Tensor = self.scorer(batch, tokens=True)
            return values
        assert hidden_M is not None
        wide = hidden_M.to(wide_dtype(hidden_M.dtype))
        return wide @ self.weights.masters["weight"].to(wide.dtype)

    def train(self, mode: bool = True) -> None:
        """Set training mode, in which activation checkpointing works, or evaluation mode. Dropout is off in both."""
        if self.scorer is not None:
            self.scorer.train(mode)

    @property
    def held(self) -> list[torch.Tensor]:
        """Weights and masters on this process, with those of a base that it shares."""
        own = weights_of(self.apart or self.scorer) if self.scorer is not None else []
        return [*own, *self.weights.masters.values()]


class HeadWeights(MasterWeights):
    """The ``weight`` of a head, which is its own master."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.model = torch.nn.ParameterDict({"weight": weight})
        self.masters, self._copies, self._hooks = {"weight": weight}, {}, []


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors on this process."""
    return sum(local_of(x).numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


def weights_of(scorer: PackedModel) -> list[torch.Tensor]:
    """The weights that a scorer has, or that it gathers."""
    return [*(scorer.model.parameters() if scorer.shards is None else scorer.shards.weights.values())]


def kind_of_critic(config: PpoConfig, source: str, rewards: Rewards) -> str:
    """``reward``, ``actor`` or ``head``; empty for RLOO."""
    if config.algorithm == "rloo":
        return ""
    if config.critic not in (None, "auto"):
        return config.critic
    return "reward" if rewards.first_model is not None else "actor" if source else "head"


def shared_base(
    config: PpoConfig, actor: Policy, source: str, rewards: Rewards, judge: RewardScorer
) -> PreTrainedModel | None:
    """The model in memory whose frozen weights the critic of a LoRA run shares: the one that it starts from. None where
    it has weights of its own: they train, are in shards, or are to be quantised."""
    kind = kind_of_critic(config, source, rewards)
    if not config.lora or actor.sharded:
        return None
    if kind == "reward" and judge.models and not config.quantises:
        return causal_model(judge.models[0].model)
    return causal_model(actor.scorer.model) if kind == "actor" else None


def build_critic(
    config: PpoConfig,
    actor: Policy,
    source: str,
    tokenizer: Tokenizer,
    rewards: Rewards,
    base: PreTrainedModel | None,
    world: World,
) -> Critic | None:
    kind = kind_of_critic(config, source, rewards)
    if not kind:
        return None
    if kind == "head":
        return _head_critic(actor.scorer, seed=config.seed)
    if kind == "reward" and rewards.first_model is None:
        raise ModelError(
            f"--critic reward: --reward {config.reward_words} is not a model to start from; use --critic actor"
        )
    if kind == "actor" and not source and base is None:
        raise ConfigError(
            "critic actor: a model given in Python has no folder to load a second one from; name a folder as model,"
            " train with lora, or take critic head"
        )
    return _network_critic(config, kind, actor, source, tokenizer, rewards.first_model, base, world)


def _head_critic(actor: Scorer, *, seed: int) -> Critic:
    """A new head on ``actor``. Raises :class:`ModelError` where the architecture does not return hidden states."""
    if actor.head.kind == "model":
        raise ModelError(f"--critic head: {type(causal_model(actor.model)).__name__} does not show its hidden states")
    embedding = causal_model(actor.model).get_input_embeddings()
    width = int(embedding.embedding_dim)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    weight = torch.nn.Parameter(drawn.to(embedding.weight.device, wide_dtype(actor.dtype)))
    return Critic("a head on the actor's layers", HeadWeights(weight))


def _network_critic(
    config: PpoConfig,
    kind: str,
    actor: Policy,
    source: str,
    tokenizer: Tokenizer,
    reward_model: str | None,
    base: PreTrainedModel | None,
    world: World,
) -> Critic:
    """A critic that starts as the reward model, or as the actor with a new scalar head.

    All of it trains; in a LoRA run only an adapter and the scalar head, so that the base needs no gradients, masters or
    optimiser state, and is that of ``base`` where one is given. Raises :class:`ModelError` where the architecture has
    no scalar head.
    """
    dtype, seed = actor.dtype, config.seed
    own_tokens = copy.deepcopy(tokenizer)  # it may get a pad token
    model: torch.nn.Module
    if base is None:
        name = reward_model if kind == "reward" and reward_model is not None else source
        model = _critic_of_its_own(config, kind, name, actor, own_tokens)
        if vocabulary_size(causal_model(model)) < len(tokenizer):
            raise ModelError(f"{name}: its vocabulary is smaller than the tokenizer's; they belong to different models")
        model.requires_grad_(not config.lora)
        for tower in towers_of(causal_model(model)) if actor.pictures and config.vision == "frozen" else ():
            tower.requires_grad_(False)
    elif kind == "reward":
        model = sharing_copy(base)
    else:
        with actor.scorer.attention_by(None):
            model = sharing_copy(base)
        _pad_with_any(own_tokens, causal_model(model))
        model = scalar_from(model, own_tokens, seed=seed)
    if config.lora and not any(p.requires_grad for p in model.parameters()):
        torch.manual_seed(seed)  # an adapter of the same shape as the actor's
        rank = config.lora_rank or LORA_RANK
        alpha = config.lora_alpha or LORA_ALPHA_PER_RANK * rank
        targets = config.lora_targets
        model = new_lora(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets, task=ScalarPolicy.task)
    if config.gradient_checkpointing is True:
        checkpoint_activations(model)
    weights = masters_of(model, config, dtype, actor.device)
    what = "an adapter on a separate network" if config.lora else "a separate network"
    if base is not None:
        what = f"an adapter on the {kind}{' model' * (kind == 'reward')}'s own base"
    scorer = ScalarScorer(model, attention=actor.scorer.attention, pictures=actor.pictures)
    if config.offloads("activations"):
        scorer.offload = HostActivations(scorer)
    if compiles(config, scorer):
        scorer.compile_layers()
    apart = blueprint = None
    if actor.sharded:
        from prefopt.parallel.gathered import shard_like

        blueprint = blueprint_of(scorer, actor.device, dtype)
        weights, apart = shard_like(actor.masters, scorer, weights, world)
    return Critic(f"{what}, initialised from the {kind} model", weights, scorer, apart, blueprint)


def _critic_of_its_own(config: PpoConfig, kind: str, name: str, actor: Policy, tokenizer: Tokenizer) -> torch.nn.Module:
    """A model with a scalar head, read from the folder ``name``; of an actor with its adapter merged."""
    dtype, seed = actor.dtype, config.seed
    wide, device = torch.promote_types(dtype, torch.float32), loaded_on(config, actor.device)
    if kind == "actor" and config.adapter:
        base = load_merged(local_folder(name), local_folder(config.adapter), dtype=wide, device=device)
        merged: torch.nn.Module = scalar_from(base, tokenizer, seed=seed)
        return merged
    folder = local_folder(name)
    quantise = None if is_adapter(folder) else config.quantise  # an adapter is merged into plain weights
    loaded_in = dtype if config.lora else wide
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": seed, "quantise": quantise, "pictures": actor.pictures}
    return load_scalar(folder, dtype=loaded_in, device=device, **options)


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that has frozen weights and buffers in common with it; weights that train are its own."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    memo |= {id(b): b for b in model.buffers()}
    # What bitsandbytes knows of packed weights belongs to them.
    states = [getattr(m, "quant_state", None) for m in model.modules()]
    memo |= {id(state): state for state in states if state is not None}
    found: PreTrainedModel = copy.deepcopy(model, memo)
    return found


def _pad_with_any(tokenizer: Tokenizer, model: PreTrainedModel) -> None:
    """Give a tokenizer that pads with EOS, or not at all, another pad token of those it has: a critic never pads, and a
    new token would need an embedding of its own."""
    ends = end_ids(model.config, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(i for i in range(len(tokenizer)) if i not in ends))


def look(
    scorer: Scorer, critic: Critic | None, temperature: float, packed: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [M] at the sampling temperature, and values [M] where there is a critic."""
    asked = ScoreRequest(hidden=True) if critic is not None and critic.is_head else None
    with scorer.at_temperature(temperature):
        found = scorer(packed, asked)
    logp_M, hidden_M = (found.logp_M, found.hidden_M) if isinstance(found, TokenScores) else (found, None)
    return logp_M, None if critic is None else critic.values(packed, scorer.layout, hidden_M)
