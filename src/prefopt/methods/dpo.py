"""Direct Preference Optimization and its kin, from a configuration to a finished model."""

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
from prefopt.train.loss_options import data_kind, describe, losses_of, needs_reference
from prefopt.train.objective import PreferenceObjective, check_rows, inspect_first
from prefopt.train.objectives import balanced, describe_balance
from prefopt.train.offline import OfflineRun, say_truncated
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferencePlan, ReferenceRun, choose_reference, identify, without_values
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

    ``model``, ``tokenizer`` and ``rows`` stand in for what ``config`` names (a model is trained in place).

    Returns none for a dry run. Raises :class:`prefopt.errors.UserError`, and
    :class:`prefopt.errors.Interrupted` after a stop, with everything kept.
    """
    config, terms = losses_of(config)
    paired = terms[0].loss.kind == "pairs"
    pairs = config.pairs or "all"
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = read_model(run, tokenizer)
        data = load_data(
            config,
            start.tokenizer,
            start.limit,
            rows,
            run.reporter,
            kind=data_kind(terms),
            which=pairs if paired else "all",
            stop=run.stop,
        )
        say_truncated(run, start, data)
        check_rows(terms, data.groups, pairs)
        # The reference is named by its contents as they are now.
        choice = choose_reference(config, model) if needs_reference(terms) else None
        identity = identify(choice, model) if choice else None

        policy = run.loading(Policy(config, start.source, run.dtype, run.device, model))
        whole = any(term.loss.whole_batch for term in terms) or config.router_aux_loss_coef is not None
        # A forward pass more, a third of a step's work, where a loss sees the whole batch and it is cut.
        offline = OfflineRun(run=run, start=start, data=data, policy=policy, passes=4 / 3 if whole else 1.0)
        check = offline.check(check_scoring)
        say(f"loss: {describe(terms)}")
        say(describe_balance(policy.scorer.model, config.router_aux_loss_coef))
        reference = None
        if choice and identity:
            tokens = any(term.loss.needs_head_values for term in terms)
            reference = ReferenceRun(choice, identity, policy.scorer, config, token_values=tokens)
        plan = ReferencePlan(
            config,
            terms,
            data,
            reference,
            start.limit,
            run.reporter,
            steps=offline.steps,
            read=offline.groups_read(),
        )
        merge = any("label_P" in (*term.inputs, *term.loss.optional_inputs) for term in terms)
        columns = partial(columns_of, kind=terms[0].loss.kind, which=pairs, merge=merge)

        def objective() -> Any:
            inner = PreferenceObjective(terms, device=policy.device)
            return balanced(inner, policy.scorer.model, config.router_aux_loss_coef)

        if config.dry_run:
            cached = without_values(plan.groups, 0.0) if reference is not None and not plan.live else None
            source = DataBatches(data, offline.sampler, columns, reference=cached, mismatched=plan.mismatched)
            offline.preview(
                objective,
                source,
                reference=lambda: plan.in_memory(policy),
                say_ahead=plan.say_missing,
                ahead=lambda speed: plan.seconds_ahead(policy.scorer, speed),
            )
            return None
        digest = identity.digest if identity else "none"
        offline.take_folder({"reference": (digest, "the reference model")}, loss=describe(terms))
        values = plan.values(policy.scorer, run.folder, run.stop)
        say(policy.make_trainable())
        source = DataBatches(data, offline.sampler, columns, reference=values, mismatched=plan.mismatched)
        goal = objective()
        in_memory = plan.in_memory(policy)
        losses = getattr(goal, "inner", goal)  # the loss that is told is that of the preferences
        known = check if choice and choice.is_start else None

        def inspect(step: int, update: int, record: Record, batch: Batch, found: Values) -> None:
            if step == 0:
                say(inspect_first(losses, known, record, batch, found))

        trainer = offline.fit(goal, source, reference=in_memory, inspect=inspect, movement=plan.movement)
        title = _TITLES.get(config.loss, f"Preference optimisation ({describe(terms)})")
        return offline.finish(
            trainer,
            title=title,
            tag=terms[0].loss.name.rpartition(":")[2],
            closing=lambda: in_words(diagnose(read_history(run.folder.path))),
        )


_TITLES = {"dpo": "Direct Preference Optimization"}
