"""The load check: before anything is trained or cached, scoring is shown to be exact for the model at hand.

A tiny float64 twin of the architecture is scored through the packed path and by the model class's own forward, one
sequence per call, values and gradients. Then real groups are scored by the real model, shared, separately, and in two
packings, which also measures the noise that the working dtype brings; and a few of their tokens by its own logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from prefopt.data.group import Group
from prefopt.data.packer import pack
from prefopt.data.table import GroupTable
from prefopt.errors import ModelError
from prefopt.model.clone import VOCABULARY, tiny_clone
from prefopt.model.costs import uncounted
from prefopt.model.kernel_check import check_kernel
from prefopt.model.packed import PackedModel, causal_model
from prefopt.model.scalar import ScalarScorer
from prefopt.model.scorer import Head, Scorer

# Rotary tables are float32 even in a float64 model, so that the last digits differ between packings.
CLONE_TOLERANCE = 1e-5
HEAD_TOKENS = 32
"""Tokens whose logits are made to check the head: few, since a vocabulary can be large."""
# Root mean square difference of a token's log-probability, shared against separate, that is still rounding.
_GROSS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15}
_FLOOR = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 5e-3}


@dataclass(frozen=True, slots=True)
class CheckReport:
    """``clone_error``: largest relative difference on the twin (none: it could not be built).

    ``sharing_error`` and ``noise``: root mean square difference of a token's log-probability, in nats, shared against
    separate and between two packings.
    """

    clone_error: float | None
    sharing_error: float
    noise: float
    unit: str = "nats per token"

    def tolerance(self, tokens: float) -> float:
        """Largest log-ratio, in nats, that rounding explains for a response of so many tokens."""
        return 10 * self.noise * math.sqrt(tokens)


def check_scoring(scorer: Scorer, groups: Sequence[Group]) -> CheckReport:
    """Run the check with a few of ``groups``. Raises :class:`ModelError` where scoring would be wrong."""
    model = causal_model(scorer.model)
    clone_error = _checked_clone(scorer)
    sharing, noise = _real_differences(scorer, groups)
    gross, name = _GROSS[scorer.dtype], type(model).__name__
    if not max(sharing, noise) < gross:
        raise ModelError(
            f"{name}: log-probabilities differ by {max(sharing, noise):.2g} per token between shared and separate"
            f" scoring in {scorer.dtype} (up to {gross:g} is rounding); try --attention loop or --dtype float32"
        )
    head = _head_difference(scorer, groups[0])
    if not head < gross:
        raise ModelError(
            f"{name}: log-probabilities differ by {head:.2g} per token from those of the model's own logits in"
            f" {scorer.dtype} (up to {gross:g} is rounding); please report this architecture"
        )
    return CheckReport(clone_error, sharing, max(noise, _FLOOR[scorer.dtype]))


def check_scalars(scorer: ScalarScorer, groups: Sequence[Group]) -> CheckReport:
    """The same for rewards: the twin, then a few of ``groups`` by the class's own forward, one response per call.

    In the report ``sharing_error`` and ``noise`` are in units of the reward. Raises :class:`ModelError`.
    """
    model = causal_model(scorer.model)
    clone_error = _checked_clone(scorer)
    device, some = next(scorer.model.parameters()).device, _typical(groups)
    with torch.no_grad():
        together = scorer(pack(some, scorer.layout).to(device))
        noise = _rms(together - torch.cat([scorer(pack([g], scorer.layout).to(device)) for g in some]))
        scorer.detach_hook()
        own = []
        for group in some:
            for k in range(len(group.continuations)):
                ids, trained = group.sequence(k)
                stop = int(np.nonzero(trained)[0][-1]) + 1
                row = torch.from_numpy(np.asarray(ids[:stop])).long().to(device)[None]
                own.append(model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, 0])
        scorer.attach_hook()
    sharing = _rms(together + scorer.shift - torch.stack(own).to(together.dtype))
    gross = _GROSS[scorer.dtype] * max(1.0, float(together.abs().max()))
    if not max(sharing, noise) < gross:
        raise ModelError(
            f"{type(model).__name__}: rewards differ by {max(sharing, noise):.2g} between packed scoring and the"
            f" class's own forward in {scorer.dtype} (up to {gross:.2g} is rounding); try --attention loop or --dtype"
            " float32, and see that no response ends with the pad token"
        )
    return CheckReport(clone_error, sharing, max(noise, _FLOOR[scorer.dtype]), "of a reward")


def _checked_clone(scorer: PackedModel) -> float | None:
    """The error on the tiny twin of the scorer's architecture; none where it cannot be built."""
    model = causal_model(scorer.model)
    clone = tiny_clone(model.config)
    if clone is None:
        return None
    with uncounted():
        if (ahead := _sees_ahead(clone)) > CLONE_TOLERANCE:
            raise ModelError(
                f"{type(model).__name__} is not causal: on a small copy logits change by {ahead:.1e} (relative) with"
                " what comes after them; prefopt trains causal language models"
            )
        error = clone_difference(clone, scorer.attention, head=getattr(scorer, "head", None))
    if not error < CLONE_TOLERANCE:
        raise ModelError(
            f"{type(model).__name__}: packed scoring differs from the model's own forward by {error:.1e}"
            " (relative) on a small copy; please report this architecture"
        )
    if scorer.layout.share and scorer.kernel == "varlen":
        with uncounted():
            device = next(scorer.model.parameters()).device
            check_kernel(clone, _random_groups(), device, scorer.dtype, getattr(scorer, "head", None))
    return error


def _typical(groups: Sequence[Group]) -> list[Group]:
    """A few groups of middling length: long enough to be typical, cheap enough for every start."""
    far = np.abs(GroupTable.of(groups).tokens_G - 300)
    return [groups[i] for i in np.argsort(far, kind="stable")[:3].tolist()]


@torch.no_grad()
def _sees_ahead(clone: PreTrainedModel) -> float:
    """How far logits depend on what comes after them, relative to the largest; nothing in a causal model."""
    ids = torch.arange(2, 14)[None] % VOCABULARY
    other = ids.clone()
    other[0, 8:] += 20
    one, two = (clone(input_ids=x, use_cache=False).logits[0, :8] for x in (ids, other))
    return float((one - two).abs().max() / one.abs().max())


def clone_difference(clone: PreTrainedModel, attention: str = "auto", *, head: Head | None = None) -> float:
    """Largest difference of values and of gradients, relative to the largest of each, on a float64 twin."""
    groups = _random_groups()
    weights = [p for p in clone.parameters() if p.requires_grad]  # a router's bias may be frozen by its class
    expected = _separately(clone, groups)
    upstream = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), weights, allow_unused=True)
    scorer = Scorer(clone, attention=attention, head=head)
    batch = pack(groups, scorer.layout)
    found = scorer(batch)
    found_grads = torch.autograd.grad((found * upstream).sum(), weights, allow_unused=True)
    scorer.detach_hook()
    pairs = [(a, b) for a, b in zip(expected_grads, found_grads, strict=True) if a is not None]
    top = max(float(a.abs().max()) for a, _ in pairs)
    grad = max(float((a - (0 if b is None else b)).abs().max()) for a, b in pairs) / top
    value = float((expected - found).detach().abs().max() / expected.detach().abs().max())
    return max(value, grad)


def _separately(model: PreTrainedModel, groups: Sequence[Group]) -> torch.Tensor:
    """Token log-probabilities [M] by the model's own forward, one sequence per call: the oracle."""
    device, parts = next(model.parameters()).device, []
    for group in groups:
        for k in range(len(group.continuations)):
            ids, trained = (torch.from_numpy(np.asarray(x)) for x in group.sequence(k))
            ids, trained = ids.long().to(device), trained.to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
            where = trained.nonzero()[:, 0]
            parts.append(logp[where - 1, ids[where]])
    return torch.cat(parts)


def _random_groups() -> list[Group]:
    rng = np.random.default_rng(0)
    groups = []
    for prefix, *lengths in ((11, 7, 13), (3, 17, 2, 9), (1, 1, 5)):
        start = rng.integers(0, VOCABULARY, prefix)
        sequences = []
        for length in lengths:
            ids = np.concatenate([start, rng.integers(0, VOCABULARY, length)])
            sequences.append((ids, np.arange(len(ids)) >= prefix))
        groups.append(Group.from_sequences(sequences, row=0))
    return groups


@torch.no_grad()
def _real_differences(scorer: Scorer, groups: Sequence[Group]) -> tuple[float, float]:
    some = _typical(groups)
    device = next(scorer.model.parameters()).device
    together = scorer(pack(some, scorer.layout).to(device))
    apart = torch.cat([scorer(pack([g], scorer.layout).to(device)) for g in some])
    noise = _rms(together - apart)
    if not scorer.layout.share:
        return 0.0, noise
    scorer.detach_hook()
    plain = Scorer(scorer.model, share=False, head=scorer.head)
    separate = plain(pack(some[:1], plain.layout).to(device))
    scorer.attach_hook()
    return _rms(apart[: len(separate)] - separate), noise


@torch.no_grad()
def _head_difference(scorer: Scorer, group: Group) -> float:
    """The scorer against the logits that the model itself makes, on a few tokens: whatever its vocabulary."""
    ids = group.sequence(0)[0][:HEAD_TOKENS]
    start = [Group.from_sequences([(ids, np.arange(len(ids)) > 0)], row=0)]
    found = scorer(pack(start, scorer.layout).to(next(scorer.model.parameters()).device))
    scorer.detach_hook()
    own = _separately(causal_model(scorer.model), start)
    scorer.attach_hook()
    return _rms(found - own)


def _rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())
