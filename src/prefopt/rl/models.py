"""The models of PPO: actor, reference, reward model and critic, with the memory that each takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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
from prefopt.model.packing import PackedBatch, PackLayout, pack
from prefopt.model.precision import MasterWeights
from prefopt.model.scalar import ScalarScorer, load_scalar, scalar_from
from prefopt.model.scorer import Scorer, ScoreRequest
from prefopt.reference.in_memory import InMemoryReference, SwappedWeights
from prefopt.train.policy import Policy, ScalarPolicy


class Critic:
    """Either a network of its own (``scorer``), or a head on the actor's hidden states; ``masters`` are what trains.

    A network of its own is what the papers have (Huang et al. 2024, arXiv 2403.17031): what is good to predict a
    reward with is not taken from what is good to predict the next token with. A head costs a forward pass less, and
    next to no memory; its gradient goes on into the actor's layers.
    """

    def __init__(
        self,
        words: str,
        *,
        head: torch.nn.Parameter | None = None,
        network: tuple[ScalarScorer, MasterWeights] | None = None,
        layout: PackLayout | None = None,
    ) -> None:
        """A ``head`` [H], or a ``network`` with what trains of it. ``layout``: how the batches are packed that the
        network will be given, which may be another way than its own."""
        self.words, self._layout = words, layout
        self.scorer = network[0] if network is not None else None
        self._own = network[1] if network is not None else None
        self.masters = self._own.masters if self._own is not None else {}
        if head is not None:
            self.masters = {"weight": head}

    @property
    def is_head(self) -> bool:
        """Whether it reads the actor's hidden states."""
        return self.scorer is None

    def values(self, batch: PackedBatch, hidden_M: torch.Tensor | None) -> torch.Tensor:
        """Values [M], float32 or wider; ``hidden_M`` [M, H] are the actor's, for a head on them."""
        if self.scorer is not None:
            values: torch.Tensor = self.scorer(self._packed(batch), tokens=True)
            return values
        assert hidden_M is not None
        wide = hidden_M.to(wide_dtype(hidden_M.dtype))
        return wide @ self.masters["weight"].to(wide.dtype)

    def _packed(self, batch: PackedBatch) -> PackedBatch:
        """As the critic takes it: it may be of another architecture than the actor."""
        assert self.scorer is not None
        if self._layout == self.scorer.layout:
            return batch
        return pack(batch.groups, self.scorer.layout).to(batch.target.device)

    def train(self, mode: bool = True) -> None:
        """Into training mode, in which activation checkpointing works, or out of it; dropout is off in both."""
        if self.scorer is not None:
            self.scorer.train(mode)

    def publish(self) -> None:
        """Let the network compute with what the optimiser made of its weights."""
        if self._own is not None:
            self._own.publish()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for master in self.masters.values():
            master.grad = None
        if self._own is not None:
            self._own.zero_grad()

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Set the weights that train."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()

    def saved(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that train by name, for checkpoints."""
        for name, master in self.masters.items():
            yield name, master.detach()

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, masters and all."""
        own = list(self.scorer.model.parameters()) if self.scorer is not None else []
        return sum(p.numel() * p.element_size() for p in {id(p): p for p in (*own, *self.masters.values())}.values())


def head_critic(actor: Scorer, *, seed: int) -> Critic:
    """A new head on ``actor``. Raises :class:`ModelError` where the architecture hides its hidden states."""
    if actor.head.kind == "model":
        raise ModelError(f"--critic head: {type(causal_model(actor.model)).__name__} does not show its hidden states")
    embedding = causal_model(actor.model).get_input_embeddings()
    width = int(embedding.embedding_dim)
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    weight = torch.nn.Parameter(drawn.to(embedding.weight.device, wide_dtype(actor.dtype)))
    return Critic("a head on the actor's layers", head=weight)


def network_critic(
    kind: str,
    actor: Scorer,
    source: str,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    seed: int,
    checkpointing: bool,
    adapter: str | None = None,
    adapt: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
) -> Critic:
    """A critic that starts as the model in folder ``source``, the ``kind`` model of the run: a reward model, or a
    language model with a new scalar head, with ``adapter`` (a folder) folded in. It computes in ``dtype``.

    All of it trains, or, with ``adapt``, the adapter that this puts on and the scalar head; the rest then needs neither
    gradients nor masters nor state of the optimiser. Raises :class:`ModelError` where the architecture has no scalar
    head.
    """
    wide, device = torch.promote_types(dtype, torch.float32), next(actor.model.parameters()).device
    own_tokens = copy.deepcopy(tokenizer)  # a pad token may be put on it, which the actor's has no need of
    model: torch.nn.Module
    if adapter is not None:
        base = load_merged(local_folder(source), adapter, dtype=wide, device=device)
        model = scalar_from(base, own_tokens, seed=seed)
    else:
        loaded_in = dtype if adapt is not None else wide
        model = load_scalar(local_folder(source), dtype=loaded_in, device=device, tokenizer=own_tokens, seed=seed)
    if vocabulary_size(causal_model(model)) < len(tokenizer):
        raise ModelError(f"{source}: its vocabulary is smaller than the tokenizer's; they belong to different models")
    model.requires_grad_(adapt is None)
    if adapt is not None:
        torch.manual_seed(seed)
        model = adapt(model)
    if checkpointing:
        checkpoint_activations(model)
    own = MasterWeights(model, dtype)
    what = "a network of its own" if adapt is None else "an adapter on a network of its own"
    scorer = ScalarScorer(model, attention=actor.attention)
    return Critic(f"{what}, started from the {kind} model", network=(scorer, own), layout=actor.layout)


@dataclass(frozen=True, slots=True)
class PpoModels:
    """``actor`` is trainable already. The reference is the actor's own model with the weights it began with, where no
    other is named: of a LoRA run it is the same base, with the adapter as it was (a new one changes nothing)."""

    actor: Policy
    reference: InMemoryReference
    judge: RewardScorer
    critic: Critic | None

    def memory(self) -> dict[str, int]:
        """Bytes of weights by model; what the reference shares with the actor counts as the actor's."""
        own = _bytes(self.actor.scorer.model)
        own += sum(_size(p) for p in self.actor.masters.masters.values() if not _is_of(p, self.actor.scorer.model))
        held = self.reference.weights
        found = {"actor": own}
        if held is not None:
            found["reference"] = sum(_size(value) for value in held.saved().values())
        else:
            found["reference"] = _bytes(self.reference.scorer.model)
        found["reward"] = _bytes(self.judge.scorer.model) if isinstance(self.judge, RewardModelScorer) else 0
        found["critic"] = self.critic.weight_bytes if self.critic is not None else 0
        return found

    def words(self) -> list[str]:
        """Lines that a run prints."""
        memory = {name: size(of) for name, of in self.memory().items() if of}
        shared = self.reference.weights is not None
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
    judge: RewardScorer | None,
) -> PpoModels:
    """Everything beside the actor, from folder ``source`` where it was named by one. ``longest``: tokens of prompt and
    response; ``judge`` stands in for ``config.reward``. Raises :class:`ModelError` where two models do not fit, and
    :class:`ConfigError` for a critic that cannot be made."""
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
            f"--reference {config.reference}: its vocabulary is another than the model's; take its own kin"
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


def look(
    scorer: Scorer, critic: Critic | None, temperature: float, packed: PackedBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [M] at the sampling temperature, and values [M] where there is a critic."""
    asked = ScoreRequest(hidden=True) if critic is not None and critic.is_head else None
    with scorer.at_temperature(temperature):
        found = scorer(packed, asked)
    logp_M, hidden_M = (found.logp_M, found.hidden_M) if isinstance(found, TokenScores) else (found, None)
    return logp_M, None if critic is None else critic.values(packed, hidden_M)
