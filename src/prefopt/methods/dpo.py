"""Direct Preference Optimization and related losses, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from prefopt.config.dpo import DpoConfig
from prefopt.model.check import check_scoring
from prefopt.runs.diagnose import diagnose, in_words
from prefopt.runs.history import read_history
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.columns import Values, columns_of
from prefopt.train.data import DataBatches, load_data
from prefopt.train.loss_options import Losses, data_kind, describe, losses_of, needs_reference
from prefopt.train.objective import PreferenceObjective, check_rows, inspect_first
from prefopt.train.objectives import describe_balance
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferenceChoice, ReferencePlan, ReferenceRun, choose_reference
from prefopt.train.run import TrainingResult, open_run, read_model


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

        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model, run.world))
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        check = offline.check(check_scoring)
        say(f"loss: {describe(terms)}")
        say(describe_balance(policy.scorer.model, config.router_aux_loss_coef))
        plan = _reference_plan(offline, terms, choice)
        objective = PreferenceObjective(terms, device=policy.device)
        merge = any("label_P" in (*term.inputs, *term.loss.optional_inputs) for term in terms)
        columns = partial(columns_of, kind=terms[0].loss.kind, which=which, merge=merge)
        batches = partial(DataBatches, data, offline.sampler, columns, mismatched=plan.mismatched)

        if config.dry_run:
            offline.preview(objective, batches(reference=plan.placeholder()), plan=plan)
            return None
        digest = choice.identity.digest if choice else "none"
        offline.take_folder({"reference": (digest, "the reference model")}, loss=describe(terms))
        source = batches(reference=plan.values(policy.scorer))
        say(policy.make_trainable(run.world))

        def inspect(step: int, update: int, record: Record, batch: Batch, values: Values) -> bool:
            if step:
                return False
            same = check if choice and choice.is_start else None
            say(line := inspect_first(objective, same, record, batch, values))
            return line is not None

        trainer = offline.fit(objective, source, plan=plan, inspect=inspect)
        return offline.finish(
            trainer,
            title=_TITLES.get(config.loss, f"Preference optimisation ({describe(terms)})"),
            tag=terms[0].loss.name.rpartition(":")[2],
            closing=lambda: in_words(diagnose(read_history(run.folder.path))),
        )


def _reference_plan(offline: OfflineRun, terms: Losses, choice: ReferenceChoice | None) -> ReferencePlan:
    run, reference, read = offline.run, None, offline.groups_read()
    if choice is not None:
        tokens = any(term.loss.needs_head_values for term in terms)
        reference = ReferenceRun(run, choice, offline.policy.scorer, token_values=tokens, shards=offline.policy.shards)
    return ReferencePlan(run, terms, offline.data, reference, offline.start.limit, steps=offline.steps, read=read)


_TITLES = {"dpo": "Direct Preference Optimization"}
