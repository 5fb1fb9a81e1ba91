"""A training run: the stages before and after training that all methods share. A method calls them in turn::

with open_run(config, model=model, callbacks=callbacks) as run:
    start = read_model(run, tokenizer)              # tokenizer and configuration
    data = load_data(...)
    policy = run.loading(Policy(...))               # released when the run ends
    ...
    trainer = run.trainer({"policy": network}, policy, objective, source, steps=steps, token_budget=tokens)
    trainer.fit()
    return run.finish(...)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from prefopt import __version__ as VERSION
from prefopt.config.methods import method_of
from prefopt.config.online import OnlineConfig
from prefopt.config.ppo import PpoConfig
from prefopt.config.training import MethodOptions
from prefopt.core.files import output_errors
from prefopt.core.phases import PhaseClock, clocked
from prefopt.core.ranks import check_ranks, ranks_in, restarted
from prefopt.core.terminal import Reporter, StopRequest, duration, size
from prefopt.core.yaml_file import write_document
from prefopt.data.chat.truncate import sequence_limit
from prefopt.errors import ConfigError
from prefopt.model.architectures import causal_model, context_length
from prefopt.model.card import write_card
from prefopt.model.check import CheckReport
from prefopt.model.costs import peak_memory
from prefopt.model.load import load_config, local_folder
from prefopt.model.precision import made_current, resolve_device, resolve_dtype
from prefopt.model.quantised import check_quantisable, quantised_words
from prefopt.model.save import add_end_tokens, repair_generation
from prefopt.model.supported import refuse_untrainable
from prefopt.parallel.world import ALONE, World, is_of_peers, open_world, peer_failed
from prefopt.reference.identity import tokenizer_of_name
from prefopt.runs.callbacks import Callbacks, default_callbacks
from prefopt.runs.folder import FREE, RunFolder
from prefopt.runs.metrics import Metrics, Spending, spending
from prefopt.runs.settings import set_values, shown
from prefopt.train import budget
from prefopt.train.named_adapter import with_base
from prefopt.train.objective import Objective
from prefopt.train.optim import Network
from prefopt.train.policy import Trained
from prefopt.train.routing import expert_use
from prefopt.train.saver import Saver
from prefopt.train.source import BatchSource
from prefopt.train.trainer import Trainer

Options = MethodOptions | PpoConfig | OnlineConfig
EXAMPLE_LINES, EXAMPLE_TEXT = 10, 400
"""Most lines of the example of a dry run, and characters of each text: the whole output should fit a screen."""
RANK_SEED = 1_000_003
"""Ranks draw dropout from seeds that lie so far apart."""
AnyTrained = TypeVar("AnyTrained", bound="Trained[Any]")


@dataclass
class Run:
    """A run in progress: its options, output folder, device, and reports. ``given`` is a model given in Python."""

    config: Any
    given: Any
    reporter: Reporter
    stop: StopRequest
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype
    costs: Spending
    callbacks: Callbacks
    world: World = ALONE
    loaded: list[Trained[Any]] = field(default_factory=list)
    clock: PhaseClock = field(default_factory=PhaseClock)

    def say(self, line: str | None) -> None:
        """Print a line, unless it is None."""
        if line is not None:
            self.reporter.say(line)

    def loading(self, policy: AnyTrained) -> AnyTrained:
        """Release ``policy`` when the run ends."""
        self.loaded.append(policy)
        self.say(quantised_words(policy.scorer.model))
        if self.config.attention != "auto" and policy.scorer.path == "separate":
            raise ConfigError(f"--attention does nothing here: {policy.scorer.reason}; leave it out")
        if self.config.compile == "on":
            if policy.scorer.path == "separate":
                raise ConfigError(f"--compile on does nothing here: {policy.scorer.reason}; leave it out")
            if policy.scorer.all_recurrent:
                kinds = policy.scorer.recurrent[0]
                raise ConfigError(f"--compile on does nothing here: all layers are recurrent ({kinds}); leave it out")
        return policy

    def options(self) -> str:
        """The options as a file for ``--config``, without those on this start alone: ``--dry-run``, ``--resume``,
        ``--overwrite``."""
        return write_document(
            type(self.config), {**self.config.to_dict(), "dry_run": False, "resume": False, "overwrite": False}
        )

    def say_options(self) -> None:
        """Print the options that are set, in a line."""
        found = set_values(method_of(self.config) or "", self.config.to_dict())
        said = " ".join(f"{name}={shown(value)}" for name, value in found.items())
        self.say(
            f"options set: {said or 'none'} (given, or set by the loss or the model's size; --print-config prints all)"
        )

    def say_example(self, title: str, text: str) -> None:
        """Print an example of the data, cut to :data:`EXAMPLE_LINES` lines."""
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > EXAMPLE_LINES:
            cut = len(lines) - EXAMPLE_LINES + 1
            half = EXAMPLE_LINES // 2
            lines = [*lines[:half], f"[... {cut} more lines ...]", *lines[half + cut :]]
        self.reporter.show("\n".join([title, *lines]))

    def say_scoring(self, policy: Trained[Any], check: CheckReport, twin: str = "") -> None:
        """Report how the model is scored, and how exactly."""
        scorer = policy.scorer
        if scorer.reason and scorer.path == "separate":
            self.say(f"scoring: each response separately, since {scorer.reason}")
        where = f"{scorer.kernel_version}, {str(self.dtype).removeprefix('torch.')}, {self.device}"
        self.say(f"scoring: {scorer.path} ({where});{twin} rounding {check.noise:.1g} {check.unit}")

    def take_folder(self, same: Mapping[str, tuple[Any, str]], **facts: Any) -> None:
        """Lock the output folder for this run. ``same``: what a resume must not change, name in ``run.json`` to (value,
        words); ``facts`` are recorded, too."""
        self.world.on_first(self.folder.take)
        for name, (value, words) in same.items():
            self.world.agree(words.removeprefix("the "), value)
            self.folder.same(name, value, words)
        self.folder.remember(**facts)
        path = self.folder.path / "config.yaml"
        if self.world.first:
            with output_errors(path):
                path.write_text(self.options(), encoding="utf-8")

    def trainer(
        self,
        networks: Mapping[str, Network],
        policy: Trained[Any],
        objective: Objective,
        source: BatchSource,
        *,
        steps: int,
        token_budget: int,
        **more: Any,
    ) -> Trainer:
        """A trainer, at its checkpoint if the run is resumed. ``more``: fields of :class:`Trainer`."""
        config = self.config
        trainer = Trainer(
            scorer=policy.scorer,
            networks=networks,
            objective=objective,
            source=source,
            steps=steps,
            max_grad_norm=config.max_grad_norm,
            eval_every=getattr(config, "eval_every", None),
            early_stopping=getattr(config, "early_stopping", None),
            save_every=config.save_every,
            keep_last=config.keep_last,
            metrics=Metrics(self.folder.path / "metrics.jsonl", writes=self.world.first),
            reporter=self.reporter,
            saver=Saver(self.folder.checkpoints, self.world, self.say),
            stop=self.stop,
            token_budget=token_budget,
            callbacks=self.callbacks,
            measure_costs=self.costs.measured,
            world=self.world,
            lockstep=policy.sharded,
            experts=expert_use(objective),
            **more,
        )
        torch.manual_seed(config.seed + 1 + RANK_SEED * self.world.rank)
        if config.resume:
            trainer.resume()
        return trainer

    def save(self, policy: Trained[Any], tokenizer: Any, ends: Sequence[int]) -> None:
        """Write the model; ``ends`` are the tokens that ended trained answers."""
        self.say(repair_generation(causal_model(policy.scorer.model)))
        policy.save(self.folder.path, tokenizer, writes=self.world.first)
        if self.world.first:
            self.say(add_end_tokens(self.folder.path, ends, tokenizer, policy.scorer.model))

    def finish(
        self,
        policy: Trained[Any],
        results: Mapping[str, Any],
        *,
        seconds: float,
        title: str,
        tag: str,
        data: str,
        licence: str = "The licences of the base model and of the data apply.",
        closing: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Write the card and the results in ``run.json``. ``closing`` makes the last lines of the log."""
        results = {
            **results,
            "training time": duration(seconds),
            "peak memory": size(peak_memory(self.device)),
            **policy.adapters,
        }
        self.costs.note()
        if self.world.first:
            write_card(
                self.folder.path,
                model=self.config.model,
                title=title,
                tag=tag,
                data=data,
                files=self._data_names(),
                settings={n: v for n, v in self.config.to_dict().items() if n not in FREE},
                results=results,
                license=licence,
            )
            self.folder.finish(results, keep_checkpoints=bool(self.config.save_every))
            for line in closing():
                self.say(line)
        self.world.barrier()  # whoever reads the folder next, on any rank, finds it finished
        since = " since it was resumed" if self.config.resume else ""
        self.say(f"done in {self.clock.in_words()}{since}: {self.folder.path}")

    def _data_names(self) -> list[str]:
        """The names of all data that the run read."""
        options = self.config.to_dict()
        return [
            name
            for key in ("data", "eval_data", "prompts", "eval_prompts", "ptx_data")
            for name in options.get(key) or ()
        ]


@contextmanager
def open_run(config: Options, *, model: Any = None, callbacks: Sequence[Any] = ()) -> Iterator[Run]:
    """A run of ``config``. Its output folder is checked, but not written to before :meth:`Run.take_folder`.

    Raises :class:`prefopt.errors.UserError` where the options do not fit this machine or the folder.
    """
    with StopRequest() as stop, clocked() as clock:
        check_ranks(config, method_of(config), ranks_in())
        world = open_world()
        # Of several machines, torchrun counts the restart only on the one where a process failed.
        if any(world.gather(restarted())) and not (config.resume or config.dry_run):
            config = replace(config, resume=True, overwrite=False)
        reporter = Reporter(config.progress if world.first else "none")
        name = config.device
        if not world.alone and name in (None, "cuda") and torch.cuda.is_available():
            name = f"cuda:{torch.cuda.current_device()}"
        device = resolve_device(name) if model is None else made_current(next(model.parameters()).device)
        if config.device and torch.device(config.device).type != device.type:
            raise ConfigError(f"--device {config.device}: the model given is on {device}; move it with model.to()")
        dtype = resolve_dtype(config.dtype, device)
        if model is None:
            config = with_base(config, reporter.say)
        world.agree("options", config.to_dict())
        world.agree("versions of prefopt and torch, device or dtype", (VERSION, torch.__version__, device.type, dtype))
        folder = world.on_first(
            lambda: RunFolder(
                Path(config.output),
                config.to_dict(),
                resume=config.resume,
                dry=config.dry_run,
                overwrite=config.overwrite,
            )
        )
        folder.writes = world.first
        own = default_callbacks(config, folder) if world.first else []
        told = Callbacks([*own, *callbacks], config.to_dict(), world)
        budget.prepare_machine(config, dtype, device, reporter)
        if not world.alone:
            reporter.say(f"processes: {world.size}, {world.ranks.local_size} on each machine")
        with spending(folder, device, world) as costs:
            run = Run(config, model, reporter, stop, folder, device, dtype, costs, told, world, clock=clock)
            try:
                yield run
            except RuntimeError as error:
                if not world.alone and is_of_peers(error):
                    raise peer_failed() from error
                raise
            finally:
                for policy in run.loaded:
                    policy.release()


@dataclass(slots=True)
class ModelStart:
    """A model before it is loaded: its folder (empty for one given in Python), tokenizer and number of positions, and
    the ``limit`` of tokens in a sequence."""

    source: str
    tokenizer: Any
    positions: int | None
    limit: int


def read_model(run: Run, tokenizer: Any = None, *, merged: bool = False) -> ModelStart:
    """Read the tokenizer and the configuration of the run's model. ``tokenizer`` is one given in Python; ``merged``: an
    adapter will be saved merged into the model.

    Raises :class:`prefopt.errors.ModelError` for a model that cannot be trained.
    """
    config = run.config
    source = "" if run.given is not None else run.world.first_on_node(lambda: local_folder(config.model))
    # A copy, since a chat template may be put on it.
    found = copy.deepcopy(tokenizer) if tokenizer is not None else tokenizer_of_name(config.model, config.named_adapter)
    configuration = run.given.config if run.given is not None else load_config(source)
    name = config.model if run.given is None else type(run.given).__name__
    refuse_untrainable(name, configuration, adapter=config.lora, merged=merged)
    if run.given is None:
        check_quantisable(config.quantise, configuration, name, run.device, run.dtype)
    elif config.quantises:
        raise ConfigError(f"--quantise {config.quantise}: a model given in Python is loaded already; quantise it there")
    positions = context_length(configuration)
    return ModelStart(source, found, positions, sequence_limit(config.max_length, positions))


def steps_of(config: Options, steps_per_epoch: int) -> int:
    """The number of steps of a run."""
    steps = max(1, math.ceil(config.epochs * steps_per_epoch))
    return min(steps, config.max_steps or steps)
