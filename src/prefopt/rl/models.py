"""The models of PPO: actor, reference, reward model and critic, and their memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.config.tools import is_model_reward
from prefopt.config.training import LORA_ALPHA_PER_RANK, LORA_RANK
from prefopt.core.terminal import size
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.rewards import RewardModelScorer, RewardScorer, load_reward_scorer
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations, context_length, vocabulary_size
from prefopt.model.kernels.head import TokenScores, wide_dtype
from prefopt.model.load import load_model, local_folder
from prefopt.model.merge import load_merged
from prefopt.model.offload import HostActivations
from prefopt.model.packing import PackedBatch, PackLayout, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer, load_scalar, scalar_from
from prefopt.model.scorer import Scorer, ScoreRequest
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.train.policy import Policy, ScalarPolicy, loaded_on


@dataclass(frozen=True, slots=True)
class Critic:
    """Either a separate network (``scorer``), or a head ``weight`` [H] on the actor's hidden states.

    A separate network is usual in papers (Huang et al. 2024, arXiv 2403.17031): its features need not serve next-token
    prediction as well. A head saves a forward pass and most of the memory; its gradient reaches the actor's layers.
    """

    words: str
    weights: MasterWeights
    scorer: ScalarScorer | None = None

    @property
    def is_head(self) -> bool:
        """Whether it is a head on the actor."""
        return self.scorer is None

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
    def weight_bytes(self) -> int:
        """Bytes of weights and masters."""
        own = self.scorer.model.parameters() if self.scorer is not None else ()
        return bytes_of([*own, *self.weights.masters.values()])


class HeadWeights(MasterWeights):
    """The ``weight`` of a head, which is its own master."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.model = torch.nn.ParameterDict({"weight": weight})
        self.masters, self._copies, self._hooks = {"weight": weight}, {}, []


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())


@dataclass(frozen=True, slots=True)
class PpoModels:
    """``actor`` is trainable. Unless ``--reference`` names another, the reference is the actor's model with its initial
    weights; in a LoRA run these are the same base with the initial adapter."""

    actor: Policy
    reference: InMemoryReference
    judge: RewardScorer
    critic: Critic | None

    def memory(self) -> dict[str, int]:
        """Bytes of weights by model. What the reference shares with the actor counts as the actor's."""
        actor = self.actor
        judge = self.judge.scorer.model.parameters() if isinstance(self.judge, RewardModelScorer) else ()
        return {
            "actor": bytes_of([*actor.scorer.model.parameters(), *actor.masters.masters.values()]),
            "reference": self.reference.bytes_held,
            "reward": bytes_of(judge),
            "critic": self.critic.weight_bytes if self.critic is not None else 0,
        }

    def words(self) -> list[str]:
        """Lines of the log."""
        memory = {name: size(of) for name, of in self.memory().items() if of}
        shared = self.reference.weights is not None
        reference = "the actor's model as it was" if shared else "a separate model"
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
    judge: RewardScorer | None,
) -> PpoModels:
    """Build the other models. ``source`` is the actor's folder, empty for one given in Python; ``longest``: tokens of
    prompt and response; ``judge`` replaces ``config.reward``. Raises :class:`ModelError` where models do not fit
    together, and :class:`ConfigError` for a critic that cannot be made."""
    dtype, device = actor.dtype, actor.device
    if judge is None:
        judge = load_reward_scorer(
            config.reward, tokenizer, stop, dtype=dtype, device=device, attention=config.attention, longest=longest
        )
    return PpoModels(actor, _reference(config, actor, longest), judge, _critic(config, actor, source, tokenizer))


def _reference(config: PpoConfig, actor: Policy, longest: int) -> InMemoryReference:
    if config.reference is None:
        return InMemoryReference(actor.scorer, SwappedWeights(actor.masters))
    model = load_model(local_folder(config.reference), dtype=actor.dtype, device=actor.device).requires_grad_(False)
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
    return InMemoryReference(Scorer(model, attention=config.attention))


def _critic(config: PpoConfig, actor: Policy, source: str, tokenizer: Tokenizer) -> Critic | None:
    if config.algorithm == "rloo":
        return None
    kind = config.critic or "auto"
    if kind == "auto":
        kind = "reward" if is_model_reward(config.reward) else "actor" if source else "head"
    if kind == "head":
        return _head_critic(actor.scorer, seed=config.seed)
    if kind == "reward" and not is_model_reward(config.reward):
        raise ModelError(f"--critic reward: --reward {config.reward} is no model to start from; take --critic actor")
    if kind == "actor" and not source:
        raise ConfigError(
            "critic actor: a model given in Python has no folder to load a second one from; name a folder as model, or"
            " take critic head"
        )
    return _network_critic(config, kind, actor, source, tokenizer)


def _head_critic(actor: Scorer, *, seed: int) -> Critic:
    """A new head on ``actor``. Raises :class:`ModelError` where the architecture does not return hidden states."""
    if actor.head.kind == "model":
        raise ModelError(f"--critic head: {type(causal_model(actor.model)).__name__} does not show its hidden states")
    embedding = causal_model(actor.model).get_input_embeddings()
    width = int(embedding.embedding_dim)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    weight = torch.nn.Parameter(drawn.to(embedding.weight.device, wide_dtype(actor.dtype)))
    return Critic("a head on the actor's layers", HeadWeights(weight))


def _network_critic(config: PpoConfig, kind: str, actor: Policy, source: str, tokenizer: Tokenizer) -> Critic:
    """A critic that starts as the reward model, or as the model in folder ``source`` with its adapter merged and a new
    scalar head.

    All of it trains; in a LoRA run only a new adapter and the scalar head, so that the base needs no gradients, masters
    or optimiser state. Raises :class:`ModelError` where the architecture has no scalar head.
    """
    dtype, seed = actor.dtype, config.seed
    wide, device = torch.promote_types(dtype, torch.float32), loaded_on(config, actor.device)
    own_tokens = copy.deepcopy(tokenizer)  # it may get a pad token
    name = config.reward if kind == "reward" else source
    model: torch.nn.Module
    if kind == "actor" and config.adapter:
        base = load_merged(local_folder(name), local_folder(config.adapter), dtype=wide, device=device)
        model = scalar_from(base, own_tokens, seed=seed)
    else:
        loaded_in = dtype if config.lora else wide
        model = load_scalar(local_folder(name), dtype=loaded_in, device=device, tokenizer=own_tokens, seed=seed)
    if vocabulary_size(causal_model(model)) < len(tokenizer):
        raise ModelError(f"{name}: its vocabulary is smaller than the tokenizer's; they belong to different models")
    model.requires_grad_(not config.lora)
    if config.lora:  # an adapter of the same shape as the actor's
        torch.manual_seed(seed)
        rank = config.lora_rank or LORA_RANK
        alpha = config.lora_alpha or LORA_ALPHA_PER_RANK * rank
        targets = config.lora_targets
        model = new_lora(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets, task=ScalarPolicy.task)
    if config.gradient_checkpointing is True:
        checkpoint_activations(model)
    weights = MasterWeights(model, dtype, on_host=config.offloads("optimizer"), device=actor.device)
    what = "an adapter on a network of its own" if config.lora else "a network of its own"
    scorer = ScalarScorer(model, attention=actor.scorer.attention)
    if config.offloads("activations"):
        scorer.offload = HostActivations(scorer)
    return Critic(f"{what}, started from the {kind} model", weights, scorer)


def look(
    scorer: Scorer, critic: Critic | None, temperature: float, packed: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [M] at the sampling temperature, and values [M] where there is a critic."""
    asked = ScoreRequest(hidden=True) if critic is not None and critic.is_head else None
    with scorer.at_temperature(temperature):
        found = scorer(packed, asked)
    logp_M, hidden_M = (found.logp_M, found.hidden_M) if isinstance(found, TokenScores) else (found, None)
    return logp_M, None if critic is None else critic.values(packed, scorer.layout, hidden_M)
