"""The policy: the trained model, its scorer, and the float32 masters of its trained weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import torch

from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.training import MethodOptions
from prefopt.core.model_folder import base_of, is_adapter
from prefopt.data.tokenizer import Tokenizer
from prefopt.errors import ConfigError
from prefopt.model.adapter import new_lora
from prefopt.model.architectures import causal_model, checkpoint_activations, weights_in
from prefopt.model.checkpoint import describe_untouched, origin_of
from prefopt.model.kernels.head_class import Head
from prefopt.model.load import load_config, load_model, local_folder
from prefopt.model.lora_targets import tower_weights
from prefopt.model.memory import Blueprint
from prefopt.model.offload import HostActivations
from prefopt.model.pictures import VisionInputs
from prefopt.model.placeholders import FromFirst, skeleton
from prefopt.model.precision import MasterWeights, disable_dropout
from prefopt.model.quantised import chosen, is_quantised, set_compute_dtype
from prefopt.model.save import copy_processor
from prefopt.model.scalar import ScalarScorer, has_scalar_head, load_scalar, merge_trained_adapter, scalar_from
from prefopt.model.scorer import PackedModel, Scorer
from prefopt.model.supported import refuse_packed, stays_packed
from prefopt.parallel.tensors import digest_of
from prefopt.parallel.world import ALONE, World
from prefopt.runs.card import save_model
from prefopt.train.memory import blueprint_of

AnyScorer = TypeVar("AnyScorer", bound=PackedModel)
Options = MethodOptions | PpoConfig | OnlineConfig
Shards = Literal["none", "full", "hybrid"]


class Trained(Generic[AnyScorer]):
    """The model as it is before training; ``make_trainable`` then adds what trains. Subclasses load and score it."""

    task: str
    """PEFT's task type."""
    scorer: AnyScorer
    masters: MasterWeights

    def __init__(
        self,
        config: Options,
        dtype: torch.dtype,
        load: Callable[[FromFirst | None], torch.nn.Module],
        device: torch.device,
        *,
        named: bool,
        world: World = ALONE,
        others: Callable[[], int] = int,
        pictures: bool = False,
    ) -> None:
        """``dtype`` is that of computation; ``load`` gives the model. ``named``: it was not given in Python. Of several
        processes in ``world`` each reads its part of a named model alone, where it is cut. ``others``: as of
        :func:`choose`. ``pictures``: some rows have them. Raises :class:`ConfigError` where ``--vision`` would do
        nothing, :class:`ModelError` for a model that takes no pictures."""
        self.pictures = pictures
        if config.vision != "frozen" and not pictures:
            raise ConfigError(f"--vision {config.vision} does nothing here: no row has a picture; leave it out")
        self.shards: Shards = "none"
        """How several processes hold the weights: all of them (``none``), a part each, or a part of each machine's."""
        self.reading: str | None = None
        """A line on how weights in shards were read."""
        self.blueprint: Blueprint | None = None
        """Of a model in shards: how it was before, to count the memory of a pass."""
        self.config, self.dtype, self._named = config, dtype, named
        self._moves_to = device if named else None
        self._never_cut = config.optimizer != "adamw" or bool(config.offload)
        self._new_lora = config.lora and config.named_adapter is None
        self._why = ""
        self._apart: AnyScorer | None = None
        self._trained_head: Head | None = None
        if named and not (world.alone or self._never_cut or config.shard == "none"):
            self._read_in_shards(load, world, device, others)
        if not self.sharded:
            self._begin(load(None))

    @property
    def sharded(self) -> bool:
        """Whether each of several processes holds a part of every weight."""
        return self.shards != "none"

    def _begin(self, model: torch.nn.Module) -> None:
        if is_quantised(model):
            name = self.config.model if self._named else type(model).__name__
            merged = isinstance(self, ScalarPolicy)
            refuse_packed(name, causal_model(model).config, adapter=self.config.lora, merged=merged)
            set_compute_dtype(model, self.dtype)
        for parameter in model.parameters() if self._new_lora else ():
            parameter.requires_grad_(False)
        for tower in VisionInputs(causal_model(model)).towers if self.pictures else ():
            if self.config.vision == "frozen":
                tower.requires_grad_(False)
        self.masters = masters_of(model, self.config, self.dtype, self._moves_to)
        self.scorer = self.score_with(model)

    def _read_in_shards(
        self,
        load: Callable[[FromFirst | None], torch.nn.Module],
        world: World,
        device: torch.device,
        others: Callable[[], int],
    ) -> None:
        """Read this process's part of the model and of a new adapter, unless every process is to have all of it."""
        from prefopt.parallel.loading import from_first, shard_unread
        from prefopt.parallel.shard import choose

        sizes = world.together(lambda: load(skeleton))
        if self._new_lora:
            sizes = self._with_adapter(sizes.requires_grad_(False))
        trained = MasterWeights(sizes, self.dtype).masters
        shards, self._why = choose(self.config.shard, world, sizes, trained, device, others)
        if shards == "none":
            return
        self._begin(load(partial(from_first, world)))
        if self._new_lora:  # it is cut with the rest; until it trains it changes nothing
            before: Any = self.scorer
            self._add_adapter()
            if isinstance(self.scorer, Scorer):  # nor may it change how logits are rounded
                self._trained_head, self.scorer.head = self.scorer.head, before.head
        self.blueprint = blueprint_of(self.scorer, device, self.dtype)
        self.masters, self.reading = shard_unread(
            self.scorer, self.masters, world, self.dtype, device, hybrid=shards == "hybrid"
        )
        self.scorer.choose_flash()
        self.shards = shards

    def _with_adapter(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model in a new LoRA adapter, drawn from the seed."""
        config = self.config
        assert config.lora_rank and config.lora_alpha and config.lora_dropout is not None
        torch.manual_seed(config.seed)
        wrapped = new_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            task=self.task,
            towers=config.vision == "lora",
        )
        if self._named:  # the name, not the folder in the cache of the Hub
            for adapter in getattr(wrapped, "peft_config", {}).values():
                adapter.base_model_name_or_path = config.model
        return wrapped

    def _add_adapter(self) -> None:
        self.scorer.detach_hook()
        model = self._with_adapter(self.scorer.model)
        self.masters.release()
        self.masters = masters_of(model, self.config, self.dtype, self._moves_to)
        self.scorer = self.score_with(model)

    @property
    def apart(self) -> AnyScorer:
        """The scorer for passes that the other ranks do not make, within its ``gathered``."""
        return self.scorer if self._apart is None else self._apart

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

    def make_trainable(self, world: World = ALONE, *, draws: bool = False, others: Callable[[], int] = int) -> str:
        """Add a new LoRA adapter, activation checkpointing and offloading, and cut the weights into shards, as
        configured. Returns a line on what trains. ``draws``: :attr:`apart` is used; ``others``: as of
        :func:`choose`."""
        config = self.config
        if not world.alone and config.offloads("optimizer"):
            raise ConfigError(
                "--offload optimizer is for one process; of several, shards divide the state: --shard full"
            )
        torch.manual_seed(config.seed)
        if self._new_lora and not self.sharded:
            self._add_adapter()
        if self._trained_head is not None and isinstance(self.scorer, Scorer):
            self.scorer.head = self._trained_head
        if config.gradient_checkpointing is True:
            checkpoint_activations(self.scorer.model)
            if self.blueprint is not None:
                checkpoint_activations(self.blueprint.scorer.model)
        if config.offloads("activations"):
            self.scorer.offload = HostActivations(self.scorer)
        trained = sum(p.numel() for p in self.masters.masters.values())
        total = sum(weights_in(p) for p in self.scorer.model.parameters())
        if not config.lora and not self.pictures:
            trained -= tower_weights(causal_model(self.scorer.model))
        compiled = self.scorer.compile_layers() if compiles(config, self.scorer) else None
        if not (world.alone or self.sharded):
            from prefopt.parallel.gathered import shard_with_copy
            from prefopt.parallel.shard import choose, shard

            # One given in Python may have been made on each rank, of numbers drawn at random.
            world.agree("weights at the start", digest_of(self.scorer.model.parameters()))
            packed, model = is_quantised(self.scorer.model), self.scorer.model
            if packed and config.shard in ("full", "hybrid"):
                raise ConfigError(f"--shard {config.shard} cuts weights into parts, and this model's are packed")
            asked = "none" if packed or self._never_cut else config.shard
            self.shards, self._why = choose(asked, world, model, self.masters.masters, self.device, others)
            if self.sharded:
                self.blueprint = blueprint_of(self.scorer, self.device, self.dtype)
                given, hybrid = (self.scorer, self.masters, world, self.dtype), self.shards == "hybrid"
                if draws:
                    self.masters, self._apart = shard_with_copy(*given, hybrid=hybrid)
                else:
                    self.masters = shard(*given, hybrid=hybrid)
        where = [f": adapters of rank {config.lora_rank} on {targets}" for targets in self.adapters.values()]
        if not world.alone:
            where.append(f"; {self._why}")
        if compiled is not None:
            where.append(f"; {compiled}")
        return f"training {trained:,} of {total:,} weights{' (LoRA)' if config.lora else ''}{''.join(where)}"

    def save(self, folder: Path, tokenizer: Tokenizer, *, writes: bool = True) -> None:
        """Write weights and tokenizer; not where another process ``writes``, to which all send their shards."""
        if writes or self.sharded:
            save_model(folder, self.scorer, self.masters, tokenizer, writes=writes)
        if writes and (self.pictures or (self._named and self.task == "CAUSAL_LM")):  # a tower may stay
            copy_processor(str(causal_model(self.scorer.model).name_or_path), folder)

    def release(self) -> None:
        """Restore the model's own attention and gradient flags, for a model given in Python."""
        self.scorer.release()
        self.masters.release()


class Policy(Trained[Scorer]):
    """A causal language model."""

    task = "CAUSAL_LM"

    def __init__(
        self,
        config: Options,
        source: str,
        dtype: torch.dtype,
        device: torch.device,
        given: Any,
        world: World = ALONE,
        others: Callable[[], int] = int,
        *,
        pictures: bool = False,
    ) -> None:
        """Load the model in folder ``source``, unless one is ``given`` in Python. ``dtype`` is that of computation;
        ``others``: as of :func:`choose`; ``pictures``: some rows have them."""

        def load(from_first: FromFirst | None) -> torch.nn.Module:
            if given is not None:
                disable_dropout(given)
                return cast(torch.nn.Module, given)
            adapter = local_folder(config.named_adapter) if config.named_adapter else None
            wide = _loaded_in(config, dtype)
            options: dict[str, Any] = {"quantise": config.quantise, "from_first": from_first, "pictures": pictures}
            model = load_model(source, dtype=wide, device=loaded_on(config, device), adapter=adapter, **options)
            if adapter is not None:
                # An adapter may name its base relative to its own folder; what is saved names it as it was found.
                for peft in getattr(model, "peft_config", {}).values():
                    if peft.base_model_name_or_path and base_of(adapter) == config.model:
                        peft.base_model_name_or_path = config.model
            return model

        whole = given is None and _packed(config, source)  # never cut
        more: dict[str, Any] = {"others": others, "pictures": pictures}
        super().__init__(config, dtype, load, device, named=given is None, world=ALONE if whole else world, **more)

    def score_with(self, model: torch.nn.Module) -> Scorer:
        return Scorer(model, attention=self.config.attention, pictures=self.pictures)


class ScalarPolicy(Trained[ScalarScorer]):
    """A reward model: ``source`` with its scalar head, or with a new one (``fresh``) if it is a language model."""

    task = "SEQ_CLS"

    def __init__(
        self,
        config: Options,
        source: str,
        dtype: torch.dtype,
        device: torch.device,
        given: Any,
        tokenizer: Tokenizer,
        world: World = ALONE,
        *,
        pictures: bool = False,
    ) -> None:
        """See :class:`Policy`. ``tokenizer`` may get a pad token, see :func:`scalar_from`."""
        wide = _loaded_in(config, dtype)
        self.fresh = given is not None or not has_scalar_head(source)

        def load(from_first: FromFirst | None) -> torch.nn.Module:
            if given is not None:
                disable_dropout(given)
                return cast(torch.nn.Module, scalar_from(given, tokenizer, seed=config.seed))
            where = loaded_on(config, device)
            options: dict[str, Any] = {"tokenizer": tokenizer, "seed": config.seed, "quantise": config.quantise}
            options["pictures"] = pictures
            return load_scalar(source, dtype=wide, device=where, from_first=from_first, **options)

        # An adapter is merged into all of the model, and packed weights are never cut.
        whole = given is None and (is_adapter(source) or _packed(config, source))
        more: dict[str, Any] = {"world": ALONE if whole else world, "pictures": pictures}
        super().__init__(config, dtype, load, device, named=given is None, **more)

    def score_with(self, model: torch.nn.Module) -> ScalarScorer:
        return ScalarScorer(model, attention=self.config.attention, pictures=self.pictures)

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
        if self.pictures:
            copy_processor(str(whole.name_or_path), folder)


def _packed(config: Options, source: str) -> bool:
    """Whether the model in folder ``source`` is, or is to be, quantised."""
    return chosen(config.quantise, None) is not None or stays_packed(load_config(source))


def compiles(config: Options, scorer: PackedModel) -> bool:
    """What ``--compile`` comes to. A run that must resume to the same bits is not compiled by ``auto``: generated code
    may depend on the shapes that it was first made for. Nor is one with a loss on routers, which are inside of layers,
    one that moves activations to the host, or a model of which flash attention does not take every layer
    (FlexAttention compiles itself)."""
    if config.compile != "auto":
        return config.compile == "on"
    device = next(scorer.model.parameters()).device
    if config.offloads("activations"):
        return False
    if device.type != "cuda" or config.deterministic or config.attention == "loop" or config.reads_routers:
        return False
    if not scorer.flash_takes_all:
        return False
    from torch.utils._triton import has_triton

    return bool(has_triton())


def _loaded_in(config: Options, dtype: torch.dtype) -> torch.dtype:
    """The dtype to load in: full fine-tuning needs float32 masters from the file, not rounded ones."""
    return dtype if config.lora else torch.promote_types(dtype, torch.float32)


def loaded_on(config: Options, device: torch.device) -> torch.device:
    """Where to load a model: float32 weights that stay on the host never fill a GPU."""
    return torch.device("cpu") if config.offloads("optimizer") and not config.lora else device


def masters_of(
    model: torch.nn.Module, config: Options, dtype: torch.dtype, device: torch.device | None
) -> MasterWeights:
    """The masters of a model that computes in ``dtype``, on the host under ``--offload optimizer``: then the model
    moves to ``device``, where one is given."""
    on_host = config.offloads("optimizer")
    return MasterWeights(model, dtype, on_host=on_host, device=device if on_host else None)
