"""What one step of reinforcement learning learns from: prompts with sampled responses, and what was known of them.

>>> import numpy as np
>>> from prefopt.generate.sampler import Sample
>>> def sample(*ids): return Sample(np.array(ids, np.int32), np.zeros(len(ids)), np.zeros(len(ids)), True)
>>> groups = (group_of([5, 6], [sample(1, 2), sample(3)]), group_of([5], [sample(4, 2)]))
>>> M, N = torch.zeros(5), torch.zeros(3)
>>> rollouts = Rollouts(groups, M, M, M, None, N, torch.ones(3, dtype=torch.bool))
>>> rollouts.length_N.tolist(), rollouts.group_N.tolist()
([2, 1, 2], [0, 0, 1])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.generate.sampler import group_of as group_of


@dataclass(frozen=True, eq=False)
class Rollouts:
    """G prompts with N responses of M tokens, all of which were sampled; tensors lie on the CPU, float64.

    Log-probabilities are at the sampling temperature: ``logp_M`` under the policy as the scorer has it (the old one,
    once training moves the weights), ``ref_logp_M`` under the reference, ``sampled_logp_M`` as the sampler had it.
    ``value_M`` is the critic's value before each token, where there is a critic. ``score_N`` is what the reward said,
    ``finished_N`` whether a response ended by itself.
    """

    groups: tuple[Group, ...]
    logp_M: torch.Tensor
    ref_logp_M: torch.Tensor
    sampled_logp_M: torch.Tensor
    value_M: torch.Tensor | None
    score_N: torch.Tensor
    finished_N: torch.Tensor

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Tokens of each response."""
        return torch.tensor([len(c.ids) for g in self.groups for c in g.continuations])

    @cached_property
    def group_N(self) -> torch.Tensor:
        """The prompt of each response, from 0."""
        many = torch.tensor([len(g.continuations) for g in self.groups])
        return torch.repeat_interleave(torch.arange(len(self.groups)), many)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors, to be saved."""
        continuations = [c for g in self.groups for c in g.continuations]
        found = {
            "prefix": _joined([g.prefix for g in self.groups]),
            "prefix_length": torch.tensor([len(g.prefix) for g in self.groups]),
            "responses": torch.tensor([len(g.continuations) for g in self.groups]),
            "ids": _joined([c.ids for c in continuations]),
            "length": self.length_N,
            "logp": self.logp_M,
            "ref_logp": self.ref_logp_M,
            "sampled_logp": self.sampled_logp_M,
            "score": self.score_N,
            "finished": self.finished_N,
        }
        return found if self.value_M is None else {**found, "value": self.value_M}

    @classmethod
    def from_tensors(cls, saved: Mapping[str, torch.Tensor]) -> Rollouts:
        """What :meth:`tensors` gave."""
        prompts = saved["prefix"].split(saved["prefix_length"].tolist())
        ids = iter(saved["ids"].split(saved["length"].tolist()))
        groups = []
        for prompt, many in zip(prompts, saved["responses"].tolist(), strict=True):
            start = prompt.numpy()
            whole = [np.concatenate([start, next(ids).numpy()]) for _ in range(many)]
            trained = [np.arange(len(w)) >= len(start) for w in whole]
            groups.append(Group.from_sequences(list(zip(whole, trained, strict=True)), row=0, pairs=()))
        return cls(
            tuple(groups),
            saved["logp"],
            saved["ref_logp"],
            saved["sampled_logp"],
            saved.get("value"),
            saved["score"],
            saved["finished"],
        )


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
