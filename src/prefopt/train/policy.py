"""The policy: the trained model, its scorer, and the float32 masters of its trained weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from prefopt.config.ppo import PpoConfig
from prefopt.config.training import ADAPTER_SHAPE, FILLED, MethodOptions, ModelOptions
from prefopt.core.model_folder import base_of, is_adapter
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations
from prefopt.model.checkpoint import describe_untouched, origin_of
from prefopt.model.load import base_and_adapter, load_model, local_folder
from prefopt.model.lora_targets import tower_weights
from prefopt.model.memory import Blueprint
from prefopt.model.offload import HostActivations
from prefopt.model.precision import MasterWeights, disable_dropout
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, merge_trained_adapter, scalar_from
from prefopt.model.scorer import PackedModel, Scorer
from prefopt.parallel.tensors import digest_of
from prefopt.parallel.world import ALONE, World
from prefopt.reference.identity import adapter_line
from prefopt.runs.card import save_model

AnyScorer = TypeVar("AnyScorer", bound=PackedModel)
Options = MethodOptions | PpoConfig


class Trained(Generic[AnyScorer]):
    """The model as it is before training; ``make_trainable`` then adds what trains. Subclasses load and score it."""

    task: str
    """PEFT's task type."""
    scorer: AnyScorer

    def __init__(
        self,
        config: Options,
        dtype: torch.dtype,
        model: torch.nn.Module,
        *,
        named: bool,
        device: torch.device | None = None,
    ) -> None:
        """``dtype`` is that of computation, ``device`` where the model moves to. ``named``: the model was not given in
        Python."""
        self.sharded = False
        """Whether each of several processes holds a part of every weight."""
        self.blueprint: Blueprint | None = None
        """Of a model in shards: how it was before, to count the memory of a pass."""
        self.config, self.dtype, self._named = config, dtype, named
        self._new_lora = config.lora and config.named_adapter is None
        for parameter in model.parameters() if self._new_lora else ():
            parameter.requires_grad_(False)
        self.masters = self._masters(model, device)
        self.scorer = self.score_with(model)

    def _masters(self, model: torch.nn.Module, device: torch.device | None = None) -> MasterWeights:
        return MasterWeights(model, self.dtype, on_host=self.config.offloads("optimizer"), device=device)

    def score_with(self, model: torch.nn.Module) -> AnyScorer:
        """The scorer of a model."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.scorer.model.parameters()).device

    @property
    def adapters(self) -> dict[str, str]:
        """For cards: the fraction of each kind of weight that a new adapter trains, in words; empty without one."""
        targets: str | None = getattr(self.scorer.model, "prefopt_targets", None)
        return {"adapters": targets} if targets else {}

    def leftover(self) -> str | None:
        """A line on the weights in the model's folder that are not trained; None if there are none."""
        origin = origin_of(causal_model(self.scorer.model))
        words = describe_untouched(origin) if origin is not None else None
        if origin is None or words is None or (origin.kept and self.config.lora):
            return None  # an adapter is saved without its model
        return f"not trained, and saved as they are: {words}" if origin.kept else f"not in a reward model: {words}"

    def make_trainable(self, world: World = ALONE, *, whole: bool = False) -> str:
        """Add a new LoRA adapter, activation checkpointing and offloading, and cut the weights into shards, as
        configured. Returns a line on what trains. ``whole``: not into shards, however large they are."""
        config = self.config
        if not world.alone and config.offloads("optimizer"):
            raise ConfigError(
                "--offload optimizer is for one process; of several, shards divide the state: --shard full"
            )
        torch.manual_seed(config.seed)
        if self._new_lora:
            self.scorer.detach_hook()
            assert config.lora_rank and config.lora_alpha and config.lora_dropout is not None
            model = new_lora(
                self.scorer.model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
                task=self.task,
            )
            if self._named:  # the name, not the folder in the cache of the Hub
                for adapter in getattr(model, "peft_config", {}).values():
                    adapter.base_model_name_or_path = config.model
            self.masters.release()
            self.masters = self._masters(model)
            self.scorer = self.score_with(model)
        if config.gradient_checkpointing is True:
            checkpoint_activations(self.scorer.model)
        if config.offloads("activations"):
            self.scorer.offload = HostActivations(self.scorer)
        trained = sum(p.numel() for p in self.masters.masters.values())
        total = sum(p.numel() for p in self.scorer.model.parameters())
        if not config.lora:
            trained -= tower_weights(causal_model(self.scorer.model))
        if not world.alone:
            from prefopt.parallel.shard import choose, shard

            # One given in Python may have been made on each rank, of numbers drawn at random.
            world.agree("weights at the start", digest_of(self.scorer.model.parameters()))
            whole = whole or config.optimizer != "adamw" or bool(config.offload)
            mode, why = choose("none" if whole else config.shard, world, self.scorer, self.masters.masters)
            if mode != "none":
                with suppress(Exception):  # of any kind, from the model's class: memory is then estimated
                    self.blueprint = Blueprint.of(self.scorer)
                self.masters = shard(self.scorer, self.masters, world, self.dtype, hybrid=mode == "hybrid")
                self.sharded = True
        where = [f": adapters of rank {config.lora_rank} on {targets}" for targets in self.adapters.values()]
        if not world.alone:
            where.append(f"; {why}")
        return f"training {trained:,} of {total:,} weights{' (LoRA)' if config.lora else ''}{''.join(where)}"

    def save(self, folder: Path, tokenizer: Tokenizer, *, writes: bool = True) -> None:
        """Write weights and tokenizer; not where another process ``writes``, to which all send their shards."""
        if writes or self.sharded:
            save_model(folder, self.scorer, self.masters, tokenizer, writes=writes)

    def release(self) -> None:
        """Restore the model's own attention and gradient flags, for a model given in Python."""
        self.scorer.detach_hook()
        self.masters.release()


class Policy(Trained[Scorer]):
    """A causal language model."""

    task = "CAUSAL_LM"

    def __init__(self, config: Options, source: str, dtype: torch.dtype, device: torch.device, given: Any) -> None:
        """Load the model in folder ``source``, unless one is ``given`` in Python. ``dtype`` is that of computation."""
        model = given
        if model is None:
            adapter = local_folder(config.named_adapter) if config.named_adapter else None
            model = load_model(
                source, dtype=_loaded_in(config, dtype), device=loaded_on(config, device), adapter=adapter
            )
            if adapter is not None:
                # An adapter may name its base relative to its own folder; what is saved names it as it was found.
                for peft in getattr(model, "peft_config", {}).values():
                    if peft.base_model_name_or_path and base_of(adapter) == config.model:
                        peft.base_model_name_or_path = config.model
        else:
            disable_dropout(model)
        super().__init__(config, dtype, model, named=given is None, device=device if given is None else None)

    def score_with(self, model: torch.nn.Module) -> Scorer:
        return Scorer(model, attention=self.config.attention)


class ScalarPolicy(Trained[ScalarScorer]):
    """A reward model: ``source`` with its scalar head, or with a new one (``fresh``) if it is a language model."""

    task = "SEQ_CLS"

    def __init__(
        self, config: Options, source: str, dtype: torch.dtype, device: torch.device, given: Any, tokenizer: Tokenizer
    ) -> None:
        """See :class:`Policy`. ``tokenizer`` may get a pad token, see :func:`scalar_from`."""
        wide = _loaded_in(config, dtype)
        self.fresh = given is not None or not has_scalar_head(source)
        if given is None:
            where = loaded_on(config, device)
            model = load_scalar(source, dtype=wide, device=where, tokenizer=tokenizer, seed=config.seed)
        else:
            disable_dropout(given)
            model = scalar_from(given, tokenizer, seed=config.seed)
        super().__init__(config, dtype, model, named=given is None, device=device if given is None else None)

    def score_with(self, model: torch.nn.Module) -> ScalarScorer:
        return ScalarScorer(model, attention=self.config.attention)

    def save(self, folder: Path, tokenizer: Tokenizer, *, writes: bool = True) -> None:
        """Save the whole model, with an adapter merged: its base has neither the head nor the configuration."""
        if not self.config.lora:
            super().save(folder, tokenizer, writes=writes)
            return
        if self.sharded:
            from prefopt.parallel.shard import made_whole

            made_whole(self.scorer, keep=writes)
        if not writes:
            return
        wide = torch.promote_types(self.dtype, torch.float32)
        self.scorer.detach_hook()
        trained = {} if self.sharded else dict(self.masters.saved())  # of shards they are the model's own weights
        whole = merge_trained_adapter(self.scorer.model, trained, wide).requires_grad_(True)
        # What was in shards can be saved, but no longer scored, which a new scorer would try.
        scorer = self.scorer if self.sharded else ScalarScorer(whole)
        scorer.model = whole
        save_model(folder, scorer, MasterWeights(whole, wide), tokenizer)


def _loaded_in(config: Options, dtype: torch.dtype) -> torch.dtype:
    """The dtype to load in: full fine-tuning needs float32 masters from the file, not rounded ones."""
    return dtype if config.lora else torch.promote_types(dtype, torch.float32)


def loaded_on(config: Options, device: torch.device) -> torch.device:
    """Where to load a model: float32 weights that stay on the host never fill a GPU."""
    return torch.device("cpu") if config.offloads("optimizer") and not config.lora else device


Config = TypeVar("Config")


def with_base(config: Config, say: Callable[[str], None] | None = None) -> Config:
    """Where ``model`` or ``reference`` is an adapter, move it to its own option and put its base in its place.

    Raises :class:`ConfigError` where that option is set too, :class:`ModelError` where the adapter names no base.
    """
    if say is not None and (line := adapter_line(getattr(config, "model"))):  # noqa: B009 - of any config
        say(line)
    for name, option in (("model", "adapter"), ("reference", "reference_adapter")):
        model = getattr(config, name, None)
        if model is None or not hasattr(config, option) or not is_adapter(source := local_folder(model)):
            continue
        if (other := getattr(config, option)) is not None:
            raise ConfigError(f"--{name} {model} is an adapter itself: leave {other} out, or name the model of both")
        base_and_adapter(model)  # its error names base and adapter
        changed: dict[str, Any] = {name: base_of(source), option: model}
        if isinstance(config, ModelOptions) and name == "model":
            # When defaults were filled in, a name on the Hub was not known to be an adapter's.
            changed |= {shape: None for shape in ADAPTER_SHAPE if getattr(config, shape) == FILLED.get(shape)}
        config = replace(config, **changed)  # type: ignore[type-var]
    return config
