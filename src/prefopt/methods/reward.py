"""A reward model from preferences, from a configuration to a finished model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from prefopt.config.reward import RewardConfig
from prefopt.core.files import write_json
from prefopt.data.table import GroupTable
from prefopt.errors import ConfigError, DataError
from prefopt.model.architectures import causal_model
from prefopt.model.check import CheckReport, check_scalars
from prefopt.model.scalar import ScalarScorer, response_rewards, set_shift, shift_of
from prefopt.train.columns import columns_of, preference_batch
from prefopt.train.data import DataBatches, TrainingData, load_data
from prefopt.train.objective import check_scores
from prefopt.train.objectives import RewardObjective
from prefopt.train.offline import OfflineRun
from prefopt.train.policy import ScalarPolicy
from prefopt.train.reliability import Reliability, draw, reliability
from prefopt.train.result import RewardResult
from prefopt.train.run import Run, open_run, read_model

ZERO_FROM = 1000
"""Training prompts to measure the shift on: its standard error is a thirtieth of the rewards' standard deviation."""


def run(
    config: RewardConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Iterable[Mapping[str, object]] | None = None,
    callbacks: Sequence[Any] = (),
) -> RewardResult | None:
    """Train a reward model. ``model`` (a language model, whose layers are trained in place), ``tokenizer`` and ``rows``
    replace those of ``config``.

    Returns None for a dry run. Raises :class:`prefopt.errors.UserError`, and :class:`prefopt.errors.Interrupted` after
    a stop: the run can be resumed.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("a reward model is made of whole weights: merge the adapter with merge_and_unload() first")
    with open_run(config, model=model, callbacks=callbacks) as run:
        config, say = run.config, run.say
        start = read_model(run, tokenizer, merged=True)
        data = run.world.first_on_node(lambda: load_data(config, start, rows, run.reporter, run.stop, kind="pairs"))
        where, pictures = (run.dtype, run.device), data.groups.has_pictures
        policy = run.loading(
            ScalarPolicy(config, start.source, *where, model, start.tokenizer, run.world, pictures=pictures)
        )
        offline = OfflineRun(run=run, start=start, data=data, policy=policy)
        offline.check(_check)
        if config.margin is not None:
            check_scores(data.groups, "--margin needs a finite score of every response; leave it out")
        objective = RewardObjective(device=policy.device, margin=config.margin, centre=config.centre)
        say(_describe(config, fresh=policy.fresh))
        source = DataBatches(data, offline.sampler, partial(columns_of, kind="pairs", which=config.pairs, merge=True))
        if config.dry_run:
            offline.preview(objective, source)
            return None
        offline.take_folder()
        say(policy.make_trainable(run.world))
        set_shift(causal_model(policy.scorer.model), 0.0)  # training needs none: only differences count
        trainer = offline.fit(objective, source)
        policy.scorer.eval()
        measured = _set_shift(run, policy.scorer, data, trainer.token_budget)
        found = _reliability(run, policy.scorer, data, trainer.token_budget)
        if found is not None:
            i = found.interval
            accuracy = f"{found.accuracy:.3f}" + (f" ({i.low:.3f} to {i.high:.3f})" if i else "")
            measured |= {"held-out accuracy": accuracy, "held-out calibration error": found.ece}
        result = offline.finish(trainer, title="Reward model", tag="reward-model", measured=measured)
        shift = shift_of(causal_model(policy.scorer.model))
        made = (result.output, result.steps, result.metrics, result.held_out_loss, result.best_step)
        return RewardResult(*made, shift, found)


def _describe(config: RewardConfig, *, fresh: bool) -> str:
    parts = [f"margins of {config.margin:g} per point of score"] if config.margin is not None else []
    parts += [f"centring {config.centre:g}"] if config.centre else []
    head = "a new head" if fresh else "its own head"
    return f"loss: Bradley-Terry ({', '.join([f'pairs {config.pairs}', *parts])}), on {head}"


def _check(scorer: ScalarScorer, groups: GroupTable) -> CheckReport:
    """Check scoring. Raises :class:`DataError` for a response that ends with the token that transformers pads with."""
    pad = causal_model(scorer.model).config.get_text_config().pad_token_id
    if pad is not None and any(bool((part.columns["ids_T"] == pad).any()) for part in groups.parts):
        for group in groups:
            if any(int(c.ids[np.nonzero(c.trained)[0][-1]]) == pad for c in group.continuations):
                raise DataError(f"a response ends with the pad token (id {pad}); remove it", row=group.row)
    return check_scalars(scorer, groups)


def _set_shift(run: Run, scorer: ScalarScorer, data: TrainingData, token_budget: int) -> dict[str, Any]:
    """Shift the rewards to average 0 over the responses of ``--zero``. Returns the shift for the card."""
    zero = run.config.zero
    if zero == "none":
        return {}
    some = [data.train[i] for i in np.linspace(0, len(data.train) - 1, min(ZERO_FROM, len(data.train)), dtype=int)]
    reward_N = response_rewards(scorer, data.groups, some, token_budget)
    taken = np.arange(len(reward_N))
    if zero == "chosen":
        batch = preference_batch([data.groups[i] for i in some], "pairs", merge=True)
        taken = np.unique(batch.at_N("chosen_P"))
    set_shift(causal_model(scorer.model), float(reward_N[taken].mean()))
    which = "chosen responses" if zero == "chosen" else "responses"
    run.say(f"shift: {scorer.shift:+.4f}, so that {len(taken)} {which} of the training data average 0")
    return {"shift": scorer.shift}


def _reliability(run: Run, scorer: ScalarScorer, data: TrainingData, token_budget: int) -> Reliability | None:
    """Measure the rewards on held-out pairs, and write the result; None where no pairs are held out."""
    if not data.held_out:
        run.say("held out: nothing, so that accuracy is not known; give --eval-fraction or --eval-data")
        return None
    reward_N = response_rewards(scorer, data.groups, data.held_out, token_budget)
    found = reliability(reward_N, data.groups, data.held_out, run.config.pairs)

    def write() -> None:
        write_json(run.folder.path / "reliability.json", found.to_dict())
        draw(found, run.folder.path / "reliability.svg")

    run.world.on_first(write)
    for line in found.lines():
        run.say(line)
    return found
