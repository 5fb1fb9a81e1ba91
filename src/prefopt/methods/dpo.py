"""Direct Preference Optimization and related losses, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from prefopt.config.dpo import DpoConfig
from prefopt.errors import ConfigError, RunError
from prefopt.model.check import CheckReport, check_scoring
from prefopt.model.costs import MEMORY_ERRORS
from prefopt.model.quantised import is_quantised
from prefopt.rl.kl_guard import GuardedBatches, kl_guard
from prefopt.runs.diagnose import diagnose, in_words
from prefopt.runs.history import read_history
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch, Column
from prefopt.train.columns import Values, columns_of
from prefopt.train.data import DataBatches, load_data
from prefopt.train.find_rate import find_rate
from prefopt.train.held_out import NO_ROOM, TOO_LARGE, Choice, HeldOutPrecision, no_room, widened
from prefopt.train.loss_options import Losses, data_kind, describe, losses_of, needs_reference
from prefopt.train.objective import PreferenceObjective, check_rows, inspect_first
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import Policy
from prefopt.train.rate import settle_rate
from prefopt.train.reference import ReferenceChoice, ReferencePlan, ReferenceRun, choose_reference
from prefopt.train.result import TrainingResult
from prefopt.train.run import Run, open_run, read_model
from prefopt.train.trainer import Inspect


def run(
    config: DpoConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainingResult | None:
    """Run DPO, or the other loss of ``config``. ``callbacks``: see :class:`prefopt.runs.callbacks.Callback`.

    ``model``, ``tokenizer`` and ``rows`` replace those of ``config`` (a model is trained in place). Returns None for a
    dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after a stop: the run can
    be resumed.
    """
    config, terms = losses_of(config)
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = read_model(run, tokenizer)
        which = config.pairs or "all"  # None where the losses are not on pairs
        data = run.world.first_on_node(
            lambda: load_data(config, start, rows, run.reporter, run.stop, kind=data_kind(terms), which=which)
        )
        check_rows(terms, data.groups, which)
        choice = None
        if needs_reference(terms):
            choice = run.world.first_on_node(lambda: choose_reference(config, model))

        pictures = data.groups.has_pictures
        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model, run.world, pictures=pictures))
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        check = offline.check(check_scoring)
        settle_rate(run, policy.scorer, updates=offline.steps)
        say(f"loss: {describe(terms)}")
        plan = _reference_plan(offline, terms, choice)
        objective = PreferenceObjective(terms, device=policy.device)
        batches = partial(GuardedBatches, data, offline.sampler, _columns(terms, which), mismatched=plan.mismatched)
        if config.dry_run:
            offline.preview(objective, batches(reference=plan.placeholder()), plan=plan)
            return None
        digest = choice.identity.digest if choice else "none"
        offline.take_folder({"reference": (digest, "the reference model")}, loss=describe(terms))
        source = batches(reference=plan.values(policy.scorer))
        precision = _held_out_precision(run, policy, plan, batches)
        say(policy.make_trainable(run.world))
        if config.find_learning_rate and not find_rate(offline, objective, source, plan):
            return None

        source.guard = guard = kl_guard(offline, plan)
        inspect = _first_look(run, objective, check if choice and choice.is_start else None)
        trainer = offline.fit(objective, source, plan=plan, inspect=inspect, precision=precision)
        measured = guard.measure_saved(trainer) if guard is not None else {}
        return offline.finish(
            trainer,
            measured=measured,
            title=_TITLES.get(config.loss, f"Preference optimisation ({describe(terms)})"),
            tag=terms[0].loss.name.rpartition(":")[2],
            closing=lambda: in_words(diagnose(read_history(run.folder.path))),
        )


def _columns(terms: Losses, which: str) -> partial[dict[str, Column]]:
    """What makes the columns that the losses read, from groups."""
    merge = any("label_P" in (*term.inputs, *term.loss.optional_inputs) for term in terms)
    return partial(columns_of, kind=terms[0].loss.kind, which=which, merge=merge)


def _first_look(run: Run, objective: PreferenceObjective, same: CheckReport | None) -> Inspect:
    """Says whether the loss of the first step is what it must be. ``same``: the load check, where policy and reference
    start as one model."""

    def inspect(step: int, update: int, record: Record, batch: Batch, values: Values) -> bool:
        if step:
            return False
        run.say(line := inspect_first(objective, same, record, batch, values))
        return line is not None

    return inspect


def _reference_plan(offline: OfflineRun, terms: Losses, choice: ReferenceChoice | None) -> ReferencePlan:
    run, reference, read = offline.run, None, offline.groups_read()
    if choice is not None:
        tokens = any(term.loss.needs_head_values for term in terms)
        reference = ReferenceRun(run, choice, offline.policy.scorer, token_values=tokens, shards=offline.policy.shards)
    return ReferencePlan(run, terms, offline.data, reference, offline.start.limit, steps=offline.steps, read=read)


def _held_out_precision(
    run: Run, policy: Policy, plan: ReferencePlan, batches: Callable[..., DataBatches]
) -> HeldOutPrecision | None:
    """What evaluates the held-out rows of a run; None where all evaluations are in the run's dtype.

    Called while ``policy`` is what it was before training: where that is the reference, it is scored here in float32.
    Raises :class:`ConfigError` where ``--eval-dtype float32`` cannot be had.
    """
    asked, name = run.config.eval_dtype, str(run.dtype).removeprefix("torch.")
    if not len(plan.held_out) or asked == "run" or run.dtype not in (torch.bfloat16, torch.float16):
        return None
    if why := _not_in_float32(policy, plan):
        if asked == "float32":
            raise ConfigError(f"--eval-dtype float32: {why}; leave it out")
        if plan.reference is not None:
            run.say(f"held out: evaluated in {name}, since {why}; margins within its rounding are noise")
        return None
    if plan.reference is None and asked == "auto":
        return None  # differences of log-probabilities of different texts are far above rounding
    choice: Choice | None = "float32" if asked == "float32" else run.folder.record.get("eval_dtype")
    if choice == "run":
        return None
    try:
        with widened(policy.masters, run.world):
            values = plan.held_out_values()
    except (*MEMORY_ERRORS, RunError) as error:
        if not no_room(error):
            raise
        if choice is not None:  # asked for, or the losses before the run was stopped are in float32
            raise ConfigError(f"--eval-dtype {asked}: {TOO_LARGE}") from error
        run.say(f"held out: evaluated in {name}: {NO_ROOM}")
        run.folder.remember(eval_dtype="run")
        return None
    batch = batches(reference=values).held_out
    assert batch is not None

    def decided(choice: Choice, line: str) -> None:
        run.say(line)
        run.folder.remember(eval_dtype=choice)

    return HeldOutPrecision(policy, batch, choice, decided, run.world)


def _not_in_float32(policy: Policy, plan: ReferencePlan) -> str | None:
    """Why held-out rows cannot be evaluated in float32, if so."""
    if policy.sharded:
        return "the weights are in shards"
    if is_quantised(policy.scorer.model):
        return "the weights are quantised"
    return "the reference is scored with every batch" if plan.live else None


_TITLES = {"dpo": "Direct Preference Optimization"}
