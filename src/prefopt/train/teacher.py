"""Distillation: the divergence from a teacher's next-token distributions, and the teacher, scored with every batch."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.data.table import GroupTable
from prefopt.model.architectures import causal_model
from prefopt.model.kernels.divergence import Divergence
from prefopt.model.kernels.head import Compared, vocabulary_of
from prefopt.model.kernels.top_tokens import TopTokens
from prefopt.model.packing import PackedBatch
from prefopt.model.scorer import PackedModel, Scorer, ScoreRequest, response_sums
from prefopt.reference.in_memory import TrDpoUpdate
from prefopt.train.batch import Batch, LossResult
from prefopt.train.columns import Values
from prefopt.train.objectives import Average, LikelihoodObjective
from prefopt.train.policy import Trained
from prefopt.train.reference import ReferenceRun
from prefopt.train.step import InMemoryColumns


class DistillationObjective(LikelihoodObjective):
    """The divergence between teacher and model at every trained token, averaged as likelihoods are.

    Hinton et al. 2015 (arXiv 1503.02531) without a temperature, token by token as in Kim and Rush 2016 (arXiv
    1606.07947); on the model's own responses it is GKD (Agarwal et al. 2024, arXiv 2306.13649): gradients flow through
    the distributions, not through what was sampled. ``nll`` and ``teacher_nll`` are those of the tokens at hand.
    """

    compares = True

    def __init__(self, divergence: Divergence, average: Average, *, device: torch.device) -> None:
        super().__init__(average, device=device)
        self.divergence = divergence

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Compared | None = None
    ) -> Values:
        """``divergence_N``, ``logp_N`` and ``ref_logp_N`` of each response."""
        scores = scorer(packed, ScoreRequest(reference=reference, divergence=self.divergence))
        found = {"divergence_N": scores.divergence_M, "logp_N": scores.logp_M.detach()}
        found["ref_logp_N"] = scores.other_logp_M
        return {name: response_sums(value, packed) for name, value in found.items()}

    def __call__(self, batch: Batch, values: Values, normaliser: tuple[torch.Tensor, ...]) -> LossResult:
        plain = super().__call__(batch, {"logp_N": values["logp_N"]}, normaliser)
        length_N = batch.on_device(self.device)["length_N"].to(self.dtype)
        apart_N = values["divergence_N"].to(self.dtype)
        loss = (apart_N.sum() if self.average == "tokens" else (apart_N / length_N).sum()) / normaliser[0]
        metrics = {
            "divergence": (apart_N.detach().sum(), length_N.sum()),
            **plain.metrics,
            "teacher_nll": (-values["ref_logp_N"].to(self.dtype).sum(), length_N.sum()),
        }
        return LossResult(loss, {"loss": loss}, metrics, weights={"loss": normaliser[0]})


class TopTokensObjective(DistillationObjective):
    """The same with a teacher of which the likeliest tokens are known, the rest of its distribution being one bin
    (:mod:`prefopt.model.kernels.top_tokens`).

    Columns of trained tokens: ``teacher_id_M`` and ``teacher_logp_M`` [M, K], and ``teacher_own_M`` [M].
    """

    compares = False

    def score(
        self, scorer: PackedModel, packed: PackedBatch, batch: Batch, reference: Compared | None = None
    ) -> Values:
        columns = batch.on_device(packed.target.device)
        ids, logps, own = (columns[f"teacher_{name}_M"] for name in ("id", "logp", "own"))
        vocabulary = vocabulary_of(causal_model(scorer.model).get_output_embeddings())
        return super().score(scorer, packed, batch, TopTokens(ids.long(), logps, own, vocabulary))


class TeacherPlan:
    """The teacher of a run, which stays as it is. ``groups``: what it must be able to take, the longest responses that
    the model may draw among them."""

    movement: TrDpoUpdate | None = None

    def __init__(self, reference: ReferenceRun, groups: GroupTable) -> None:
        self.reference, self.groups = reference, groups

    def say_missing(self) -> None:
        """Raises :class:`prefopt.errors.ModelError` where the teacher cannot take the data."""
        self.reference.check_fits(self.groups)

    def seconds_ahead(self, scorer: Scorer, speed: float) -> float | None:
        """None: nothing is scored before training."""
        return None

    def in_memory(self, policy: Trained[Any]) -> InMemoryColumns:
        """The teacher, to be scored with every micro-batch."""
        live = self.reference.in_memory(policy.scorer, policy.masters, self.groups, moves=False)
        return InMemoryColumns(live, compares=True, tokens=False)
