"""Lessons: the batch that a round makes for each kind of loss, and what is left out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from prefopt.config.online import OnlineConfig
from prefopt.data.group import Group
from prefopt.data.table import GroupTable
from prefopt.losses.rl import group_relative, k1, leave_one_out, overlong_penalty, per_response
from prefopt.model.kernels.head import Distributions
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, Scorer
from prefopt.records import tiers_of
from prefopt.rl.importance import importance
from prefopt.rl.judgement import Preference, Round
from prefopt.train.batch import Batch, Column
from prefopt.train.columns import Values, columns_of, mismatched
from prefopt.train.loss_options import Losses
from prefopt.train.objective import PreferenceObjective
from prefopt.train.objectives import LikelihoodObjective


@dataclass(frozen=True, slots=True)
class Lesson:
    """``batch`` has the prompts that are trained on; ``skipped`` counts those left out, whose responses are equally
    good. ``preferences``: those of the judge by group, where they are not by scores alone."""

    batch: Batch
    skipped: int = 0
    preferences: Sequence[Sequence[Preference]] | None = None


MakeLesson = Callable[[Round], Lesson]


def lesson_maker(config: OnlineConfig, terms: Losses | None) -> MakeLesson:
    """What turns a round into the batch of a loss; ``terms`` are the losses on preferences, if it is one."""
    if terms is None:
        return (lambda r: gradient_lesson(config, r)) if config.gradient else best_lesson
    losses = terms

    def lesson(found: Round) -> Lesson:
        return preference_lesson(config, losses, found)

    return lesson


def gradient_lesson(config: OnlineConfig, found: Round) -> Lesson:
    """The columns of :class:`prefopt.rl.policy_gradient.PolicyGradient`.

    The return of a response is its score, less DAPO's penalty of long ones and, with ``--kl reward``, beta times its
    log-ratio; its advantage is relative to the other responses (RLOO), or to the mean of all of them. With ``--stale
    correct`` truncated importance weights multiply it, of responses where ratios are of responses, else of tokens.
    """
    rollouts = found.rollouts
    length_N, group_N, return_N = rollouts.length_N, rollouts.group_N, rollouts.score_N
    if config.overlong_buffer is not None:
        return_N = return_N + overlong_penalty(length_N, config.max_new_tokens, config.overlong_buffer)
    equal_G = _equal(return_N, group_N, len(rollouts.groups))
    if config.kl == "reward" and config.beta:
        return_N = return_N - config.beta * per_response(k1(rollouts.logp_M - rollouts.ref_logp_M), length_N)
    if config.loss == "rloo" and not config.advantage_std:
        advantage_N = leave_one_out(return_N, group_N)
    else:
        advantage_N = group_relative(return_N, group_N, std=bool(config.advantage_std))
    columns: dict[str, Column] = {"old_logp_M": rollouts.logp_M.numpy(), "ref_logp_M": rollouts.ref_logp_M.numpy()}
    if config.importance_cap is not None:
        weight = importance(rollouts, config.importance_cap, whole=config.average is None)
        if config.average is None:
            advantage_N = advantage_N * weight
        else:
            columns["importance_M"] = weight.numpy()
    columns["advantage_N"] = advantage_N.numpy()
    batch = Batch(rollouts.groups, columns)
    if not config.dynamic_sampling:
        return Lesson(batch)
    return Lesson(batch.select(np.flatnonzero(~equal_G).tolist()), int(equal_G.sum()))


def _equal(score_N: torch.Tensor, group_N: torch.Tensor, groups: int) -> np.ndarray:
    """Which groups [G] have responses of the same score only."""
    none_G = score_N.new_zeros(groups)
    least_G, most_G = (none_G.scatter_reduce(0, group_N, score_N, f"a{n}", include_self=False) for n in ("min", "max"))
    found: np.ndarray = (least_G == most_G).numpy()
    return found


def best_lesson(found: Round) -> Lesson:
    """The best response of each prompt alone, of equals the first: without prompts whose responses are all equal, what
    is imitated would not be the distribution of the best of K."""
    rollouts, scores = found.rollouts, found.scores()
    best = [int(np.argmax(many)) for many in scores]
    groups = [
        replace(group, continuations=(group.continuations[k],)) for group, k in zip(rollouts.groups, best, strict=True)
    ]
    logp_N = per_response(rollouts.logp_M, rollouts.length_N).numpy()
    starts = np.cumsum([0, *(len(many) for many in scores[:-1])])
    return Lesson(Batch(groups, {"old_logp_N": logp_N[starts + np.array(best)]}))


def preference_lesson(config: OnlineConfig, terms: Losses, found: Round) -> Lesson:
    """The columns of losses on pairs, labels or rankings, and the reference's log-probabilities."""
    rollouts, kind = found.rollouts, terms[0].loss.kind
    soft = config.labels == "soft"
    votes = found.preferences(soft=soft, best_worst=config.pairs == "best-worst") if kind == "pairs" else None
    learned = [
        _with_judgement(group, kind, scores, votes[g] if votes is not None else (), config.desirable_above)
        for g, (group, scores) in enumerate(zip(rollouts.groups, found.scores(), strict=True))
    ]
    kept = [g for g, group in enumerate(learned) if group is not None]
    groups = [group if group is not None else rollouts.groups[g] for g, group in enumerate(learned)]
    sums = {
        "old_logp_N": per_response(rollouts.logp_M, rollouts.length_N).numpy(),
        "ref_logp_N": per_response(rollouts.ref_logp_M, rollouts.length_N).numpy(),
        "ref_logp_M": rollouts.ref_logp_M.numpy(),
    }
    some = Batch(groups, sums).select(kept)
    if any(term.loss.needs_mismatched for term in terms) and _prompts(some) < 2:
        some = some.select([])  # responses to other prompts are compared with, and there are none
    skipped = len(learned) - len(some)
    preferences = votes if soft or found.outcomes is not None else None
    if not len(some):
        return Lesson(some, skipped, preferences)
    merge = any("label_P" in (*term.inputs, *term.loss.optional_inputs) for term in terms)
    batch = Batch(some.groups, {**some.columns, **columns_of(some.groups, kind, merge=merge)})
    if any(term.loss.needs_mismatched for term in terms):
        others, _ = mismatched(some.groups, max(group.longest for group in some.groups) + config.max_new_tokens)
        batch = replace(batch, mismatched=Batch(_listed(others)))
    return Lesson(batch, skipped, preferences)


def _listed(table: GroupTable) -> list[Group]:
    return [table[g] for g in range(len(table))]


def _prompts(batch: Batch) -> int:
    return len({group.prompt.tobytes() for group in batch.groups})


def _with_judgement(
    group: Group, kind: str, scores: Sequence[float], votes: Sequence[Preference], threshold: float | None
) -> Group | None:
    """The group as losses of ``kind`` read it; None where nothing is better than anything else."""
    if kind == "pairs":
        if not votes:
            return None
        pairs, weights = tuple((i, k) for i, k, _ in votes), tuple(w for _, _, w in votes)
        return replace(group, pairs=pairs, weights=weights, scores=tuple(scores))
    if kind == "labels":
        least = float(np.mean(scores)) if threshold is None else threshold
        if threshold is None and len(set(scores)) == 1:
            return None
        return replace(group, labels=tuple(score > least for score in scores), scores=tuple(scores))
    tiers = tiers_of(scores)
    return None if len(tiers) < 2 else replace(group, tiers=tiers, scores=tuple(scores))


class TemperedPreferences(PreferenceObjective):
    """Losses on preferences, of log-probabilities at the temperature of the samples."""

    def __init__(self, terms: Losses, temperature: float, *, device: torch.device) -> None:
        super().__init__(terms, device=device)
        self._temperature = temperature

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        assert isinstance(scorer, Scorer)
        with scorer.at_temperature(self._temperature):
            return super().score(scorer, packed, batch, reference)


class TemperedLikelihood(LikelihoodObjective):
    """Negative log-likelihood at the temperature of the samples."""

    def __init__(self, config: OnlineConfig, *, device: torch.device) -> None:
        super().__init__("rows" if config.average == "rows" else "tokens", device=device)
        self._temperature = config.temperature

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Distributions | None = None
    ) -> Values:
        assert isinstance(scorer, Scorer)
        with scorer.at_temperature(self._temperature):
            return super().score(scorer, packed, batch, reference)
