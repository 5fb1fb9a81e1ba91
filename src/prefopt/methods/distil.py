"""Distillation, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from prefopt.config.distil import DistilConfig
from prefopt.data.chat.ends import trained_ends
from prefopt.errors import ConfigError, ModelError
from prefopt.generate.sampler import SamplingParams
from prefopt.model.check import check_scoring
from prefopt.model.kernels.divergence import Divergence
from prefopt.parallel.world import ALONE
from prefopt.reference.identity import identity_of_name, tokenizer_of_name
from prefopt.rl.models import weights_in_files
from prefopt.rl.student import StudentBatches, check_prompts
from prefopt.train.data import DataBatches, load_data
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import Policy
from prefopt.train.reference import ReferenceChoice, ReferenceRun
from prefopt.train.run import ModelStart, TrainingResult, open_run, read_model
from prefopt.train.teacher import DistillationObjective, TeacherPlan

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
        choice = run.world.first_on_node(lambda: _teacher(config, start))
        data = run.world.first_on_node(
            lambda: load_data(config, start, rows, run.reporter, run.stop, kind="demonstrations", windows=True)
        )
        if config.on_policy:
            check_prompts(data.groups)
        others = partial(_bytes_of, choice, run.dtype)
        # One that draws is cut when it trains, beside a copy of its modules that the other ranks need not call.
        world = ALONE if config.on_policy else run.world
        pictures = data.groups.has_pictures
        if pictures and config.on_policy:
            raise ConfigError("--on-policy samples from prompts of text alone; leave it out, or rows with pictures")
        policy = run.loading(
            Policy(config, start.source, run.dtype, run.device, model, world, others, pictures=pictures)
        )
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        offline.check(check_scoring)
        divergence = Divergence(config.divergence, config.jsd_weight or 0.5)
        mean = "token" if config.average == "tokens" else "response"
        words = WORDS[config.divergence].format(divergence.weight)
        say(f"teacher: {choice.words}, {choice.identity.digest[:12]}, scored with every batch")
        say(f"loss: {words}, mean over every {mean}")
        reference = ReferenceRun(run, choice, policy.scorer, token_values=False, shards=policy.shards)
        plan = TeacherPlan(reference, _source(offline, policy).groups)
        objective = DistillationObjective(divergence, config.average, device=policy.device)
        if config.dry_run:
            offline.preview(objective, _source(offline, policy), plan=plan)
            return None
        plan.say_missing()
        offline.take_folder({"teacher": (choice.identity.digest, "the teacher")})
        say(policy.make_trainable(run.world, draws=config.on_policy > 0, others=others))
        source = _source(offline, policy)
        if isinstance(source, StudentBatches):
            source.prepare(run.folder)
            drawn = sum(map(source.is_drawn, range(offline.steps)))
            say(f"sampling: {drawn} of {offline.steps} steps learn from the model's own responses")
        trainer = offline.fit(objective, source, plan=plan)
        return offline.finish(trainer, title="Distillation", tag="distil")


def _source(offline: OfflineRun, policy: Policy) -> DataBatches:
    run, config, data = offline.run, offline.run.config, offline.data
    if not config.on_policy:
        return DataBatches(data, offline.sampler)
    ends = tuple(trained_ends(data.groups, offline.start.tokenizer))
    settings = SamplingParams(config.max_new_tokens, ends, seed=config.seed)
    scorer, longest = policy.apart, offline.start.limit
    return StudentBatches(data, offline.sampler, scorer, settings, config.on_policy, run.world, longest=longest)


def _bytes_of(choice: ReferenceChoice, dtype: torch.dtype) -> int:
    """Bytes of the teacher's weights."""
    return weights_in_files(choice.model) * dtype.itemsize


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
