"""Distillation, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from prefopt.config.distil import DistilConfig
from prefopt.core.options import flag
from prefopt.data.chat.ends import trained_ends
from prefopt.data.table import GroupTable
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.sampler import SamplingParams
from prefopt.model.check import check_scoring
from prefopt.model.kernels.divergence import Divergence
from prefopt.parallel.world import ALONE
from prefopt.reference.identity import identity_of_name, tokenizer_of_name
from prefopt.rl.models import weights_in_files
from prefopt.rl.samplers import policy_sampler
from prefopt.rl.student import StudentBatches, check_prompts
from prefopt.train.data import DataBatches, load_data
from prefopt.train.offline import OfflineRun, Plan
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferenceChoice, ReferenceRun
from prefopt.train.remote_teacher import RemoteTeacher, RemoteTeacherPlan
from prefopt.train.result import TrainingResult
from prefopt.train.run import ModelStart, Run, open_run, read_model
from prefopt.train.teacher import DistillationObjective, TeacherPlan, TopTokensObjective

WORDS = {
    "forward": "forward KL(teacher || model)",
    "reverse": "reverse KL(model || teacher)",
    "jsd": "Jensen-Shannon divergence, the teacher's weight {:g}",
}


def run(
    config: DistilConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainingResult | None:
    """Distil a teacher into a model. ``model``, ``tokenizer`` and ``rows`` replace those of ``config``; a model is
    trained in place.

    Returns None for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after
    a stop: the run can be resumed.
    """
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = read_model(run, tokenizer)
        choice = None if config.teacher_url else run.world.first_on_node(lambda: _teacher(config, start))
        data = run.world.first_on_node(
            lambda: load_data(config, start, rows, run.reporter, run.stop, kind="demonstrations", windows=True)
        )
        if config.on_policy:
            check_prompts(data.groups)
        others = partial(_bytes_of, choice, run.dtype)
        # One that draws is cut when it trains, beside a copy of its modules that the other ranks need not call.
        world = ALONE if config.on_policy else run.world
        pictures = data.groups.has_pictures
        for option in ("teacher_url", "rollout_server") if pictures else ():
            if getattr(config, option):
                raise ConfigError(f"rows have pictures, which {flag(option)} is not given; leave out that or those")
        policy = run.loading(
            Policy(config, start.source, run.dtype, run.device, model, world, others, pictures=pictures)
        )
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        offline.check(check_scoring)
        teacher = None if choice is not None else RemoteTeacher(run, start.tokenizer, policy.scorer)
        objective = _objective(run, choice, policy)
        plan = _plan(run, choice, policy, _source(offline, policy, teacher).groups)
        if config.dry_run:
            offline.preview(objective, _source(offline, policy, teacher, asked=False), plan=plan)
            return None
        plan.say_missing()
        if teacher is None:
            assert choice is not None
            offline.take_folder({"teacher": (choice.identity.digest, "the teacher")})
        else:
            offline.take_folder()
            teacher.recognise(data.groups)
            teacher.ask(data.groups)
        say(policy.make_trainable(run.world, draws=config.on_policy > 0, others=others))
        source = _source(offline, policy, teacher)
        if isinstance(source, StudentBatches):
            source.prepare(policy_sampler(run, policy, start.tokenizer, longest=start.limit))
            drawn = sum(map(source.is_drawn, range(offline.steps)))
            say(f"sampling: {drawn} of {offline.steps} steps learn from the model's own responses")
        trainer = offline.fit(objective, source, plan=plan)
        if isinstance(source, StudentBatches):
            source.close()
        return offline.finish(trainer, title="Distillation", tag="distil")


def _objective(run: Run, choice: ReferenceChoice | None, policy: Policy) -> DistillationObjective:
    config: DistilConfig = run.config
    divergence = Divergence(config.divergence, config.jsd_weight or 0.5)
    if choice is not None:
        run.say(f"teacher: {choice.words}, {choice.identity.digest[:12]}, scored with every batch")
    words = WORDS[config.divergence].format(divergence.weight)
    run.say(f"loss: {words}, mean over every {'token' if config.average == 'tokens' else 'response'}")
    kind = DistillationObjective if choice is not None else TopTokensObjective
    return kind(divergence, config.average, device=policy.device)


def _plan(run: Run, choice: ReferenceChoice | None, policy: Policy, groups: GroupTable) -> Plan:
    if choice is None:
        return RemoteTeacherPlan()
    return TeacherPlan(ReferenceRun(run, choice, policy.scorer, token_values=False, shards=policy.shards), groups)


def _source(offline: OfflineRun, policy: Policy, teacher: RemoteTeacher | None, *, asked: bool = True) -> DataBatches:
    """Batches of the data, or of these and samples. ``asked``: a teacher behind a URL was asked about the data."""
    run, config, data = offline.run, offline.run.config, offline.data
    columns: dict[str, Any] = {}
    if teacher is not None:
        columns["columns"] = teacher.columns if asked else teacher.placeholder
    if not config.on_policy:
        return DataBatches(data, offline.sampler, **columns)
    ends = tuple(trained_ends(data.groups, offline.start.tokenizer))
    if policy.pictures and policy.sharded:
        raise ConfigError("rows have pictures, and models in shards do not sample for them: give --shard none")
    never = (policy.scorer.vision.token_id,) if policy.pictures else ()
    settings = SamplingParams(config.max_new_tokens, ends, seed=config.seed, never=never)
    known = (data, offline.sampler, policy.apart, settings, config.on_policy, run.world)
    return StudentBatches(*known, longest=offline.start.limit, teacher=teacher, **columns)


def _bytes_of(choice: ReferenceChoice | None, dtype: torch.dtype) -> int:
    """Bytes of the weights of a teacher in memory."""
    return 0 if choice is None else weights_in_files(choice.model) * dtype.itemsize


def _teacher(config: DistilConfig, start: ModelStart) -> ReferenceChoice:
    """The teacher, by its present contents. Raises :class:`ModelError` for one with another tokenizer."""
    theirs = tokenizer_of_name(config.teacher, config.teacher_adapter)
    if theirs.get_vocab() != start.tokenizer.get_vocab():
        raise ModelError(
            f"--teacher {config.teacher}: its tokenizer is not that of {config.model}, so that their next tokens cannot"
            " be compared; give a teacher with the same tokenizer"
        )
    identity = identity_of_name(config.teacher, config.teacher_adapter, config.quantise)
    return ReferenceChoice(config.teacher, config.teacher_adapter, False, identity, option="--teacher")
