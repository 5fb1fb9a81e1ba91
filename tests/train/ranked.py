"""Groups of every kind that losses are computed on, and losses on them as one would write them down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.data.sampler import BatchSampler
from prefopt.data.table import GroupTable
from prefopt.losses.parse import WeightedLoss, parse_losses
from prefopt.records import tiers_of
from prefopt.train.columns import columns_of
from prefopt.train.data import DataBatches

VOCABULARY = 50


def group(row: int, lengths: Sequence[int], scores: Sequence[float], rng: np.random.Generator) -> Group:
    """A prompt with responses of these lengths and scores, every other one desirable."""
    prompt = rng.integers(3, VOCABULARY, int(rng.integers(2, 12)))
    ids = [np.concatenate([prompt, rng.integers(3, VOCABULARY, n)]) for n in lengths]
    made = Group.from_sequences([(x, np.arange(len(x)) >= len(prompt)) for x in ids], row)
    tiers = tiers_of(list(map(float, scores)))
    pairs = tuple((a, b) for a in range(len(ids)) for b in range(len(ids)) if scores[a] > scores[b])
    labels = tuple(bool((row + k) % 2) for k in range(len(ids)))
    return dataclasses.replace(made, pairs=pairs, tiers=tiers, scores=tuple(map(float, scores)), labels=labels)


def pairs_only(n: int, seed: int = 0) -> GroupTable:
    """Groups of two."""
    rng = np.random.default_rng(seed)
    return GroupTable.of([group(i, rng.integers(1, 14, 2).tolist(), (1, 0), rng) for i in range(n)])


def mixed(n: int, seed: int = 0) -> GroupTable:
    """Groups of two to four, with ties."""
    rng = np.random.default_rng(seed)
    orders = [(2, 1), (0, 3, 1), (5, 4, 4, 1), (0, 0, 7), (1, 2, 3, 4)]
    return GroupTable.of(
        [group(i, rng.integers(1, 14, len(o)).tolist(), o, rng) for i, o in ((i, orders[i % 5]) for i in range(n))]
    )


def columns_for(chosen: Sequence[WeightedLoss], which: str = "all") -> Any:
    """What makes the columns of some groups that these losses read."""
    merge = any("label_P" in (*term.inputs, *term.loss.optional_inputs) for term in chosen)
    return partial(columns_of, kind=chosen[0].loss.kind, which=which, merge=merge)


def batches_of(
    groups: Sequence[Group], columns: Any = lambda groups: {}, reference: Any = None, mismatched: Any = None
) -> DataBatches:
    """Batches of any of these groups."""
    table = GroupTable.of(groups)
    data: Any = SimpleNamespace(groups=table, train=range(len(table)), held_out=())
    sampler = BatchSampler(len(table), 1, seed=0)
    return DataBatches(data, sampler, columns, reference=reference, mismatched=mismatched)


def terms(text: str, *options: str) -> tuple[WeightedLoss, ...]:
    """Losses as ``--loss`` names them."""
    return parse_losses(text, options)


def inputs_by_hand(kind: str, groups: Sequence[Group], own: Any, ref: Any, mismatched: Any) -> tuple[Any, Any]:
    """Inputs of a loss and the weights of its rows, from lists [G][K] of token values [tokens] under both models."""
    rows: list[dict[str, Any]] = []
    weights = []
    for g, one in enumerate(groups):
        assert one.scores is not None and one.labels is not None
        k = range(len(one.continuations))
        if kind == "pairs":
            pairs = [(a, b) for a in k for b in k if one.scores[a] > one.scores[b]]
            for pair in pairs:
                head = min(len(own[g][i]) for i in pair)
                row = {}
                for side, i in zip(("chosen", "rejected"), pair, strict=True):
                    row[f"{side}_logp_P"], row[f"{side}_ref_logp_P"] = own[g][i].sum(), ref[g][i].sum()
                    row[f"{side}_length_P"] = torch.tensor(float(len(own[g][i])))
                    row[f"{side}_score_P"] = torch.tensor(one.scores[i])
                    row[f"{side}_head_logp_P"] = own[g][i][:head].sum()
                    row[f"{side}_head_ref_logp_P"] = ref[g][i][:head].sum()
                rows.append(row)
                weights.append(1 / len(pairs))
            continue
        for i in k:
            tier = sorted(set(one.scores), reverse=True).index(one.scores[i])
            rows.append(
                {
                    "logp_N": own[g][i].sum(),
                    "ref_logp_N": ref[g][i].sum(),
                    "length_N": torch.tensor(float(len(own[g][i]))),
                    "label_N": torch.tensor(one.labels[i]),
                    "mismatched_logp_N": mismatched[0][g][i].sum(),
                    "mismatched_ref_logp_N": mismatched[1][g][i].sum(),
                    "tier_N": torch.tensor(tier),
                    "group_N": torch.tensor(g),
                }
            )
        weights += [1.0] * (1 if kind == "ranking" else len(k))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, torch.tensor(
        weights, dtype=torch.float64
    )
