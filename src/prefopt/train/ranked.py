"""What a reward model optimises: Bradley-Terry on the pairs of groups, those of a group weighing 1 together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.packer import PackedBatch
from prefopt.errors import DataError
from prefopt.losses.reward import bradley_terry
from prefopt.model.packed import PackedModel
from prefopt.train import items
from prefopt.train.facts import Facts, Values
from prefopt.train.objective import Normaliser
from prefopt.train.sums import Outcome, Record, State, summed


class RewardObjective:
    """See :class:`prefopt.train.objective.Objective`.

    A group of K ranked responses has K (K - 1) / 2 pairs, fewer where some are tied, each of which weighs 1 over their
    number (Ouyang et al. 2022, equation 1: all pairs of a prompt in one batch). ``pairs``: see
    :data:`prefopt.train.items.WHICH`. ``margin``: times the difference of the data's scores, none without it.
    """

    whole_batch = False

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        device: torch.device,
        pairs: str = "all",
        margin: float | None = None,
        centre: float = 0.0,
    ) -> None:
        """Raises :class:`DataError` where a margin is asked for and a row has no scores."""
        self.groups, self.device, self.which, self.margin, self.centre = groups, device, pairs, margin, centre
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state: State = {}
        if margin is not None:
            for group in groups:
                if group.scores is None or not np.isfinite(group.scores).all():
                    raise DataError("--margin needs a finite score of every response; leave it out", row=group.row)

    def normaliser(self, indices: Sequence[int]) -> Normaliser:
        """The groups: each has pairs of weight 1."""
        return (torch.tensor(float(len(indices)), dtype=self.dtype, device=self.device),)

    def fixed(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """Nothing is compared with."""
        return {}

    def policy(self, scorer: PackedModel, batch: PackedBatch, indices: Sequence[int]) -> Values:
        """The reward of each response, ``reward_N``."""
        return {"reward_N": scorer(batch).to(self.dtype)}

    def __call__(self, values: Values, indices: Sequence[int], normaliser: Normaliser) -> Outcome:
        """The loss on ``values`` of these groups."""
        groups = [self.groups[i] for i in indices]
        facts = Facts(groups, "pairs", self.which, True, self.device, self.dtype)
        reward_N, rows, weight_R = values["reward_N"], facts.pairs, facts.weight_R
        chosen, rejected = (reward_N[facts.tensor(side)] for side in (rows.chosen, rows.rejected))
        label = facts.tensor(rows.label, self.dtype) if (rows.label != 1).any() else None
        margin = None
        if self.margin is not None:
            score_N = items.scores_of(groups)
            margin = facts.tensor(self.margin * (score_N[rows.chosen] - score_N[rows.rejected]), self.dtype)
        loss_R = bradley_terry(chosen, rejected, label, margin, centre=self.centre)
        total = (loss_R * weight_R).sum() / normaliser[0]
        length_N = facts.length_N
        seen = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": (chosen - rejected).detach(),
            "rewards/accuracies": 0.5 + 0.5 * (chosen - rejected).detach().sign(),
            "lengths/chosen": length_N[facts.tensor(rows.chosen)],
            "lengths/rejected": length_N[facts.tensor(rows.rejected)],
        }
        metrics = {name: summed(x, weight_R) for name, x in seen.items()}
        return Outcome(total, {"loss": total}, metrics, self.state, {"loss": normaliser[0]})

    def derived(self, record: Record) -> Record:
        """See :class:`prefopt.train.objective.Objective`."""
        return {}
