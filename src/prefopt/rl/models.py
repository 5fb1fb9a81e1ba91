"""The models of PPO: actor, reference, reward model and critic, and their memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.config.scoring import is_model_reward
from prefopt.config.training import LORA_ALPHA_PER_RANK, LORA_RANK
from prefopt.core.model_folder import is_adapter
from prefopt.core.terminal import size
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.rewards import RewardModelScorer, RewardScorer, load_reward_scorer
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import body_of, causal_model, checkpoint_activations, context_length, vocabulary_size
from prefopt.model.checkpoint import WeightFiles
from prefopt.model.kernels.head import TokenScores, wide_dtype
from prefopt.model.load import base_and_adapter, load_model, local_folder
from prefopt.model.memory import Blueprint
from prefopt.model.merge import load_merged
from prefopt.model.offload import HostActivations
from prefopt.model.packing import PackedBatch, PackLayout, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer, load_scalar, scalar_from
from prefopt.model.scorer import PackedModel, Scorer, ScoreRequest
from prefopt.parallel.tensors import local_of
from prefopt.parallel.world import ALONE, World
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
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
    def weight_bytes(self) -> int:
        """Bytes of weights and masters on this process."""
        own = weights_of(self.apart or self.scorer) if self.scorer is not None else ()
        return bytes_of([*own, *self.weights.masters.values()])


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

    def memory(self) -> dict[str, int]:
        """Bytes of weights by model on this process. What the reference shares with the actor counts as the actor's."""
        actor, held = [*weights_of(self.actor.apart), *self.actor.masters.masters.values()], self.reference.weights
        reference = held.saved().values() if held is not None else weights_of(self.reference.scorer)
        shared = {id(weight) for weight in actor}
        judge = weights_of(self.judge.scorer) if isinstance(self.judge, RewardModelScorer) else ()
        return {
            "actor": bytes_of(actor),
            "reference": bytes_of(weight for weight in reference if id(weight) not in shared),
            "reward": bytes_of(judge),
            "critic": self.critic.weight_bytes if self.critic is not None else 0,
        }

    def words(self) -> list[str]:
        """Lines of the log."""
        memory = {name: size(of) for name, of in self.memory().items() if of}
        shared = self.is_start
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
    world: World = ALONE,
) -> PpoModels:
    """Build the other models. ``source`` is the actor's folder, empty for one given in Python; ``longest``: tokens of
    prompt and response; ``judge`` replaces ``config.reward``. All are cut into shards if the actor is. Raises
    :class:`ModelError` where models do not fit together, and :class:`ConfigError` for a critic that cannot be made."""
    dtype, device = actor.dtype, actor.device
    if judge is None:
        judge = load_reward_scorer(
            config.reward, tokenizer, stop, dtype=dtype, device=device, attention=config.attention, longest=longest
        )
    if isinstance(judge, RewardModelScorer):
        _cut_frozen(judge.scorer, actor, world)
    reference, critic = _reference(config, actor, longest, world), _critic(config, actor, source, tokenizer, world)
    return PpoModels(actor, reference, judge, critic, config.reference is None)


def _cut_frozen(scorer: PackedModel, actor: Policy, world: World) -> None:
    """Cut a frozen model into shards if the actor is in shards."""
    if actor.sharded:
        from prefopt.parallel.gathered import cut

        cut(scorer, actor.masters, world)


def _reference(config: PpoConfig, actor: Policy, longest: int, world: World) -> InMemoryReference:
    if config.reference is None and actor.sharded:
        from prefopt.parallel.gathered import copy_as_it_is

        return InMemoryReference(copy_as_it_is(actor.apart, world))
    if config.reference is None:
        return InMemoryReference(actor.scorer, SwappedWeights(actor.masters))
    source = local_folder(config.reference)
    model = load_model(source, dtype=actor.dtype, device=actor.device, quantise=config.quantise).requires_grad_(False)
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
    scorer = Scorer(model, attention=config.attention)
    _cut_frozen(scorer, actor, world)
    return InMemoryReference(scorer)


def _kind_of_critic(config: PpoConfig, source: str) -> str:
    """``reward``, ``actor`` or ``head``; empty for RLOO."""
    if config.algorithm == "rloo":
        return ""
    if config.critic not in (None, "auto"):
        return config.critic
    return "reward" if is_model_reward(config.reward) else "actor" if source else "head"


def _critic(config: PpoConfig, actor: Policy, source: str, tokenizer: Tokenizer, world: World) -> Critic | None:
    kind = _kind_of_critic(config, source)
    if not kind:
        return None
    if kind == "head":
        return _head_critic(actor.scorer, seed=config.seed)
    if kind == "reward" and not is_model_reward(config.reward):
        raise ModelError(f"--critic reward: --reward {config.reward} is no model to start from; take --critic actor")
    if kind == "actor" and not source:
        raise ConfigError(
            "critic actor: a model given in Python has no folder to load a second one from; name a folder as model, or"
            " take critic head"
        )
    return _network_critic(config, kind, actor, source, tokenizer, world)


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
    config: PpoConfig, kind: str, actor: Policy, source: str, tokenizer: Tokenizer, world: World
) -> Critic:
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
        folder = local_folder(name)
        quantise = None if is_adapter(folder) else config.quantise  # an adapter is merged into plain weights
        model = load_scalar(folder, dtype=loaded_in, device=device, tokenizer=own_tokens, seed=seed, quantise=quantise)
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
    weights = masters_of(model, config, dtype, actor.device)
    what = "an adapter on a network of its own" if config.lora else "a network of its own"
    scorer = ScalarScorer(model, attention=actor.scorer.attention)
    if config.offloads("activations"):
        scorer.offload = HostActivations(scorer)
    if compiles(config, scorer):
        scorer.compile_layers()
    apart = blueprint = None
    if actor.sharded:
        from prefopt.parallel.gathered import shard_like

        blueprint = blueprint_of(scorer, actor.device, dtype)
        weights, apart = shard_like(actor.masters, scorer, weights, world)
    return Critic(f"{what}, started from the {kind} model", weights, scorer, apart, blueprint)


def bytes_of_others(config: PpoConfig, actor: Policy, source: str) -> int:
    """About the bytes that the models of :func:`build_models` take if none is in shards, with what training the critic
    needs. ``actor`` trains already."""
    each = actor.dtype.itemsize
    trained = sum(p.numel() for p in actor.masters.masters.values())
    judge = weights_in_files(config.reward) if is_model_reward(config.reward) else 0
    found = judge * each
    found += each * (trained if config.reference is None else weights_in_files(config.reference))
    kind = _kind_of_critic(config, source)
    if kind in ("reward", "actor"):
        layers = body_of(causal_model(actor.scorer.model)).parameters()
        own = judge if kind == "reward" else sum(p.numel() for p in layers)
        trains, frozen = (trained, own) if config.lora else (own, 0)
        wide = torch.promote_types(actor.dtype, torch.float32).itemsize
        # A master, a gradient and two moments for each weight that trains, and a rounded copy if it is narrower.
        found += 4 * wide * trains + each * (frozen + (trains if each < wide else 0))
    return found


def weights_in_files(name: str) -> int:
    """The number of weights of a model, by the headers of its files."""
    base, _ = base_and_adapter(name)
    return sum(math.prod(tensor.shape) for tensor in WeightFiles.read(base).tensors.values())


def look(
    scorer: Scorer, critic: Critic | None, temperature: float, packed: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [M] at the sampling temperature, and values [M] where there is a critic."""
    asked = ScoreRequest(hidden=True) if critic is not None and critic.is_head else None
    with scorer.at_temperature(temperature):
        found = scorer(packed, asked)
    logp_M, hidden_M = (found.logp_M, found.hidden_M) if isinstance(found, TokenScores) else (found, None)
    return logp_M, None if critic is None else critic.values(packed, scorer.layout, hidden_M)
